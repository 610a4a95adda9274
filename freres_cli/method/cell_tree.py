"""The rectangles of cells that a token of adaptive Fre-Res can stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1


@dataclass(frozen=True)
class CellTree:
    """The rectangles of cells that tokens can stand for: halves of halves of the grid, down to single cells.

    ``rectangles``: (K, 4) h0, h1, w0, w1, half-open. ``parent``, ``sibling``: (K,), -1 for the whole grid. ``leaves``:
    (H*W,), the rectangle of each cell in raster order. ``areas``: (K,), the number of cells in each.
    """

    rectangles: Tensor
    parent: Tensor
    sibling: Tensor
    leaves: Tensor
    areas: Tensor


def split_grid(grid_h: int, grid_w: int) -> CellTree:
    """Return the tree of a grid. The longer side is halved; the first half is the larger one."""
    rectangles, parent, sibling = [(0, grid_h, 0, grid_w)], [NONE], [NONE]
    leaves = torch.empty(grid_h, grid_w, dtype=torch.int64)
    index = 0
    while index < len(rectangles):
        h0, h1, w0, w1 = rectangles[index]
        if (h1 - h0) * (w1 - w0) == 1:
            leaves[h0, w0] = index
        else:
            if h1 - h0 >= w1 - w0:
                middle = (h0 + h1 + 1) // 2
                halves = [(h0, middle, w0, w1), (middle, h1, w0, w1)]
            else:
                middle = (w0 + w1 + 1) // 2
                halves = [(h0, h1, w0, middle), (h0, h1, middle, w1)]
            at = len(rectangles)
            rectangles += halves
            parent += [index, index]
            sibling += [at + 1, at]
        index += 1
    sides = torch.tensor(rectangles)
    areas = (sides[:, 1] - sides[:, 0]) * (sides[:, 3] - sides[:, 2])
    return CellTree(sides, torch.tensor(parent), torch.tensor(sibling), leaves.flatten(), areas)
