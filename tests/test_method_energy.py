"""What compression reports about kept and lost energy, against scipy's transform of the pooled residuals."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.fft import dct as scipy_dct
from scipy.fft import idct as scipy_idct

from freres_cli.method.energy import report_energy
from freres_cli.method.residuals import cell_edges, pool_to_cells
from freres_cli.method.tokens import build_tokens
from freres_cli.records import TOKEN_KINDS
from freres_cli.tracks import IMPULSE
from tests.compressed_clips import compress, smooth_clip


def rebuild(tracks, gop, length):
    """What the kept coefficients and impulses of 16 cells hold of a GoP's residual frames: (length, 16, 6)."""
    dense = torch.zeros(length, 16, 6)
    waves = (tracks.coefficient_gop == gop) & ~tracks.is_impulse
    dense[tracks.coefficient_band[waves], tracks.coefficient_cell[waves]] = tracks.coefficient_values[waves]
    rebuilt = torch.from_numpy(scipy_idct(dense.numpy(), type=2, norm="ortho", axis=0))
    sharp = (tracks.coefficient_gop == gop) & tracks.is_impulse
    rebuilt[tracks.coefficient_band[sharp] - IMPULSE, tracks.coefficient_cell[sharp]] = tracks.coefficient_values[sharp]
    return rebuilt


def test_the_loss_of_every_second_is_the_reconstruction_error():
    latents = torch.randn(24, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    tracks, _, _ = compress(latents, 120, anchors=2, reference_budget_tokens=120)
    pooled = pool_to_cells(latents, 4, 4)
    report = report_energy(tracks)
    total_error, edges = 0.0, [*tracks.gop_anchor_frame.tolist(), 24]
    for gop, (low, high) in enumerate(itertools.pairwise(edges)):
        residual = pooled[low + 1 : high] - pooled[low]
        length = residual.shape[0]
        rebuilt = rebuild(tracks, gop, length)
        error = (residual - rebuilt).square().sum((1, 2))
        total_error += float(error.sum())
    told = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in report.losses)
    assert told == pytest.approx(total_error, rel=1e-3)
    assert 1 - total_error / float(tracks.gop_pooled_energy.sum()) == pytest.approx(report.clip_kept, rel=1e-3)
    assert 0 < tracks.is_impulse.sum() < len(tracks.is_impulse), "some of each kind"
    rates = [loss.lost_energy_per_s for loss in report.losses]
    assert rates == sorted(rates, reverse=True)


def hold_by_bin(tracks, gop):
    """What the kept coefficients and impulses of 16 cells hold of each residual frame of a GoP, bin by bin: (L, 16, 6)."""
    mine = tracks.coefficient_gop == gop
    waves, sharp = mine & ~tracks.is_impulse, mine & tracks.is_impulse
    dense = torch.zeros(int(tracks.gop_num_bins[gop]), 16, 6)
    dense[tracks.coefficient_band[waves], tracks.coefficient_cell[waves]] = tracks.coefficient_values[waves]
    bin_frames = int(tracks.gop_bin_frames[gop])
    held = torch.from_numpy(scipy_idct(dense.numpy(), type=2, norm="ortho", axis=0)) / bin_frames**0.5
    held[tracks.coefficient_band[sharp] - IMPULSE, tracks.coefficient_cell[sharp]] = tracks.coefficient_values[sharp]
    return held[torch.arange(int(tracks.gop_num_residuals[gop])) // bin_frames]


@pytest.mark.parametrize("num_frames", [1100, 1101, 1107, 2100])
def test_a_last_time_bin_that_is_not_full_counts_for_the_frames_it_holds(num_frames):
    """In a long GoP each bin is a few frames. What changes late makes the last bin matter most."""
    generator = torch.Generator().manual_seed(4)
    rise = torch.linspace(0, 1, num_frames)[:, None, None, None] ** 40
    latents = torch.randn(4, 4, 6, generator=generator) + rise * torch.randn(4, 4, 6, generator=generator)
    tracks, _, _ = compress(latents, 60, anchors=2, reference_budget_tokens=60)
    edges, error, energy = [*tracks.gop_anchor_frame.tolist(), num_frames], 0.0, 0.0
    assert int(tracks.gop_bin_frames.min()) > 1 and len(edges) == 3
    for gop, (low, high) in enumerate(itertools.pairwise(edges)):
        residual = (latents[low + 1 : high] - latents[low]).flatten(1, 2)
        error += float((residual - hold_by_bin(tracks, gop)).square().sum())
        energy += float(residual.square().sum())
        means = latents[low + 1 : high].mean(0).flatten(0, 1)[tracks.static_cell[tracks.static_gop == gop]]
        assert torch.allclose(tracks.static_latents[tracks.static_gop == gop], means, atol=1e-5)
    report = report_energy(tracks)
    lost = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in report.losses)
    assert lost == pytest.approx(error, rel=2e-3) and len(tracks.static_gop)
    assert report.clip_kept == pytest.approx(1 - error / energy, rel=2e-3) and 0.05 < report.clip_kept < 0.999


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


