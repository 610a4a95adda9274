"""Budgets: the number of tokens asked for, split over the parts of a clip to the exact token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def clamp_budget(latents: Tensor, budget_tokens: int) -> int:
    """Return min(B, T*H*W) for ``latents`` (T, H, W, C). Raises ``ValueError`` if the budget is below one."""
    if budget_tokens < 1:
        raise ValueError(f"budget: expected at least 1, got {budget_tokens}")
    return min(budget_tokens, latents.shape[:3].numel())


def share_budget(budget_tokens: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """Return how many tokens each part gets: (n,) int64, min(B, sum of ``capacities``) in all.

    Shares are in proportion to ``weights`` (n,) int64, at most ``capacities`` (n,) int64, and what rounding leaves is
    spread evenly over the sequence. What a full part cannot take is shared again among the others. Parts of weight 0 get
    tokens only when all others are full.
    """
    shares = torch.zeros_like(capacities)
    left = min(budget_tokens, int(capacities.sum()))
    while left:
        room = capacities - shares
        has_room = (room > 0).long()
        open_weights = weights * has_room
        if not int(open_weights.sum()):
            open_weights = has_room
        # The running total, rounded, in whole numbers.
        total = open_weights.sum()
        ends = (2 * left * open_weights.cumsum(0) + total) // (2 * total)
        added = ends.diff(prepend=ends.new_zeros(1)).minimum(room)
        shares += added
        left -= int(added.sum())
    return shares


def share_evenly(budget_tokens: int, count: int, capacity: int) -> Tensor:
    """Return how many tokens each of ``count`` equal parts gets, at most ``capacity`` each: (count,) int64."""
    return share_budget(budget_tokens, torch.ones(count, dtype=torch.int64), torch.full((count,), capacity))
