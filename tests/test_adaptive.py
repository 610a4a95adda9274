"""Adaptive Fre-Res from latents to tokens: streaming, budgets, quality, cutting, cuts."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from freres_cli.method import adaptive
from freres_cli.method.adaptive import (
    CutDetector,
    StretchCompressor,
    build_stretch_tokens,
    count_for_quality,
    cut_stretches,
)
from freres_cli.method.stretch_means import box_sizes
from tests.compressed_clips import smooth_clip
from tests.test_merging import D, walk


def compress(clip, budget_tokens=None, quality=None, batch=None, width=D):
    compressor = StretchCompressor(tuple(clip.shape[1:3]), width, budget_tokens, quality)
    seconds = torch.arange(len(clip)).double() / 8
    for part, times in zip(clip.split(batch or len(clip)), seconds.split(batch or len(clip)), strict=True):
        compressor.push(part, times.tolist())
    return compressor.finish()


def assert_equal(a, b):
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


def lost(clip, stretches):
    shown = torch.empty_like(clip)
    for value, (t0, t1, h0, h1, w0, w1) in zip(stretches.latents, stretches.boxes.tolist(), strict=True):
        shown[t0:t1, h0:h1, w0:w1] = value
    return float((clip - shown).double().square().sum())


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_result_does_not_depend_on_batches(batch, monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 40)
    clip = walk(20, 3, 3)
    assert_equal(compress(clip, 17), compress(clip, 17, batch=batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_cutting_equals_compressing_anew_bit_for_bit(dtype):
    clip = walk(16, 3, 4).to(dtype)
    budgets = (192, 150, 97, 40, 12, 5, 1)
    for larger in budgets:
        for smaller in budgets:
            if smaller < larger:
                assert_equal(cut_stretches(compress(clip, larger), smaller), compress(clip, smaller))


@pytest.mark.parametrize("most", [100, 192])
def test_cutting_holds_for_a_clip_that_just_fits_and_for_budgets_above_half_of_the_memory(most, monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", most)
    clip = walk(16, 3, 4)
    for larger, smaller in ((180, 150), (180, 60), (120, 101), (96, 5)):
        assert_equal(cut_stretches(compress(clip, larger), smaller), compress(clip, smaller))


@pytest.mark.parametrize(
    ("changes", "is_cut"),
    [
        ([*[10.0] * 8, *[1.0] * 7, 12.0], False),
        ([*[10.0] * 8, *[1.0] * 7, 16.0], True),
        ([*[10.0] * 8, *[1.0] * 8, 9.0], True),
    ],
)
def test_a_cut_stands_out_from_the_median_of_the_fifteen_changes_before(changes, is_cut):
    place = [0.0]
    for change in changes:  # to and fro, so that the spread of the clip stays below the changes
        place.append(place[-1] + change**0.5 * (1 if place[-1] <= 0 else -1))
    assert CutDetector().observe(torch.tensor(place)[:, None, None, None])[0][-1] == is_cut


@pytest.mark.parametrize("quality", [0.5, 0.99, 0.999])
def test_a_quality_beside_a_budget_changes_nothing_about_the_way(quality, monkeypatch):
    """Also of a clip that is longer than memory."""
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 100)
    clip = walk(160, 3, 4)
    both = compress(clip, 80, quality)
    assert_equal(both, cut_stretches(compress(clip, 80), len(both)))
    assert_equal(cut_stretches(both, 7), compress(clip, 7))


@pytest.mark.parametrize("budget", [90, 50, 20])
def test_a_quality_counts_what_was_lost_while_a_long_clip_was_read(budget, monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 100)
    clip = walk(160, 3, 4)
    made = compress(clip, budget)
    assert_equal(compress(clip, quality=made.quality), made)


def test_cutting_twice_equals_cutting_once():
    whole = compress(walk(16, 3, 4), 120)
    assert_equal(cut_stretches(cut_stretches(whole, 60), 13), cut_stretches(whole, 13))


def test_a_budget_for_everything_keeps_every_latent_in_place():
    clip = walk(6, 3, 5)
    tokens = build_stretch_tokens(compress(clip, 6 * 15))
    assert torch.equal(tokens.latents, clip.flatten(0, 2))
    t, h, w = torch.meshgrid(torch.arange(6), torch.arange(3), torch.arange(5), indexing="ij")
    assert torch.equal(tokens.positions, torch.stack([t, h, w], -1).flatten(0, 2).float())
    assert set(tokens.kind.tolist()) == {0}


@pytest.mark.parametrize("budget", [1, 2, 8, 9, 31, 95, 96, 10**6])
def test_the_budget_is_met_exactly_and_the_error_is_told(budget):
    clip = walk(8, 3, 4)
    stretches = compress(clip, budget)
    assert len(stretches) == min(budget, 96)
    total = float((clip - clip.mean((0, 1, 2))).double().square().sum())
    assert stretches.energy.tolist() == pytest.approx([total, lost(clip, stretches)], rel=1e-4, abs=1e-4)
    assert stretches.quality == pytest.approx(1 - lost(clip, stretches) / total, abs=1e-5)


@pytest.mark.parametrize("quality", [0.05, 0.5, 0.9, 0.99, 1.0])
def test_quality_is_kept_with_the_fewest_tokens(quality):
    clip = walk(16, 3, 4)
    stretches = compress(clip, quality=quality)
    assert stretches.quality >= quality
    assert len(stretches) == 1 or cut_stretches(stretches, len(stretches) - 1).quality < quality
    whole = compress(clip, 10**6)
    assert count_for_quality(whole, quality) == len(stretches)
    assert_equal(cut_stretches(whole, len(stretches)), stretches)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_asking_for_the_quality_of_a_bundle_gives_that_bundle(seed):
    clip = walk(16, 3, 4, seed)
    whole = compress(clip, 10**6)
    for budget in range(1, 193, 3):
        smaller = cut_stretches(whole, budget)
        again = compress(clip, quality=smaller.quality)
        assert len(again) == count_for_quality(whole, smaller.quality) <= budget
        assert again.quality == smaller.quality, "only merges that lose nothing can be made beyond"


def test_the_curve_is_the_quality_at_other_budgets_and_does_not_depend_on_the_budget():
    clip = walk(16, 3, 4)
    small, large = compress(clip, 10), compress(clip, 150)
    assert torch.equal(small.curve_tokens, large.curve_tokens) and torch.equal(small.curve_loss, large.curve_loss)
    for count, loss in zip(small.curve_tokens.tolist(), small.curve_loss.tolist(), strict=True):
        assert loss == pytest.approx(float(compress(clip, count).energy[1]))
    assert small.curve_tokens[0] == 16 * 12 and small.curve_tokens[-1] == 1


def test_a_budget_above_the_memory_is_met_exactly(monkeypatch):
    """Of 4,800 latents at most 2,000 stretches are in memory, twice the budget."""
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 256)
    assert len(compress(walk(400, 3, 4), 1000)) == 1000


def test_memory_is_bounded_and_little_is_lost_by_it(monkeypatch):
    clip = walk(400, 3, 4)
    exact = compress(clip, 60)
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 256)
    most = 0
    compressor = StretchCompressor((3, 4), D, 60)
    for frame in clip.split(1):
        compressor.push(frame, [0.0])
        assert compressor._merger is not None
        most = max(most, compressor._merger._storage.shape[0])
    bounded = compressor.finish()
    assert most <= 2 * 256 < clip[..., 0].numel()
    assert bounded.quality == pytest.approx(exact.quality, abs=0.02)
    assert_equal(cut_stretches(compress(clip, 200), 60), compress(clip, 60))


def scene(seed, num_frames=10):
    torch.manual_seed(seed)
    return torch.randn(1, 4, 4, D).repeat(num_frames, 1, 1, 1) + 0.01 * torch.randn(num_frames, 4, 4, D)


def test_a_hard_cut_is_found_and_no_stretch_crosses_it():
    clip = torch.cat([scene(0), scene(1)])
    for budget in (320, 60, 33, 8):
        stretches = compress(clip, budget)
        assert stretches.cut_frame.tolist() == [10]
        assert not ((stretches.boxes[:, 0] < 10) & (stretches.boxes[:, 1] > 10)).any()


def test_a_flash_in_a_few_cells_is_no_cut():
    clip = scene(0, 20)
    clip[8, :1, :3] += 9
    stretches = compress(clip, 25)
    assert not stretches.cut_frame.numel()
    flashes = stretches.boxes[(stretches.boxes[:, 0] == 8) & (stretches.boxes[:, 1] == 9)]
    assert int(box_sizes(flashes).sum()) == 3  # and it is kept


def test_noise_is_no_cut():
    detector = CutDetector()
    torch.manual_seed(0)
    assert not any(detector.observe(5 + 0.3 * torch.randn(50, 1, 1, D) + torch.randn(1, 6, 6, D))[0])


def test_noise_of_a_flat_lead_in_is_a_cut_once_at_most():
    """Nothing but noise is in the picture, and all of it is new in every frame."""
    torch.manual_seed(0)
    lead_in, scene = 0.3 * torch.randn(30, 6, 6, D), walk(20, 6, 6) + 5 * torch.randn(1, 6, 6, D)
    assert CutDetector().observe(torch.cat([lead_in, scene]))[0][2:] == [frame == 30 for frame in range(2, 50)]
    stretches = compress(torch.cat([lead_in, scene]), 30)
    assert (stretches.boxes[:, 1] <= 30).sum() <= 2, "the lead-in has next to no energy, so it gets next to no tokens"


def test_tokens_lie_in_the_middle_of_what_they_stand_for():
    clip = walk(16, 3, 4)
    tokens = build_stretch_tokens(compress(clip, 20))
    assert tokens.boxes is not None
    middle = (tokens.boxes[:, ::2] + tokens.boxes[:, 1::2] - 1) / 2
    assert torch.equal(tokens.positions, middle.float())
    assert torch.allclose(tokens.seconds, middle[:, 0].double() / 8)
    keys = tokens.positions.tolist()
    assert keys == sorted(keys) and len({tuple(key) for key in keys}) == 20
    single_cell = box_sizes(tokens.boxes[:, 2:]) == 1
    assert torch.equal(tokens.kind == 1, single_cell) and torch.equal(tokens.kind == 3, ~single_cell)


def test_deepstack_rows_go_along_and_can_be_dropped():
    clip = walk(10, 2, 2, channels=3 * D)
    stretches = compress(clip, 9)
    assert stretches.latents.shape[1] == 3 * D
    assert_equal(stretches.without_deep_rows(), compress(clip[..., :D].contiguous(), 9))


def test_a_push_that_is_refused_takes_nothing():
    clip, times = walk(6, 2, 2), [float(i) for i in range(6)]
    compressor = StretchCompressor((2, 2), D, 5)
    compressor.push(clip[:3], times[:3])
    for wrong in (times[3:5], times[2:]):
        with pytest.raises(ValueError, match=f"seconds: expected 3, got {len(wrong)}"):
            compressor.push(clip[3:], wrong)
    compressor.push(clip[3:], times[3:])
    whole = StretchCompressor((2, 2), D, 5)
    whole.push(clip, times)
    assert_equal(compressor.finish(), whole.finish())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="budget: expected at least 1"):
        StretchCompressor((2, 2), D, 0)
    with pytest.raises(ValueError, match="no frames"):
        StretchCompressor((2, 2), D, 4).finish()
    with pytest.raises(ValueError, match="expected a grid"):
        StretchCompressor((2, 2), D, 4).push(torch.zeros(1, 3, 2, D), [0.0])
    with pytest.raises(ValueError, match="budget: expected at least 1"):
        cut_stretches(compress(walk(4, 2, 2), 8), 0)


def test_the_last_frame_does_not_keep_its_batch():
    detector = CutDetector()
    detector.observe(torch.randn(32, 4, 4, D))
    assert detector._previous.untyped_storage().nbytes() == 16 * D * 4


@pytest.mark.parametrize(("share", "is_cut"), [(0.4, False), (0.6, True)])
def test_at_a_cut_cells_change_by_half_of_what_two_random_tokens_differ(share, is_cut):
    still = torch.randn(1, 6, 6, D, generator=torch.Generator().manual_seed(0)).repeat(30, 1, 1, 1)
    detector = CutDetector()
    detector.observe(still)
    moved = still[:1] + (share * detector.distance / D) ** 0.5
    assert detector.observe(moved)[0] == [is_cut]


def test_the_shot_of_a_token_is_that_of_its_first_frame():
    """The shot of a token is the number of cuts up to its first frame."""
    latents = torch.cat([smooth_clip(9, (4, 4), seed=seed) for seed in range(3)])
    latents[9:18] += 20
    made = StretchCompressor((4, 4), 16, 60)
    made.push(latents, [i / 10 for i in range(27)])
    stretches = made.finish()
    tokens = build_stretch_tokens(stretches)
    cuts = stretches.cut_frame.tolist()
    assert cuts == [9, 18]
    assert tokens.gop.tolist() == [sum(cut <= first for cut in cuts) for first in stretches.boxes[:, 0].tolist()]
