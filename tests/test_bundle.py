"""Bundles: what is written is read back, and no file is overwritten by accident or left half written."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freres_cli.bundle.schema import LATER_FIELDS, SCHEMA_VERSION
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.errors import ExitStatus, ResourceError
from freres_cli.files import write_atomically
from tests.forged_bundles import MANIFEST, make_tokens, make_tracks, manifest_for, smooth_latents
from tests.forged_bundles import bundle as bundle
from tests.forged_bundles import tracks as tracks
from tests.runner import fails
from tests.token_checks import same_tokens


def test_what_is_read_is_what_was_written(bundle, tracks):
    back = read_bundle(bundle)
    assert back.tracks.grid == tracks.grid and back.tracks.width == tracks.width
    for name, tensor in tracks.tensors().items():
        assert torch.equal(getattr(back.tracks, name), tensor) and getattr(back.tracks, name).dtype == tensor.dtype
    expected = manifest_for(tracks)
    # what the bundle lacks is not known
    expected |= {section: {**dict.fromkeys(later), **expected[section]} for section, later in LATER_FIELDS.items()}
    assert {key: back.manifest[key] for key in expected} == expected
    assert back.schema_version == SCHEMA_VERSION == 4 and back.manifest["content"] == "tracks"
    assert back.num_bytes == bundle.stat().st_size


def test_what_was_read_does_not_change_with_the_file(bundle, tracks):
    """Nor does it end the process if the file gets shorter."""
    back = read_bundle(bundle)
    with bundle.open("r+b") as file:
        file.write(bytes(bundle.stat().st_size // 2))
    for name, tensor in tracks.tensors().items():
        assert torch.equal(getattr(back.tracks, name), tensor)
    bundle.write_bytes(b"hello")
    assert all(torch.equal(getattr(back.tracks, name), tensor) for name, tensor in tracks.tensors().items())


def test_tokens_that_are_read_are_those_that_were_written(tmp_path):
    tokens = make_tokens(smooth_latents())
    write_bundle(tmp_path / "b.pt", tokens, manifest_for(tokens))
    back = read_bundle(tmp_path / "b.pt")
    same_tokens(back.content, tokens)
    assert back.manifest["content"] == "tokens" and back.manifest["geometry"]["pooled_grid"] is None
    with fails(ExitStatus.BUNDLE, "made by method uniform"):
        _ = back.tracks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_latents_keep_their_dtype_to_the_bit(tmp_path, dtype):
    tracks = make_tracks(smooth_latents(12, 6).to(dtype), 100)
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
    with fails(ExitStatus.USAGE, "already exists"):
        write_bundle(bundle, tracks, manifest_for(tracks))
    assert bundle.read_bytes() == before
    changed = {**MANIFEST["source"], "file": "changed.mp4"}
    write_bundle(bundle, tracks, manifest_for(tracks, source=changed), force=True)
    assert read_bundle(bundle).manifest["source"] == changed


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "b.pt"

    def write(file):
        file.write(b"ours")
        path.write_bytes(b"theirs")

    with fails(ExitStatus.USAGE, "already exists"):
        write_atomically(path, write, force=False)
    assert path.read_bytes() == b"theirs" and [p.name for p in tmp_path.iterdir()] == ["b.pt"]


@pytest.mark.parametrize("destination", ["missing/b.pt", "."])
def test_an_impossible_destination_is_refused(tmp_path, tracks, destination):
    with fails(ExitStatus.USAGE, "folder"):
        write_bundle(tmp_path / destination, tracks, manifest_for(tracks))


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="disk space"):
        write_atomically(tmp_path / "b.pt", fail, force=False)
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_be_so_large_is_no_full_disk(tmp_path):
    def fail(file):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with pytest.raises(ResourceError, match="larger than a file may be") as caught:
        write_atomically(tmp_path / "b.pt", fail, force=False)
    assert "free some space" not in str(caught.value.hint) and not list(tmp_path.iterdir())


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
import sys
from pathlib import Path
from freres_cli.files import write_atomically
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


def test_a_link_keeps_pointing_where_it_points(tmp_path, tracks):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "b.pt")
    write_bundle(tmp_path / "real" / "b.pt", tracks, manifest_for(tracks))
    new = {**MANIFEST["source"], "file": "new.mp4"}
    write_bundle(link, tracks, manifest_for(tracks, source=new), force=True)
    assert link.is_symlink() and read_bundle(tmp_path / "real" / "b.pt").manifest["source"] == new


def test_only_regular_files_are_replaced(tmp_path, tracks):
    os.mkfifo(tmp_path / "pipe")
    with fails(ExitStatus.USAGE, "not a regular file"):
        write_bundle(tmp_path / "pipe", tracks, manifest_for(tracks), force=True)
    with fails(ExitStatus.USAGE, "name too long"):
        write_bundle(tmp_path / ("b" * 300), tracks, manifest_for(tracks))
    write_bundle(tmp_path / ("b" * 255), tracks, manifest_for(tracks))
