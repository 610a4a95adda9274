"""Choosing what is kept: the best coefficients of the whole clip, and anchor, static and summary tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from freres_cli.method.anchors import prune_order, spread_order
from freres_cli.method.budget import Allocation, BudgetPlan, MethodSettings, allocate_budget, num_static_cells
from freres_cli.method.gop import ClosedGop
from freres_cli.method.residuals import cell_centres
from freres_cli.tracks import COLUMNS, GOP_STARTS, IMPULSE, NUM_SEGMENTS, REFINED, TABLE_OF_KIND, Tracks

# A coefficient below this share of a mean anchor token's energy is rounding noise, not motion (the paper drops near-zero
# cells; the value is ours).
NEAR_ZERO_SHARE = 1e-9
# The other variants make their tokens from the same tracks.
VARIANTS_WITH_OWN_ROWS = ("anchors", "temporal", "idct")


def select_tracks(
    gops: list[ClosedGop], plan: BudgetPlan, settings: MethodSettings, width: int, seconds: Sequence[float]
) -> Tracks:
    """Return the tracks that fit ``plan.budget_tokens``.

    The coefficients of largest energy in the whole clip are kept: for an orthonormal transform that is the best choice
    (method section 4, ours). Impulses compete with them, each with the energy that the coefficients of its cell miss there.
    An inverse transform of whole frames (``idct``) has none.

    ``gops``: every GoP of the clip, in time order. ``plan``: from ``plan_budget`` with the same
    ``settings``. ``width``: D. ``seconds``: time of each sampled frame.
    """
    moving = [i for i, gop in enumerate(gops) if gop.coefficients.shape[0]]
    demoted = [i for i, gop in enumerate(gops) if gop.anchor is None]
    # Without raw anchors, a GoP of a single frame would be lost; its summary is kept.
    alone = settings.variant == "temporal"
    standing = [i for i, gop in enumerate(gops) if gop.anchor is not None and (alone or gop.coefficients.shape[0])]
    rules = {
        "anchor_target": plan.anchor_target_tokens,
        "anchor_available": sum(gop.anchor is not None for gop in gops) * plan.num_tokens_per_frame,
        "num_gops": 0 if plan.is_lossless else len(standing),
        "num_demoted": len(demoted),
        "static_available": len(moving) * num_static_cells(plan.pooled_grid, settings),
    }
    allocation = allocate_budget(plan.budget_tokens, settings, **rules, dynamic_available=0)
    static = _static_cells(gops, moving, plan, settings, allocation.static)
    order = _coefficient_order(gops, moving, width, static, settings.variant != "idct")
    dynamic_available = 0 if plan.is_lossless else order.shape[0]
    allocation = allocate_budget(plan.budget_tokens, settings, **rules, dynamic_available=dynamic_available)
    kept = order[: allocation.dynamic]
    summary = [standing[i] for i in spread_order(len(standing))] + _strongest_first(gops, demoted)
    summary = summary[: allocation.summary]
    return _gather(gops, plan, settings, width, seconds, allocation, kept, static, summary)


def cut_tracks(tracks: Tracks, settings: MethodSettings, budget_tokens: int) -> Tracks:
    """Return the same clip in at most ``budget_tokens`` tokens: a prefix of each kind, with unchanged GoPs.

    Raises ``ValueError`` if the budget is below one.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget: expected at least 1, got {budget_tokens}")
    counts = tracks.num_tokens_by_kind()
    total = sum(counts.values())
    if budget_tokens >= total:
        return tracks
    moving = int((tracks.gop_start[tracks.summary_gop] != GOP_STARTS.index("demoted")).sum())
    allocation = allocate_budget(
        budget_tokens,
        settings,
        anchor_target=budget_tokens * counts["anchor"] // total,
        anchor_available=counts["anchor"],
        num_gops=moving,
        num_demoted=counts["summary"] - moving,
        static_available=counts["static"],
        dynamic_available=counts["dynamic"],
    )
    sizes = {TABLE_OF_KIND[kind]: count for kind, count in vars(allocation).items()}
    cut: dict[str, Any] = {
        name: getattr(tracks, name)[: sizes[column.table]].clone()
        for name, column in COLUMNS.items()
        if column.table in sizes
    }
    if settings.variant != "idct":
        cells = tracks.num_cells
        used = cut["coefficient_gop"] * cells + cut["coefficient_cell"]
        keep = torch.isin(tracks.base_gop * cells + tracks.base_cell, used)
        cut |= {name: getattr(tracks, name)[keep] for name, column in COLUMNS.items() if column.table == "base"}
    return replace(tracks, **cut)


