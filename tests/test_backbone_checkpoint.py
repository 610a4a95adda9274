"""Reading models from disk: each half by itself, every key layout, and a one-line error for whatever cannot be read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file

from freres_cli.backbones.checkpoint import fingerprint, resolve_checkpoint
from freres_cli.backbones.halves import read_tokenizer
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel, Qwen2VLVisionEncoder
from freres_cli.backbones.qwen_vision import fit_grid
from freres_cli.backbones.registry import (
    FAMILIES,
    KNOWN_CHECKPOINTS,
    identify_vision_encoder,
    load_language_model,
    load_vision_encoder,
)
from freres_cli.errors import BackboneError, ResourceError
from freres_cli.world.bundled_model import (
    FRAME_PX,
    GRID,
    WIDTH,
    bundled_model_dir,
    bundled_model_info,
    make_checkpoint,
)
from tests.tiny_models import (
    CPU,
    make_qwen2_vl,
    open_checkpoint,
    open_recording_checkpoint,
    rewrite_weights,
    to_new_layout,
)

SUPPORTED = tuple(FAMILIES)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made = {}
    for tied in (False, True):
        directory = tmp_path_factory.mktemp("tied" if tied else "untied")
        made[tied] = (directory, make_qwen2_vl(directory, tied=tied, layers=2, depth=1))
    return made


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of the untied checkpoint that a test may damage."""
    copied = tmp_path / "model"
    shutil.copytree(originals[False][0], copied)
    return copied


def same_weights(module, stock):
    ours, theirs = module.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["as saved", "new"])
@pytest.mark.parametrize("shards", [1, 3])
def test_both_layouts_sharded_or_not_tied_or_not(originals, tmp_path, tied, layout, shards):
    source, stock = originals[tied]
    copied = tmp_path / "model"
    shutil.copytree(source, copied)
    rewrite_weights(copied, to_new_layout if layout == "new" else lambda key: key, shards=shards)
    checkpoint = open_checkpoint(copied)
    same_weights(Qwen2VLVisionEncoder.load(checkpoint, CPU).tower, stock.model.visual)
    model = Qwen2VLLanguageModel.load(checkpoint, CPU)
    same_weights(model.decoder, stock.model.language_model)
    assert torch.equal(model.head_weight, stock.lm_head.weight)
    assert (model.head_weight is model.decoder.embed_tokens.weight) == tied
    original = fingerprint(open_checkpoint(source), ("model.visual.merger.", "visual.merger."))
    assert model.fingerprint == original | {"model_id": "model"}


def test_each_half_reads_only_its_own_tensors(folder):
    checkpoint = open_recording_checkpoint(folder)
    vision = Qwen2VLVisionEncoder.load(checkpoint, CPU)
    assert checkpoint.read and all(key.startswith("visual.") for key, _ in checkpoint.read)
    checkpoint.read.clear()
    model = Qwen2VLLanguageModel.load(checkpoint, CPU)
    assert all(key.startswith(("model.", "lm_head.", "visual.merger.")) for key, _ in checkpoint.read)
    assert sum(key.startswith("visual.") for key, _ in checkpoint.read) == 6  # the projector's digest
    stock = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    halves = [sum(p.numel() for p in module.parameters()) for module in (vision.tower, model.decoder)]
    assert sum(halves) + model.head_weight.numel() == stock


# Refusals


def refused(model, match, error=BackboneError, **options):
    with pytest.raises(error, match=match) as caught:
        resolve_checkpoint(str(model), SUPPORTED, **options).files_by_key  # noqa: B018
    assert "\n" not in caught.value.message


def test_a_model_that_is_not_there():
    refused("/no/such/folder", "no such model: expected bundled, a folder or ORGANISATION/NAME")
    refused("bundled", "no such model")


def test_a_folder_without_config(tmp_path):
    refused(tmp_path, "not a model folder: expected config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "\ufffd"])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"cannot be read as JSON|expected a JSON object")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_unsupported_family(folder):
    change_config(folder, model_type="llama")
    refused(folder, "unsupported model_type: expected one of qwen2_vl, .*, got llama")


@pytest.mark.parametrize("model_type", ["llava_qwen", "llava_onevision"])
def test_llava_video_is_refused_by_name_of_what_is_missing(folder, model_type):
    """No class in transformers writes its newline after every row of tokens, however the checkpoint was converted."""
    change_config(folder, model_type=model_type, mm_newline_position="grid")
    refused(folder, "unsupported newline tokens in the video: expected one_token, got grid")


def test_a_quantized_checkpoint(folder):
    change_config(folder, quantization_config={"quant_method": "gptq"})
    refused(folder, "quantized checkpoints are not supported")


def test_a_config_that_is_not_qwen2_vl(folder):
    change_config(folder, vision_config={"depth": "many"})
    with pytest.raises(BackboneError, match=r"config.json is not a Qwen2-VL config") as caught:
        Qwen2VLVisionEncoder.load(open_checkpoint(folder), CPU)
    assert "\n" not in caught.value.message


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "only pickled weights: expected model.safetensors")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights: expected model.safetensors")


