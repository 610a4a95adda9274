"""Bundles: what is read back is what was written; nothing damaged, foreign or unsafe gets in; nothing half written stays."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from freres_cli.bundle.schema import encode_manifest
from freres_cli.bundle.store import read_bundle, write_atomically, write_bundle
from freres_cli.errors import BundleError, ResourceError
from freres_cli.presets import load_preset, merge_settings
from tests.test_method_laws import compress, smooth_clip

MANIFEST = {
    "freres_version": "0",
    "model": {"model_id": "x"},
    "source": {},
    "sampling": {},
    "settings": {key: asdict(s) for key, s in merge_settings(load_preset("bundled"), {}).items()},
    "tokens": {"full_tokens": 2560},
    "history": [],
}


@pytest.fixture(scope="module")
def tracks():
    return compress(smooth_clip(40, (8, 8)), 300)[0]


def manifest_for(tracks):
    geometry = {"width": tracks.width, "grid": list(tracks.grid), "pooled_grid": list(tracks.pooled_grid)}
    return {**MANIFEST, "geometry": geometry}


@pytest.fixture
def bundle(tmp_path, tracks):
    path = tmp_path / "bundle.pt"
    write_bundle(path, tracks, manifest_for(tracks))
    return path


def rewrite(path, **changes):
    """Change the outer dictionary of a bundle, checksums of the rest untouched."""
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)


def test_what_is_read_is_what_was_written(bundle, tracks):
    back = read_bundle(bundle)
    assert back.tracks.grid == tracks.grid and back.tracks.width == tracks.width
    for name, tensor in tracks.tensors().items():
        assert torch.equal(getattr(back.tracks, name), tensor) and getattr(back.tracks, name).dtype == tensor.dtype
    assert {key: back.manifest[key] for key in MANIFEST} == MANIFEST
    assert back.num_bytes == bundle.stat().st_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_latents_keep_their_dtype_to_the_bit(tmp_path, dtype):
    latents = smooth_clip(12, (6, 6)).to(dtype)
    tracks = compress(latents, 100)[0]
    assert tracks.anchor_latents.dtype == dtype
    write_bundle(tmp_path / "b.pt", tracks, manifest_for(tracks))
    assert torch.equal(read_bundle(tmp_path / "b.pt").tracks.anchor_latents, tracks.anchor_latents)


def test_equal_content_is_equal_bytes_under_any_name(tmp_path, tracks):
    for name in ("a.pt", "another name.pt"):
        write_bundle(tmp_path / name, tracks, manifest_for(tracks))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another name.pt").read_bytes()


def test_no_storage_is_dragged_in(tmp_path, tracks):
    size = write_bundle(tmp_path / "b.pt", tracks, manifest_for(tracks))
    assert size < 1.2 * sum(t.nbytes for t in tracks.tensors().values()) + 30_000


def test_an_existing_file_is_not_overwritten_without_force(bundle, tracks):
    before = bundle.read_bytes()
    with pytest.raises(BundleError, match="already exists"):
        write_bundle(bundle, tracks, manifest_for(tracks))
    assert bundle.read_bytes() == before
    write_bundle(bundle, tracks, {**manifest_for(tracks), "source": {"changed": 1}}, force=True)
    assert read_bundle(bundle).manifest["source"] == {"changed": 1}


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "b.pt"

    def write(file):
        file.write(b"ours")
        path.write_bytes(b"theirs")

    with pytest.raises(BundleError, match="already exists"):
        write_atomically(path, write, force=False)
    assert path.read_bytes() == b"theirs" and [p.name for p in tmp_path.iterdir()] == ["b.pt"]


@pytest.mark.parametrize("destination", ["missing/b.pt", "."])
def test_an_impossible_destination_is_refused(tmp_path, tracks, destination):
    with pytest.raises(BundleError, match="folder"):
        write_bundle(tmp_path / destination, tracks, manifest_for(tracks))


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="disk space"):
        write_atomically(tmp_path / "b.pt", fail, force=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_error(tmp_path, tracks):
    def write(_):
        with Path("/dev/full").open("wb") as full:
            torch.save(dict(tracks.tensors()), full)

    with pytest.raises(ResourceError, match="disk space"):
        write_atomically(tmp_path / "b.pt", write, force=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("delay_ms", [0, 20, 60, 120])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, delay_ms):
    path = tmp_path / "b.pt"
    path.write_bytes(b"old")
    code = """
