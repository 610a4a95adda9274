"""VisionZip with the norm of tokens in place of the tower's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest, unit_tokens
from freres_cli.baselines.groups import average_around, locate, place_rows
from freres_cli.baselines.shares import clamp_budget, share_evenly
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

CONTEXT_SHARE = 10 / 64  # of a frame's tokens: 10 of 64, 20 of 128, 30 of 192 in the paper


def zip_frames(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): in each frame dominant tokens as encoded, and context tokens.

    B is ``budget_tokens``, shared evenly among the frames. Of a frame's tokens ``CONTEXT_SHARE``, rounded, are context
    tokens. Dominant are the tokens of largest norm. Of the rest, context tokens stand at even steps in raster order, and
    each other token joins the one with which its cosine is highest: half of a context token is its own, half the mean of
    those that joined. Decisions are over the first D channels. ``frame_seconds``: (T,) float64. ``width``: D. Raises
    ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    holder, joined = torch.full((2, num_frames * per_frame), -1)
    done = 0
    for frame, count in enumerate(share_evenly(num_tokens, num_frames, per_frame).tolist()):
        if not count:
            continue
        start = frame * per_frame
        norms = measure_norms(latents[frame], width)
        num_context = round(count * CONTEXT_SHARE)
        dominant = pick_highest(norms, count - num_context)
        holder[start + dominant] = done + torch.arange(count - num_context)
        done += count - num_context
        if not num_context:
            continue
        is_rest = torch.ones(per_frame, dtype=torch.bool)
        is_rest[dominant] = False
        rest = is_rest.nonzero().squeeze(1)
        target = torch.arange(num_context) * (rest.shape[0] // num_context)
        units = unit_tokens(latents[frame], width)[rest]
        joined[start + rest] = done + (units @ units[target].T).argmax(1)
        joined[start + rest[target]] = -1
        holder[start + rest[target]] = done + torch.arange(num_context)
        done += num_context
    rows = average_around(latents, holder, joined, torch.full((num_tokens,), 0.5))
    kept = (holder >= 0).nonzero().squeeze(1)
    places = locate(kept, (num_frames, grid_h, grid_w))
    return place_rows(rows[holder[kept]], places, latents, frame_seconds, width)


def measure_norms(frame: Tensor, width: int) -> Tensor:
    """Return the L2 norms of the tokens of ``frame`` (..., H, W, C) over the first ``width`` channels: (..., H*W) float32.

    They stand in for the attention that a token gets in the tower: in several towers, tokens that much is read from have
    large norms. The decoder is given latents only, and so are we.
    """
    return frame[..., :width].flatten(-3, -2).to(torch.float32).norm(dim=-1)


METHOD = Method(
    name="visionzip-norm",
    summary="in each frame the tokens of largest norm, and a few that average the others",
    source="VisionZip, arXiv 2412.04467",
    deviations="the norm of a token stands in for the attention it gets in the tower, and latents for keys; a context "
    "token is halfway to the mean of what joined it, where the original adds both; frames without a share of "
    "a small budget are left out",
    mixes=True,
    compress=zip_frames,
)
