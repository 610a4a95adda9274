"""DPP: the tokens that differ most from one another, by a determinantal point process that knows no question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import unit_tokens
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

SPENT = 1e-6  # share of a token's own volume below which what it adds is rounding in float32


def keep_diverse_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C), picked by ``pick_diverse`` over the whole clip.

    B is ``budget_tokens``; every relevance is 1, so no question is needed. ``frame_seconds``: (T,) float64. ``width``: D.
    Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    units = unit_tokens(latents, width).flatten(0, 1)
    keep = pick_diverse(units, torch.ones(len(units)), budget_tokens).sort().values
    return gather_tokens(latents, frame_seconds, keep, width)


def pick_diverse(units: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Return the indices of min(``count``, S) tokens in the order in which they are picked, (n,) int64.

    Greedy maximum of the determinant of K = diag(r) Z Z^T diag(r) over the tokens picked so far (CDPruner; greedy search
    as in Chen et al., arXiv 1709.05135). Of equal gains, the first token is picked. A token's gain is its squared length
    across the span of those picked, which is kept as an orthonormal basis: the same picks as from Cholesky rows, without
    the (n, S) matrix of those. Once no token adds volume, the search starts over among the rest (ours, because D
    directions are spent after D picks, and the budget is exact). ``units``: (S, D) float32, rows of norm 1, or zeros.
    ``relevance``: (S,) r, 0 or more.
    """
    num_tokens, width = units.shape
    count = min(count, num_tokens)
    weights = relevance.square() * units.any(dim=1)
    gains, is_left = weights.clone(), torch.ones(num_tokens, dtype=torch.bool, device=units.device)
    basis, size = units.new_empty(min(count, width), width), 0
    picked: list[int] = []
    while len(picked) < count:
        best = int(torch.where(is_left, gains, -torch.inf).argmax())
        most = torch.where(is_left, weights, 0.0).max()
        if size and (size == width or bool(gains[best] <= SPENT * most)):
            gains, size = weights.clone(), 0
            continue
        picked.append(best)
        is_left[best] = False
        direction = units[best]
        for _ in range(2):  # once more, because one subtraction leaves rounding along the basis
            direction = direction - basis[:size].T @ (basis[:size] @ direction)
        if len(picked) < count:
            basis[size] = torch.nn.functional.normalize(direction, dim=0)
            gains = gains - relevance.square() * (units @ basis[size]).square()
            size += 1
    return torch.tensor(picked, dtype=torch.int64, device=units.device)


METHOD = Method(
    name="dpp",
    summary="the tokens that differ most from one another (a determinantal point process)",
    source="CDPruner, arXiv 2506.10967, without its relevance",
    deviations="one selection over the whole clip, not one for each frame; once every direction is spent, the search starts "
    "over among the rest",
    compress=keep_diverse_tokens,
)
