"""tracks -> tokens: everything that was kept becomes tokens on the backbone's own manifold, in time order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.method.anchors import spread_order
from freres_cli.method.dct import choose_instants, dct_basis_at
from freres_cli.method.fusion import FreResModules
from freres_cli.method.residuals import cell_centres
from freres_cli.records import TOKEN_KINDS, VideoTokens
from freres_cli.tracks import IMPULSE, PLAIN, Tracks

ANCHOR, DYNAMIC, STATIC, SUMMARY = range(len(TOKEN_KINDS))
VARIANTS_WITHOUT_ABSORBER = ("concat", "idct", "sparse-idct")
CELLS_AT_ONCE = 512  # bounds the memory of the inverse transform


@dataclass(frozen=True)
class _Rows:
    """Tokens of one kind: latents (n, C), positions (n, 3), gop (n,), energy (n,)."""

    kind: int
    latents: Tensor
    positions: Tensor
    gop: Tensor
    energy: Tensor


def build_tokens(tracks: Tracks, variant: str = "absorber", modules: FreResModules | None = None) -> VideoTokens:
    """Return the visual tokens of a clip for the language model (method sections 5 and 6).

    Without ``modules`` nothing is trained: anchors are the backbone's own latents bit for bit, and every other token is
    a pooled latent of the clip at some instant. If every token of the clip was kept, nothing was lost and ``modules``
    are not applied (ours). Tokens are in time order: for each GoP anchors, dynamic, static, summary, each in raster
    order. ``variant``: one of ``presets.VARIANTS``.
    """
    if tracks.anchor_gop.shape[0] == math.prod(tracks.grid):
        modules = None
    kinds = [
        _anchor_rows(tracks),
        *_dynamic_rows(tracks, variant, modules),
        _static_rows(tracks),
        _summary_rows(tracks),
    ]
    if modules is not None:
        kinds = [_adapted(rows, tracks, modules) for rows in kinds]
    kind = torch.cat([torch.full_like(rows.gop, rows.kind) for rows in kinds])
    positions = torch.cat([rows.positions for rows in kinds])
    gop = torch.cat([rows.gop for rows in kinds])
    order = _sequence_order(gop, kind, positions)
    return VideoTokens(
        latents=torch.cat([rows.latents for rows in kinds])[order],
        positions=positions[order],
        seconds=seconds_at(tracks.frame_seconds, positions[order, 0]),
        kind=kind[order].to(torch.uint8),
        gop=gop[order],
        energy=torch.cat([rows.energy for rows in kinds])[order],
        grid=tracks.grid,
        width=tracks.width,
        frame_seconds=tracks.frame_seconds,
    )


def seconds_at(frame_seconds: Tensor, frames: Tensor) -> Tensor:
    """Return the times of fractional frame positions, linear between frames: (n,) float64 seconds."""
    clamped = frames.to(torch.float64).clamp(0, frame_seconds.shape[0] - 1)
    low = clamped.floor().to(torch.int64)
    high = clamped.ceil().to(torch.int64)
    return torch.lerp(frame_seconds[low], frame_seconds[high], clamped - low)


def _sequence_order(gop: Tensor, kind: Tensor, positions: Tensor) -> Tensor:
    """Sort by (gop, kind, t, h, w): stable sorts from the last key to the first."""
    order = torch.arange(gop.shape[0])
    for key in (positions[:, 2], positions[:, 1], positions[:, 0], kind, gop):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _energy(latents: Tensor, width: int) -> Tensor:
    return latents[:, :width].to(torch.float32).square().sum(-1)


def _positions(t: Tensor, hw: Tensor) -> Tensor:
    return torch.cat([t.to(torch.float32)[:, None], hw.to(torch.float32)], dim=1)


def _centres(tracks: Tracks) -> Tensor:
    return cell_centres(*tracks.grid[1:], *tracks.pooled_grid)


def _middle(tracks: Tracks, gop: Tensor) -> Tensor:
    """The middle of a GoP's residual frames on the frame axis; the anchor itself if there are none."""
    length = tracks.gop_num_residuals[gop].to(torch.float64)
    return tracks.gop_anchor_frame[gop] + torch.where(length > 0, (length + 1) / 2, 0.0)


