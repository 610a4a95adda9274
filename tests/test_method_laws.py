"""The laws of the method, against scipy and against what the numbers of the paper force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from scipy.fft import dct as scipy_dct

from freres_cli.method.anchors import EventDetector, anchor_schedule, prune_order, spread_order
from freres_cli.method.budget import MethodSettings, plan_budget
from freres_cli.method.compress import StreamingCompressor, compress_latents
from freres_cli.method.dct import dct_basis_at, inverse_temporal_dct, null_energy_share, temporal_dct
from freres_cli.method.energy import report_energy
from freres_cli.method.residuals import (
    MAX_TIME_BINS,
    ResidualTrajectory,
    cell_areas,
    cell_centres,
    pool_to_cells,
)
from freres_cli.method.select import cut_tracks
from freres_cli.method.tokens import ANCHOR, DYNAMIC, STATIC, SUMMARY, build_tokens
from freres_cli.presets import VARIANTS


def make_settings(**changes) -> MethodSettings:
    values = dict(
        variant="absorber",
        reference_budget_tokens=400,
        anchors=4,
        keep_per_block=8,
        temporal_share=0.3,
        static_per_gop=2,
        pooled_side=4,
        max_coefficients=4,
        tau=None,
        events=False,
    )
    return MethodSettings(**{**values, **changes})


def smooth_clip(num_frames: int, grid: tuple[int, int], width: int = 16, seed: int = 0) -> torch.Tensor:
    """Latents that drift smoothly in the middle of the grid and stand still elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(*grid, width, generator=generator) + 3.0
    drift = torch.randn(*grid, width, generator=generator)
    mask = torch.zeros(*grid, 1)
    mask[grid[0] // 4 : max(1, 3 * grid[0] // 4), grid[1] // 4 : max(1, 3 * grid[1] // 4)] = 1.0
    t = torch.linspace(0, 1, num_frames)[:, None, None, None]
    noise = 1e-3 * torch.randn(num_frames, *grid, width, generator=generator)
    return still + torch.sin(3 * t) * drift * mask + noise


def compress(latents: torch.Tensor, budget: int, **changes):
    settings = make_settings(**changes)
    plan = plan_budget(latents.shape[0], tuple(latents.shape[1:3]), settings, budget)
    seconds = [i / 10 for i in range(latents.shape[0])]
    return compress_latents(latents, seconds, plan, settings, latents.shape[-1]), plan, settings


# --- DCT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 29, 128])
def test_dct_equals_scipy_and_keeps_energy(length):
    x = torch.randn(length, 5, 3, dtype=torch.float32)
    got = temporal_dct(x, length)
    expected = scipy_dct(x.numpy(), type=2, norm="ortho", axis=0)
    assert np.abs(got.numpy() - expected).max() < 1e-5
    assert torch.allclose(got.square().sum(), x.square().sum(), rtol=1e-5)
    assert (inverse_temporal_dct(got, length) - x).abs().max() < 1e-5


def test_dct_refuses_more_coefficients_than_samples():
    with pytest.raises(ValueError, match=r"expected 1\.\.3, got 4"):
        temporal_dct(torch.zeros(3, 1), 4)


def test_basis_between_samples_passes_through_the_samples():
    length = 9
    bands = torch.arange(length)[:, None]
    assert torch.equal(
        dct_basis_at(torch.arange(length)[None], length, bands),
        dct_basis_at(torch.arange(length, dtype=torch.float64)[None], length, bands),
    )
    halves = dct_basis_at(torch.arange(length - 1)[None] + 0.5, length, bands[:2])
    whole = dct_basis_at(torch.arange(length)[None], length, bands[:2])
    assert ((halves[1] < whole[1, :-1]) & (halves[1] > whole[1, 1:])).all(), "band 1 falls all the way"


def test_null_spectrum_is_that_of_independent_frames():
    length, runs = 16, 4000
    frames = torch.randn(runs, length + 1, generator=torch.Generator().manual_seed(1))
    spectrum = temporal_dct((frames[:, 1:] - frames[:, :1]).T, length).square().mean(1)
    measured = (spectrum.cumsum(0) / spectrum.sum())[[0, 1, 2, 4]]
    derived = torch.tensor([null_energy_share(length, k) for k in (1, 2, 3, 5)])
    assert (measured - derived).abs().max() < 0.02


# --- pooling, residuals -----------------------------------------------------------------------------------------------


def test_pooling_to_as_many_cells_as_tokens_changes_nothing():
    x = torch.randn(3, 5, 7, 4)
    assert torch.equal(pool_to_cells(x, 5, 7), x.flatten(1, 2))


@pytest.mark.parametrize(("grid", "cells"), [((24, 24), (4, 4)), ((9, 9), (4, 4)), ((5, 7), (2, 3)), ((1, 1), (1, 1))])
def test_cells_are_disjoint_and_cover_the_grid(grid, cells):
    areas = cell_areas(*grid, *cells)
    assert int(areas.sum()) == grid[0] * grid[1] and int(areas.min()) >= 1
    x = torch.randn(*grid, 3)
    weighted = (pool_to_cells(x, *cells) * areas[:, None]).sum(0) / areas.sum()
    assert torch.allclose(weighted, x.mean((0, 1)), atol=1e-5)
    h, w = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    where = torch.stack([h, w], dim=-1).float()
    assert torch.allclose(pool_to_cells(where, *cells), cell_centres(*grid, *cells), atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 5, MAX_TIME_BINS, MAX_TIME_BINS + 1, 1000])
