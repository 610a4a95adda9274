"""EVS, Efficient Video Sampling: the tokens that changed most since the frame before."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.uniform import spread
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

_VALUES_AT_ONCE = 2**19  # of small frames, so many are scaled together that calls do not cost more than arithmetic


def keep_changed_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return the min(B, T*H*W) tokens of ``latents`` (T, H, W, C) that changed most since the frame before, in raster
    order.

    B is ``budget_tokens``. The change of a token is 1 - cos to the token of its cell one frame earlier, over the first D
    channels; that of the first frame is infinite, so it is kept first. Equal changes are kept in raster order. If B is
    below the H*W tokens of the first frame, B of them are kept, evenly spread (ours). ``frame_seconds``: (T,) float64.
    ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    per_frame = latents.shape[1] * latents.shape[2]
    if budget_tokens < per_frame:
        return gather_tokens(latents, frame_seconds, thin_first_frame(per_frame, budget_tokens), width)
    change = measure_changes(latents, width)
    return gather_tokens(latents, frame_seconds, pick_highest(change, budget_tokens), width)


def measure_changes(latents: Tensor, width: int) -> Tensor:
    """Return 1 - cos of each token of ``latents`` (T, H, W, C) to that of its cell one frame earlier, over the first
    ``width`` channels: (T, H*W) float32; infinite in the first frame."""
    change = torch.full((latents.shape[0], latents.shape[1] * latents.shape[2]), torch.inf)
    for frame, (before, now) in enumerate(pairwise(scale_frames(latents, width)), start=1):
        change[frame] = measure_change(now, before)
    return change


def scale_frames(latents: Tensor, width: int) -> Iterator[Tensor]:
    """Yield ``unit_tokens`` of each frame of ``latents`` (T, H, W, C): (N, D) float32, T times. Only a few frames are scaled
    at once: a float32 copy of the clip would be twice as large as the clip."""
    at_once = max(1, _VALUES_AT_ONCE // (latents.shape[1] * latents.shape[2] * width))
    for part in latents.split(at_once):
        yield from unit_tokens(part, width)


def unit_tokens(latents: Tensor, width: int) -> Tensor:
    """Return the first ``width`` channels of ``latents`` (..., H, W, C), each token scaled to norm 1: (..., H*W, D)
    float32."""
    tokens = latents[..., :width].flatten(-3, -2).to(torch.float32)
    return torch.nn.functional.normalize(tokens, dim=-1)


def measure_change(units: Tensor, others: Tensor) -> Tensor:
    """Return 1 - cos of tokens of norm 1, (..., D), as half the squared distance: exactly 0 for equal tokens."""
    return (units - others).square().sum(-1) / 2


def pick_highest(scores: Tensor, count: int) -> Tensor:
    """Return the raster indices of the ``count`` highest of ``scores`` (T, N), increasing. Ties go to the first in raster
    order."""
    order = scores.flatten().argsort(descending=True, stable=True)
    return order[:count].sort().values


def thin_first_frame(per_frame: int, budget_tokens: int) -> Tensor:
    """Return ``budget_tokens`` raster indices, evenly spread over the first ``per_frame``: (B,) int64.

    Raises ``ValueError`` if the budget is below one.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget: expected at least 1, got {budget_tokens}")
    return spread(budget_tokens, per_frame)


METHOD = Method(
    name="evs",
    summary="the tokens that changed most since the frame before, and the whole first frame",
    source="EVS, arXiv 2510.14624",
    deviations="compares latents, as servers do, not pixels as in the paper; a budget below one frame thins the first frame "
    "evenly",
    compress=keep_changed_tokens,
)