def _coefficient_order(
    gops: list[ClosedGop], moving: list[int], width: int, static: list[tuple[int, int]], with_impulses: bool
) -> Tensor:
    """Return (n, 3) int64 rows (gop, band, cell) of every coefficient that is not near zero, largest energy first.

    Cells that give a static token give no coefficients.
    """
    if not moving:
        return torch.zeros(0, 3, dtype=torch.int64)
    anchor_energy = torch.stack(
        [_mean_token_energy(gop.anchor, width) for gop in gops if gop.anchor is not None]
    ).mean()
    calm_cells: dict[int, list[int]] = {i: [] for i in moving}
    for i, cell in static:
        calm_cells[i].append(cell)
    rows, energies = [], []
    for i in moving:
        bands, cells = gops[i].energies.shape
        grid = torch.cartesian_prod(torch.arange(bands), torch.arange(cells)).reshape(-1, 2)
        rows.append(torch.cat([torch.full((grid.shape[0], 1), i), grid], dim=1))
        calm = torch.tensor(calm_cells[i], dtype=torch.int64)
        energies.append(gops[i].energies.index_fill(1, calm, 0.0).flatten())
        if with_impulses and gops[i].impulse_bins.numel():
            own = torch.arange(cells)
            rows.append(torch.stack([torch.full_like(own, i), IMPULSE + gops[i].impulse_bins, own], dim=1))
            energies.append(gops[i].impulse_energies.index_fill(0, calm, 0.0))
    energy = torch.cat(energies)
    order = torch.argsort(energy, descending=True, stable=True)
    return torch.cat(rows)[order[energy[order] > NEAR_ZERO_SHARE * anchor_energy]]


def _mean_token_energy(anchor: Tensor, width: int) -> Tensor:
    return anchor[..., :width].to(torch.float32).square().sum(-1).mean()


def _static_cells(
    gops: list[ClosedGop], moving: list[int], plan: BudgetPlan, settings: MethodSettings, wanted: int
) -> list[tuple[int, int]]:
    """Return up to ``wanted`` (gop, cell) pairs of background cells, spread over each grid, taking GoPs in turn."""
    if not wanted:
        return []
    centres = cell_centres(*plan.grid, *plan.pooled_grid)
    per_gop = num_static_cells(plan.pooled_grid, settings)
    # What happens for a moment only makes a cell no background.
    moved = {i: gops[i].energies.sum(0) for i in moving}
    moved |= {i: moved[i] + gops[i].impulse_energies for i in moving if gops[i].impulse_bins.numel()}
    picks = {i: _spread_cells(centres, moved[i], per_gop) for i in moving}
    turns = [moving[i] for i in spread_order(len(moving))]
    return [(i, picks[i][n]) for n in range(per_gop) for i in turns][:wanted]