def test_trajectory_is_bounded_and_keeps_mean_and_energy(num_frames):
    residuals = torch.randn(num_frames, 2, 3, dtype=torch.float64)
    trajectory = ResidualTrajectory()
    for residual in residuals:
        trajectory.append(residual, float(residual.square().sum()))
    assert trajectory.num_frames == num_frames and trajectory.num_bins() <= MAX_TIME_BINS
    assert trajectory.bin_energies().sum().item() == pytest.approx(float(residuals.square().sum()), rel=1e-6)
    first = residuals[: trajectory.bin_frames].mean(0)
    assert torch.allclose(trajectory.bins()[0], first)
    if num_frames <= MAX_TIME_BINS:
        assert torch.equal(trajectory.bins(), residuals)


# --- anchors ----------------------------------------------------------------------------------------------------------


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


def test_ties_fall_to_raster_order():
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


def test_cuts_are_found_and_drift_is_not():
    a, b = smooth_clip(30, (6, 6), seed=1), smooth_clip(30, (6, 6), seed=2)
    detector = EventDetector(None)
    events = [i for i, frame in enumerate(torch.cat([a, b])) if detector.observe(frame)[1]]
    assert events == [30]


def test_a_shared_component_does_not_hide_a_cut():
    common = 50.0 * torch.randn(16, generator=torch.Generator().manual_seed(5))
    clip = torch.cat([smooth_clip(30, (6, 6), seed=1), smooth_clip(30, (6, 6), seed=2)]) + common
    raw = torch.nn.functional.cosine_similarity(clip[29].flatten(), clip[30].flatten(), dim=0)
    assert raw > 0.99, "the raw distance says nothing"
    detector = EventDetector(None)
    assert [i for i, frame in enumerate(clip) if detector.observe(frame)[1]] == [30]


def test_still_frames_are_no_events_and_where_every_step_is_a_cut_none_stands_out():
    detector = EventDetector(None)
    assert not any(detector.observe(torch.ones(4, 4, 8))[1] for _ in range(20))
    detector = EventDetector(None)
    generator = torch.Generator().manual_seed(0)
    noise = [detector.observe(torch.randn(8, 8, 8, generator=generator))[1] for _ in range(40)]
    assert sum(noise) <= 1


def test_a_whip_pan_is_one_event():
    detector = EventDetector(None)
    background = 1.5 * (smooth_clip(1, (6, 6), seed=9)[0] - 3.0)
    clip = [*smooth_clip(20, (6, 6)), *(torch.roll(smooth_clip(1, (6, 6))[0], s, 1) for s in range(1, 6))]
    distances, events = zip(*(detector.observe(background + frame) for frame in clip), strict=True)
    assert min(distances[20:]) > 0.2, "every step of the pan is long"
    assert [i for i, is_event in enumerate(events) if is_event] == [20]


# --- compression ------------------------------------------------------------------------------------------------------


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
def test_untrained_anchors_are_bit_for_bit_and_counts_are_told_right(variant):
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


@pytest.mark.parametrize("seed", range(4))
def test_budget_is_never_exceeded_and_is_used(seed):
    """500 random clips in all: at most the budget, at least 98 % of it where the clip has that many tokens."""
    chooser = random.Random(seed)
    for _ in range(125):
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


def test_a_budget_of_one_token_is_legal():
    tracks, _, _ = compress(smooth_clip(12, (6, 6)), 1)
    assert len(build_tokens(tracks)) == 1


@pytest.mark.parametrize("events", [False, True])
def test_chunks_give_what_the_whole_gives(events):
    latents = torch.cat([smooth_clip(33, (6, 6), seed=1), smooth_clip(20, (6, 6), seed=2)])
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