@pytest.mark.parametrize("keep_bytes", [0, 5, 2000, -100])
def test_truncated_weights(folder, keep_bytes):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep_bytes])
    refused(folder, "damaged weights")


def test_a_damaged_index(folder):
    rewrite_weights(folder, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    refused(folder, "weight file model-00002-of-00002.safetensors is missing")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(folder, "expected safetensors file names in weight_map")
    index.write_text("{}")
    refused(folder, "expected a weight_map")


def test_keys_that_are_missing_or_too_many_or_misshapen(folder):
    rewrite_weights(folder, drop=("visual.merger.ln_q.bias", "lm_head.weight"))
    with pytest.raises(BackboneError, match=r"missing weights: merger.ln_q.bias"):
        Qwen2VLVisionEncoder.load(open_checkpoint(folder), CPU)
    with pytest.raises(BackboneError, match=r"missing weights: lm_head.weight"):
        Qwen2VLLanguageModel.load(open_checkpoint(folder), CPU)
    rewrite_weights(folder, lambda key: key.replace("norm1.bias", "norm9.bias"))
    with pytest.raises(BackboneError, match="missing weights"):
        Qwen2VLVisionEncoder.load(open_checkpoint(folder), CPU)


def test_unexpected_and_misshapen_keys(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    config["text_config"]["layer_types"] = ["full_attention"]
    config["text_config"]["intermediate_size"] = 95
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"unexpected weights: model.layers.1.* and 8 more"):
        Qwen2VLLanguageModel.load(open_checkpoint(folder), CPU)
    config["vision_config"]["mlp_ratio"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"fc1.*wrong shape: expected \(96.*\), got \(128"):
        Qwen2VLVisionEncoder.load(open_checkpoint(folder), CPU)


def test_a_missing_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BackboneError, match="tokenizer cannot be read"):
        Qwen2VLLanguageModel.load(open_checkpoint(folder), CPU)


