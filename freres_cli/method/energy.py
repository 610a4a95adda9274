"""What compression kept and lost, computed from the tracks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freres_cli.method.allocation import frame_edges_s
from freres_cli.method.dct import dct_basis, null_energy_share
from freres_cli.method.gop import segment_of_bin, sum_by_segment
from freres_cli.method.residuals import cell_weights
from freres_cli.tracks import IMPULSE, NUM_SEGMENTS, REFINED, Tracks


@dataclass(frozen=True)
class Loss:
    """A stretch of time and the residual energy lost in it, per second."""

    start_s: float
    end_s: float
    lost_energy_per_s: float


@dataclass(frozen=True)
class EnergyReport:
    """Shares of residual energy, ``None`` where there is none.

    ``gop_kept``: (G,) share of each GoP's pooled residual energy in the kept coefficients. ``clip_kept``: the same for
    the whole clip. ``pooling_kept``: share that is left after pooling to cells. ``spectrum``: share in the first 1, 2,
    ... coefficients of all GoPs; ``null_spectrum``: the same if frames were independent noise. ``losses``: worst first.
    """

    gop_kept: tuple[float | None, ...]
    clip_kept: float | None
    pooling_kept: float | None
    spectrum: tuple[float, ...]
    null_spectrum: tuple[float, ...]
    losses: tuple[Loss, ...]


def report_energy(tracks: Tracks, end_s: float | None = None) -> EnergyReport:
    """Return the shares of residual energy kept, the spectrum and its null, and the energy lost in all stretches. ``end_s``:
    as ``frame_edges_s`` takes it."""
    num_gops = tracks.gop_anchor_frame.shape[0]
    pooled = tracks.gop_pooled_energy.to(torch.float64)
    kept = torch.zeros(num_gops, dtype=torch.float64)
    gains = _impulse_gains(tracks)
    kept.index_add_(0, tracks.coefficient_gop, gains)
    explained = {
        gop: _explained_by_segment(tracks, gop) for gop in tracks.gop_num_residuals.nonzero().squeeze(1).tolist()
    }
    for gop, by_segment in explained.items():
        kept[gop] += float(by_segment.sum())
    areas = tracks.grid[1] * tracks.grid[2] / (tracks.pooled_grid[0] * tracks.pooled_grid[1])
    spectrum, null = _spectra(tracks)
    losses = sorted(_losses(tracks, gains, explained, end_s), key=lambda loss: -loss.lost_energy_per_s)
    return EnergyReport(
        gop_kept=tuple(_share(float(k), float(e)) for k, e in zip(kept, pooled, strict=True)),
        clip_kept=_share(float(kept.sum()), float(pooled.sum())),
        pooling_kept=_share(float(pooled.sum()) * areas, float(tracks.gop_residual_energy.sum())),
        spectrum=spectrum,
        null_spectrum=null,
        losses=tuple(losses),
    )


def lost_in_time(losses: Sequence[Loss], edges_s: Tensor) -> Tensor:
    """Return the energy lost in each interval between times: (n + 1,) float64 seconds -> (n,) float64.

    ``losses``: all of a clip's, in any order. What is lost in one of them is spread evenly over it.
    """
    times, lost = [float(edges_s[0])], [0.0]
    for loss in sorted(losses, key=lambda loss: loss.start_s):
        times += [loss.start_s, loss.end_s]
        lost += [lost[-1], lost[-1] + loss.lost_energy_per_s * (loss.end_s - loss.start_s)]
    return torch.from_numpy(np.diff(np.interp(edges_s.numpy(), times, lost)))


def _share(part: float, whole: float) -> float | None:
    # Coefficients count a last bin that is not full as full, so what they take from it may be less than nothing.
    return max(0.0, min(1.0, part / whole)) if whole > 0 else None


def _spectra(tracks: Tracks) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cumulative share of the first bands, and its null, both weighted by the energy of each GoP."""
    energy = tracks.gop_pooled_energy.to(torch.float64)
    total = float(energy.sum())
    if total <= 0:
        return (), ()
    bands = tracks.gop_band_energy.to(torch.float64)
    cumulative = (bands.sum(0) / total).cumsum(0).clamp(max=1.0)
    lengths = tracks.gop_num_residuals.tolist()
    null = [
        sum(float(e) * null_energy_share(length, k + 1) for e, length in zip(energy, lengths, strict=True)) / total
        for k in range(bands.shape[1])
    ]
    return tuple(cumulative.tolist()), tuple(null)