def blocks_that_move(num_frames, grid, pooled, width=6):
    """Every token of a cell moves alike, so that pooling loses nothing, whatever the sizes of the cells."""
    generator = torch.Generator().manual_seed(3)
    still = torch.randn(*grid, width, generator=generator)
    moves = torch.randn(num_frames, *pooled, width, generator=generator).cumsum(0)
    heights, widths = (torch.tensor(cell_edges(size, count)).diff() for size, count in zip(grid, pooled, strict=True))
    return still + moves.repeat_interleave(heights, 1).repeat_interleave(widths, 2)


def test_where_pooling_loses_nothing_all_energy_is_left_whatever_the_areas_of_cells():
    """A share above one is reported as one, so only what moves most in the large cells shows an error."""
    latents = blocks_that_move(24, (7, 13), (4, 4))
    latents[:, :5] = latents[:1, :5]
    latents[:, :, :9] = latents[:1, :, :9]
    tracks, _, _ = compress(latents, 300, anchors=2, reference_budget_tokens=300)
    assert report_energy(tracks).pooling_kept == pytest.approx(1.0, abs=1e-5)


def test_energies_and_losses_count_every_token_of_uneven_cells():
    """Energies are those of the tokens that the cells stand for, in units of a cell of mean area."""
    latents = blocks_that_move(24, (7, 13), (4, 4))
    tracks, _, _ = compress(latents, 150, anchors=2, reference_budget_tokens=150)
    mean_area = 7 * 13 / 16
    error, total, edges = 0.0, 0.0, [*tracks.gop_anchor_frame.tolist(), 24]
    heights, widths = torch.tensor(cell_edges(7, 4)).diff(), torch.tensor(cell_edges(13, 4)).diff()
    for gop, (low, high) in enumerate(itertools.pairwise(edges)):
        rebuilt = rebuild(tracks, gop, high - low - 1)
        spread = rebuilt.unflatten(1, (4, 4)).repeat_interleave(heights, 1).repeat_interleave(widths, 2)
        residual = latents[low + 1 : high] - latents[low]
        error += float((residual - spread).square().sum()) / mean_area
        total += float(residual.square().sum()) / mean_area
    report = report_energy(tracks)
    told = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in report.losses)
    assert told == pytest.approx(error, rel=1e-3)
    assert report.clip_kept == pytest.approx(1 - error / total, rel=1e-3)


def test_of_two_cells_that_move_alike_the_larger_is_kept_first():
    latents = torch.zeros(9, 3, 3, 4)  # in 2x2 cells of 1, 2, 2 and 4 tokens
    latents[:, 0, 0] = latents[:, 2, 2] = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))
    latents[:, 1:, 1:] = latents[:, 2:, 2:]
    tracks, _, _ = compress(latents, 14, anchors=1, reference_budget_tokens=14, pooled_side=2, static_per_gop=0)
    assert tracks.coefficient_cell.tolist()[:1] == [3]
    assert cells_of_band(tracks, 0).index(3) < cells_of_band(tracks, 0).index(0)


def cells_of_band(tracks, band):
    return tracks.coefficient_cell[tracks.coefficient_band == band].tolist()