def _spread_cells(centres: Tensor, energy: Tensor, count: int) -> list[int]:
    """Pick cells that are far apart from the calmer half: first the calmest, then always the one farthest from those
    picked."""
    calm = torch.argsort(energy, stable=True)[: max(count, centres.shape[0] // 2)]
    picked = calm[:1].tolist()
    distance = (centres[calm] - centres[calm[0]]).square().sum(-1)
    while len(picked) < count:
        best = calm[int(distance.argmax())]
        picked.append(int(best))
        distance = torch.minimum(distance, (centres[calm] - centres[best]).square().sum(-1))
    return picked


def _strongest_first(gops: list[ClosedGop], rows: list[int]) -> list[int]:
    return sorted(rows, key=lambda i: (-gops[i].event_distance, i))


def _gather(
    gops: list[ClosedGop],
    plan: BudgetPlan,
    settings: MethodSettings,
    width: int,
    seconds: Sequence[float],
    allocation: Allocation,
    kept: Tensor,
    static: list[tuple[int, int]],
    summary: list[int],
) -> Tracks:
    """Stack the chosen rows into tracks. Latents keep the dtype they were encoded in."""
    first = next(gop.anchor for gop in gops if gop.anchor is not None)
    dtype, channels = first.dtype, first.shape[-1]
    num_cells = plan.pooled_grid[0] * plan.pooled_grid[1]
    gop, band, cell = kept.unbind(1)
    if settings.variant == "idct":
        moving = torch.tensor([i for i, g in enumerate(gops) if g.coefficients.shape[0]], dtype=torch.int64)
        bases = torch.cartesian_prod(moving, torch.arange(num_cells)).reshape(-1, 2)
    else:
        pairs = torch.unique(gop * num_cells + cell)
        bases = torch.stack([pairs // num_cells, pairs % num_cells], dim=1)
    static_rows = torch.tensor(static, dtype=torch.int64).reshape(-1, 2)
    num_bands = max([gops[i].coefficients.shape[0] for i in summary], default=0)

    def rows(values: list[Tensor], *shape: int) -> Tensor:
        return torch.stack(values).to(dtype) if values else torch.zeros(0, *shape, dtype=dtype)

    anchor_latents, anchor_gop, anchor_cell = _gather_anchors(gops, width, allocation.anchor)
    return Tracks(
        width=width,
        grid=(len(seconds), *plan.grid),
        pooled_grid=plan.pooled_grid,
        frame_seconds=torch.tensor(seconds, dtype=torch.float64),
        **_gop_table(gops),
        anchor_latents=anchor_latents,
        anchor_gop=anchor_gop,
        anchor_cell=anchor_cell,
        coefficient_values=_pick(
            gops, gop, lambda g, at: _read(g.coefficients, g.impulses, band[at], cell[at]), dtype, channels
        ),
        coefficient_gop=gop.clone(),
        coefficient_cell=cell.clone(),
        coefficient_band=band.clone(),
        coefficient_energy=_pick(
            gops, gop, lambda g, at: _read(g.energies, g.impulse_energies, band[at], cell[at]), torch.float32
        ),
        coefficient_segments=_pick(
            gops, gop, lambda g, at: _read_segments(g, band[at], cell[at]), torch.float32, NUM_SEGMENTS
        ),
        base_latents=_pick(gops, bases[:, 0], lambda g, at: g.base[bases[at, 1]], dtype, channels),
        base_gop=bases[:, 0].clone(),
        base_cell=bases[:, 1].clone(),
        static_latents=rows([gops[g].means[p] for g, p in static], channels),
        static_gop=static_rows[:, 0].clone(),
        static_cell=static_rows[:, 1].clone(),
        summary_base=rows([gops[i].summary_base for i in summary], channels),
        summary_spectrum=rows([_padded(gops[i].summary_spectrum, num_bands) for i in summary], num_bands, channels),
        summary_gop=torch.tensor(summary, dtype=torch.int64),
    )


def _read(of_waves: Tensor, of_impulses: Tensor, band: Tensor, cell: Tensor) -> Tensor:
    """Return ``of_waves[band, cell]``, or ``of_impulses[cell]`` where the band is an impulse."""
    is_impulse = band >= IMPULSE
    read = of_waves[band.masked_fill(is_impulse, 0), cell]
    read[is_impulse] = of_impulses[cell[is_impulse]]
    return read


def _read_segments(gop: ClosedGop, band: Tensor, cell: Tensor) -> Tensor:
    """Return the inner products of coefficients with the residual in each eighth; zero for impulses, which need none."""
    no_segments = torch.zeros(gop.impulse_bins.shape[0], NUM_SEGMENTS)
    return _read(gop.segments.permute(1, 2, 0), no_segments, band, cell)


def _padded(spectrum: Tensor, num_bands: int) -> Tensor:
    return torch.nn.functional.pad(spectrum, (0, 0, 0, num_bands - spectrum.shape[0]))


def _pick(
    gops: list[ClosedGop], gop: Tensor, read: Callable[[ClosedGop, Tensor], Tensor], dtype: torch.dtype, *shape: int
) -> Tensor:
    """Return one row for each entry of ``gop``, reading one GoP at a time: stacking all GoPs first would double the
    memory."""
    out = torch.empty(gop.shape[0], *shape, dtype=dtype)
    for i in gop.unique().tolist():
        at = (gop == i).nonzero().squeeze(1)
        out[at] = read(gops[i], at).to(dtype)
    return out


def _gather_anchors(gops: list[ClosedGop], width: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first ``count`` anchor tokens: the best of every anchor first, anchors in spread order."""
    anchors = {i: gop.anchor for i, gop in enumerate(gops) if gop.anchor is not None}
    standing = list(anchors)
    orders = {i: prune_order(anchor, width) for i, anchor in anchors.items()}
    turns = torch.tensor([standing[i] for i in spread_order(len(standing))])
    num_tokens = orders[standing[0]].shape[0]
    gop = turns.repeat(-(-count // len(turns)))[:count] if count else turns[:0]
    rank = torch.arange(count) // len(turns)
    by_rank = torch.stack([orders[i] for i in standing])
    row = torch.searchsorted(torch.tensor(standing), gop)
    cell = by_rank[row, rank] if count else rank
    first = anchors[standing[0]]
    latents = torch.empty(count, first.shape[-1], dtype=first.dtype)
    for i, anchor in anchors.items():
        mine = (gop == i).nonzero().squeeze(1)
        latents[mine] = anchor.reshape(num_tokens, -1)[cell[mine]]
    return latents, gop.clone(), cell.clone()


def _gop_table(gops: list[ClosedGop]) -> dict[str, Tensor]:
    return {
        "gop_anchor_frame": torch.tensor([gop.anchor_frame for gop in gops]),
        "gop_num_residuals": torch.tensor([gop.num_residuals for gop in gops]),
        "gop_num_bins": torch.tensor([gop.num_bins for gop in gops]),
        "gop_bin_frames": torch.tensor([gop.bin_frames for gop in gops]),
        "gop_start": torch.tensor([gop.start for gop in gops]),
        "gop_event_distance": torch.tensor([gop.event_distance for gop in gops], dtype=torch.float32),
        "gop_residual_energy": torch.tensor([gop.residual_energy for gop in gops], dtype=torch.float32),
        "gop_pooled_energy": torch.tensor([gop.pooled_energy for gop in gops], dtype=torch.float32),
        "gop_band_energy": torch.stack([gop.band_energy for gop in gops]),
        "gop_segment_energy": torch.stack([gop.segment_energy for gop in gops]),
        "gop_recipe": torch.full((len(gops),), REFINED),
    }