def _losses(tracks: Tracks, gains: Tensor, explained: Mapping[int, Tensor], end_s: float | None) -> list[Loss]:
    """Energy of residual minus reconstruction in each eighth of each GoP: E - 2 <r, r'> + |r'|^2, exact per bin.

    ``gains``: what each impulse takes from that. ``explained``: what the coefficients of each GoP take. ``end_s``: of the
    clip.
    """
    losses, edges_s = [], frame_edges_s(tracks.frame_seconds, end_s).tolist()
    for gop, by_segment in explained.items():
        impulses = ((tracks.coefficient_gop == gop) & tracks.is_impulse).nonzero().squeeze(1)
        lost = tracks.gop_segment_energy[gop] - by_segment
        num_bins, bin_frames = int(tracks.gop_num_bins[gop]), int(tracks.gop_bin_frames[gop])
        at = segment_of_bin(num_bins)[tracks.coefficient_band[impulses] % IMPULSE]
        lost = lost.index_add(0, at, -gains[impulses].to(torch.float32)).clamp(min=0)
        first = int(tracks.gop_anchor_frame[gop]) + 1
        segments = segment_of_bin(num_bins)
        for segment in segments.unique().tolist():
            inside = (segments == segment).nonzero().squeeze(1)
            low = first + int(inside[0]) * bin_frames
            high = first + min((int(inside[-1]) + 1) * bin_frames, int(tracks.gop_num_residuals[gop]))
            start, end = edges_s[low], edges_s[high]
            losses.append(Loss(start, end, float(lost[segment]) / (end - start)))
    return losses


def _explained_by_segment(tracks: Tracks, gop: int) -> Tensor:
    """What the kept coefficients take from the energy of each eighth of one GoP, 2 <r, r'> - |r'|^2: (8,) float32."""
    rows = ((tracks.coefficient_gop == gop) & ~tracks.is_impulse).nonzero().squeeze(1)
    if not rows.numel():
        return torch.zeros(NUM_SEGMENTS)
    cells, dense = _dense(tracks, gop)
    gram = torch.einsum("pkd,pjd->kj", dense * _weights(tracks, gop)[cells, None, None], dense)
    counts = _bin_counts(tracks, gop)
    basis = dct_basis(counts.shape[0], dense.shape[1])
    per_bin = (basis * (gram @ basis)).sum(0) * counts / float(tracks.gop_bin_frames[gop])
    return 2 * tracks.coefficient_segments[rows].sum(0) - sum_by_segment(per_bin[:, None]).squeeze(1)


def _bin_counts(tracks: Tracks, gop: int) -> Tensor:
    """Frames in each time bin of one GoP, of which the last may hold fewer than the others: (B,) float32."""
    num_bins, bin_frames = int(tracks.gop_num_bins[gop]), int(tracks.gop_bin_frames[gop])
    counts = torch.full((num_bins,), float(bin_frames))
    counts[-1] = int(tracks.gop_num_residuals[gop]) - (num_bins - 1) * bin_frames
    return counts


def _dense(tracks: Tracks, gop: int) -> tuple[Tensor, Tensor]:
    """Return the cells of one GoP that kept coefficients or impulses, (n,) ascending, and the coefficients of each, zero
    where none was kept, (n, K, D) float32. Other cells take no memory: a grid may have many more than a file has rows."""
    mine = tracks.coefficient_gop == gop
    cells = tracks.coefficient_cell[mine].unique()
    rows = (mine & ~tracks.is_impulse).nonzero().squeeze(1)
    dense = torch.zeros(cells.shape[0], tracks.num_bands, tracks.width)
    values = tracks.coefficient_values[rows, : tracks.width].to(torch.float32)
    dense[torch.searchsorted(cells, tracks.coefficient_cell[rows]), tracks.coefficient_band[rows]] = values
    return cells, dense


def _weights(tracks: Tracks, gop: int) -> Tensor:
    """The weight of each cell in the energies of this GoP: (P,) float32."""
    is_weighted = int(tracks.gop_recipe[gop]) == REFINED
    return cell_weights(*tracks.grid[1:], *tracks.pooled_grid) if is_weighted else torch.ones(tracks.num_cells)


def _impulse_gains(tracks: Tracks) -> Tensor:
    """Energy that each impulse adds to what the kept coefficients of its cell hold: (n,) float64, zero for coefficients.

    It ends the error in its bin, which is the residual there minus the kept waves.
    """
    gains = torch.zeros(tracks.coefficient_gop.shape[0], dtype=torch.float64)
    for gop in tracks.coefficient_gop[tracks.is_impulse].unique().tolist():
        impulses = ((tracks.coefficient_gop == gop) & tracks.is_impulse).nonzero().squeeze(1)
        cell, at = tracks.coefficient_cell[impulses], tracks.coefficient_band[impulses] % IMPULSE
        cells, dense = _dense(tracks, gop)
        counts = _bin_counts(tracks, gop)
        waves = dct_basis(counts.shape[0], dense.shape[1])[:, at] / float(tracks.gop_bin_frames[gop]) ** 0.5
        held = torch.einsum("kn,nkd->nd", waves, dense[torch.searchsorted(cells, cell)])
        missed = tracks.coefficient_values[impulses, : tracks.width].to(torch.float32) - held
        gains[impulses] = (missed.square().sum(1) * _weights(tracks, gop)[cell] * counts[at]).to(torch.float64)
    return gains