def test_a_tokenizer_of_a_newer_release_is_named(folder):
    """The native part of tokenizers raises a bare Exception."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": {"type": "Nope"}}))
    with pytest.raises(BackboneError, match="tokenizer cannot be read") as caught:
        Qwen2VLLanguageModel.load(open_checkpoint(folder), CPU)
    assert "newer release of tokenizers" in caught.value.hint


def test_a_template_in_the_config_of_the_processor_counts_first(folder):
    """As in processors of transformers."""
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": "own"}))
    checkpoint = open_checkpoint(folder)
    assert read_tokenizer(checkpoint, "<|video_pad|>").chat_template == "own"
    (folder / "processor_config.json").write_text("{}")
    assert read_tokenizer(open_checkpoint(folder), "<|video_pad|>").chat_template == "other"


# Model hub


def hub_failure(kind):
    import httpx2

    response = httpx2.Response(403, request=httpx2.Request("GET", "https://hub.invalid"))
    return {
        "gated": lambda: hub_errors.GatedRepoError("gated\nlong text", response=response),
        "missing": lambda: hub_errors.RepositoryNotFoundError("404\nlong text", response=response),
        "revision": lambda: hub_errors.RevisionNotFoundError("404\nlong text", response=response),
        "offline": lambda: hub_errors.LocalEntryNotFoundError("not cached\nlong text"),
        "no network": lambda: hub_errors.OfflineModeIsEnabled("offline"),
        "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
        "server": lambda: hub_errors.HfHubHTTPError("500 server error\nlong text", response=response),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message", "error"),
    [
        ("gated", "org/name: this model is gated", BackboneError),
        ("missing", "org/name: no such model on the hub", BackboneError),
        ("revision", "org/name: no revision v9", BackboneError),
        ("offline", "org/name: not in the local cache, and the hub cannot be reached", BackboneError),
        ("no network", "org/name: not in the local cache", BackboneError),
        ("disk", "org/name: the disk is full", ResourceError),
        ("server", "org/name: download failed: 500 server error", BackboneError),
    ],
)
def test_a_hub_failure_is_one_line(monkeypatch, kind, message, error):
    def fail(*_args, **_kwargs):
        raise hub_failure(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused("org/name", message, error, revision="v9")


def test_hub_models_are_checked_before_their_weights_are_fetched(folder, monkeypatch, tmp_path):
    commit = "0123456789abcdef"
    snapshot = folder.rename(tmp_path / commit)
    calls = []

    def download(model_id, revision, allow_patterns):
        calls.append((model_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = resolve_checkpoint("org/name", SUPPORTED, revision="main")
    assert (found.model_id, found.revision) == ("org/name", commit)
    assert [call[:2] for call in calls] == [("org/name", "main")]
    assert "config.json" in calls[0][2] and all(name.endswith(".json") for name in calls[0][2])
    change_config(snapshot, model_type="llama")
    calls.clear()
    refused("org/name", "unsupported model_type")
    assert len(calls) == 1


def test_offline_mode_is_honoured(tmp_path):
    code = (
        "from freres_cli.backbones.checkpoint import resolve_checkpoint\n"
        "from freres_cli.errors import BackboneError\n"
        "try: resolve_checkpoint('org/name', ('qwen2_vl',))\n"
        "except BackboneError as error: print(error.message)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout == "org/name: not in the local cache, and the hub cannot be reached\n"


# Fingerprint


def test_the_fingerprint_tells_models_apart(folder):
    def prints():
        return fingerprint(open_checkpoint(folder), ("model.visual.merger.", "visual.merger."))

    first = prints()
    change_config(folder, transformers_version="9.9", _name_or_path="/somewhere")
    assert prints() == first
    change_config(folder, tie_word_embeddings=True)
    assert prints()["config_sha256"] != first["config_sha256"]
    assert prints()["projector_sha256"] == first["projector_sha256"]
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    tensors = load_file(path)
    assert prints()["projector_sha256"] == first["projector_sha256"]
    needle = tensors["visual.merger.mlp.2.bias"].numpy().tobytes()
    content[content.index(needle)] ^= 1
    path.write_bytes(content)
    assert prints()["projector_sha256"] != first["projector_sha256"]


def test_image_processors_are_told_apart_with_and_without_the_tower(folder):
    def digests():
        return {part(str(folder), CPU).pixels_sha256 for part in (identify_vision_encoder, load_vision_encoder)}

    (first,) = digests()
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.5, 0.5, 0.5]}))
    (second,) = digests()
    assert second != first


# Bundled model and registry


def test_the_bundled_model_is_written_the_same_each_time(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for directory in folders:
        make_checkpoint(directory)
    contents = [{p.name: p.read_bytes() for p in directory.iterdir()} for directory in folders]
    assert contents[0] == contents[1]
    shipped = bundled_model_dir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        own, written = (json.loads(text) for text in ((shipped / name).read_text(), contents[0][name]))
        for document in (own, written):
            document.pop("transformers_version", None)
        assert own == written, f"{name} is not what the code writes"
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 24_000_000


def test_the_bundled_model_loads():
    vision = load_vision_encoder("bundled", CPU, bundled_directory=bundled_model_dir())
    model = load_language_model("bundled", CPU, bundled_directory=bundled_model_dir())
    assert vision.fingerprint == model.fingerprint
    assert vision.fingerprint["model_id"] == "bundled"
    assert vision.width == model.width == WIDTH
    size = vision.frame_size(FRAME_PX, FRAME_PX)
    assert (size.grid_h, size.grid_w) == (GRID, GRID)
    assert vision.frame_size(1920, 1080).num_tokens <= GRID**2
    text = "ünïcödé € 𝄞\n"
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text
    assert {model.tokenizer.decode([i]) for i in model.stop_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert bundled_model_info()["freres_trained"] and model.choices_as == "words"


def test_known_checkpoints_are_of_supported_families():
    assert {known.family for known in KNOWN_CHECKPOINTS} <= set(FAMILIES)


@pytest.mark.parametrize("known", KNOWN_CHECKPOINTS, ids=lambda known: known.model_id)
def test_tokens_of_known_checkpoints_follow_the_size_rule(known):
    if not known.family.startswith("qwen"):
        # Frames have one size; patches are 14 or 16 px, and a token is 2x2, 3x3 or 4x4 patches.
        (((width, height), tokens),) = known.tokens_per_frame.items()
        factors = {"internvl": (28,), "llava_onevision": (28,), "smolvlm": (42, 64)}[known.family]
        assert width == height and tokens in {round(width / factor) ** 2 for factor in factors}
        return
    factor, least, most = (32, 256 * 256, 4096 * 4096) if known.num_deep_layers else (28, 56 * 56, 28 * 28 * 1280)
    for (width, height), tokens in known.tokens_per_frame.items():
        rows, columns = fit_grid(width, height, factor, least, most)
        assert rows * columns == tokens


def test_bundle_bytes_of_a_known_checkpoint():
    for known in KNOWN_CHECKPOINTS:
        channels = None if known.width is None else known.width * (1 + known.num_deep_layers)
        assert known.bundle_bytes_per_token == (None if channels is None else torch.bfloat16.itemsize * channels)
        is_deep = known.family in ("qwen3_vl", "qwen3_vl_moe")
        assert bool(known.num_deep_layers) == is_deep
