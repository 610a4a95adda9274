"""tracks -> frames: the clip as far as it can be rebuilt from what Fre-Res kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.method.dct import dct_basis_at
from freres_cli.method.residuals import cell_edges
from freres_cli.tracks import IMPULSE, Tracks


def rebuild_frames(tracks: Tracks) -> Tensor:
    """Return every frame of the clip, rebuilt from its tracks: (T, H*W, D) float32.

    A place shows what its GoP holds of it, the first of: its anchor token, the pooled anchor of its cell, the mean of the
    anchor tokens in its cell, the static token of its cell, and the GoP's summary with its own wave. To that the residual
    frames add the inverse DCT of the cell's kept coefficients; where an impulse was kept it is the residual. A place that
    its GoP holds nothing of shows the last frame of the GoP before it that does, else the first frame of the one after,
    and the mean of all that is known if there is neither. Ours: it measures what the tracks hold, which is more than
    tokens show a language model.
    """
    num_frames, grid_h, grid_w = tracks.grid
    frames = torch.zeros(num_frames, grid_h * grid_w, tracks.width)
    is_known = torch.zeros(num_frames, grid_h * grid_w, dtype=torch.bool)
    cell_of_place = _cells_of_places(tracks)
    for gop in range(tracks.gop_anchor_frame.shape[0]):
        first = int(tracks.gop_anchor_frame[gop])
        stop = first + 1 + int(tracks.gop_num_residuals[gop])
        still = _still_picture(tracks, gop, cell_of_place)
        frames[first:stop] = still.values
        frames[first:stop, still.from_summary] += _summary_wave(tracks, gop)[:, None]
        frames[first + 1 : stop] += _residuals(tracks, gop)[:, cell_of_place]
        is_known[first:stop] = still.is_known
    return _fill_unknown(frames, is_known)


@dataclass(frozen=True)
class _Still:
    """A GoP without its residuals: ``values`` (N, D), which of them are known, and which come from the summary, (N,)."""

    values: Tensor
    is_known: Tensor
    from_summary: Tensor


def _cells_of_places(tracks: Tracks) -> Tensor:
    """Return the pooled cell of each token of a frame: (N,) int64."""
    (_, grid_h, grid_w), (rows, columns) = tracks.grid, tracks.pooled_grid
    row = torch.bucketize(torch.arange(grid_h), torch.tensor(cell_edges(grid_h, rows))[1:], right=True)
    column = torch.bucketize(torch.arange(grid_w), torch.tensor(cell_edges(grid_w, columns))[1:], right=True)
    return (row[:, None] * columns + column[None, :]).flatten()


def _still_picture(tracks: Tracks, gop: int, cell_of_place: Tensor) -> _Still:
    values = torch.zeros(cell_of_place.shape[0], tracks.width)
    is_known = torch.zeros(cell_of_place.shape[0], dtype=torch.bool)

    def show(shown: Tensor, where: Tensor) -> None:
        fresh = where & ~is_known
        values[fresh] = shown[fresh]
        is_known[fresh] = True

    def by_cell(cells: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Spread the means of rows with equal cells over the places of these cells."""
        sums = torch.zeros(tracks.num_cells, tracks.width).index_add_(0, cells, latents)
        counts = torch.bincount(cells, minlength=tracks.num_cells)
        means = sums / counts.clamp(min=1)[:, None]
        return means[cell_of_place], (counts > 0)[cell_of_place]

    anchors = tracks.anchor_gop == gop
    at, latents = tracks.anchor_cell[anchors], _main(tracks.anchor_latents[anchors], tracks)
    values[at], is_known[at] = latents, True
    bases, statics = tracks.base_gop == gop, tracks.static_gop == gop
    show(*by_cell(tracks.base_cell[bases], _main(tracks.base_latents[bases], tracks)))
    show(*by_cell(cell_of_place[at], latents))
    show(*by_cell(tracks.static_cell[statics], _main(tracks.static_latents[statics], tracks)))
    summaries = tracks.summary_gop == gop
    from_summary = ~is_known & summaries.any()
    if bool(from_summary.any()):
        show(_main(tracks.summary_base[summaries], tracks)[:1].expand_as(values), from_summary)
    return _Still(values, is_known, from_summary)


def _main(latents: Tensor, tracks: Tracks) -> Tensor:
    return latents[..., : tracks.width].to(torch.float32)


def _waves(tracks: Tracks, gop: int, bands: Tensor) -> Tensor:
    """Return the wave of each band at each residual frame of a GoP: (L, number of bands) float32."""
    bin_frames = int(tracks.gop_bin_frames[gop])
    frames = torch.arange(int(tracks.gop_num_residuals[gop]), dtype=torch.float64)
    at = (frames + 0.5) / bin_frames - 0.5
    # Coefficients are scaled by sqrt(bin_frames), see OpenGop.
    return dct_basis_at(at[:, None], int(tracks.gop_num_bins[gop]), bands[None, :]) / bin_frames**0.5


def _residuals(tracks: Tracks, gop: int) -> Tensor:
    """Return the residual frames of a GoP, from its kept coefficients and impulses: (L, P, D) float32."""
    length = int(tracks.gop_num_residuals[gop])
    mine = (tracks.coefficient_gop == gop).nonzero().squeeze(1)
    if not mine.numel():
        return torch.zeros(length, tracks.num_cells, tracks.width)
    bands, cells = tracks.coefficient_band[mine], tracks.coefficient_cell[mine]
    values = _main(tracks.coefficient_values[mine], tracks)
    is_wave = bands < IMPULSE
    spectrum = torch.zeros(tracks.num_bands, tracks.num_cells, tracks.width)
    spectrum[bands[is_wave], cells[is_wave]] = values[is_wave]
    frames = torch.einsum("lk,kpc->lpc", _waves(tracks, gop, torch.arange(spectrum.shape[0])), spectrum)
    # An impulse is the whole residual of its time bin.
    time_bin = torch.arange(length) // int(tracks.gop_bin_frames[gop])
    for row in (~is_wave).nonzero().squeeze(1).tolist():
        frames[time_bin == int(bands[row]) - IMPULSE, int(cells[row])] = values[row]
    return frames


def _summary_wave(tracks: Tracks, gop: int) -> Tensor:
    """Return what the summary of a GoP adds to its base at the anchor, 0, and at each residual frame: (1 + L, D) float32."""
    length = int(tracks.gop_num_residuals[gop])
    wave = torch.zeros(1 + length, tracks.width)
    mine = (tracks.summary_gop == gop).nonzero().squeeze(1)[:1]
    num_bands = min(tracks.summary_spectrum.shape[1], int(tracks.gop_num_bins[gop]))
    if mine.numel() and num_bands:
        spectrum = _main(tracks.summary_spectrum[mine[0], :num_bands], tracks)
        wave[1:] = _waves(tracks, gop, torch.arange(num_bands)) @ spectrum
    return wave


def _fill_unknown(frames: Tensor, is_known: Tensor) -> Tensor:
    """Give each unknown place its last known value, else its next one, else the mean of all known values."""
    if bool(is_known.all()):
        return frames
    index = torch.arange(frames.shape[0])[:, None]
    before = torch.where(is_known, index, -1).cummax(0).values
    after = torch.where(is_known, index, frames.shape[0]).flip(0).cummin(0).values.flip(0)
    source = torch.where(before >= 0, before, after)
    mean = frames[is_known].to(torch.float64).mean(0).to(torch.float32)
    places = torch.arange(frames.shape[1])
    filled = frames[source.clamp(max=frames.shape[0] - 1), places]
    return torch.where((source < frames.shape[0])[..., None], filled, mean)
