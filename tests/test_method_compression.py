"""Compression as a whole: what is kept, within which budget, and what a smaller bundle holds."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from freres_cli.method.anchors import anchor_schedule
from freres_cli.method.budget import DEMOTED_SUMMARY_SHARE, MethodSettings, allocate_budget, plan_budget
from freres_cli.method.compress import StreamingCompressor, _choose_reach, compress_latents
from freres_cli.method.energy import report_energy
from freres_cli.method.residuals import MAX_TIME_BINS, cell_centres, pool_to_cells
from freres_cli.method.select import cut_tracks
from freres_cli.method.tokens import ANCHOR, DYNAMIC, STATIC, SUMMARY, build_tokens
from freres_cli.presets import VARIANTS
from tests.compressed_clips import close_gop, compress, make_settings, smooth_clip

# --- tokens -----------------------------------------------------------------------------------------------------------


def test_all_coefficients_on_the_full_grid_give_every_frame_back():
    """K = L, g = H: the m = L dynamic tokens of a cell are that cell's latents in the L frames."""
    latents = torch.randn(10, 3, 4, 6)
    settings = make_settings(anchors=2, static_per_gop=0, pooled_side=4, max_coefficients=16, keep_per_block=9)
    settings = MethodSettings(**{**vars(settings), "reference_budget_tokens": 119})
    plan = plan_budget(10, (3, 4), settings, 119)
    assert plan.num_anchors == 2
    plan = type(plan)(**{**vars(plan), "num_coefficients": 16, "budget_tokens": 200})
    tracks = compress_latents(latents, range(10), plan, settings, 6)
    tokens = build_tokens(tracks)
    dynamic = tokens.kind == DYNAMIC
    assert int(dynamic.sum()) == 8 * 12
    t, h, w = tokens.positions[dynamic].round().long().unbind(1)
    assert torch.allclose(tokens.positions[dynamic], torch.stack([t, h, w], 1).float(), atol=1e-5)
    assert (tokens.latents[dynamic] - latents[t, h, w]).abs().max() < 1e-5
    assert report_energy(tracks).clip_kept == pytest.approx(1.0, abs=1e-5)


def test_with_room_for_all_tokens_all_are_kept_bit_for_bit():
    latents = torch.randn(7, 4, 5, 8)
    tracks, plan, _ = compress(latents, 7 * 20)
    tokens = build_tokens(tracks)
    assert plan.is_lossless
    assert torch.equal(tokens.latents, latents.flatten(0, 2))
    expected = torch.cartesian_prod(torch.arange(7), torch.arange(4), torch.arange(5)).float()
    assert torch.equal(tokens.positions, expected)
    assert set(tokens.kind.tolist()) == {ANCHOR}


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_anchors_are_bit_for_bit_and_counts_are_right(variant):
    latents = smooth_clip(40, (8, 8))
    tracks, _, _ = compress(latents, 300, variant=variant)
    tokens = build_tokens(tracks, variant)
    anchors = tokens.kind == ANCHOR
    t, h, w = tokens.positions[anchors].long().unbind(1)
    assert torch.equal(tokens.latents[anchors], latents[t, h, w])
    counted = tracks.num_tokens_by_kind()
    assert [counted[k] for k in ("anchor", "dynamic", "static", "summary")] == [
        int((tokens.kind == k).sum()) for k in range(4)
    ]
    assert len(tokens) <= 300
    assert (anchors.sum() == 0) == (variant == "temporal")
    assert ((tokens.kind == DYNAMIC).sum() == 0) == (variant == "anchors")


def test_dynamic_tokens_lie_between_the_clips_own_latents():
    """On the backbone's own manifold: each equals the pooled latents of the clip near its instant."""
    latents = smooth_clip(40, (8, 8))
    tracks, _, _ = compress(latents, 300)
    tokens = build_tokens(tracks)
    pooled = pool_to_cells(latents, 4, 4)
    centres = cell_centres(8, 8, 4, 4)
    rows = (tokens.kind == DYNAMIC).nonzero().squeeze(1)
    error, scale = 0.0, float(pooled.std())
    for row in rows.tolist():
        t, h, w = tokens.positions[row].tolist()
        cell = int(((centres - torch.tensor([h, w])).square().sum(1)).argmin())
        error = max(error, float((tokens.latents[row] - pooled[round(t), cell]).square().mean().sqrt()))
    assert len(rows) > 50 and error < 0.35 * scale


