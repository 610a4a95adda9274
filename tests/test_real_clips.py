"""Every real clip: compress -> inspect -> ask -> repack -> ask, or the one right line and status for the broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runner import check_failure, run_freres

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "videos"
BROKEN = {"not_a_video.mp4", "empty.mp4", "bunny_audio_only.m4a"}
# The same pictures come in other containers and codecs as well, in less time.
LONG = {"screen.mp4", "dog.mp4", "coffee.mp4", "squirrel.mp4", "blocks.mp4"}
CLIPS = sorted(p for p in FOLDER.rglob("*") if p.suffix not in (".json", ".jsonl") and p.is_file())

pytestmark = pytest.mark.skipif(not CLIPS, reason="no real clips here")


@pytest.mark.parametrize("method", ["adaptive", pytest.param("fre-res", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in LONG else [])
        for p in CLIPS
        if p.name not in BROKEN
    ],
)
def test_a_real_clip_goes_all_the_way(path, method, tmp_path):
    bundle, small = tmp_path / "bundle.pt", tmp_path / "small.pt"
    flags = ("--method", method, "--frames", 40, "--budget", 500)
    made = run_freres("compress", path, *flags, "-o", bundle, "--json").json
    # A short clip has fewer tokens than the budget, and keeps them all.
    least = 500 if method == "adaptive" else 490
    assert min(least, made["full_tokens"]) <= made["visual_tokens"] <= 500
    shown = run_freres("inspect", bundle, "--json").json
    assert shown["visual_tokens"] == made["visual_tokens"] and shown["source"]["file"] == path.name
    times = shown["over_time"]["edges_s"] if method == "adaptive" else [gop["start_s"] for gop in shown["gops"]]
    assert times == sorted(times) and 0 <= times[0] < shown["source"]["duration_s"]
    assert run_freres("inspect", bundle).status == 0
    flags = ("what moves?", "--choices", "a dog|a car", "--json")
    assert run_freres("ask", bundle, *flags).json["visual_tokens"] == made["visual_tokens"]
    assert run_freres("repack", bundle, "--budget", 120, "-o", small).out == f"{small}\n"
    assert run_freres("ask", small, *flags).json["visual_tokens"] == 120


@pytest.mark.parametrize("path", [p for p in CLIPS if p.name in BROKEN], ids=lambda p: p.name)
def test_a_broken_clip_is_one_line(path, tmp_path):
    check_failure(run_freres("compress", path, "-o", tmp_path / "b.pt"), 3, path.name)
    assert not list(tmp_path.iterdir())


def test_the_five_cuts_of_the_bike_clip_are_found(tmp_path):
    path = FOLDER / "bikes.mp4"
    run_freres("compress", path, "--method", "fre-res", "--budget", 1280, "-o", tmp_path / "b.pt")
    gops = run_freres("inspect", tmp_path / "b.pt", "--json").json["gops"]
    starts = {gop["anchor_frame"] for gop in gops}
    assert {30, 76, 137, 187, 242} <= starts
