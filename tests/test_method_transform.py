"""The transform: pooling, residual trajectories, the DCT of a GoP and its inverse, against scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dct as scipy_dct
from scipy.fft import idct as scipy_idct

from freres_cli.method.budget import Allocation, BudgetPlan
from freres_cli.method.compress import compress_latents
from freres_cli.method.dct import choose_instants, dct_basis_at, null_energy_share
from freres_cli.method.residuals import (
    MAX_TIME_BINS,
    ResidualTrajectory,
    cell_areas,
    cell_centres,
    pool_to_cells,
)
from freres_cli.method.tokens import evaluate_dynamic, order_dynamic
from freres_cli.tracks import Tracks
from tests.compressed_clips import close_gop, make_settings, smooth_clip

GRIDS = [((3, 4), (3, 4)), ((6, 5), (2, 3)), ((9, 9), (4, 4)), ((2, 2), (1, 1))]


def make_frames(length: int, grid: tuple[int, int], channels: int = 6) -> torch.Tensor:
    """An anchor and ``length`` residual frames, all independent: (1 + length, H, W, C)."""
    generator = torch.Generator().manual_seed(length)
    frames = torch.randn(1 + length, *grid, channels, generator=generator)
    # What all residuals share adds up in the first coefficient; float32 has no digits to spare for a large anchor.
    frames[0] *= 0.1
    return frames


def pooled_residuals(frames: torch.Tensor, pooled: tuple[int, int]) -> torch.Tensor:
    """What the transform sees: cells of each frame minus those of the anchor, (L, P, C)."""
    cells = pool_to_cells(frames, *pooled)
    return cells[1:] - cells[:1]


def some_counts(length: int) -> list[int]:
    """K: the first coefficient, half of them, all of them."""
    return sorted({1, (length + 1) // 2, length})


# --- DCT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "pooled"), GRIDS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 29, 128])
def test_coefficients_of_a_gop_equal_scipys_dct(length, grid, pooled):
    frames = make_frames(length, grid)
    expected = scipy_dct(pooled_residuals(frames, pooled).numpy(), type=2, norm="ortho", axis=0)
    for count in some_counts(length):
        closed = close_gop(frames, pooled, count, width=6)
        assert closed.bin_frames == 1 and closed.num_bins == closed.num_residuals == length
        assert closed.coefficients.shape == (count, pooled[0] * pooled[1], 6)
        assert np.abs(closed.coefficients.numpy() - expected[:count]).max() < 1e-5


@pytest.mark.parametrize(("grid", "pooled"), GRIDS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 29, 128])
def test_all_coefficients_of_a_gop_keep_all_energy_and_give_the_residuals_back(length, grid, pooled):
    frames = make_frames(length, grid)
    residuals = pooled_residuals(frames, pooled)
    closed = close_gop(frames, pooled, length, width=6)
    assert torch.allclose(closed.coefficients.square().sum(), residuals.square().sum(), rtol=1e-5)
    assert closed.energies.sum().item() == pytest.approx(float(closed.pooled_energy), rel=1e-5)
    back = scipy_idct(closed.coefficients.numpy(), type=2, norm="ortho", axis=0)
    assert np.abs(back - residuals.numpy()).max() < 1e-5


def test_energies_are_those_of_the_main_channels_and_of_all_tokens_of_a_cell():
    frames = make_frames(16, (6, 5))
    closed = close_gop(frames, (2, 3), 16, width=2)
    spectrum = scipy_dct(pooled_residuals(frames, (2, 3)).numpy(), type=2, norm="ortho", axis=0)
    assert np.abs(closed.coefficients.numpy() - spectrum).max() < 1e-5, "every channel is transformed"
    areas = cell_areas(6, 5, 2, 3)
    energies = torch.from_numpy(spectrum[..., :2]).square().sum(-1) * areas / areas.mean()
    assert torch.allclose(closed.energies, energies, rtol=1e-4)
    assert torch.allclose(closed.band_energy, energies.sum(1)[:8], rtol=1e-4)


@pytest.mark.parametrize("pooled", [(6, 5), (2, 3)])
def test_impulses_are_the_frames_that_the_coefficients_miss_most(pooled):
    frames = make_frames(16, (6, 5))
    residuals, areas = pooled_residuals(frames, pooled), cell_areas(6, 5, *pooled)
    spectrum = scipy_dct(residuals.numpy(), type=2, norm="ortho", axis=0)
    spectrum[5:] = 0
    missed = (residuals - torch.from_numpy(scipy_idct(spectrum, type=2, norm="ortho", axis=0))).square().sum(-1)
    closed = close_gop(frames, pooled, 5, width=6)
    assert torch.equal(closed.impulse_bins, missed.argmax(0))
    assert torch.allclose(closed.impulse_energies, missed.amax(0) * areas / areas.mean(), rtol=1e-4)
    assert torch.equal(closed.impulses, residuals[closed.impulse_bins, torch.arange(len(areas))])
    assert not close_gop(frames, pooled, 16, width=6).impulse_bins.numel(), "all coefficients miss nothing"


@pytest.mark.parametrize("pooled", [(6, 5), (2, 3), (4, 4)])
def test_the_summary_of_a_gop_is_that_of_its_mean_token(pooled):
    """Every token of a frame counts once, whatever the areas of cells."""
    frames = make_frames(16, (6, 5))
    closed = close_gop(frames, pooled, 16, width=6)
    assert torch.allclose(closed.summary_base, frames[0].mean((0, 1)), atol=1e-5)
    expected = scipy_dct((frames[1:] - frames[0]).mean((1, 2)).numpy(), type=2, norm="ortho", axis=0)
    assert np.abs(closed.summary_spectrum.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("length", [1, 16, MAX_TIME_BINS, MAX_TIME_BINS + 72])
def test_the_means_of_cells_are_those_of_all_residual_frames(length):
    """Static tokens are these means, also where frames share a time bin."""
    frames = make_frames(length, (6, 5))
    means = close_gop(frames, (2, 3), 1, width=6).means
    assert torch.allclose(means, pool_to_cells(frames[1:], 2, 3).mean(0), atol=1e-5)


def test_a_gop_has_no_more_coefficients_than_residual_frames():
    assert close_gop(make_frames(3, (2, 2)), (2, 2), 4, width=6).coefficients.shape == (3, 4, 6)
    assert close_gop(make_frames(0, (2, 2)), (2, 2), 4, width=6).coefficients.shape == (0, 4, 6)


def test_coefficients_of_a_binned_gop_are_those_of_its_bin_means():
    frames = make_frames(MAX_TIME_BINS + 72, (2, 3))
    closed = close_gop(frames, (2, 3), 5, width=6)
    assert closed.bin_frames == 2 and closed.num_bins == 100
    means = pooled_residuals(frames, (2, 3)).unflatten(0, (100, 2)).mean(1)
    expected = 2**0.5 * scipy_dct(means.numpy(), type=2, norm="ortho", axis=0)[:5]
    assert np.abs(closed.coefficients.numpy() - expected).max() < 1e-5


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
    closed = close_gop(frames.T.reshape(length + 1, 1, 1, runs), (1, 1), length, width=runs)
    spectrum = closed.coefficients.square().mean((1, 2))
    measured = (spectrum.cumsum(0) / spectrum.sum())[[0, 1, 2, 4]]
    derived = torch.tensor([null_energy_share(length, k) for k in (1, 2, 3, 5)])
    assert (measured - derived).abs().max() < 0.02


# --- the inverse ------------------------------------------------------------------------------------------------------


def compress_with_coefficients(frames: torch.Tensor, pooled: tuple[int, int], count: int) -> Tracks:
    """The tracks of one GoP with the first ``count`` coefficients of every cell, and without static tokens or impulses."""
    num_frames, *grid, channels = frames.shape
    anchor, dynamic = grid[0] * grid[1], count * pooled[0] * pooled[1]
    plan = BudgetPlan(
        budget_tokens=anchor + dynamic + 1,
        num_frames=num_frames,
        grid=(grid[0], grid[1]),
        pooled_grid=pooled,
        num_anchors=1,
        max_events=0,
        anchor_target_tokens=anchor,
        num_coefficients=count,
        expected=Allocation(anchor, dynamic, 0, 1),
        is_lossless=False,
    )
    return compress_latents(frames, range(num_frames), plan, make_settings(static_per_gop=0, variant="idct"), channels)


@pytest.mark.parametrize(("grid", "pooled"), GRIDS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 29, 128])
def test_dynamic_tokens_are_the_anchor_plus_scipys_inverse_of_the_kept_coefficients(length, grid, pooled):
    """The first m coefficients at m even instants are the inverse transform of m points, scaled by sqrt(m / L)."""
    frames = make_frames(length, grid)
    cells = pool_to_cells(frames, *pooled)
    spectrum = scipy_dct((cells[1:] - cells[:1]).numpy(), type=2, norm="ortho", axis=0)
    for count in some_counts(length):
        tracks = compress_with_coefficients(frames, pooled, count)
        runs = order_dynamic(tracks)
        assert runs.order.shape[0] == count * pooled[0] * pooled[1], "every coefficient is kept"
        tokens = evaluate_dynamic(tracks, runs).unflatten(0, (-1, count))
        inverse = scipy_idct(spectrum[:count], type=2, norm="ortho", axis=0) * (count / length) ** 0.5
        expected = cells[0] + torch.from_numpy(inverse)
        assert (tokens - expected.transpose(0, 1)).abs().max() < 1e-5
        if count == length:
            assert torch.equal(runs.instants.unflatten(0, (-1, length))[0], torch.arange(length).to(torch.float64))
            assert (tokens - cells[1:].transpose(0, 1)).abs().max() < 1e-5, "whole instants give base + residual"


def test_dynamic_tokens_of_a_binned_gop_follow_its_bin_means():
    frames = make_frames(MAX_TIME_BINS + 72, (2, 3))
    tracks = compress_with_coefficients(frames, (2, 3), 5)
    assert tracks.gop_bin_frames.tolist() == [2]
    means = pooled_residuals(frames, (2, 3)).unflatten(0, (100, 2)).mean(1)
    spectrum = scipy_dct(means.numpy(), type=2, norm="ortho", axis=0)[:5]
    inverse = torch.from_numpy(scipy_idct(spectrum, type=2, norm="ortho", axis=0)) * (5 / 100) ** 0.5
    tokens = evaluate_dynamic(tracks, order_dynamic(tracks)).unflatten(0, (-1, 5))
    assert (tokens - (frames[0].flatten(0, 1) + inverse).transpose(0, 1)).abs().max() < 1e-5


def keep_bands(tracks: Tracks, keep: torch.Tensor) -> Tracks:
    """Tracks without the other coefficients. ``keep``: (n,) bool."""
    return replace(tracks, **{name: t[keep] for name, t in tracks.tensors().items() if name.startswith("coefficient")})


@pytest.mark.parametrize("length", [8, 11, 40, MAX_TIME_BINS + 72])
def test_the_tokens_of_a_cell_tell_its_coefficients_whichever_bands_are_kept(length):
    """One cell for each set of the first eight bands: m tokens minus the I-token give the m coefficients back."""
    frames = make_frames(length, (16, 16), channels=3)
    tracks = compress_with_coefficients(frames, (16, 16), 8)
    tracks = keep_bands(tracks, (tracks.coefficient_cell >> tracks.coefficient_band) & 1 == 1)
    runs = order_dynamic(tracks)
    residuals = evaluate_dynamic(tracks, runs).double() - pool_to_cells(frames, 16, 16)[0][runs.cell]
    samples = int(tracks.gop_num_bins[0] * tracks.gop_bin_frames[0])
    for cell in range(1, 256):
        mine = runs.cell == cell
        bands, instants = tracks.coefficient_band[runs.order[mine]], runs.instants[mine]
        assert (instants.diff() > 0).all() and instants[0] + 0.5 >= 0 and instants[-1] + 0.5 <= length
        waves = torch.cos(torch.pi * bands * (2 * instants[:, None] + 1) / (2 * samples)) * (2 / samples) ** 0.5
        waves[:, bands == 0] /= 2**0.5
        strength = torch.linalg.svdvals(waves * (samples / len(bands)) ** 0.5)
        assert strength[-1] > 0.1 * strength[0], bands.tolist()
        values = tracks.coefficient_values[runs.order[mine]].double()
        assert torch.allclose(torch.linalg.solve(waves, residuals[mine]), values, atol=1e-3), bands.tolist()


def test_a_lone_band_never_gives_the_i_token():
    frames = make_frames(16, (4, 4))
    whole = compress_with_coefficients(frames, (4, 4), 8)
    for band in range(8):
        tracks = keep_bands(whole, whole.coefficient_band == band)
        runs = order_dynamic(tracks)
        moved = (evaluate_dynamic(tracks, runs) - pool_to_cells(frames, 4, 4)[0][runs.cell]).norm(dim=1)
        energy = tracks.coefficient_energy[runs.order]
        assert (moved > 0.8 * (energy / 16).sqrt()).all(), "a wave's mean strength over its GoP"
        plain = replace(tracks, gop_recipe=torch.zeros_like(tracks.gop_recipe))
        assert order_dynamic(plain).instants.unique().tolist() == [7.5], "bundles of versions 1 and 2: in the middle"


def test_of_instants_that_show_a_wave_alike_the_later_is_taken():
    """Each of these waves is strongest at both instants in the middle; the anchor tells what came before."""
    assert [choose_instants(torch.tensor([band])).tolist() for band in (1, 3, 5)] == [[1], [2], [3]]


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
        trajectory.append(residual, residual.square().sum())
    assert trajectory.num_frames == num_frames and trajectory.num_bins() <= MAX_TIME_BINS
    assert trajectory.bin_energies().sum().item() == pytest.approx(float(residuals.square().sum()), rel=1e-6)
    first = residuals[: trajectory.bin_frames].mean(0)
    assert torch.allclose(trajectory.bins()[0], first)
    last = residuals[(trajectory.num_bins() - 1) * trajectory.bin_frames :].mean(0)
    assert torch.allclose(trajectory.bins()[-1], last), "also of a bin that is not full"
    if num_frames <= MAX_TIME_BINS:
        assert torch.equal(trajectory.bins(), residuals)


def test_what_is_dropped_is_freed():
    latents = smooth_clip(12, (6, 6))
    closed = close_gop(latents, (3, 3), 2, width=16)
    assert closed.coefficients.untyped_storage().nbytes() == closed.coefficients.nbytes
    closed.drop_residuals()
    for name in ("coefficients", "energies", "segments", "base", "means"):
        assert getattr(closed, name).untyped_storage().nbytes() == 0, name