def _anchor_rows(tracks: Tracks) -> _Rows:
    t = tracks.gop_anchor_frame[tracks.anchor_gop]
    grid_w = tracks.grid[2]
    hw = torch.stack([tracks.anchor_cell // grid_w, tracks.anchor_cell % grid_w], dim=1)
    energy = _energy(tracks.anchor_latents, tracks.width)
    return _Rows(ANCHOR, tracks.anchor_latents, _positions(t, hw), tracks.anchor_gop, energy)


def _static_rows(tracks: Tracks) -> _Rows:
    positions = _positions(_middle(tracks, tracks.static_gop), _centres(tracks)[tracks.static_cell])
    energy = _energy(tracks.static_latents, tracks.width)
    return _Rows(STATIC, tracks.static_latents, positions, tracks.static_gop, energy)


def _summary_rows(tracks: Tracks) -> _Rows:
    gop = tracks.summary_gop
    latents = tracks.summary_base
    if tracks.summary_spectrum.shape[1]:
        samples = (tracks.gop_num_bins[gop] * tracks.gop_bin_frames[gop]).clamp(min=1)
        mean_residual = tracks.summary_spectrum[:, 0].to(torch.float32) / samples.sqrt()[:, None]
        latents = (latents.to(torch.float32) + mean_residual).to(tracks.summary_base.dtype)
    middle = torch.tensor([(tracks.grid[1] - 1) / 2, (tracks.grid[2] - 1) / 2]).expand(gop.shape[0], 2)
    energy = _energy(latents, tracks.width)
    return _Rows(SUMMARY, latents, _positions(_middle(tracks, gop), middle), gop, energy)


@dataclass(frozen=True)
class DynamicRuns:
    """The kept coefficients (n,) in runs of one cell of one GoP, lowest band first. Each gives one token.

    An impulse is a run of its own.

    ``order``: rows of the coefficient table. ``group``: run of each; ``index``: place in its run; ``sizes``: length of
    each run. ``gop``, ``cell``: of each. ``instants``: float64, in residual frames of the GoP, increasing in each run.
    """

    order: Tensor
    group: Tensor
    index: Tensor
    sizes: Tensor
    gop: Tensor
    cell: Tensor
    instants: Tensor


def order_dynamic(tracks: Tracks) -> DynamicRuns:
    """Return the runs of the kept coefficients. The tracks must hold at least one."""
    key = 2 * (tracks.coefficient_gop * tracks.num_cells + tracks.coefficient_cell) + tracks.is_impulse
    order = torch.argsort(tracks.coefficient_band, stable=True)
    order = order[torch.argsort(key[order], stable=True)]
    _, group, sizes = torch.unique_consecutive(key[order], return_inverse=True, return_counts=True)
    index = torch.arange(order.shape[0]) - (sizes.cumsum(0) - sizes)[group]
    gop, cell = tracks.coefficient_gop[order], tracks.coefficient_cell[order]
    length = tracks.gop_num_residuals[gop].to(torch.float64)
    is_impulse, band = tracks.is_impulse[order], tracks.coefficient_band[order]
    place, count = _places(band.masked_fill(is_impulse, 0), group, index, sizes)
    is_even = tracks.gop_recipe[gop] == PLAIN
    place, count = torch.where(is_even, index, place), torch.where(is_even, sizes[group], count)
    instants = (place + 0.5) * length / count - 0.5
    # An impulse lies in the middle of the frames of its bin.
    first = (band % IMPULSE) * tracks.gop_bin_frames[gop]
    after = torch.minimum(first + tracks.gop_bin_frames[gop], tracks.gop_num_residuals[gop])
    instants = torch.where(is_impulse, (first + after - 1) / 2.0, instants)
    return DynamicRuns(order, group, index, sizes, gop, cell, instants)


def _places(band: Tensor, group: Tensor, index: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For each coefficient, which of how many evenly spaced instants its token has: two (n,) int64."""
    bands = torch.full((sizes.shape[0], int(sizes.max())), -1)
    bands[group, index] = band
    kinds, kind = torch.unique(bands, dim=0, return_inverse=True)
    places = torch.full_like(kinds, -1)
    for row, own in zip(places, kinds, strict=True):
        row[: int((own >= 0).sum())] = choose_instants(own[own >= 0])
    return places[kind[group], index], kinds.amax(1)[kind[group]] + 1


def _dynamic_rows(tracks: Tracks, variant: str, modules: FreResModules | None) -> list[_Rows]:
    if not tracks.coefficient_gop.numel():
        return []
    if variant == "idct":
        return [_dense_rows(tracks)]
    runs = order_dynamic(tracks)
    positions = _positions(tracks.gop_anchor_frame[runs.gop] + 1 + runs.instants, _centres(tracks)[runs.cell])
    if variant == "concat":
        latents = tracks.coefficient_values[runs.order]
        if modules is not None:
            latents = modules.adapt_concat(latents, tracks.width)
    else:
        latents = dynamic_latents(tracks, runs, variant)
        if modules is not None and variant not in VARIANTS_WITHOUT_ABSORBER:
            latents = modules.absorb(latents, tracks, runs.gop, runs.cell)
    return [_Rows(DYNAMIC, latents, positions, runs.gop, tracks.coefficient_energy[runs.order])]


def _bin_coordinate(tracks: Tracks, gop: Tensor, instants: Tensor) -> Tensor:
    """Convert instants in residual frames of a GoP to instants in its time bins."""
    return (instants + 0.5) / tracks.gop_bin_frames[gop] - 0.5


def _basis(tracks: Tracks, gop: Tensor, instants: Tensor, band: Tensor) -> Tensor:
    """Value of each band's wave at each instant of its GoP, for coefficients scaled by sqrt(bin_frames)."""
    num_bins = tracks.gop_num_bins[gop].to(torch.float64)
    at = _bin_coordinate(tracks, gop, instants)
    # Up to its scale, the basis of length n at x depends only on (2x + 1) / n: read all lengths from length 1.
    phase = (2 * at + 1) / num_bins
    value = dct_basis_at((phase - 1) / 2, 1, band).to(torch.float64) / (num_bins * tracks.gop_bin_frames[gop]).sqrt()
    # An impulse is a residual already.
    return torch.where(band >= IMPULSE, 1.0, value).to(torch.float32)


def dynamic_latents(tracks: Tracks, runs: DynamicRuns, variant: str) -> Tensor:
    """Return the dynamic tokens of a ``variant`` before any module, (n, C): what the absorber takes as queries.

    With ``iquery`` they are I-tokens, as in the paper (section 3.4): the pooled anchor of the cell, once for each kept
    coefficient. Everything about the motion then comes from attention, and the tokens of a cell differ only in position.
    Impulses are no coefficients and stay as they are.
    """
    evaluated = evaluate_dynamic(tracks, runs)
    if variant == "iquery":
        i_tokens = tracks.base_latents[_base_rows(tracks, runs.gop, runs.cell)]
        return torch.where(tracks.is_impulse[runs.order][:, None], evaluated, i_tokens)
    return evaluated


def _base_rows(tracks: Tracks, gop: Tensor, cell: Tensor) -> Tensor:
    return torch.searchsorted(tracks.base_gop * tracks.num_cells + tracks.base_cell, gop * tracks.num_cells + cell)


def evaluate_dynamic(tracks: Tracks, runs: DynamicRuns) -> Tensor:
    """Return the I-token of each dynamic token plus its cell's kept coefficients at its instant, (n, C)."""
    order, index, sizes, gop = runs.order, runs.index, runs.sizes, runs.gop
    num_groups, widest = sizes.shape[0], int(sizes.max())
    starts = sizes.cumsum(0) - sizes
    base_row = _base_rows(tracks, gop[starts], runs.cell[starts])
    values = tracks.coefficient_values
    out = torch.empty(order.shape[0], values.shape[1], dtype=values.dtype)
    for low in range(0, num_groups, CELLS_AT_ONCE):
        high = min(num_groups, low + CELLS_AT_ONCE)
        rows = slice(int(starts[low]), int(starts[high - 1] + sizes[high - 1]))
        g, i = runs.group[rows] - low, index[rows]
        padded = torch.zeros(high - low, widest, values.shape[1])
        padded[g, i] = values[order[rows]].to(torch.float32)
        bands = torch.zeros(high - low, widest, dtype=torch.int64)
        bands[g, i] = tracks.coefficient_band[order[rows]]
        waves = _basis(tracks, gop[rows][:, None], runs.instants[rows][:, None], bands[g])
        filled = torch.arange(widest) < sizes[low:high, None]
        weights = torch.zeros(high - low, widest, widest)
        weights[g, i] = waves * filled[g]
        residual = torch.bmm(weights, padded)[g, i]
        base = tracks.base_latents[base_row[low:high]].to(torch.float32)
        out[rows] = (base[g] + residual).to(values.dtype)
    return out


def _dense_rows(tracks: Tracks) -> _Rows:
    """The ``idct`` variant: reconstructed frames of all P cells at evenly spaced instants of each GoP, one token per
    coefficient."""
    cells = tracks.pooled_grid[0] * tracks.pooled_grid[1]
    share = _deal_tokens(tracks, cells)
    latents, positions, gops = [], [], []
    for gop, count in share.items():
        num_frames = -(-count // cells)
        instants = (torch.arange(num_frames) + 0.5) * int(tracks.gop_num_residuals[gop]) / num_frames - 0.5
        mine = (tracks.coefficient_gop == gop).nonzero().squeeze(1)
        row = torch.tensor(gop)
        waves = _basis(tracks, row, instants[:, None], tracks.coefficient_band[mine][None, :])
        base = tracks.base_latents[tracks.base_gop == gop].to(torch.float32)
        frame = base.repeat(num_frames, 1, 1)
        values = tracks.coefficient_values[mine].to(torch.float32)
        frame.index_add_(1, tracks.coefficient_cell[mine], waves[..., None] * values[None])
        t = tracks.gop_anchor_frame[gop] + 1 + instants
        latents.append(frame.flatten(0, 1)[:count].to(tracks.base_latents.dtype))
        at = _positions(t.repeat_interleave(cells), _centres(tracks).repeat(num_frames, 1))
        positions.append(at[:count])
        gops.append(torch.full((count,), gop))
    stacked = torch.cat(latents)
    return _Rows(DYNAMIC, stacked, torch.cat(positions), torch.cat(gops), _energy(stacked, tracks.width))


def _deal_tokens(tracks: Tracks, cells: int) -> dict[int, int]:
    """Deal one token per kept coefficient to GoPs in turn, a frame of P cells at a time, at most L frames each."""
    with_base = tracks.base_gop.unique().tolist()
    turn = [with_base[i] for i in spread_order(len(with_base))]
    share = dict.fromkeys(sorted(with_base), 0)
    left = tracks.coefficient_gop.shape[0]
    while left:
        for gop in turn:
            dealt = min(left, cells, cells * int(tracks.gop_num_residuals[gop]) - share[gop])
            share[gop] += dealt
            left -= dealt
    return {gop: count for gop, count in share.items() if count}


def _adapted(rows: _Rows, tracks: Tracks, modules: FreResModules) -> _Rows:
    spectrum = _mean_spectrum(tracks) if rows.kind == SUMMARY else None
    latents = modules.adapt(rows.latents, rows.kind, tracks.width, spectrum)
    return _Rows(rows.kind, latents, rows.positions, rows.gop, rows.energy)


def _mean_spectrum(tracks: Tracks) -> Tensor:
    """Mean of the retained coefficients of each summary over the bands of its GoP: (n, D) float32."""
    spectrum = tracks.summary_spectrum[..., : tracks.width].to(torch.float32)
    bands = tracks.gop_num_bins[tracks.summary_gop].clamp(min=1, max=max(1, spectrum.shape[1]))
    return spectrum.sum(1) / bands[:, None]