def test_static_and_summary_tokens_are_means_over_the_gop():
    latents = smooth_clip(40, (8, 8))
    tracks, _, _ = compress(latents, 300)
    tokens = build_tokens(tracks)
    starts = [*tracks.gop_anchor_frame.tolist(), 40]
    pooled = pool_to_cells(latents, 4, 4)
    for row in (tokens.kind == STATIC).nonzero().squeeze(1).tolist():
        gop = int(tokens.gop[row])
        means = pooled[starts[gop] + 1 : starts[gop + 1]].mean(0)
        assert (means - tokens.latents[row]).abs().amax(1).min() < 1e-4
    for row in (tokens.kind == SUMMARY).nonzero().squeeze(1).tolist():
        gop = int(tokens.gop[row])
        mean = latents[starts[gop] + 1 : starts[gop + 1]].mean((0, 1, 2))
        assert (mean - tokens.latents[row]).abs().max() < 1e-4


def test_background_cells_give_the_static_tokens():
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    moving = set(zip(tracks.coefficient_gop.tolist(), tracks.coefficient_cell.tolist(), strict=True))
    static = set(zip(tracks.static_gop.tolist(), tracks.static_cell.tolist(), strict=True))
    assert static and not (moving & static)


def test_coefficients_are_ordered_by_energy_and_the_best_are_kept():
    latents = smooth_clip(40, (8, 8))
    tracks, _, _ = compress(latents, 300)
    energy = tracks.coefficient_energy
    assert (energy[:-1] >= energy[1:]).all()
    more, _, _ = compress(latents, 300, temporal_share=0.6)
    assert more.coefficient_energy[0] == energy[0] or more.gop_anchor_frame.shape != tracks.gop_anchor_frame.shape
    assert report_energy(tracks).clip_kept >= 0.9


def spiked_clip(frame=23, cell=(0, 7), size=2.0):
    """Something in one corner in a single frame; the middle of the grid drifts all the time, with more energy."""
    latents = smooth_clip(40, (8, 8))
    latents[(frame, *cell)] += size * torch.randn(16, generator=torch.Generator().manual_seed(8))
    return latents


def test_what_is_there_for_one_frame_is_kept_as_it_was():
    """A wave holds a small share of a spike; an impulse is ranked by nearly all of its energy, and shows it whole."""
    latents = spiked_clip(size=1.2)
    tracks, _, _ = compress(latents, 130, pooled_side=8, static_per_gop=0)
    tokens = build_tokens(tracks)
    at = (tokens.kind == DYNAMIC) & (tokens.positions == torch.tensor([23.0, 0.0, 7.0])).all(1)
    assert at.sum() == 1 and torch.allclose(tokens.latents[at], latents[23, 0, 7], atol=1e-5)
    spike = float((latents[23, 0, 7] - latents[22, 0, 7]).square().sum())
    there = tracks.is_impulse & (tracks.coefficient_cell == 7)
    assert 0.3 * spike < float(tracks.coefficient_energy[there]) < spike
    assert tracks.coefficient_energy[~there].max() > spike, "the drift has more energy"


def test_the_cell_of_a_spike_is_no_background():
    """It moves more than any other cell of its GoP, but in its first coefficients it moves least."""
    still, way, spike = torch.randn(3, 8, 8, 16, generator=torch.Generator().manual_seed(1))
    speed = (0.7 / sum(t**2 for t in range(1, 10))) ** 0.5
    latents = still + speed * torch.arange(40)[:, None, None, None] * way[0, 0] / way[0, 0].norm()
    latents[:, :2, 6:] = still[:2, 6:]
    latents[24, :2, 6:] += spike[:1, 6:7] / spike[0, 6].norm()
    tracks, plan, _ = compress(latents, 300, reference_budget_tokens=300)
    assert plan.num_coefficients == 4 and tracks.gop_anchor_frame.tolist() == [0, 10, 20, 30]
    background = {gop: tracks.static_cell[tracks.static_gop == gop].tolist() for gop in range(4)}
    assert 3 not in background[2] and all(3 in background[gop] for gop in (0, 1, 3))


def test_an_inverse_transform_of_whole_frames_has_no_impulses():
    assert compress(spiked_clip(), 300)[0].is_impulse.any()
    assert not compress(spiked_clip(), 300, variant="idct")[0].is_impulse.any()


