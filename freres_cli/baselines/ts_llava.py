"""TS-LLaVA: a thumbnail of a few small frames, and tokens sampled from all frames."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.full import gather_tokens, place_tokens, raster_order
from freres_cli.baselines.lowres import pool_cells
from freres_cli.baselines.shares import clamp_budget
from freres_cli.baselines.uniform import spread
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

THUMBNAIL_FRAMES = 6


def sample_with_thumbnail(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): small frames that make up a thumbnail, and sampled tokens.

    B is ``budget_tokens``. The thumbnail has the H*W tokens of one frame, or half of B if that is less (ours). It is made
    of six frames, from the first to the last at even steps, averaged over as many cells each, as ``lowres.pool_cells``
    does. The rest of B are tokens at even steps from the first token of the clip to the last. If B holds the clip, all
    tokens are kept (ours). Boxes are set. ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the
    budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    grid = latents.shape[:3]
    num_tokens, per_frame = grid.numel(), grid[1] * grid[2]
    if budget_tokens >= num_tokens:
        return gather_tokens(latents, frame_seconds, torch.arange(num_tokens), width)
    in_thumbnail = min(per_frame, budget_tokens // 2)
    sampled = gather_tokens(latents, frame_seconds, spread_to_ends(budget_tokens - in_thumbnail, num_tokens), width)
    first = sampled.positions.long()
    rows, boxes = [sampled.latents], [torch.stack([first, first + 1], dim=2).flatten(1)]
    frames = spread_to_ends(min(THUMBNAIL_FRAMES, grid[0], in_thumbnail), grid[0])
    for frame, count in zip(frames.tolist(), split_evenly(in_thumbnail, frames.shape[0]), strict=True):
        means, spans = pool_cells(latents[frame : frame + 1], count)
        rows.append(means[0].to(latents.dtype))
        boxes.append(torch.cat([torch.tensor([[frame, frame + 1]]).expand(count, 2), spans], dim=1))
    return _place(torch.cat(rows), torch.cat(boxes), latents, frame_seconds, width)


def spread_to_ends(count: int, size: int) -> Tensor:
    """Return ``count`` <= ``size`` indices in 0..size-1 at even steps, the first and the last among them: (count,) int64.
    One index is the first."""
    if count < 2:
        return torch.zeros(count, dtype=torch.int64)
    # i * (size - 1) / (count - 1), rounded half up in whole numbers.
    return (2 * torch.arange(count) * (size - 1) + count - 1) // (2 * (count - 1))


def split_evenly(total: int, parts: int) -> list[int]:
    """Return ``total`` as a sum of ``parts`` whole numbers that differ by at most one, the larger ones evenly spread."""
    if not parts:
        return []
    counts = torch.full((parts,), total // parts)
    counts[spread(total % parts, parts)] += 1
    return counts.tolist()


def _place(rows: Tensor, boxes: Tensor, latents: Tensor, frame_seconds: Tensor, width: int) -> VideoTokens:
    """Return ``rows`` (S, C) in raster order, each at the middle of its box (S, 6)."""
    positions = (boxes[:, 0::2] + boxes[:, 1::2] - 1).to(torch.float32) / 2
    order = raster_order(positions)
    boxes = boxes[order]
    frame = boxes[:, 0].clone()
    grid = (latents.shape[0], latents.shape[1], latents.shape[2])
    tokens = place_tokens(rows[order], positions[order], frame, grid, frame_seconds, width)
    return replace(tokens, boxes=boxes)


METHOD = Method(
    name="ts-llava",
    summary="a thumbnail of six small frames, and tokens sampled at even steps from the whole clip",
    source="TS-LLaVA, arXiv 2411.11066",
    deviations="the thumbnail is made of averaged latents, not of frames shrunk and encoded as one image; its tokens stand "
    "at their own frames and places, in raster order with the others, not ahead of them; it takes at most half of the "
    "budget; a clip that fits the budget is kept as it is",
    mixes=True,
    compress=sample_with_thumbnail,
)
