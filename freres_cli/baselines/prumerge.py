"""LLaVA-PruMerge+ with the norm of tokens in place of the tower's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
from freres_cli.baselines.groups import locate, place_rows
from freres_cli.baselines.shares import clamp_budget, share_budget
from freres_cli.baselines.uniform import spread
from freres_cli.baselines.visionzip import measure_norms
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

NEIGHBOUR_SHARE = 32 / 576  # of a frame's tokens: the original takes 32 of 576
UNIFORM_PER_OUTLIER = 3


def prune_and_merge(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): of each frame outliers, evenly spread others, and a remainder.

    B is ``budget_tokens``. Frames share it in proportion to what the original would keep: four tokens for each outlier,
    see ``count_outliers``, and one more. Of a frame's share, one token is the remainder, a quarter of the others are the
    tokens of largest norm, and the rest are spread evenly over what is left. Each of them is averaged with its nearest
    neighbours, see ``merge_frame``. A frame whose share is H*W stays as encoded. Decisions are over the first D channels.
    ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    norms = torch.stack([measure_norms(frame, width) for frame in latents])
    weights = 1 + (1 + UNIFORM_PER_OUTLIER) * count_outliers(norms)
    shares = share_budget(num_tokens, weights, torch.full((num_frames,), per_frame))
    rows, places = [], []
    for frame, count in enumerate(shares.tolist()):
        if count:
            kept = _pick(norms[frame], count)
            rows.append(merge_frame(latents[frame].flatten(0, 1), norms[frame], kept, count, width))
            where = kept if kept.shape[0] == count else torch.cat([kept, _middle(kept, (grid_h, grid_w))])
            places.append(locate(frame * per_frame + where, (num_frames, grid_h, grid_w)))
    return place_rows(torch.cat(rows), torch.cat(places), latents, frame_seconds, width)


def count_outliers(norms: Tensor) -> Tensor:
    """Return how many of ``norms`` (T, N) of each frame lie above the third quartile by more than 1.5 times the distance
    between the quartiles: (T,) int64."""
    low, high = norms.quantile(torch.tensor([0.25, 0.75]), dim=1)
    return (norms > (high + 1.5 * (high - low))[:, None]).sum(1)


def merge_frame(tokens: Tensor, norms: Tensor, kept: Tensor, count: int, width: int) -> Tensor:
    """Return the tokens of a frame after merging, as ``kept``, and last the remainder if one is asked for: (count, C).

    ``tokens``: (N, C). ``norms``: (N,) over the main channels; divided by their sum they are the weights a. ``kept``: (K,)
    raster indices, K is ``count`` or one less. A kept token x becomes (x + sum a y) / (1 + sum a) over those other tokens
    y of the frame whose cosine with it, over the first ``width`` channels, is highest: ``NEIGHBOUR_SHARE`` of the frame's
    tokens. The remainder is the mean of the dropped tokens by weight.
    """
    values = tokens.to(torch.float32)
    if count == tokens.shape[0]:
        return values
    weights = norms / norms.sum() if bool(norms.any()) else torch.full_like(norms, 1 / norms.shape[0])
    units = torch.nn.functional.normalize(values[:, :width], dim=1)
    cosines = units[kept] @ units.T
    cosines[torch.arange(kept.shape[0]), kept] = -torch.inf
    num_neighbours = min(tokens.shape[0] - 1, max(1, round(tokens.shape[0] * NEIGHBOUR_SHARE)))
    neighbours = cosines.argsort(dim=1, descending=True, stable=True)[:, :num_neighbours]
    mix = torch.zeros(kept.shape[0], tokens.shape[0]).scatter_(1, neighbours, weights[neighbours])
    mix[torch.arange(kept.shape[0]), kept] = 1.0
    if kept.shape[0] < count:
        rest = weights.clone()
        rest[kept] = 0
        if not bool(rest.any()):
            rest = torch.ones_like(rest).index_fill_(0, kept, 0.0)
        mix = torch.cat([mix, rest[None]])
    return (mix / mix.sum(1, keepdim=True)) @ values


def _pick(norms: Tensor, count: int) -> Tensor:
    """The tokens to keep, increasing: ``count`` of them if that is one or all, else one less."""
    if count in (1, norms.shape[0]):
        return pick_highest(norms, count)
    num_outliers = -(-(count - 1) // (1 + UNIFORM_PER_OUTLIER))
    is_rest = torch.ones(norms.shape[0], dtype=torch.bool)
    is_rest[pick_highest(norms, num_outliers)] = False
    rest = is_rest.nonzero().squeeze(1)
    is_rest[rest[spread(count - 1 - num_outliers, rest.shape[0])]] = False
    return (~is_rest).nonzero().squeeze(1)


def _middle(kept: Tensor, size: tuple[int, int]) -> Tensor:
    """The dropped cell of a frame nearest to the middle of all that are dropped: (1,) int64."""
    is_dropped = torch.ones(size[0] * size[1], dtype=torch.bool)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero().squeeze(1)
    places = torch.stack([dropped // size[1], dropped % size[1]], dim=1).to(torch.float32)
    return dropped[(places - places.mean(0)).square().sum(1).argmin()][None]


METHOD = Method(
    name="prumerge-norm",
    summary="in each frame tokens of outstanding norm, evenly spread others, and one for the rest, each averaged with its "
    "like",
    source="LLaVA-PruMerge+, arXiv 2403.15388",
    deviations="the norm of a token stands in for the attention it gets in the tower, and latents for keys; the counts "
    "that the original would keep are scaled to the budget; averages, where the original adds; neighbours in "
    "proportion to the grid, 32 of 576 tokens; frames without a share of a small budget are left out",
    mixes=True,
    compress=prune_and_merge,
)
