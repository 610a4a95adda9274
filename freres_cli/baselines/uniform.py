"""Uniform frames: what most video language models do with a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def sample_uniform_frames(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return the tokens of F = ceil(B / (H*W)) evenly spaced frames of ``latents`` (T, H, W, C), at their own positions.

    B is ``budget_tokens``. The frames are the centres of F equal parts of the clip, as is common practice. If they hold
    more than B tokens, tokens are dropped evenly along the sequence, so that exactly min(B, T*H*W) remain.
    ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    num_frames, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    frames = spread(min(num_frames, -(-budget_tokens // per_frame)), num_frames)
    tokens = (frames[:, None] * per_frame + torch.arange(per_frame)).flatten()
    kept = tokens[spread(min(budget_tokens, tokens.shape[0]), tokens.shape[0])]
    return gather_tokens(latents, frame_seconds, kept, width)


def spread(count: int, size: int) -> Tensor:
    """Return ``count`` <= ``size`` different indices in 0..size-1, the centres of ``count`` equal parts: (count,) int64."""
    # (i + 1/2) * size / count rounded down, in whole numbers.
    return (2 * torch.arange(count) + 1) * size // (2 * count)


METHOD = Method(
    name="uniform",
    summary="evenly spaced whole frames, thinned to exactly the budget",
    source="common practice",
    deviations="frames that hold a few tokens more than the budget are thinned evenly",
    compress=sample_uniform_frames,
)