def still_for_four_frames_each(seed):
    """An anchor and 400 frames that are equal in fours, so that bins of four frames lose nothing."""
    generator = torch.Generator().manual_seed(seed)
    anchor, bins = torch.randn(1, 4, 4, 6, generator=generator), 0.3 * torch.randn(100, 4, 4, 6, generator=generator)
    bins = bins.cumsum(0)
    bins[33 + seed, 1] += 9
    return torch.cat([anchor, bins.repeat_interleave(4, dim=0)])


def in_frames(spectrum):
    """What coefficients of 100 bins of four frames, (100, 16, 6), hold of each of the 400 frames."""
    bins = scipy_idct(spectrum.numpy(), type=2, norm="ortho", axis=0) / 2
    return torch.from_numpy(bins).repeat_interleave(4, dim=0)


def test_what_long_gops_tell_is_that_of_their_frames():
    """400 residual frames in 100 bins: energies of impulses, what is kept and lost, and summaries, against direct sums."""
    latents = torch.cat([still_for_four_frames_each(seed) for seed in range(3)])
    tracks, plan, _ = compress(latents, 240, anchors=3, reference_budget_tokens=240)
    assert tracks.gop_bin_frames.tolist() == [4] * 3 and tracks.gop_anchor_frame.tolist() == [0, 401, 802]
    pooled, lost, energy = pool_to_cells(latents, 4, 4), 0.0, 0.0
    for gop, first in enumerate((0, 401, 802)):
        residual = pooled[first + 1 : first + 401] - pooled[first]
        known = torch.zeros(100, 16, 6)
        spectrum = scipy_dct(residual[::4].numpy(), type=2, norm="ortho", axis=0)
        known[: plan.num_coefficients] = 2 * torch.from_numpy(spectrum)[: plan.num_coefficients]
        missed = (residual - in_frames(known)).square().sum(2)
        mine = tracks.coefficient_gop == gop
        waves, sharp = (part.nonzero().squeeze(1) for part in (mine & ~tracks.is_impulse, mine & tracks.is_impulse))
        kept = torch.zeros(100, 16, 6)
        kept[tracks.coefficient_band[waves], tracks.coefficient_cell[waves]] = tracks.coefficient_values[waves]
        rebuilt = in_frames(kept)
        assert len(waves) and len(sharp)
        for row in sharp.tolist():
            at, cell = 4 * (int(tracks.coefficient_band[row]) - IMPULSE), int(tracks.coefficient_cell[row])
            rebuilt[at : at + 4, cell] = tracks.coefficient_values[row]
            told = float(tracks.coefficient_energy[row])
            assert told == pytest.approx(float(missed[at : at + 4, cell].sum()), rel=1e-3)
        lost, energy = lost + float((residual - rebuilt).square().sum()), energy + float(residual.square().sum())
    report = report_energy(tracks)
    assert report.clip_kept == pytest.approx(1 - lost / energy, rel=1e-4)
    told = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in report.losses)
    assert told == pytest.approx(lost, rel=1e-3)
    tokens = build_tokens(tracks)
    summary = tokens.latents[tokens.kind == TOKEN_KINDS.index("summary")]
    means = torch.stack([pooled[first + 1 : first + 401].mean((0, 1)) for first in (0, 401, 802)])
    torch.testing.assert_close(summary, means, rtol=1e-4, atol=1e-4)


def test_no_loss_reaches_into_the_next_gop():
    """201 residual frames in bins of two: the last bin is not full."""
    latents = torch.randn(404, 3, 3, 4, generator=torch.Generator().manual_seed(6))
    tracks, _, _ = compress(latents, 90, anchors=2, reference_budget_tokens=90)
    assert tracks.gop_anchor_frame.tolist() == [0, 202] and tracks.gop_bin_frames.tolist() == [2, 2]
    losses = sorted(report_energy(tracks).losses, key=lambda loss: loss.start_s)
    assert len(losses) == 16 and [losses[7].end_s, losses[15].end_s] == pytest.approx([20.2, 40.4])
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(losses))
