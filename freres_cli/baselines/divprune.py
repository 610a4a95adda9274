"""DivPrune: tokens that are far from each other, chosen one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.falling import FallingScores, inverse_norms, scaled_parts
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

BLOCK_TOKENS = 1024  # tokens whose distances to all others are taken at a time
SAME = 1e-6  # distances below are rounding


def keep_diverse_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C), chosen as ``choose_diverse`` does, in raster order.

    B is ``budget_tokens``. Time grows with the square of T*H*W, for the first choice, and with B*T*H*W; memory beyond the
    latents with T*H*W and B. ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    tokens = latents[..., :width].flatten(0, 2)
    if budget_tokens >= tokens.shape[0]:
        keep = torch.arange(tokens.shape[0])
    else:
        keep = choose_diverse(tokens, budget_tokens).sort().values
    return gather_tokens(latents, frame_seconds, keep, width)


def choose_diverse(tokens: Tensor, count: int) -> Tensor:
    """Return the indices of ``count`` <= N of ``tokens`` (N, D), in the order of choice.

    The first is the token whose nearest other token is farthest. Each further one is farthest from the nearest of those
    chosen. Distance is 1 - cos, ties go to the first token, but for rounding.
    """
    scale = inverse_norms(tokens)
    first = int(_nearest_others(tokens, scale).argmax())
    chosen, units = [first], tokens.new_empty(count, tokens.shape[1], dtype=torch.float32)
    units[0] = tokens[first].to(torch.float32) * scale[first]

    def fall(vectors: Tensor, nearest: Tensor, since: int) -> Tensor:
        return torch.minimum(nearest, _apart((vectors @ units[1 + since : len(chosen)].T).amax(1)))

    nearest = _apart(torch.cat([part @ units[0] for part in scaled_parts(tokens, scale, 1)]))
    nearest[first] = -torch.inf
    scores = FallingScores(tokens, scale, nearest, fall)
    while len(chosen) < count:
        best, _ = scores.find_best()
        units[len(chosen)] = tokens[best].to(torch.float32) * scale[best]
        chosen.append(best)
        scores.pick(best)
    return torch.tensor(chosen)


def _apart(cosine: Tensor) -> Tensor:
    """Return 1 - cos, and exactly 0 for equal tokens."""
    apart = 1 - cosine
    return apart.masked_fill_(apart < SAME, 0.0)


def _nearest_others(tokens: Tensor, scale: Tensor) -> Tensor:
    """Return the distance of each token to the nearest other one: (N,)."""
    nearest = []
    for first in range(0, tokens.shape[0], BLOCK_TOKENS):
        part = slice(first, first + BLOCK_TOKENS)
        own = tokens[part].to(torch.float32) * scale[part, None]
        most, done = torch.full(own.shape[:1], -torch.inf), 0
        for others in scaled_parts(tokens, scale, BLOCK_TOKENS):
            cosine = own @ others.T
            low, high = max(first, done), min(first + len(own), done + len(others))
            itself = torch.arange(low, max(low, high))
            cosine[itself - first, itself - done] = -torch.inf
            most, done = torch.maximum(most, cosine.amax(1)), done + len(others)
        nearest.append(_apart(most))
    return torch.cat(nearest)


METHOD = Method(
    name="divprune",
    summary="the tokens of the clip that are farthest from each other, chosen one by one",
    source="DivPrune, arXiv 2503.02175",
    deviations="tokens stay in raster order",
    compress=keep_diverse_tokens,
)
