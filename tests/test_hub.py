"""Models named by hub id: a command downloads only the files that it reads, and each failure is one line."""

from __future__ import annotations

import errno
import json
import shutil
import socket
from fnmatch import fnmatch

import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from freres_cli.backbones.checkpoint import resolve_checkpoint
from freres_cli.backbones.hub import CONFIG_FILES, TOKENIZER_FILES
from freres_cli.backbones.registry import FAMILIES, load_language_model, load_vision_encoder
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import BackboneError
from freres_cli.world.clip import make_clip
from tests.runner import check_failure, run_freres
from tests.tiny_models import CPU, make_qwen2_vl

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {
    "model-00001-of-00004.safetensors": lambda key: key.startswith("visual.") and "merger" not in key,
    "model-00002-of-00004.safetensors": lambda key: key.startswith("visual.merger"),
    "model-00003-of-00004.safetensors": lambda key: key.startswith("model."),
    "model-00004-of-00004.safetensors": lambda key: key.startswith("lm_head"),
}
TOWER, PROJECTOR, DECODER, HEAD = SHARDS
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What the hub holds: a model in four shards, and files that nobody asked for."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    make_qwen2_vl(folder, layers=2, depth=1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name, belongs in SHARDS.items():
        part = {key: tensor for key, tensor in tensors.items() if belongs(key)}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    assert weight_map.keys() == tensors.keys()
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    for name in ("pytorch_model.bin", "modeling_other.py", "README.md", "onnx.json"):
        (folder / name).write_text("not for us")
    return folder


class FakeHub:
    """Stands in for ``snapshot_download``: copies and records what is requested. ``refuse``: file name -> exception."""

    def __init__(self, repository, cache):
        self.repository, self.snapshot = repository, cache / COMMIT
        self.revisions, self.downloaded, self.refuse = [], [], {}

    def __call__(self, model_id, revision=None, allow_patterns=None):
        assert model_id == "org/name" and allow_patterns is not None
        self.revisions.append(revision)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.repository.iterdir()):
            if not any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                continue
            if path.name in self.refuse:
                raise self.refuse[path.name]
            if not (self.snapshot / path.name).exists():
                self.downloaded.append(path.name)
                shutil.copy(path, self.snapshot)
        return str(self.snapshot)

    def shards(self):
        return [name for name in self.downloaded if name.endswith(".safetensors")]


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    fake = FakeHub(repository, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=0.5)


def compress(clip, output, *flags):
    place = ("--device", "cpu", "--grid", "4x5", "--frames", 4, "--budget", 40, "-o", output)
    return run_freres("compress", clip, "--model", "org/name", *place, *flags)


def test_each_verb_downloads_its_own_half(hub, clip, tmp_path):
    made = compress(clip, tmp_path / "b.pt", "--revision", "v1")
    assert made.status == 0, made.err
    assert hub.shards() == [TOWER, PROJECTOR]
    # The tokenizer counts the text of the prompt.
    assert set(hub.downloaded) <= {*CONFIG_FILES, *TOKENIZER_FILES, TOWER, PROJECTOR}
    # The branch or tag is resolved once; everything else comes from that commit.
    assert hub.revisions[0] == "v1" and set(hub.revisions[1:]) == {COMMIT}
    assert read_bundle(tmp_path / "b.pt").manifest["model"]["revision"] == COMMIT

    shutil.rmtree(hub.snapshot)  # on another machine
    hub.downloaded.clear()
    hub.revisions.clear()
    asked = run_freres("ask", tmp_path / "b.pt", "what moves?", "--max-new-tokens", 2, "--device", "cpu", "--json")
    assert asked.status == 0, asked.err
    assert sorted(hub.shards()) == [PROJECTOR, DECODER, HEAD]  # the projector tells whether it is the same model
    assert set(hub.downloaded) <= {*CONFIG_FILES, *TOKENIZER_FILES, PROJECTOR, DECODER, HEAD}
    assert set(hub.revisions) == {COMMIT}
    assert asked.json["model"]["revision"] == COMMIT

    hub.downloaded.clear()
    assert run_freres("ask", tmp_path / "b.pt", "what moves?", "--max-new-tokens", 2, "--device", "cpu").status == 0
    assert hub.downloaded == []


def test_the_halves_are_those_of_the_folder(hub, repository):
    """The same dtype and fingerprint as from a folder with all files."""
    for load in (load_vision_encoder, load_language_model):
        remote, local = load("org/name", CPU), load(str(repository), CPU)
        assert remote.dtype == local.dtype
        ours, theirs = (part.fingerprint for part in (remote, local))
        assert {k: v for k, v in ours.items() if k.endswith("256")} == {
            k: v for k, v in theirs.items() if k.endswith("256")
        }
        assert [note for note in remote.notes if "dtype" in note] == [note for note in local.notes if "dtype" in note]


def test_weights_in_one_file_are_downloaded_whole(hub, repository, tmp_path):
    single = tmp_path / "single"
    shutil.copytree(repository, single)
    tensors = {}
    for name in SHARDS:
        tensors |= load_file(single / name)
        (single / name).unlink()
    (single / INDEX).unlink()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    hub.repository = single
    assert load_vision_encoder("org/name", CPU).width == 48
    assert hub.shards() == ["model.safetensors"]


