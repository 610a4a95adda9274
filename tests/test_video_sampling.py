"""The arithmetic of sampling."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from freres_cli.errors import UsageError
from freres_cli.records import FrameSize
from freres_cli.video.sampling import Sampling, num_sampled_frames, num_shown_frames, sampling_instants, sampling_window

CLIPS = [
    (0.0, 10.0, 300),
    (8.3, 10.01, 300),
    (0.3, 31.8, 636),
    (0.0, 29.6, 68),
    (0.0, 1 / 30, 1),
    (0.0, 3600.0, 108000),
]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("fps", [0.1, 1, 2, 29.97, 30, 60])
def test_fps_instants_are_a_uniform_grid_that_fills_the_clip(clip, fps):
    start, duration, _ = clip
    instants = sampling_instants(Sampling("fps", fps=fps), *clip)
    assert instants[0] == start
    assert all(math.isclose(t - start, k / fps, abs_tol=1e-9) for k, t in enumerate(instants))
    assert instants[-1] < start + duration
    # One more instant would be past the end, within the tolerance.
    assert start + len(instants) / fps >= start + duration - 2e-3


def test_fps_instants_do_not_drift_in_an_hour():
    instants = sampling_instants(Sampling("fps", fps=29.97), 0.0, 3600.0, 107892)
    assert instants[-1] == (len(instants) - 1) / 29.97


@pytest.mark.parametrize("duration", [10.0, 10.0 - 1e-9, 10.0 + 1e-9, 10.0005])
def test_fps_does_not_gain_or_lose_a_frame_by_rounding(duration):
    assert num_sampled_frames(Sampling("fps", fps=2), 0.0, duration, 300) == 20


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_count_instants_are_centres_of_equal_segments(clip, count):
    start, duration, num_packets = clip
    instants = sampling_instants(Sampling("count", count=count), *clip)
    expected = min(count, num_packets)
    assert len(instants) == expected
    step = duration / expected
    for i, instant in enumerate(instants):
        assert math.isclose(instant, start + (i + 0.5) * step, abs_tol=1e-9)


def test_count_is_capped_to_the_frames_there_are():
    assert len(sampling_instants(Sampling("count", count=1000), 0.0, 2.0, 48)) == 48


def test_native_has_no_instants_and_counts_all_packets():
    assert sampling_instants(Sampling("native"), 0.0, 2.0, 48) is None
    assert num_sampled_frames(Sampling("native"), 0.0, 2.0, 48) == 48
    stamps = [k / 24 for k in range(48)]
    assert num_shown_frames(Sampling("native"), 0.0, 2.0, stamps) == 48
    assert num_shown_frames(Sampling("native", start_s=0.5, end_s=1.0), 0.0, 2.0, stamps) == 12


@pytest.mark.parametrize("mode", [{"mode": "fps", "fps": 4.0}, {"mode": "count", "count": 9}])
def test_prediction_equals_the_instants(mode):
    for clip in CLIPS:
        sampling = Sampling(**mode)
        assert num_sampled_frames(sampling, *clip) == len(sampling_instants(sampling, *clip))


@pytest.mark.parametrize("mode", [{"mode": "fps", "fps": 4.0}, {"mode": "count", "count": 9}])
def test_window_holds_all_instants_and_counts_from_the_first_frame(mode):
    instants = sampling_instants(Sampling(**mode, start_s=2.0, end_s=5.0), 8.3, 10.0, 300)
    assert all(10.3 <= t < 13.3 for t in instants)
    assert all(a < b for a, b in pairwise(instants))


def test_window_is_clipped_to_the_clip():
    assert sampling_window(Sampling("native", end_s=99.0), 8.3, 10.0) == (8.3, 18.3)


def test_window_outside_the_clip_is_a_usage_error():
    with pytest.raises(UsageError, match=r"starts at 10 s.*lasts 10\.000 s"):
        sampling_instants(Sampling("fps", fps=1, start_s=10.0), 0.0, 10.0, 300)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "all"},
        {"mode": "fps"},
        {"mode": "fps", "fps": 0.0},
        {"mode": "fps", "fps": -1.0},
        {"mode": "fps", "fps": math.nan},
        {"mode": "fps", "fps": math.inf},
        {"mode": "fps", "fps": 1.0, "count": 3},
        {"mode": "count"},
        {"mode": "count", "count": 0},
        {"mode": "native", "fps": 1.0},
        {"mode": "native", "start_s": -1.0},
        {"mode": "native", "start_s": math.nan},
        {"mode": "native", "end_s": 0.0},
        {"mode": "native", "start_s": 3.0, "end_s": 2.0},
        {"mode": "native", "end_s": math.inf},
    ],
)
def test_values_that_make_no_sense_are_usage_errors(values):
    with pytest.raises(UsageError):
        Sampling(**values)


@pytest.mark.parametrize(
    ("grid", "size", "fit"),
    [
        ((24, 24), (500, 500), "exact"),
        ((26, 46), (1280, 720), "exact"),
        ((20, 36), (1280, 720), "exact"),
        ((24, 24), (1280, 720), "squeezed"),
        ((16, 16), (640, 480), "squeezed"),
        ((46, 26), (720, 1280), "exact"),
        ((24, 24), (720, 1280), "squeezed"),
    ],
)
def test_the_change_of_aspect_ratio_is_described(grid, size, fit):
    assert FrameSize(grid[0] * 28, grid[1] * 28, *grid).fit(*size) == fit
