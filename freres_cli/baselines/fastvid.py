"""FastVID with the norm of tokens in place of the tower's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import cut_by_similarity, find_peaks
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest, unit_tokens
from freres_cli.baselines.groups import average_around, bound_groups, locate, place_rows
from freres_cli.baselines.shares import clamp_budget, share_budget, share_evenly
from freres_cli.baselines.visionzip import measure_norms
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

THRESHOLD = 0.9
FEWEST_SEGMENTS = 8
CONTEXT_SHARE = 0.4
ANCHOR_STEP = 4  # context tokens come from every fourth frame of a segment
NUM_NEIGHBOURS = 4
LEAST_OWN_SHARE = 0.6


def prune_segments(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): in each segment salient tokens as encoded, and context tokens.

    B is ``budget_tokens``, shared by the segments of ``cut_by_similarity`` in proportion to their frames. Of a segment's
    tokens 40 % are context tokens: the centres of DPC-kNN in every fourth frame, at most all of these frames' tokens.
    Salient are the tokens of largest norm among the others, spread evenly over the frames. Every other token joins the
    context token with which its cosine is highest. One that n tokens joined keeps max(1 / (n + 1), 0.6) of its own, the
    rest is their mean. Tokens stay at their own places; boxes are set. Decisions are over the first D channels. Time is
    quadratic in a frame, and in a segment's tokens times its context tokens. ``frame_seconds``: (T,) float64. ``width``:
    D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    segments = cut_by_similarity(latents, width, THRESHOLD, FEWEST_SEGMENTS)
    sizes = torch.tensor([(stop - first) * per_frame for first, stop in segments])
    holder, joined = torch.full((2, num_frames * per_frame), -1)
    done = 0
    for (first, stop), count in zip(segments, share_budget(num_tokens, sizes, sizes).tolist(), strict=True):
        if count:
            own, others = _prune_segment(latents[first:stop], count, width)
            part = slice(first * per_frame, stop * per_frame)
            holder[part] = torch.where(own >= 0, own + done, -1)
            joined[part] = torch.where(others >= 0, others + done, -1)
            done += count
    numbers = torch.bincount(joined[joined >= 0], minlength=num_tokens)
    rows = average_around(latents, holder, joined, keep_own_share(numbers))
    kept = (holder >= 0).nonzero().squeeze(1)
    places = locate(kept[holder[kept].argsort()], (num_frames, grid_h, grid_w))
    boxes = bound_groups(torch.where(holder >= 0, holder, joined), places, (num_frames, grid_h, grid_w))
    return place_rows(rows, places, latents, frame_seconds, width, boxes=boxes)


def keep_own_share(num_joined: Tensor) -> Tensor:
    """Return the share of its own that a token keeps when others join it: max(1 / (n + 1), 0.6) for ``num_joined`` n."""
    return (1 / (num_joined.to(torch.float32) + 1)).clamp(min=LEAST_OWN_SHARE)


def _prune_segment(latents: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the output token, in 0..count-1, that each token of a segment is and the one that it joins: (L*N,) int64 each,
    -1 for none."""
    length, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    anchors = range(0, length, ANCHOR_STEP)
    num_context = min(round(CONTEXT_SHARE * count), len(anchors) * per_frame)
    context = torch.zeros(length, per_frame, dtype=torch.bool)
    shares = share_evenly(num_context, len(anchors), per_frame).tolist()
    for frame, share in zip(anchors, shares, strict=True):
        if share:
            tokens = latents[frame, ..., :width].flatten(0, 1).to(torch.float32)
            context[frame, find_peaks(tokens, share, NUM_NEIGHBOURS)] = True
    room = per_frame - context.sum(1)
    is_kept = context.clone()
    salient = share_budget(count - num_context, torch.ones(length, dtype=torch.int64), room)
    for frame, share in enumerate(salient.tolist()):
        norms = measure_norms(latents[frame], width).masked_fill(context[frame], -1.0)
        is_kept[frame, pick_highest(norms, share)] = True
    holder = torch.full((length * per_frame,), -1)
    holder[is_kept.flatten()] = torch.arange(count)
    joined = torch.full_like(holder, -1)
    if num_context:
        _join(latents, holder, context.flatten().nonzero().squeeze(1), joined, width)
    return holder, joined


def _join(latents: Tensor, holder: Tensor, centres: Tensor, joined: Tensor, width: int) -> None:
    per_frame = latents.shape[1] * latents.shape[2]
    # Frame by frame: only the centres of a segment are held in float32.
    units = torch.cat(
        [
            unit_tokens(latents[i], width)[centres[centres // per_frame == i] % per_frame]
            for i in centres.div(per_frame, rounding_mode="floor").unique().tolist()
        ]
    )
    for frame in range(latents.shape[0]):
        free = (holder[frame * per_frame : (frame + 1) * per_frame] < 0).nonzero().squeeze(1)
        nearest = (unit_tokens(latents[frame], width)[free] @ units.T).argmax(1)
        joined[frame * per_frame + free] = holder[centres[nearest]]


METHOD = Method(
    name="fastvid-norm",
    summary="segments of like frames, each with the tokens of largest norm and a few that average the others",
    source="FastVID, arXiv 2503.11187",
    deviations="the norm of a token stands in for the attention it gets in the tower; cuts compare mean latents, not the "
    "tower's own features of frames; anchor frames are counted from the first of a segment, not from its "
    "last; a token joins one context token of its segment, not one in each anchor frame; no random noise in "
    "DPC-kNN; context tokens are picked before salient ones, so that both fit any budget; segments longer "
    "than 32 frames are cut; segments without a share of a small budget are left out; constants are those of the authors' "
    "code for LLaVA-OneVision, for every model",
    mixes=True,
    compress=prune_segments,
)