def test_another_family_is_refused_before_any_weight(hub, repository, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}))
    hub.repository = other
    with pytest.raises(BackboneError, match="unsupported model_type"):
        load_vision_encoder("org/name", CPU)
    assert hub.shards() == []


def response():
    import httpx2

    return httpx2.Response(403, request=httpx2.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize("name", ["config.json", PROJECTOR])
@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (lambda: hub_errors.GatedRepoError("gated\nlong", response=response()), 5, "this model is gated"),
        (lambda: hub_errors.RepositoryNotFoundError("404\nlong", response=response()), 5, "no such model on the hub"),
        (lambda: hub_errors.HfHubHTTPError("500 x\nlong", response=response()), 5, "download failed: 500 x"),
        (lambda: hub_errors.LocalEntryNotFoundError("offline\nlong"), 5, "the hub cannot be reached"),
        (lambda: ConnectionResetError("reset"), 5, "the hub cannot be reached"),
        (lambda: hub_errors.HTTPError("peer closed\nlong"), 5, "download failed: peer closed"),
        (lambda: hub_errors.XetDownloadError("stalled\nlong"), 5, "download failed: stalled"),
        (lambda: PermissionError(errno.EACCES, "Permission denied"), 5, "Permission denied"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), 6, "the disk is full"),
        (lambda: RuntimeError("Data processing error: No space left on device (os error 28)"), 6, "the disk is full"),
    ],
)
def test_each_failure_is_one_line_and_leaves_no_bundle(hub, clip, tmp_path, name, failure, status, text):
    hub.refuse[name] = failure()
    run = compress(clip, tmp_path / "b.pt")
    check_failure(run, status, text)
    assert run.errors[0].startswith("error: org/name: ")
    assert not (tmp_path / "b.pt").exists() and not list(tmp_path.glob(".freres*"))


def test_a_download_that_failed_is_taken_up_again(hub, clip, tmp_path):
    hub.refuse[PROJECTOR] = OSError(errno.ENOSPC, "No space left on device")
    assert compress(clip, tmp_path / "b.pt").status == 6
    hub.refuse.clear()
    assert compress(clip, tmp_path / "b.pt").status == 0
    assert sorted(hub.shards()) == [TOWER, PROJECTOR]  # each once


def test_files_the_hub_does_not_have_are_named(hub, repository, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(repository, part)
    (part / HEAD).unlink()
    (part / DECODER).unlink()
    hub.repository = part
    assert load_vision_encoder("org/name", CPU).width == 48  # needs neither
    with pytest.raises(BackboneError, match=rf"org/name: {DECODER} is not in the local cache or on the hub"):
        load_language_model("org/name", CPU)
    (part / INDEX).unlink()
    shutil.rmtree(hub.snapshot)
    with pytest.raises(
        BackboneError, match=r"org/name: no weights: expected model.safetensors or its index on the hub"
    ):
        load_vision_encoder("org/name", CPU)
    (part / "config.json").unlink()
    shutil.rmtree(hub.snapshot)
    with pytest.raises(BackboneError, match=r"org/name: config.json is not in the local cache or on the hub"):
        load_vision_encoder("org/name", CPU)


def test_a_model_without_a_tokenizer_is_named(hub, repository, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(repository, part, ignore=shutil.ignore_patterns("tokenizer*"))
    hub.repository = part
    with pytest.raises(BackboneError, match="org/name: tokenizer cannot be read") as caught:
        load_language_model("org/name", CPU)
    assert "\n" not in caught.value.message


# --- the real huggingface_hub, without a network ----------------------------------------------------------------------


@pytest.fixture
def cache(repository, tmp_path, monkeypatch):
    """A cache in the layout of huggingface_hub, without the head and the tower; every connection is refused."""
    place = tmp_path / "hub" / "models--org--name"
    snapshot = place / "snapshots" / COMMIT
    shutil.copytree(repository, snapshot, ignore=shutil.ignore_patterns(HEAD, TOWER))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between retries
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return snapshot


def test_a_snapshot_that_is_known_to_be_partial_is_used_without_a_network(cache, monkeypatch):
    """huggingface_hub keeps a list of a commit's files, and then refuses a snapshot that lacks one of them."""

    def refuse(*_, **__):
        raise hub_errors.IncompleteSnapshotError("1 file(s) are missing", snapshot_path=str(cache))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert resolve_checkpoint("org/name", tuple(FAMILIES)).revision == COMMIT
    with pytest.raises(BackboneError, match=rf"^org/name: {TOWER} is not in the local cache or on the hub$"):
        load_vision_encoder("org/name", CPU)


@pytest.mark.parametrize("is_offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_a_partial_cache_without_a_network(cache, repository, monkeypatch, is_offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    supported = tuple(FAMILIES)
    assert resolve_checkpoint("org/name", supported).revision == COMMIT
    for load, name in ((load_vision_encoder, TOWER), (load_language_model, HEAD)):
        with pytest.raises(BackboneError, match=rf"^org/name: {name} is not in the local cache or on the hub$"):
            load("org/name", CPU)
        shutil.copy(repository / name, cache)
        assert load("org/name", CPU).fingerprint["revision"] == COMMIT
    with pytest.raises(BackboneError, match=r"^org/name: not in the local cache, and the hub cannot be reached$"):
        resolve_checkpoint("org/name", supported, revision="v2")
    with pytest.raises(BackboneError, match=r"^org/other: not in the local cache, and the hub cannot be reached$"):
        resolve_checkpoint("org/other", supported)
