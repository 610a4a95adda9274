"""Anchor frames: which tokens stay, where anchors are placed, and what counts as an event."""

from __future__ import annotations

import itertools

import pytest
import torch

from freres_cli.method.anchors import EventDetector, anchor_schedule, prune_order, spread_order
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import StreamingCompressor
from tests.compressed_clips import make_settings, smooth_clip


def test_block_pruning_drops_the_weakest_token_of_every_3x3_block():
    x = torch.randn(24, 24, 8, generator=torch.Generator().manual_seed(3))
    kept = set(prune_order(x, 8)[:512].tolist())
    energy = x.square().sum(-1)
    for top, left in itertools.product(range(0, 24, 3), repeat=2):
        block = energy[top : top + 3, left : left + 3].flatten()
        weakest = int(block.argmin())
        index = (top + weakest // 3) * 24 + left + weakest % 3
        assert index not in kept
    assert len(kept) == 512


@pytest.mark.parametrize("grid", [(24, 24), (9, 9), (4, 4), (5, 7), (1, 1), (2, 11)])
def test_prune_order_is_a_permutation_and_shares_loss_over_blocks(grid):
    x = torch.randn(*grid, 4)
    order = prune_order(x, 4)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    half = set(order[: grid[0] * grid[1] // 2].tolist())
    for top, left in itertools.product(range(0, grid[0], 3), range(0, grid[1], 3)):
        block = [
            r * grid[1] + c for r in range(top, min(top + 3, grid[0])) for c in range(left, min(left + 3, grid[1]))
        ]
        assert abs(len(half & set(block)) - len(block) / 2) <= 1


def test_ties_keep_raster_order():
    assert prune_order(torch.ones(3, 3, 2), 2).tolist() == list(range(9))


def test_schedule_is_even_and_starts_at_the_first_frame():
    for num_frames, num_anchors in [(16, 8), (64, 8), (1800, 60), (7, 3), (5, 5), (1, 1)]:
        schedule = anchor_schedule(num_frames, num_anchors)
        gaps = [b - a for a, b in itertools.pairwise([*schedule, num_frames])]
        assert schedule[0] == 0 and len(schedule) == num_anchors and max(gaps) - min(gaps) <= 1


def test_every_prefix_of_the_spread_order_is_spread():
    for count in (1, 2, 5, 8, 60):
        order = spread_order(count)
        assert sorted(order) == list(range(count))
        for length in range(2, count + 1):
            chosen = sorted(order[:length])
            gaps = [b - a for a, b in itertools.pairwise([*chosen, count])]
            assert max(gaps) <= 4 * count / length + 1


def watch(clip, is_repeat=None):
    """The distance of each frame (H, W, D) to the one before, and the frames that are events."""
    detector = EventDetector(None)
    distances = detector.measure(torch.stack(list(clip))).tolist()
    found = detector.judge(distances, is_repeat or [False] * len(distances))
    return distances, [i for i, is_event in enumerate(found) if is_event]


def test_cuts_are_found_and_drift_is_not():
    a, b = smooth_clip(30, (6, 6), seed=1), smooth_clip(30, (6, 6), seed=2)
    assert watch(torch.cat([a, b]))[1] == [30]


def test_a_shared_component_does_not_hide_a_cut():
    common = 50.0 * torch.randn(16, generator=torch.Generator().manual_seed(5))
    clip = torch.cat([smooth_clip(30, (6, 6), seed=1), smooth_clip(30, (6, 6), seed=2)]) + common
    raw = torch.nn.functional.cosine_similarity(clip[29].flatten(), clip[30].flatten(), dim=0)
    assert raw > 0.99, "the raw distance hides the cut"
    assert watch(clip)[1] == [30]


def test_still_frames_are_not_events_and_among_cuts_none_stands_out():
    assert not watch(torch.ones(20, 4, 4, 8))[1]
    assert len(watch(torch.randn(40, 8, 8, 8, generator=torch.Generator().manual_seed(0)))[1]) <= 1


def test_a_frame_sampled_again_is_no_step():
    """Twice and three times as many frames as the video has find the events that the video has."""
    noise = torch.randn(80, 6, 6, 16, generator=torch.Generator().manual_seed(1))
    clip = noise.clone()
    for frame in (*range(1, 40), *range(41, 80)):
        clip[frame] = 0.7 * clip[frame - 1] + 0.51**0.5 * noise[frame]
    distances, once = watch(clip)
    assert min(distances[1:]) > 0.15 and once == [40], "every step is long, and only the cut stands out"
    for times in (2, 3):
        again = [frame % times > 0 for frame in range(times * len(clip))]
        assert watch(clip.repeat_interleave(times, dim=0), again)[1] == [times * 40]
    different = torch.cat([clip[:41], clip[:1], clip[41:]])
    assert 41 in watch(different, [frame == 41 for frame in range(81)])[1], (
        "a different frame at the same time is a step"
    )


def flash_at(frame, clip, strength, seed=11):
    """The clip with something over the whole of one frame."""
    light = torch.randn(clip.shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.cat([clip[:frame], (clip[frame] + strength * light)[None], clip[frame + 1 :]])


@pytest.mark.parametrize("strength", [0.8, 1.0, 1.5, 5.0])
def test_the_return_from_a_flash_is_an_event_too(strength):
    distances, events = watch(flash_at(20, smooth_clip(40, (6, 6)) - 3.0, strength))
    assert min(distances[20:22]) > 0.15 and events == [20, 21]


def test_a_light_that_goes_on_and_off_with_every_frame_is_not_a_series_of_events():
    clip = smooth_clip(40, (6, 6)) - 3.0
    for frame in range(20, 40, 2):
        clip = flash_at(frame, clip, 1.0)
    assert watch(clip)[1] == [20, 21]


def test_a_whip_pan_is_one_event():
    background = 1.5 * (smooth_clip(1, (6, 6), seed=9)[0] - 3.0)
    clip = [*smooth_clip(20, (6, 6)), *(torch.roll(smooth_clip(1, (6, 6))[0], s, 1) for s in range(1, 6))]
    distances, events = watch(background + frame for frame in clip)
    assert min(distances[20:]) > 0.2, "every step of the pan is long"
    assert events == [20]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 100, 256, 300])
def test_the_threshold_is_made_of_the_quantiles_of_the_last_distances(length):
    """Against torch.quantile, bit for bit."""
    clip = torch.randn(length + 1, 2, 2, 4, generator=torch.Generator().manual_seed(length))
    detector = EventDetector(None)
    distances = detector.measure(clip).tolist()
    detector.judge(distances, [False] * len(distances))
    history = torch.tensor(distances[1:][-256:], dtype=torch.float64)
    median = history.quantile(0.5)
    mad = (history - median).abs().quantile(0.5)
    expected = max(0.5, 2 * float(median)) if length < 8 else max(0.15, float(median + 6 * mad))
    assert detector.threshold() == expected


def test_distances_are_those_of_the_definition():
    clip = torch.randn(20, 3, 4, 8, generator=torch.Generator().manual_seed(0)) + 5
    detector = EventDetector(None)
    found: list[float] = []
    for part in clip.split(7):
        distances = detector.measure(part).tolist()
        detector.judge(distances, [False] * len(distances))
        found += distances
    for i in range(1, 20):
        mean = clip[: i + 1].double().mean((0, 1, 2))
        pair = [(clip[j].double() - mean).flatten() for j in (i - 1, i)]
        assert found[i] == pytest.approx(1 - float(torch.cosine_similarity(*pair, dim=0)), abs=1e-5)


def test_above_a_threshold_of_its_own_every_step_is_an_event():
    """With a threshold of its own, every longer step is an event, however long the one before was."""
    noise = torch.randn(40, 6, 6, 16, generator=torch.Generator().manual_seed(1))
    clip = noise.clone()
    for frame in range(1, 40):
        clip[frame] = 0.7 * clip[frame - 1] + 0.51**0.5 * noise[frame]
    detector = EventDetector(0.2)
    distances = detector.measure(clip).tolist()
    assert detector.judge(distances, [False] * 40) == [distance > 0.2 for distance in distances]
    assert 0.2 < min(distances[1:]) < max(distances) < 0.5


def test_a_full_block_is_thinned_before_one_that_is_cut_off():
    """Of a grid that is no multiple of 3, a full block loses its weakest before a cut-off block loses its only token."""
    for grid in ((4, 4), (7, 7), (5, 3)):
        energy = torch.rand(*grid, 1, generator=torch.Generator().manual_seed(0)) + 1
        energy[-1, -1] = 0.1
        num_full = (grid[0] // 3) * (grid[1] // 3)
        order = prune_order(energy, 1)
        lost = {(i // grid[1] // 3, i % grid[1] // 3) for i in order[len(order) - num_full :].tolist()}
        assert lost == {(r, c) for r in range(grid[0] // 3) for c in range(grid[1] // 3)}


def test_frames_that_are_sampled_again_are_no_steps_wherever_batches_begin():
    """A frame that is sampled again is no step, wherever batches begin."""
    noise = torch.randn(80, 6, 6, 16, generator=torch.Generator().manual_seed(1))
    clip = noise.clone()
    for frame in (*range(1, 40), *range(41, 80)):
        clip[frame] = 0.7 * clip[frame - 1] + 0.51**0.5 * noise[frame]
    latents, seconds = clip.repeat_interleave(2, dim=0), [frame // 2 / 10 for frame in range(160)]
    settings = make_settings(events=True)
    plan = plan_budget(160, (6, 6), settings, 400)
    found = []
    for size in (160, 3, 1):
        made = StreamingCompressor(plan, settings, 16)
        for first in range(0, 160, size):
            made.push(latents[first : first + size], seconds[first : first + size])
        found.append((made.num_cuts_found, made.finish().gop_anchor_frame.tolist()))
    assert found[0] == found[1] == found[2]
