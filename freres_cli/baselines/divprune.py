"""DivPrune: tokens that are far from each other, chosen one by one."""

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

CHUNK_VALUES = 2**22  # values in float32 at a time
COPY_VALUES = 2**26  # latents of up to this many values are copied to float32
BLOCK_TOKENS = 1024  # tokens whose distances to all others are taken at a time
SAME = 1e-6  # distances below are rounding


def keep_diverse_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C), chosen as ``choose_diverse`` does, in raster order.

    B is ``budget_tokens``. Time grows with the square of T*H*W, for the first choice, and with B*T*H*W; memory beyond the
    latents with T*H*W. ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
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
    chosen. Distance is 1 - cos, ties go to the first token.
    """
    if tokens.numel() <= COPY_VALUES:
        # Every choice reads all tokens, and converting them takes longer than the products.
        tokens = tokens.to(torch.float32)
    scale = _inverse_norms(tokens)
    chosen = torch.empty(count, dtype=torch.int64)
    chosen[0] = _nearest_others(tokens, scale).argmax()
    nearest = torch.full((tokens.shape[0],), torch.inf)
    for index in range(1, count):
        last = chosen[index - 1]
        unit = tokens[last].to(torch.float32) * scale[last]
        nearest = torch.minimum(nearest, _distances(tokens, scale, unit[None])[0])
        nearest[last] = -torch.inf
        chosen[index] = nearest.argmax()
    return chosen


def _distances(tokens: Tensor, scale: Tensor, units: Tensor) -> Tensor:
    """Return 1 - cos of each of ``units`` (U, D) to each of ``tokens`` (N, D): (U, N). Equal tokens are 0 apart."""
    step = max(1, CHUNK_VALUES // tokens.shape[1])
    parts = [units @ part.to(torch.float32).T for part in tokens.split(step)]
    apart = 1 - torch.cat(parts, dim=1) * scale
    return apart.masked_fill_(apart < SAME, 0.0)


def _nearest_others(tokens: Tensor, scale: Tensor) -> Tensor:
    """Return the distance of each token to the nearest other one: (N,)."""
    nearest = []
    step = max(1, min(BLOCK_TOKENS, CHUNK_VALUES // tokens.shape[0]))
    for first in range(0, tokens.shape[0], step):
        part = slice(first, first + step)
        apart = _distances(tokens, scale, tokens[part].to(torch.float32) * scale[part, None])
        rows = torch.arange(apart.shape[0])
        apart[rows, first + rows] = torch.inf
        nearest.append(apart.min(1).values)
    return torch.cat(nearest)


def _inverse_norms(tokens: Tensor) -> Tensor:
    """Return one over the norm of each token, (N,) float32; 0 for zero tokens."""
    step = max(1, CHUNK_VALUES // tokens.shape[1])
    norms = torch.cat([part.to(torch.float32).norm(dim=-1) for part in tokens.split(step)])
    return torch.where(norms > 0, 1 / norms, 0.0)


METHOD = Method(
    name="divprune",
    summary="the tokens of the clip that are farthest from each other, chosen one by one",
    source="DivPrune, arXiv 2503.02175",
    deviations="tokens stay in raster order",
    compress=keep_diverse_tokens,
)