import sys, time, torch
from pathlib import Path
from freres_cli.bundle.store import write_atomically
data = bytes(8 << 20)
print("ready", flush=True)
while True:
    write_atomically(Path(sys.argv[1]), lambda f: [f.write(data) for _ in range(4)], force=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes() in (b"old", bytes(32 << 20))


# --- refusals ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_pickle_inside_is_refused_and_not_run(bundle, tmp_path):
    went_off = tmp_path / "bomb-went-off"
    content = torch.load(bundle, weights_only=True)
    torch.save({**content, "extra": Bomb(went_off)}, bundle)
    with pytest.raises(BundleError, match="pickled object"):
        read_bundle(bundle)
    assert not went_off.exists()
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Bomb(went_off)))
    with pytest.raises(BundleError, match="not a freres bundle"):
        read_bundle(plain)
    assert not went_off.exists()


def test_every_flipped_byte_is_found(bundle):
    whole = bytearray(bundle.read_bytes())
    step = len(whole) // 60
    original = {name: t.clone() for name, t in read_bundle(bundle).tracks.tensors().items()}
    for at in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[at] ^= 0x41
        bundle.write_bytes(flipped)
        try:
            back = read_bundle(bundle)
        except BundleError:
            continue
        # What is not covered is zip padding: the content is still right.
        assert all(torch.equal(getattr(back.tracks, name), t) for name, t in original.items()), at


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_bundle_is_refused(bundle, keep):
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(BundleError):
        read_bundle(bundle)


def test_missing_files_folders_and_strangers_are_refused(tmp_path):
    with pytest.raises(BundleError, match="no such file"):
        read_bundle(tmp_path / "none.pt")
    with pytest.raises(BundleError, match="is a folder"):
        read_bundle(tmp_path)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(BundleError, match="not a freres bundle"):
        read_bundle(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(BundleError):
        read_bundle(tmp_path / "zip.pt")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused_by_name(bundle, version):
    rewrite(bundle, schema_version=version)
    with pytest.raises(BundleError, match="schema: expected version 1"):
        read_bundle(bundle)


def test_a_changed_manifest_or_tensor_is_refused(bundle, tracks):
    content = torch.load(bundle, weights_only=True)
    manifest = json.loads(content["manifest"])
    rewrite(bundle, manifest=encode_manifest({**manifest, "model": {"model_id": "y"}}))
    with pytest.raises(BundleError, match="manifest's checksum"):
        read_bundle(bundle)
    tensors = dict(content["tensors"])
    tensors["anchor_latents"] = tensors["anchor_latents"] + 1e-6
    rewrite(bundle, manifest=content["manifest"], tensors=tensors)
    with pytest.raises(BundleError, match="anchor_latents: the checksum"):
        read_bundle(bundle)
    tensors["anchor_latents"] = content["tensors"]["anchor_latents"][:-1]
    rewrite(bundle, tensors=tensors)
    with pytest.raises(BundleError, match=r"anchor_latents: expected float32 \["):
        read_bundle(bundle)
    del tensors["anchor_latents"]
    rewrite(bundle, tensors=tensors)
    with pytest.raises(BundleError, match="differ: anchor_latents"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anchor_cell", 64),
        ("anchor_gop", 99),
        ("coefficient_cell", -1),
        ("static_gop", 1 << 40),
        ("summary_gop", -5),
        ("gop_anchor_frame", -1),
        ("gop_num_residuals", 1 << 40),
        ("gop_num_bins", 99),
        ("gop_bin_frames", 0),
        ("gop_start", 3),
        ("coefficient_band", 77),
        ("base_cell", 15),
    ],
)
def test_an_index_out_of_range_is_refused_even_with_right_checksums(tmp_path, tracks, name, value):
    tensors = {key: tensor.clone() for key, tensor in tracks.tensors().items()}
    tensors[name][0] = value

    class Forged:
        def tensors(self):
            return tensors

    write_bundle(tmp_path / "b.pt", Forged(), manifest_for(tracks))
    with pytest.raises(
        BundleError, match="gop_num_bins: expected" if name == "gop_bin_frames" else f"{name}: expected"
    ):
        read_bundle(tmp_path / "b.pt")


