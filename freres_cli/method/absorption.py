"""Maps of what the absorber took from each cell of a GoP; the paper's Figure 4 shows one for an anchor frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.method.absorber import neighbours_of
from freres_cli.method.fusion import FreResModules
from freres_cli.method.tokens import dynamic_latents, order_dynamic
from freres_cli.tracks import Tracks


@dataclass(frozen=True)
class AbsorptionMaps:
    """Two maps of each GoP over the pooled grid, (G, rows, columns) float64, zero where no coefficient was kept.

    ``energy``: squared L2 norm of the kept coefficients of each cell. ``absorbed``: how much the dynamic tokens took
    from each cell, as the L2 norm of what the absorber added to them.
    """

    energy: Tensor
    absorbed: Tensor


@torch.no_grad()
def map_absorption(tracks: Tracks, modules: FreResModules, variant: str = "absorber") -> AbsorptionMaps:
    """Return maps of where the absorber's additions came from. The tracks must hold at least one coefficient.

    A token's attention over cells and bands sums to 1. It is weighted by the L2 norm of what the token received,
    ``|gamma * output|``, and summed over tokens and bands. So a GoP's map sums to everything added in that GoP, and an
    absorber that adds nothing gives an empty map. The paper shows the bare weights; the weighting is ours, because a
    token's weights sum to 1 even if it receives next to nothing. Adapters and gates after the absorber are left out.
    ``variant``: one with an absorber; it decides the queries.
    Raises ``ValueError`` if a band is beyond those the absorber knows.
    """
    runs = order_dynamic(tracks)
    inputs = modules.absorber_inputs(dynamic_latents(tracks, runs, variant), tracks, runs.gop, runs.cell)
    added, weights = modules.absorber.attend(*inputs)
    from_cell = (weights.sum(2) * added.norm(dim=1, keepdim=True)).to(torch.float64)
    # Cells outside the grid have weight 0, so any index will do for them.
    around = neighbours_of(runs.cell, tracks.pooled_grid).clamp(min=0)
    absorbed = _sum_by_cell(tracks, runs.gop[:, None].expand_as(around), around, from_cell)
    energy = tracks.coefficient_energy.to(torch.float64)
    return AbsorptionMaps(_sum_by_cell(tracks, tracks.coefficient_gop, tracks.coefficient_cell, energy), absorbed)


def _sum_by_cell(tracks: Tracks, gop: Tensor, cell: Tensor, values: Tensor) -> Tensor:
    """Sum ``values`` by GoP and cell: (G, rows, columns). All three tensors have the same shape."""
    rows, columns = tracks.pooled_grid
    num_gops = tracks.gop_anchor_frame.shape[0]
    summed = torch.zeros(num_gops * rows * columns, dtype=values.dtype)
    summed.index_add_(0, (gop * (rows * columns) + cell).flatten(), values.flatten())
    return summed.view(num_gops, rows, columns)
