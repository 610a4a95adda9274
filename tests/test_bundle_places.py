"""Times and places that no clip has are refused by name, whatever the version that is claimed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.errors import ExitStatus
from freres_cli.pipeline.manifest import clip_end_s
from tests.forged_bundles import (
    MANIFEST,
    edit_manifest,
    forge,
    make_stretches,
    make_tokens,
    make_tracks,
    manifest_for,
    rewrite,
    smooth_latents,
)
from tests.runner import fails

CONTENTS = {"tracks": make_tracks, "tokens": make_tokens, "stretches": make_stretches}
VERSIONS = [("tracks", 1), ("tracks", 2), ("tracks", 3), ("tokens", 2), ("tokens", 3), ("stretches", 4)]


@pytest.fixture(scope="module")
def contents():
    """Each kind of content with its tensors."""
    made = {kind: make(smooth_latents()) for kind, make in CONTENTS.items()}
    names = {
        kind: [n for n, value in vars(content).items() if isinstance(value, Tensor)] for kind, content in made.items()
    }
    return {kind: (content, {n: getattr(content, n).clone() for n in names[kind]}) for kind, content in made.items()}


def put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([index]), value)


TIMES = {
    "reversed": (lambda t: t.flip(0), "never decrease"),
    "one step back": (put(20, 0.0), "never decrease"),
    "negative": (lambda t: t - 5.0, "0 s or more"),
    "not a number": (put(3, float("nan")), "finite"),
    "infinite": (put(-1, float("inf")), "finite"),
    "half precision": (lambda t: t.half(), "float16"),
    "single precision": (lambda t: t.float(), "float32"),
    "whole numbers": (lambda t: t.long(), "int64"),
}


@pytest.mark.parametrize(("kind", "version"), VERSIONS)
@pytest.mark.parametrize("fault", TIMES)
def test_times_that_no_clip_has_are_refused(tmp_path, contents, kind, version, fault):
    content, tensors = contents[kind]
    change, text = TIMES[fault]
    forge(tmp_path / "b.pt", content, tensors | {"frame_seconds": change(tensors["frame_seconds"])}, version)
    with fails(ExitStatus.BUNDLE, text) as caught:
        read_bundle(tmp_path / "b.pt")
    assert "frame_seconds" in caught.value.message


def move(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The times among these tensors, changed."""
    return {name: change(tensors[name]) for name in ("frame_seconds", "seconds") if name in tensors}


@pytest.mark.parametrize(("kind", "version"), VERSIONS)
def test_times_of_real_clips_are_read(tmp_path, contents, kind, version):
    """The clock of given frames may start below zero if the source says so, or far above; a frame may be shown twice."""
    content, tensors = contents[kind]
    for start, change in ((-5.0, lambda t: t - 5.0), (0.0, lambda t: t + 1e9), (0.0, lambda t: t * 0)):
        moved = move(tensors, change)
        source = {**MANIFEST["source"], "start_s": start}
        forge(tmp_path / "b.pt", content, tensors | moved, version, source=source)
        assert torch.equal(read_bundle(tmp_path / "b.pt").content.frame_seconds, moved["frame_seconds"])


@pytest.mark.parametrize(("kind", "version"), VERSIONS)
@pytest.mark.parametrize("start", [-5.0, 0.3, 8.333333, 1e6])
def test_times_on_the_clock_of_the_file_are_counted_from_its_first_frame(tmp_path, contents, kind, version, start):
    """Bundles that do not say when their zero is have the times that the file has. Written again, they say it."""
    content, tensors = contents[kind]
    source = {name: value for name, value in MANIFEST["source"].items() if name != "zero_s"} | {"start_s": start}
    forge(tmp_path / "b.pt", content, tensors | move(tensors, lambda t: t + start), version, source=source)
    first = read_bundle(tmp_path / "b.pt")
    write_bundle(tmp_path / "again.pt", first.content, first.manifest)
    for read in (first, read_bundle(tmp_path / "again.pt")):
        assert read.manifest["source"] == {**source, "zero_s": start}
        assert clip_end_s(read.manifest) == pytest.approx(source["duration_s"])
        for name, told in move(tensors, lambda t: t).items():
            torch.testing.assert_close(getattr(read.content, name), told, atol=1e-6, rtol=0)
        assert torch.equal(read.content.frame_seconds, first.content.frame_seconds)


def test_given_frames_keep_the_times_they_were_given(tmp_path, contents):
    content, tensors = contents["tokens"]
    source = {name: value for name, value in MANIFEST["source"].items() if name != "zero_s"}
    source |= {"start_s": 5.0, "file": None, "container": None, "codec": None}
    moved = move(tensors, lambda t: t + 5.0)
    forge(tmp_path / "b.pt", content, tensors | moved, source=source)
    assert torch.equal(read_bundle(tmp_path / "b.pt").content.frame_seconds, moved["frame_seconds"])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("positions", lambda p: p.index_copy(0, torch.tensor([1]), p[:1])),
        ("positions", lambda p: p.flip(0)),
        ("positions", lambda p: p[:, [0, 2, 1]]),
        ("positions", lambda p: p.double()),
        ("seconds", lambda s: s - 1.0),
        ("seconds", lambda s: s + 100.0),
        ("seconds", lambda s: s.half()),
        ("kind", put(0, 4)),
        ("gop", put(0, -1)),
    ],
)
def test_tokens_that_are_out_of_place_are_refused(tmp_path, contents, name, change, version):
    content, tensors = contents["tokens"]
    forge(tmp_path / "b.pt", content, tensors | {name: change(tensors[name])}, version)
    with fails(ExitStatus.BUNDLE, name):
        read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize(("kind", "version"), VERSIONS)
def test_energies_below_zero_are_refused(tmp_path, contents, kind, version):
    content, tensors = contents[kind]
    names = [name for name in tensors if name.endswith(("energy", "_loss"))]
    assert names
    for name in names:
        last = tensors[name].index_fill(0, torch.tensor([-1]), -1e-3)
        forge(tmp_path / "b.pt", content, tensors | {name: last}, version)
        with fails(ExitStatus.BUNDLE, f"{name}: expected 0 or more"):
            read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("table", ["anchor", "static", "summary"])
def test_two_tokens_of_a_kind_at_one_place_are_refused(tmp_path, contents, table, version):
    content, tensors = contents["tracks"]
    doubled = {}
    for name in (f"{table}_gop", f"{table}_cell"):
        if name in tensors:
            doubled[name] = tensors[name].index_copy(0, torch.tensor([1]), tensors[name][:1])
    forge(tmp_path / "b.pt", content, tensors | doubled, version)
    with fails(ExitStatus.BUNDLE, f"{table}_") as caught:
        read_bundle(tmp_path / "b.pt")
    assert "once" in caught.value.message


def test_text_for_numbers_is_refused(tmp_path, contents):
    content, tensors = contents["tokens"]
    path = tmp_path / "b.pt"
    write_bundle(path, content, manifest_for(content))
    edit_manifest(path, lambda manifest: manifest["source"].update(start_s="0.0"))
    with fails(ExitStatus.BUNDLE, "source.start_s: expected a number"):
        read_bundle(path)
    write_bundle(path, content, manifest_for(content), force=True)
    rewrite(path, tensors=tensors | {"seconds": "0.0"})
    with fails(ExitStatus.BUNDLE, "seconds: expected a plain tensor"):
        read_bundle(path)
