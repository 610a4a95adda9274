"""A compression that is stopped goes on where it was, and gives the bundle that it would have given."""

from __future__ import annotations

import os
import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from freres_cli.errors import ResourceError
from freres_cli.pipeline import checkpoints, encoding
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.planning import plan_compression
from freres_cli.video import decode as decode_module
from freres_cli.workflows.compress import compress_file
from tests import clips

FRAMES, BATCH = 76, 8  # the last batch is short


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Numbered frames, each shown twice at first, and a still stretch across the end of a batch."""
    pictures = (clips.draw_index(min(n, 14) // 2 if n < 30 else n) for n in range(FRAMES))
    path = tmp_path_factory.mktemp("long") / "clip.mp4"
    return clips.write_clip(path, FRAMES, pictures=pictures, options={**clips.X264_B_FRAMES, "g": "12"})


@pytest.fixture(scope="module")
def models():
    return Compressor().models


def states(folder):
    return sorted(folder.glob(".freres-*"))


def compress(video, output, models, monkeypatch, stop_at=None, every_s=0.0, told=None, **settings):
    """Compress, keeping the state after every batch; stop once ``stop_at`` frames are done."""
    monkeypatch.setattr(encoding, "MAX_BATCH_FRAMES", BATCH)
    monkeypatch.setattr(checkpoints, "EVERY_S", every_s)
    monkeypatch.setattr(checkpoints, "MOST_SHARE", float("inf"))

    def progress(done, total):
        # The state is written after this call, so the last one is that of the batch before.
        if stop_at is not None and done > stop_at:
            raise Stopped

    compressor = Compressor(models=models, **{"budget_tokens": 300, **settings})
    tell = (lambda _: None) if told is None else told.append
    return compress_file(compressor, video, output, progress=progress, tell=tell)


SETTINGS = {
    "fre-res": {"method": "fre-res"},
    "adaptive": {},
    "frames a second": {"sample": "fps", "sample_fps": 11.0},
    "still": {"still_levels": 3},
    "two resolutions": {"method": "fre-res", "residual_grid": "half", "still_levels": 3},
    "adaptive, by quality": {"quality": 0.9},
    "frames between others": {"line_levels": 40, "still_levels": 3},
}


SLOW = ("frames a second", "adaptive, by quality")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in SETTINGS])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(clip, models, tmp_path, monkeypatch, kind):
    settings = SETTINGS[kind]
    whole = compress(clip, tmp_path / "whole.pt", models, monkeypatch, every_s=1e9, **settings)
    assert states(tmp_path) == []
    encoded, told = [], []
    real = models.encoder.encode
    output = tmp_path / "part.pt"
    for stop_at in (BATCH, 2 * BATCH):  # stopped twice
        with pytest.raises(Stopped):
            compress(clip, output, models, monkeypatch, stop_at=stop_at, **settings)
        assert len(states(tmp_path)) == 1 and not output.exists()
    monkeypatch.setattr(models.encoder, "encode", lambda pixels: encoded.append(len(pixels)) or real(pixels))
    result = compress(clip, output, models, monkeypatch, told=told, **settings)
    # Frames that may lie between others are done later than they are read.
    resumed = (3 if "line_levels" in settings else 2) * BATCH
    assert result.resumed_frames == resumed and len(told) == 1 and f"going on after {resumed} of" in told[0]
    assert output.read_bytes() == whole.bundle.read_bytes()
    assert 0 < sum(encoded) <= whole.manifest["sampling"]["num_frames"] - 2 * BATCH
    assert states(tmp_path) == []


def test_a_run_stopped_after_its_short_last_batch_takes_no_frame_twice(clip, models, tmp_path, monkeypatch):
    whole = compress(clip, tmp_path / "whole.pt", models, monkeypatch, every_s=1e9)
    with monkeypatch.context() as stopped:

        def stop(*_):
            raise Stopped

        stopped.setattr(Compressor, "_count_text", stop)  # all frames are done by then
        with pytest.raises(Stopped):
            compress(clip, tmp_path / "part.pt", models, monkeypatch)
    result = compress(clip, tmp_path / "part.pt", models, monkeypatch)
    assert result.resumed_frames == FRAMES - FRAMES % BATCH
    assert result.bundle.read_bytes() == whole.bundle.read_bytes()


def test_going_on_does_not_decode_what_was_done(clip, models, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        compress(clip, tmp_path / "b.pt", models, monkeypatch, stop_at=56)
    begun = []
    real = decode_module.frames_from
    monkeypatch.setattr(decode_module, "frames_from", lambda *given: begun.append(given[2]) or real(*given))
    compress(clip, tmp_path / "b.pt", models, monkeypatch)
    assert len(begun) == 1 and 40 < begun[0].first_index < 56


def test_a_state_of_other_work_is_not_used(clip, models, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        compress(clip, tmp_path / "b.pt", models, monkeypatch, stop_at=16)
    (kept,) = states(tmp_path)
    other = clips.write_clip(tmp_path / "other.mp4", 20)
    for video, settings in ((other, {}), (clip, {"budget_tokens": 301}), (clip, {"still_levels": 1})):
        found = compress(video, tmp_path / "c.pt", models, monkeypatch, every_s=1e9, **settings)
        assert found.resumed_frames == 0
        (tmp_path / "c.pt").unlink()
    monkeypatch.setattr(checkpoints, "__version__", "0.0.0")
    assert compress(clip, tmp_path / "c.pt", models, monkeypatch, every_s=1e9).resumed_frames == 0
    assert states(tmp_path) == [kept]


@pytest.mark.parametrize(("stopped", "other"), [(None, 576), (576, None)])
def test_a_quality_goes_on_only_with_the_budget_that_it_began_with(clip, models, tmp_path, monkeypatch, stopped, other):
    """The preset has the same budget, which limits a quality only if the user names it."""
    with pytest.raises(Stopped):
        compress(clip, tmp_path / "b.pt", models, monkeypatch, stop_at=16, quality=0.999, budget_tokens=stopped)
    found = compress(clip, tmp_path / "c.pt", models, monkeypatch, every_s=1e9, quality=0.999, budget_tokens=other)
    assert found.resumed_frames == 0


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", ["damaged", "flipped", "name", "pickle", "other", "code"])
def test_a_state_that_cannot_be_read_is_told_and_removed(clip, models, tmp_path, monkeypatch, content):
    with pytest.raises(Stopped):
        compress(clip, tmp_path / "b.pt", models, monkeypatch, stop_at=16)
    (kept,) = states(tmp_path)
    monkeypatch.chdir(tmp_path)
    if content == "damaged":
        clips.cut(kept, 0.5)
    elif content in ("flipped", "name"):  # one bit of a number, which torch would read; or of the text of its pickle
        data = bytearray(kept.read_bytes())
        at = len(data) // 2 if content == "flipped" else data.index(b"position")
        data[at] ^= 0x80
        kept.write_bytes(data)
    elif content == "pickle":
        kept.write_bytes(pickle.dumps(_Evil()))
    else:
        torch.save(_Evil() if content == "code" else {"position": 1}, kept)
    told = []
    result = compress(clip, tmp_path / "b.pt", models, monkeypatch, every_s=1e9, told=told)
    assert result.resumed_frames == 0 and len(told) == 1 and "cannot be read" in told[0]
    assert states(tmp_path) == [] and not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_a_state_that_does_not_fit_in_memory_is_kept(clip, models, tmp_path, monkeypatch, failure):
    with pytest.raises(Stopped):
        compress(clip, tmp_path / "b.pt", models, monkeypatch, stop_at=16)

    def fill(*_, **__):
        raise failure

    kept = states(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="memory"):
        patch.setattr(torch, "load", fill)
        compress(clip, tmp_path / "b.pt", models, monkeypatch, every_s=1e9)
    assert states(tmp_path) == kept != []


def test_states_that_nobody_came_back_for_are_swept(clip, models, tmp_path, monkeypatch):
    old, new = tmp_path / ".freres-old.resume", tmp_path / ".freres-new.resume"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    compress(clip, tmp_path / "b.pt", models, monkeypatch, every_s=1e9)
    assert states(tmp_path) == [new]


def test_a_disk_that_is_full_costs_the_state_and_not_the_work(clip, models, tmp_path, monkeypatch):

    def full(path, write, *, force):
        raise ResourceError(f"{path}: not enough disk space to write it")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    told = []
    result = compress(clip, tmp_path / "b.pt", models, monkeypatch, told=told)
    assert result.bundle.exists() and len(told) == 1 and "not enough disk space" in told[0]


def test_a_state_is_named_by_everything_that_decides_the_bundle(clip, models):
    options, source, tower = Compressor(models=models).options, VideoSource(clip), models.encoder
    plan, names = plan_compression(options, tower, source.info), ("fingerprint", "dtype", "attention", "pixels_sha256")

    def digest(options=options, **facts):
        encoder = SimpleNamespace(**{name: getattr(tower, name) for name in names} | facts)
        return checkpoints._digest(source, options, plan, encoder)

    model = options.model
    others = [replace(options, **own) for own in ({"method": "fre-res"}, {"strict": True}, {"decode": "gpu"})]
    others.append(replace(options, model=replace(model, device=replace(model.device, name="cuda:1"))))
    found = [digest(), *map(digest, others), digest(dtype=torch.bfloat16)]
    found += [digest(**{name: "another"}) for name in names if name != "dtype"]
    assert len(set(found)) == len(found) == 9


def test_a_stopped_run_over_damage_gives_the_same_bytes(models, tmp_path, monkeypatch):
    made = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "color_range": 2}
    video = clips.blank_payloads(clips.write_clip(tmp_path / "hole.mov", 60, **made), slice(5, 9))
    whole = compress(video, tmp_path / "whole.pt", models, monkeypatch, every_s=1e9)
    with pytest.raises(Stopped):
        compress(video, tmp_path / "part.pt", models, monkeypatch, stop_at=32)
    result = compress(video, tmp_path / "part.pt", models, monkeypatch)
    assert result.resumed_frames == 32 and whole.manifest["sampling"]["lost_s"] > 0
    assert result.bundle.read_bytes() == whole.bundle.read_bytes()


def test_a_state_of_two_weeks_is_kept_and_that_of_another_user_is_not_read(models, clip, tmp_path, monkeypatch):
    recent = tmp_path / ".freres-recent.resume"
    recent.write_bytes(b"x")
    os.utime(recent, (0, time.time() - 13 * 24 * 3600))
    with pytest.raises(Stopped):
        compress(clip, tmp_path / "b.pt", models, monkeypatch, stop_at=8)
    assert recent.exists() and len(states(tmp_path)) == 2
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert compress(clip, tmp_path / "b.pt", models, monkeypatch, every_s=1e9).resumed_frames == 0
