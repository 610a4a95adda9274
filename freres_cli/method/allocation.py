"""Where the tokens of a clip went: how many stand for each part of its time, and for each place in the frame.

Ours: a token counts 1 in all, spread evenly over the frames and the cells that it stands for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from freres_cli.method.residuals import cell_edges
from freres_cli.records import TOKEN_KINDS, VideoTokens

ANCHOR, SUMMARY = TOKEN_KINDS.index("anchor"), TOKEN_KINDS.index("summary")


def token_boxes(tokens: VideoTokens, pooled_grid: tuple[int, int] | None = None) -> Tensor:
    """Return what each token stands for: (S, 6) float64 edges t0, t1, h0, h1, w0, w1, where frame i is from i to i + 1.

    That is known of stretches. A Fre-Res token stands for its stretch of time, and for a cell of ``pooled_grid``, or the
    whole frame if it is a summary. Any other token stands for the frame and the cell nearest to its position.
    """
    size = torch.tensor(tokens.grid, dtype=torch.float64)
    if tokens.boxes is not None:
        return tokens.boxes.to(torch.float64)
    first = (tokens.positions.to(torch.float64) + 0.5).floor().clamp(min=0).minimum(size - 1)
    boxes = torch.stack([first, first + 1], dim=2).flatten(1)
    spreads = tokens.kind != ANCHOR
    if tokens.stretches is not None:
        # There, frame i is around i.
        spans = (tokens.stretches.to(torch.float64) + 0.5).clamp(0, tokens.grid[0])
        boxes[:, :2] = torch.where((spreads & (spans[:, 1] > spans[:, 0]))[:, None], spans, boxes[:, :2])
    if pooled_grid is not None:
        cells = torch.cat(
            [_cells_around(tokens, axis, count) for axis, count in enumerate(pooled_grid, start=1)], dim=1
        )
        boxes[:, 2:] = torch.where(spreads[:, None], cells, boxes[:, 2:])
        whole = torch.stack([torch.zeros(2, dtype=torch.float64), size[1:]], dim=1).flatten()
        boxes[:, 2:] = torch.where((tokens.kind == SUMMARY)[:, None], whole, boxes[:, 2:])
    return boxes


def _cells_around(tokens: VideoTokens, axis: int, count: int) -> Tensor:
    """Return the edges of the cell, of ``count`` along an ``axis`` of the grid, that each token is in: (S, 2) float64."""
    edges = torch.tensor(cell_edges(tokens.grid[axis], count), dtype=torch.float64)
    middle = tokens.positions[:, axis].to(torch.float64) + 0.5
    cell = torch.searchsorted(edges, middle, right=True) - 1
    return torch.stack([edges[cell], edges[cell + 1]], dim=1)


def share_of_interval(boxes: Tensor, low: float, high: float) -> Tensor:
    """Return the share of each token's time that is from ``low`` to ``high`` on the frame axis: (S,) float64."""
    start, stop = boxes[:, 0], boxes[:, 1]
    return (stop.clamp(max=high) - start.clamp(min=low)).clamp(min=0) / (stop - start)


def sum_in_time(boxes: Tensor, edges: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the tokens in each interval between ``edges`` on the frame axis: (n + 1,) edges -> (n,) float64.

    ``weights``: (S,), what each token counts for, by default 1.
    """
    spans = zip(edges.tolist(), edges[1:].tolist(), strict=False)
    shares = (share_of_interval(boxes, low, high) for low, high in spans)
    return torch.stack([share.sum() if weights is None else (share * weights).sum() for share in shares])


def map_in_space(boxes: Tensor, grid: tuple[int, int], weights: Tensor) -> Tensor:
    """Return what falls on each cell of the ``grid`` (rows, columns) if each token counts ``weights`` (S,): float64."""
    rows, columns = (_covers(boxes[:, 2 * axis + 2 : 2 * axis + 4], size) for axis, size in enumerate(grid))
    return torch.einsum("sh,s,sw->hw", rows, weights.to(torch.float64), columns)


def map_frames(boxes: Tensor, grid: tuple[int, int, int], edges: Tensor, axis: int) -> Tensor:
    """Return the tokens by place and time: (rows or columns, n) float64, summed over the other axis of the frame.

    ``boxes``: what tokens stand for. ``grid``: (T, H, W). ``edges``: (n + 1,) on the frame axis. ``axis``: 1 for rows, 2
    for columns.
    """
    covers = _covers(boxes[:, 2 * axis : 2 * axis + 2], grid[axis])
    spans = zip(edges.tolist(), edges[1:].tolist(), strict=False)
    return torch.stack([share_of_interval(boxes, low, high) @ covers for low, high in spans], dim=1)


def _covers(spans: Tensor, size: int) -> Tensor:
    """The share of each span (S, 2) that lies on each of ``size`` cells: (S, size) float64."""
    low = torch.arange(size, dtype=torch.float64)
    start, stop = spans[:, :1], spans[:, 1:]
    return (stop.minimum(low + 1) - start.maximum(low)).clamp(min=0) / (stop - start)


def frame_edges_s(frame_seconds: Tensor, end_s: float | None = None) -> Tensor:
    """Return when each frame begins, and when the last one ends: (T + 1,) float64 seconds, increasing.

    Frames of one time, as when a frame of the file is sampled several times, share the time up to the next one. The last
    gap is repeated, but not past ``end_s``. Where all frames have one time, they last until ``end_s``, or for a second if
    that is not later.
    """
    stamps, counts = frame_seconds.to(torch.float64).unique_consecutive(return_counts=True)
    each = stamps.diff() / counts[:-1]
    if not each.numel():
        length = 1.0 if end_s is None or end_s <= float(stamps[0]) else end_s - float(stamps[0])
        each = torch.tensor([length], dtype=torch.float64) / counts
    each = torch.cat([each, each[-1:]])[: counts.shape[0]]
    if end_s is not None and end_s > float(stamps[-1]):
        each[-1:] = each[-1:].clamp(max=(end_s - float(stamps[-1])) / int(counts[-1]))
    nth = torch.arange(frame_seconds.shape[0]) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    begins = stamps.repeat_interleave(counts) + nth * each.repeat_interleave(counts)
    return torch.cat([begins, stamps[-1:] + counts[-1] * each[-1]])


def frames_at(edges_s: Tensor, seconds: Tensor) -> Tensor:
    """Return the place on the frame axis of times in seconds: (n,) float64. ``edges_s``: as of ``frame_edges_s``."""
    places = np.interp(seconds.numpy(), edges_s.numpy(), np.arange(edges_s.shape[0]))
    return torch.from_numpy(places)