def test_impulses_of_binned_gops_lie_in_their_bins():
    latents = 0.01 * smooth_clip(3, (3, 3), width=4)[:1].repeat(400, 1, 1, 1)
    latents[301, 1, 1] += 5.0
    tracks, _, _ = compress(latents, 15, anchors=1, reference_budget_tokens=15, static_per_gop=0)
    tokens = build_tokens(tracks)
    assert tracks.gop_bin_frames.tolist() == [4] and tracks.is_impulse.sum() == 1
    t, h, w = tokens.positions[tokens.kind == DYNAMIC][tokens.energy[tokens.kind == DYNAMIC].argmax()].tolist()
    assert (h, w) == (1, 1) and abs(t - 301) <= 2


def test_identical_frames_give_no_dynamic_tokens_and_no_division_by_zero():
    latents = smooth_clip(1, (8, 8)).expand(30, -1, -1, -1)
    tracks, _, _ = compress(latents, 300)
    tokens = build_tokens(tracks)
    assert not (tokens.kind == DYNAMIC).any()
    assert tokens.latents.isfinite().all()
    report = report_energy(tracks)
    assert report.clip_kept is None and report.spectrum == ()


# --- budget, stream ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_budget_is_never_exceeded_and_is_used(seed):
    """240 random clips in all use at most the budget, and at least 98 % of it if the clip has that many tokens."""
    chooser = random.Random(seed)
    for _ in range(60):
        num_frames, h, w = chooser.randint(1, 40), chooser.randint(1, 10), chooser.randint(1, 10)
        everything = num_frames * h * w
        budget = chooser.randint(1, int(everything * 1.2) + 1)
        changes = {
            "anchors": chooser.randint(1, 12),
            "keep_per_block": chooser.randint(1, 9),
            "temporal_share": chooser.random() * 0.9,
            "static_per_gop": chooser.randint(0, 4),
            "pooled_side": chooser.randint(1, 9),
            "max_coefficients": chooser.randint(1, 8),
            "events": chooser.random() < 0.5,
            "variant": chooser.choice(["absorber", "anchors", "concat", "idct"]),
        }
        latents = torch.randn(num_frames, h, w, 3, generator=torch.Generator().manual_seed(seed))
        tracks, plan, _ = compress(latents, budget, **changes)
        used = len(build_tokens(tracks, changes["variant"]))
        assert used <= budget, (num_frames, h, w, budget, changes)
        assert used >= 0.98 * min(budget, everything), (num_frames, h, w, budget, changes, used)
        assert plan.expected.total <= budget


def test_every_split_of_a_budget_uses_it_and_takes_no_more_than_there_is():
    names = ("anchor_target", "anchor_available", "num_gops", "num_demoted", "static_available", "dynamic_available")
    for budget, *values in itertools.product(
        range(1, 8), (0, 2, 5), (0, 3, 9), (0, 2, 4), (0, 1, 6), (0, 3), (0, 2, 9)
    ):
        split = allocate_budget(budget, make_settings(), **dict(zip(names, values, strict=True)))
        assert min(vars(split).values()) >= 0, (budget, values, split)
        assert split.total == min(budget, sum(values[1:])), (budget, values, split)