def test_an_expanded_view_that_claims_more_than_the_file_holds_is_refused(bundle):
    content = torch.load(bundle, weights_only=True)
    tensors = {**content["tensors"], "anchor_latents": torch.zeros(1).expand(1 << 40)}
    torch.save({**content, "tensors": tensors}, bundle)
    with pytest.raises(BundleError):
        read_bundle(bundle)


def forge(path, tracks, tensors, **manifest):
    """Write a bundle of any tensors with right checksums."""

    class Forged:
        def tensors(self):
            return tensors

    write_bundle(path, Forged(), {**manifest_for(tracks), **manifest})


def test_forged_columns_are_refused_whatever_their_shape_or_type(tmp_path, tracks):
    for number, name in enumerate(tracks.tensors()):
        tensor = getattr(tracks, name)
        kind = torch.int64 if tensor.is_floating_point() else torch.float32
        for trick, forged in enumerate((tensor[..., None].expand(*tensor.shape, 2), tensor.to(kind), tensor[:0])):
            if forged.shape == tensor.shape and forged.dtype == tensor.dtype:
                continue
            path = tmp_path / f"{number}-{trick}.pt"
            forge(path, tracks, {**tracks.tensors(), name: forged.contiguous()})
            with pytest.raises(BundleError):
                read_bundle(path)


def test_a_coefficient_given_twice_is_refused(tmp_path, tracks):
    tensors = dict(tracks.tensors())
    for name in ("coefficient_gop", "coefficient_cell", "coefficient_band"):
        tensors[name] = tensors[name].clone()
        tensors[name][1] = tensors[name][0]
    forge(tmp_path / "b.pt", tracks, tensors)
    with pytest.raises(BundleError, match="each coefficient once"):
        read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("key", "value"), [("variant", "idct"), ("variant", "magic"), ("anchors", "many"), ("text_after", 3)]
)
def test_forged_settings_are_refused(tmp_path, tracks, key, value):
    settings = {**MANIFEST["settings"], key: {"value": value, "source": "flag"}}
    forge(tmp_path / "b.pt", tracks, tracks.tensors(), settings=settings)
    with pytest.raises(BundleError, match="damaged bundle"):
        read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize("tokens", [{}, {"full_tokens": "many"}, {"full_tokens": 0}])
def test_forged_counts_are_refused(tmp_path, tracks, tokens):
    forge(tmp_path / "b.pt", tracks, tracks.tensors(), tokens=tokens)
    with pytest.raises(BundleError, match="damaged bundle"):
        read_bundle(tmp_path / "b.pt")


def test_a_link_keeps_pointing_where_it_points(tmp_path, tracks):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "b.pt")
    write_bundle(tmp_path / "real" / "b.pt", tracks, manifest_for(tracks))
    write_bundle(link, tracks, {**manifest_for(tracks), "source": {"new": 1}}, force=True)
    assert link.is_symlink() and read_bundle(tmp_path / "real" / "b.pt").manifest["source"] == {"new": 1}


def test_what_is_no_regular_file_is_never_replaced(tmp_path, tracks):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="no regular file"):
        write_bundle(tmp_path / "pipe", tracks, manifest_for(tracks), force=True)
    with pytest.raises(BundleError, match="name too long"):
        write_bundle(tmp_path / ("b" * 300), tracks, manifest_for(tracks))
    write_bundle(tmp_path / ("b" * 255), tracks, manifest_for(tracks))
