"""What compression reports about kept and lost energy, against scipy's transform of the pooled residuals."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.fft import dct as scipy_dct
from scipy.fft import idct as scipy_idct

from freres_cli.method.energy import report_energy
from freres_cli.method.residuals import pool_to_cells
from tests.compressed_clips import compress, smooth_clip


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
        rebuilt = torch.from_numpy(scipy_idct(dense.numpy(), type=2, norm="ortho", axis=0))
        error = (residual - rebuilt).square().sum((1, 2))
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