@pytest.mark.parametrize("num_frames", range(1, 40, 3))
def test_no_coefficient_is_planned_that_no_gop_has_frames_for(num_frames):
    plan = plan_budget(num_frames, (4, 4), make_settings(max_coefficients=64, temporal_share=0.9), 15 * num_frames)
    assert plan.num_coefficients <= max(1, -(-num_frames // plan.num_anchors) - 1)


def test_a_budget_of_one_token_is_legal():
    tracks, _, _ = compress(smooth_clip(12, (6, 6)), 1)
    assert len(build_tokens(tracks)) == 1


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("cut", [27, 33])
def test_chunks_give_what_the_whole_gives(events, cut):
    """A cut far from any uniform anchor, and one that moves an anchor."""
    latents = torch.cat([smooth_clip(33, (6, 6), seed=1)[:cut], smooth_clip(53 - cut, (6, 6), seed=2)])
    settings = make_settings(events=events)
    plan = plan_budget(53, (6, 6), settings, 200)
    whole = compress_latents(latents, range(53), plan, settings, 16)
    for size in (1, 4, 50):
        compressor = StreamingCompressor(plan, settings, 16)
        for low in range(0, 53, size):
            part = latents[low : low + size]
            compressor.push(part, range(low, low + part.shape[0]))
        for name, tensor in compressor.finish().tensors().items():
            assert torch.equal(tensor, getattr(whole, name)), name


def test_no_residual_crosses_a_cut_and_the_strongest_cuts_win():
    clips = [smooth_clip(9, (6, 6), seed=s) * (1 + 0.2 * s) for s in range(12)]
    latents = torch.cat(clips)
    settings = make_settings(anchors=1, reference_budget_tokens=60, events=True, tau=0.3)
    plan = plan_budget(108, (6, 6), settings, 60)
    assert plan.max_events < 11, "more cuts than the budget has room for"
    compressor = StreamingCompressor(plan, settings, 16)
    compressor.push(latents, range(108))
    tracks = compressor.finish()
    assert compressor.num_cuts_found == 11
    assert compressor.num_cuts_not_honoured == 11 - plan.max_events
    assert tracks.gop_anchor_frame.tolist() == sorted({*range(0, 108, 9)} | set(anchor_schedule(108, plan.num_anchors)))
    honoured = tracks.gop_event_distance[tracks.gop_start == 1]
    refused = tracks.gop_event_distance[tracks.gop_start == 2]
    assert honoured.min() >= refused.max()
    assert not set(tracks.anchor_gop.tolist()) & set((tracks.gop_start == 2).nonzero().squeeze(1).tolist())
    assert len(build_tokens(tracks)) <= 60


def test_a_push_that_is_refused_takes_nothing():
    latents, settings = smooth_clip(12, (4, 4)), make_settings(reference_budget_tokens=40)
    plan = plan_budget(12, (4, 4), settings, 40)
    compressor = StreamingCompressor(plan, settings, 16)
    compressor.push(latents[:6], range(6))
    for wrong in (range(6, 9), range(6, 14)):
        with pytest.raises(ValueError, match=f"seconds: expected 6, got {len(wrong)}"):
            compressor.push(latents[6:], wrong)
    compressor.push(latents[6:], range(6, 12))
    whole = compress_latents(latents, range(12), plan, settings, 16)
    for name, tensor in compressor.finish().tensors().items():
        assert torch.equal(tensor, getattr(whole, name)), name


@pytest.mark.parametrize("strength", [1.0, 5.0])
def test_a_flash_leaves_no_energy_behind(strength):
    """Neither the flash nor the return from it is a residual: both frames are anchors."""
    clip = smooth_clip(40, (8, 8)) - 3.0
    quiet = float(compress(clip, 400, events=True)[0].gop_residual_energy.sum())
    light = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(11))
    clip[22] += strength * light
    tracks = compress(clip, 400, events=True)[0]
    assert {22, 23} <= set(tracks.gop_anchor_frame.tolist())
    assert tracks.gop_residual_energy.sum() < 1.1 * quiet < 0.1 * float((strength * light).square().sum()) + quiet


def gop_ends(tracks):
    return (tracks.gop_anchor_frame + tracks.gop_num_residuals + 1).tolist()


@pytest.mark.parametrize("late", [1, 2])
def test_a_uniform_anchor_moves_to_a_cut_right_after_it(late):
    """The shot before takes the frames that it had, as if the anchor had never been there."""
    cut = 20 + late
    latents = torch.cat([smooth_clip(60, (6, 6), seed=1)[:cut], smooth_clip(40 - cut, (6, 6), seed=2)])
    tracks, plan, _ = compress(latents, 300, events=True, reference_budget_tokens=300)
    assert anchor_schedule(40, plan.num_anchors) == [0, 10, 20, 30]
    assert tracks.gop_anchor_frame.tolist() == [0, 10, cut, 30] and not tracks.gop_start.any()
    assert gop_ends(tracks) == [10, cut, 30, 40]
    longer = close_gop(latents[10:cut], (4, 4), plan.num_coefficients, 16)
    assert float(tracks.gop_residual_energy[1]) == pytest.approx(float(longer.residual_energy), rel=1e-5)
    assert torch.allclose(tracks.gop_band_energy[1], longer.band_energy, rtol=1e-4)
    mine = (tracks.coefficient_gop == 1) & ~tracks.is_impulse
    values = longer.coefficients[tracks.coefficient_band[mine], tracks.coefficient_cell[mine]]
    assert mine.any() and torch.allclose(tracks.coefficient_values[mine], values, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_a_gop_whose_anchor_moves_has_frames_for_every_coefficient_and_an_impulse(seed):
    rng = random.Random(seed)
    settings = make_settings(events=True, anchors=rng.randint(1, 12), max_coefficients=rng.randint(1, 8))
    plan = plan_budget(rng.randint(12, 200), (8, 8), settings, rng.randint(100, 800))
    reach, length = _choose_reach(plan), plan.num_frames // plan.num_anchors
    assert 0 <= reach <= max(1, length // 4)
    assert reach == 0 or length - reach - 1 >= plan.num_coefficients + 1


def test_below_its_own_budget_a_preset_ranks_the_same_coefficients():
    settings = make_settings(max_coefficients=16, reference_budget_tokens=1200, pooled_side=8)
    plans = [plan_budget(400, (16, 16), settings, budget) for budget in (300, 450, 600, 800, 1200)]
    assert {plan.num_anchors for plan in plans} == {4}
    assert {plan.num_coefficients for plan in plans} == {5}, "fewer than the setting allows"


def test_a_uniform_anchor_stays_where_the_cut_is_far_or_the_first_frame_would_be_lost():
    for cut, anchors in ((24, [0, 10, 20, 24, 30]), (1, [0, 1, 10, 20, 30]), (20, [0, 10, 20, 30])):
        latents = torch.cat([smooth_clip(60, (6, 6), seed=1)[:cut], smooth_clip(40 - cut, (6, 6), seed=2)])
        tracks, _, _ = compress(latents, 300, events=True, tau=0.4, reference_budget_tokens=300)
        assert tracks.gop_anchor_frame.tolist() == anchors
        assert gop_ends(tracks) == [*anchors[1:], 40]


def test_memory_of_a_gop_does_not_grow_with_its_length():
    latents = smooth_clip(3000, (3, 3), width=4)
    tracks, _, _ = compress(latents, 60, anchors=1, reference_budget_tokens=60)
    assert int(tracks.gop_num_bins.max()) <= MAX_TIME_BINS
    assert int(tracks.gop_bin_frames.max()) > 1
    assert report_energy(tracks).clip_kept > 0.5


def test_what_weak_cuts_leave_lies_side_by_side():
    """A film of hours has thousands of cuts. Small tensors between large ones that are gone would keep the heap in pieces."""
    settings = make_settings(events=True, tau=0.4, reference_budget_tokens=300)
    compressor = StreamingCompressor(plan_budget(400, (3, 3), settings, 300), settings, 8)
    compressor.push(torch.cat([smooth_clip(4, (3, 3), width=8, seed=n) for n in range(100)]), range(400))
    compressor.finish()
    left = [gop for gop in compressor._gops if gop.anchor is None and not len(gop.base)]
    stores = {t.untyped_storage().data_ptr() for gop in left for t in vars(gop).values() if isinstance(t, torch.Tensor)}
    assert len(left) > 30 and len(stores) <= 4


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_bundle_holds_a_prefix_of_what_it_held(variant):
    latents = smooth_clip(40, (8, 8))
    tracks, _, settings = compress(latents, 400, variant=variant)
    before = tracks.num_tokens_by_kind()
    for budget in (399, 200, 77, 5, 1):
        cut = cut_tracks(tracks, settings, budget)
        used = len(build_tokens(cut, variant))
        assert used <= budget
        assert used >= 0.98 * min(budget, sum(before.values()))
        for name in ("anchor_cell", "coefficient_energy", "static_cell", "summary_gop"):
            kept = getattr(cut, name)
            assert torch.equal(kept, getattr(tracks, name)[: kept.shape[0]])
    assert cut_tracks(tracks, settings, 400) is tracks


def test_a_clip_of_nothing_but_cuts_still_fills_a_cut_bundle():
    latents = torch.randn(30, 6, 6, 8, generator=torch.Generator().manual_seed(4))
    tracks, _, settings = compress(latents, 265, events=True, tau=0.05)
    total = sum(tracks.num_tokens_by_kind().values())
    for budget in (1, 3, total - 8, total - 1):
        assert 0.98 * budget <= len(build_tokens(cut_tracks(tracks, settings, budget))) <= budget


def test_cuts_that_found_no_room_take_no_more_of_a_cut_bundle_than_of_a_whole_one():
    latents = torch.cat([smooth_clip(9, (6, 6), seed=s) * (1 + 0.2 * s) for s in range(12)])
    tracks, _, settings = compress(latents, 100, anchors=1, reference_budget_tokens=100, events=True, tau=0.3)
    for budget in (50, 33, 20):
        cut = cut_tracks(tracks, settings, budget)
        demoted = int((cut.gop_start[cut.summary_gop] == 2).sum())
        assert 0 < demoted <= DEMOTED_SUMMARY_SHARE * (budget - cut.anchor_gop.shape[0])
