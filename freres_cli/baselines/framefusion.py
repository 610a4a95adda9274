"""FrameFusion, its merging part: a cell's tokens are averaged as long as each is like the one before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import measure_changes, pick_highest, thin_first_frame
from freres_cli.baselines.groups import average_groups, locate, place_rows
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def merge_runs(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) means of runs of tokens of ``latents`` (T, H, W, C), each at the first frame of its run.

    B is ``budget_tokens``. A run is what a cell shows in consecutive frames. It goes on where the cosine to the frame
    before, over the first D channels, is highest: the T*H*W - B highest of the clip, ties last in raster order. If B is
    below H*W, every cell is one run, and B of them are kept, evenly spread (ours). Boxes are set. ``frame_seconds``: (T,)
    float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    if num_tokens < per_frame:
        starts = thin_first_frame(per_frame, num_tokens)
    else:
        starts = pick_highest(measure_changes(latents, width), num_tokens)
    run = torch.full((num_frames * per_frame,), -1)
    run[starts] = torch.arange(num_tokens)
    # Raster order: of one cell, a later run has a higher number.
    run = run.reshape(num_frames, per_frame).cummax(0).values.flatten()
    rows, lengths = average_groups(latents, run, num_tokens)
    first = locate(starts, (num_frames, grid_h, grid_w)).long()
    stop = first + 1
    stop[:, 0] = first[:, 0] + lengths
    boxes = torch.stack([first, stop], dim=2).flatten(1)
    return place_rows(rows, first, latents, frame_seconds, width, boxes=boxes)


METHOD = Method(
    name="framefusion",
    summary="runs of like tokens of a cell, averaged at the first frame of the run",
    source="FrameFusion, arXiv 2501.01986",
    deviations="merging only: the pruning after it needs attention of the decoder; merges latents once, not states of "
    "several decoder layers; the threshold is the one that leaves the budget; a budget below one frame thins "
    "the cells evenly",
    mixes=True,
    compress=merge_runs,
)
