"""Low-resolution frames: every frame, averaged in space until the clip fits the budget."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from freres_cli.baselines.full import place_tokens
from freres_cli.baselines.uniform import spread
from freres_cli.records import VideoTokens

# A pooled cell may be this many times longer one way than the other: a strip of a frame is no low-resolution frame.
MAX_CELL_ASPECT = 2.0


def pool_frames(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return means of ``latents`` (T, H, W, C) over the cells of the largest grid that fits B, at the cells' centres.

    A budget below one token a frame keeps that many evenly spread frames, one token each. Never more than B tokens;
    often fewer, since every frame has the same grid. ``frame_seconds``: (T,) float64; ``width``: D. Raises
    ``ValueError`` for a budget below one.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget: expected at least 1, got {budget_tokens}")
    num_frames, grid_h, grid_w, channels = latents.shape
    rows, columns = choose_cells(grid_h, grid_w, max(1, budget_tokens // num_frames))
    frames = spread(min(num_frames, budget_tokens), num_frames)
    pooled = adaptive_avg_pool2d(latents[frames].to(torch.float32).movedim(-1, 1), (rows, columns)).movedim(1, -1)
    axes = frames.to(torch.float32), centres(grid_h, rows), centres(grid_w, columns)
    cells = pooled.reshape(-1, channels).to(latents.dtype)
    frame = frames.repeat_interleave(rows * columns)
    return place_tokens(cells, torch.cartesian_prod(*axes), frame, (num_frames, grid_h, grid_w), frame_seconds, width)


def choose_cells(grid_h: int, grid_w: int, most: int) -> tuple[int, int]:
    """Return (rows, columns) of the grid with most cells, at most ``most``, whose cells are not too long; of equal
    ones that with the squarest cells."""
    fitting = [(r, c) for r in range(1, grid_h + 1) for c in range(1, grid_w + 1) if r * c <= most]
    shapely = [grid for grid in fitting if _aspect(grid_h, grid_w, *grid) <= MAX_CELL_ASPECT]
    # A lone row or column of tokens has no squarer choice.
    return max(shapely or fitting, key=lambda grid: (grid[0] * grid[1], -_aspect(grid_h, grid_w, *grid)))


def _aspect(grid_h: int, grid_w: int, rows: int, columns: int) -> float:
    height, width = grid_h / rows, grid_w / columns
    return max(height / width, width / height)


def centres(size: int, num_cells: int) -> Tensor:
    """Return the middle of each cell of ``adaptive_avg_pool2d`` on an axis of ``size`` tokens: (num_cells,) float32."""
    index = torch.arange(num_cells)
    first, stop = index * size // num_cells, -((index + 1) * -size // num_cells)
    return (first + stop - 1).to(torch.float32) / 2
