"""Low-resolution frames: every frame, averaged in space until the clip fits the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.full import place_tokens
from freres_cli.baselines.shares import clamp_budget
from freres_cli.baselines.uniform import spread
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

CHUNK_VALUES = 2**24  # values in float32 at a time


def pool_frames(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return means of ``latents`` (T, H, W, C) over cells of every frame, at the cells' centres: min(B, T*H*W) tokens.

    B is ``budget_tokens``; the cells are those of ``shrink_frames``. ``frame_seconds``: (T,) float64. ``width``: D. Raises
    ``ValueError`` if the budget is below one.
    """
    return shrink_frames(latents, frame_seconds, budget_tokens, width, pool_cells)


def shrink_frames(
    latents: Tensor,
    frame_seconds: Tensor,
    budget_tokens: int,
    width: int,
    shrink: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> VideoTokens:
    """Return one token for each of some cells of every frame of ``latents`` (T, H, W, C), at the cells' centres.

    There are min(B, T*H*W) of them, B is ``budget_tokens``. All frames have the same number of cells, except that some,
    evenly spread, have one more. If B is below one token per frame, B evenly spread frames are kept with one token each.
    Boxes are set. ``frame_seconds``: (T,) float64. ``width``: D. ``shrink``: takes some frames and the number of cells,
    and returns as ``pool_cells`` does. Raises ``ValueError`` if the budget is below one.
    """
    num_tokens = clamp_budget(latents, budget_tokens)
    num_frames, grid_h, grid_w, num_channels = latents.shape
    frames = spread(min(num_frames, num_tokens), num_frames)
    fewest, num_finer = divmod(num_tokens, frames.shape[0])
    num_cells = torch.full_like(frames, fewest)
    if num_finer:
        num_cells[spread(num_finer, frames.shape[0])] += 1
    step = max(1, CHUNK_VALUES // (grid_h * grid_w * num_channels))
    cells, spans = [], []
    for count in num_cells.unique().tolist():
        # A few frames at a time, so that no float32 copy of the clip is made.
        for these in frames[num_cells == count].split(step):
            values, own = shrink(latents[these], count)
            cells.append(values.to(latents.dtype).flatten(0, 1))
            times = these.repeat_interleave(count)[:, None]
            spans.append(torch.cat([times, times + 1, own.repeat(these.shape[0], 1)], dim=1))
    boxes = torch.cat(spans)
    # Stable: within a frame cells stay in raster order.
    order = boxes[:, 0].argsort(stable=True)
    boxes = boxes[order]
    # The middle of the cells that were averaged.
    positions = (boxes[:, 0::2] + boxes[:, 1::2] - 1).to(torch.float32) / 2
    frame = boxes[:, 0].clone()
    grid = (num_frames, grid_h, grid_w)
    tokens = place_tokens(torch.cat(cells)[order], positions, frame, grid, frame_seconds, width)
    return replace(tokens, boxes=boxes)


def pool_cells(latents: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return the means of ``latents`` (T, H, W, C) over ``num_cells`` cells of each frame, and what the cells span.

    The shapes are (T, num_cells, C) float32 and (num_cells, 4) int64, [h0, h1, w0, w1). Rows of cells have equal heights;
    some have one cell more than others. Where the grid does not divide evenly, neighbours share a row or column of tokens.
    """
    _, grid_h, grid_w, _ = latents.shape
    cells_of_row = choose_rows(grid_h, grid_w, num_cells)
    image = latents.to(torch.float32).movedim(-1, 1)
    heights = split_axis(grid_h, len(cells_of_row))
    means, spans = [], []
    for row, columns in enumerate(cells_of_row):
        means.append(torch.nn.functional.adaptive_avg_pool2d(image, (len(cells_of_row), columns))[:, :, row])
        spans.append(torch.cat([heights[row].expand(columns, 2), split_axis(grid_w, columns)], dim=1))
    return torch.cat(means, dim=-1).movedim(1, -1), torch.cat(spans)


def choose_rows(grid_h: int, grid_w: int, num_cells: int) -> list[int]:
    """Return how many cells each row of a frame has: ``num_cells`` <= H*W in all, as square as possible."""
    fitting = [rows for rows in range(1, grid_h + 1) if rows <= num_cells <= rows * grid_w]
    rows = min(fitting, key=lambda rows: _aspect(grid_h, grid_w, rows, num_cells))
    columns = torch.full((rows,), num_cells // rows)
    if num_cells % rows:
        columns[spread(num_cells % rows, rows)] += 1
    return columns.tolist()


def _aspect(grid_h: int, grid_w: int, rows: int, num_cells: int) -> float:
    """Longer side over shorter side of the least square cell."""
    height = grid_h / rows
    widths = grid_w / (num_cells // rows), grid_w / -(-num_cells // rows)
    return max(max(height / width, width / height) for width in widths)


def split_axis(size: int, num_cells: int) -> Tensor:
    """Return first and stop of each cell of ``adaptive_avg_pool2d`` on an axis of ``size`` tokens: (num_cells, 2) int64."""
    index = torch.arange(num_cells)
    return torch.stack([index * size // num_cells, -((index + 1) * -size // num_cells)], dim=1)


METHOD = Method(
    name="lowres",
    summary="every frame, averaged in space until the clip fits the budget",
    source="common practice",
    deviations="averages latents; common practice shrinks the frames before the tower; below one token a frame, "
    "evenly spread frames are kept",
    mixes=True,
    compress=pool_frames,
)
