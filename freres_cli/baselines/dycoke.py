"""DyCoke, first stage: in groups of frames, the tokens least like those of an earlier frame of the group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import measure_change, pick_highest, thin_first_frame, unit_tokens
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.uniform import spread
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

WINDOW = 4  # frames in a group, of the paper
# Ours: at a quarter of the tokens, whole frames of windows of 4 would be the whole budget, and none of what changes be kept.
FIRST_FRAMES_SHARE = 0.75


def drop_similar_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): whole first frames of windows, and of every other frame the
    tokens least like those at the same places of its reference.

    B is ``budget_tokens``. A window has 4 frames: the second refers to the first, the third to the first, and the fourth
    to the third, each as it was before anything was dropped. All frames but the first of a window keep the same number of
    tokens, except that some, evenly spread, keep one more. If the first frames exceed three quarters of B, windows double
    until they do not, or there is only one; a window of 8 adds a fifth frame that refers to the first, and so on (ours). If
    B is below one frame, B tokens of the first are kept, evenly spread. Likeness is the cosine over the first D channels;
    ties in raster order. ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    if budget_tokens < per_frame:
        return gather_tokens(latents, frame_seconds, thin_first_frame(per_frame, budget_tokens), width)
    counts = count_kept(num_frames, per_frame, budget_tokens)
    kept = []
    for frame, count in enumerate(counts.tolist()):
        if count == per_frame:
            own = torch.arange(per_frame)
        else:
            reference = unit_tokens(latents[find_reference(frame)], width)
            own = pick_highest(measure_change(unit_tokens(latents[frame], width), reference), count)
        kept.append(frame * per_frame + own)
    return gather_tokens(latents, frame_seconds, torch.cat(kept), width)


def find_reference(frame: int) -> int:
    """Return the frame that a frame after the first of its window is compared with: one step back at odd frames, two at
    frames 2, 6, 10, ..., four at 4, 12, 20, ..., and so on."""
    return frame & (frame - 1)


def count_kept(num_frames: int, per_frame: int, budget_tokens: int) -> Tensor:
    """Return how many tokens each frame keeps, (T,) int64, min(B, T*H*W) in all.

    ``per_frame``: H*W. ``budget_tokens``: B, at least H*W.
    """
    window = WINDOW
    while window < num_frames and -(-num_frames // window) * per_frame > FIRST_FRAMES_SHARE * budget_tokens:
        window *= 2
    counts = torch.full((num_frames,), per_frame)
    others = (torch.arange(num_frames) % window).nonzero()[:, 0]
    if others.numel():
        left = min(budget_tokens, num_frames * per_frame) - (num_frames - others.numel()) * per_frame
        counts[others] = left // others.numel()
        counts[others[spread(left % others.numel(), others.numel())]] += 1
    return counts


METHOD = Method(
    name="dycoke",
    summary="whole frames at the start of windows, and of the others the tokens least like an earlier frame's",
    source="DyCoke, first stage, arXiv 2411.15024",
    deviations="the share that is dropped follows from the budget; windows of 4 frames double "
    "until their first frames are at most three quarters of the budget; a last frame without a partner is kept, not lost; "
    "every third frame of a window is pruned, the last window's too; tokens stay in raster order; a budget below one frame "
    "thins the first frame evenly",
    compress=drop_similar_tokens,
)
