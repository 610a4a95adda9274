"""DTD, Differential Token Drop: a token is kept when it differs enough from what its cell showed before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import measure_change, pick_highest, scale_frames, thin_first_frame
from freres_cli.baselines.full import gather_tokens
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

MOST_CHANGE = 4.0  # above the largest 1 - cos, which is 2
NUM_HALVINGS = 24  # leaves an interval of 2e-7, about the rounding of a cosine in float32


def drop_repeated_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return the min(B, T*H*W) tokens of ``latents`` (T, H, W, C) that differ from the last kept token of their cell.

    B is ``budget_tokens``. Tokens are kept as ``keep_above`` keeps them, the first frame whole. Its threshold is halved
    in on: an interval starts as [0, 4], where 0 keeps everything and 4 only the first frame; of its two halves, the one
    stays whose lower end keeps more than B tokens and whose upper end at most B; after 24 halvings the upper end is used,
    or sooner a threshold that keeps exactly B. The tokens still missing are those of largest change among the dropped,
    ties in raster order. If B is below the H*W tokens of the first frame, B of them are kept, evenly spread. All of this
    search is ours: the original is given its threshold. ``frame_seconds``: (T,) float64. ``width``: D. Raises
    ``ValueError`` if the budget is below one.
    """
    per_frame = latents.shape[1] * latents.shape[2]
    if budget_tokens < per_frame:
        return gather_tokens(latents, frame_seconds, thin_first_frame(per_frame, budget_tokens), width)
    change = _search(latents, width, budget_tokens)
    return gather_tokens(latents, frame_seconds, pick_highest(change, budget_tokens), width)


def keep_above(latents: Tensor, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Return which tokens are kept, (T, N) bool, and the change of each since the last kept token of its cell, (T, N).

    ``latents``: (T, H, W, C), of which the first ``width`` channels are compared. A token is kept if its change, 1 - cos,
    is at least ``threshold``. The change of the first frame is infinite.
    """
    num_frames, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    kept = torch.ones(num_frames, per_frame, dtype=torch.bool)
    change = torch.full((num_frames, per_frame), torch.inf)
    frames = scale_frames(latents, width)
    last = next(frames).clone()
    for frame, units in enumerate(frames, start=1):
        change[frame] = measure_change(units, last)
        kept[frame] = change[frame] >= threshold
        last[kept[frame]] = units[kept[frame]]
    return kept, change


def _search(latents: Tensor, width: int, budget_tokens: int) -> Tensor:
    """Return the changes (T, N) at the threshold that was found: those of kept tokens are above all others."""
    low, high = 0.0, MOST_CHANGE
    best = keep_above(latents, width, high)
    for _ in range(NUM_HALVINGS):
        if int(best[0].sum()) == budget_tokens:
            break
        middle = (low + high) / 2
        tried = keep_above(latents, width, middle)
        if int(tried[0].sum()) > budget_tokens:
            low = middle
        else:
            high, best = middle, tried
    return best[1]


METHOD = Method(
    name="dtd",
    summary="the tokens that differ most from the last kept token of their cell, and the whole first frame",
    source="DTD of TimeChat-Online, arXiv 2504.17343",
    deviations="the threshold is searched so that the budget is met exactly; a token is compared with the last kept one of "
    "its cell, not with the frame before, so slow drift is kept; a budget below one frame thins the first frame evenly",
    compress=drop_repeated_tokens,
)