def test_identical_frames_give_no_dynamic_tokens_and_no_division_by_zero():
    latents = smooth_clip(1, (8, 8)).expand(30, -1, -1, -1)
    tracks, _, _ = compress(latents, 300)
    tokens = build_tokens(tracks)
    assert not (tokens.kind == DYNAMIC).any()
    assert tokens.latents.isfinite().all()
    report = report_energy(tracks)
    assert report.clip_kept is None and report.spectrum == ()


def test_memory_of_a_gop_does_not_grow_with_its_length():
    latents = smooth_clip(3000, (3, 3), width=4)
    tracks, _, _ = compress(latents, 60, anchors=1, reference_budget_tokens=60)
    assert int(tracks.gop_num_bins.max()) <= MAX_TIME_BINS
    assert int(tracks.gop_bin_frames.max()) > 1
    assert report_energy(tracks).clip_kept > 0.5


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


def test_coefficients_are_ordered_by_energy_and_the_best_are_kept():
    latents = smooth_clip(40, (8, 8))
    tracks, _, _ = compress(latents, 300)
    energy = tracks.coefficient_energy
    assert (energy[:-1] >= energy[1:]).all()
    more, _, _ = compress(latents, 300, temporal_share=0.6)
    assert more.coefficient_energy[0] == energy[0] or more.gop_anchor_frame.shape != tracks.gop_anchor_frame.shape
    assert report_energy(tracks).clip_kept >= 0.9


# --- what was lost ----------------------------------------------------------------------------------------------------


def test_the_loss_of_every_second_is_the_reconstruction_error():
    latents = torch.randn(24, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    tracks, _, _ = compress(latents, 120, anchors=2, reference_budget_tokens=120)
    pooled = pool_to_cells(latents, 4, 4)
    report = report_energy(tracks, num_losses=1000)
    total_error, edges = 0.0, [*tracks.gop_anchor_frame.tolist(), 24]
    for gop, (low, high) in enumerate(itertools.pairwise(edges)):
        residual = pooled[low + 1 : high] - pooled[low]
        length = residual.shape[0]
        dense = torch.zeros(length, 16, 6)
        mine = tracks.coefficient_gop == gop
        dense[tracks.coefficient_band[mine], tracks.coefficient_cell[mine]] = tracks.coefficient_values[mine]
        error = (residual - inverse_temporal_dct(dense, length)).square().sum((1, 2))
        total_error += float(error.sum())
    told = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in report.losses)
    assert told == pytest.approx(total_error, rel=1e-3)
    kept = float(tracks.coefficient_energy.sum())
    assert kept / (kept + total_error) == pytest.approx(report.clip_kept, rel=1e-3)
    rates = [loss.lost_energy_per_s for loss in report.losses]
    assert rates == sorted(rates, reverse=True)


def test_the_reported_spectrum_is_that_of_the_pooled_residuals():
    latents = smooth_clip(24, (4, 4), width=6)
    tracks, _, _ = compress(latents, 120, anchors=2, reference_budget_tokens=120)
    pooled = pool_to_cells(latents, 4, 4)
    energies = torch.zeros(8)
    for low, high in itertools.pairwise([*tracks.gop_anchor_frame.tolist(), 24]):
        spectrum = scipy_dct((pooled[low + 1 : high] - pooled[low]).numpy(), type=2, norm="ortho", axis=0)
        energies += torch.tensor((spectrum**2).sum((1, 2))[:8])
    total = float(tracks.gop_pooled_energy.sum())
    assert report_energy(tracks).spectrum == pytest.approx((energies.cumsum(0) / total).tolist(), rel=1e-4)


def test_what_is_dropped_is_freed():
    from freres_cli.method.gop import OpenGop

    latents = smooth_clip(12, (6, 6))
    gop = OpenGop(0, latents[0].clone(), 16, (3, 3), 1, 0.5)
    for frame in latents[1:]:
        gop.append(frame, pool_to_cells(frame, 3, 3))
    closed = gop.close(2)
    assert closed.coefficients.untyped_storage().nbytes() == closed.coefficients.nbytes
    closed.drop_residuals()
    for name in ("coefficients", "energies", "segments", "base"):
        assert getattr(closed, name).untyped_storage().nbytes() == 0, name


def test_a_clip_of_nothing_but_cuts_still_fills_a_cut_bundle():
    latents = torch.randn(30, 6, 6, 8, generator=torch.Generator().manual_seed(4))
    tracks, _, settings = compress(latents, 265, events=True, tau=0.05)
    total = sum(tracks.num_tokens_by_kind().values())
    for budget in (1, 3, total - 8, total - 1):
        assert 0.98 * budget <= len(build_tokens(cut_tracks(tracks, settings, budget))) <= budget
