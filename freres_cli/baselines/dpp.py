"""DPP: the tokens that differ most from one another, by a determinantal point process that knows no question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.falling import FallingScores, inverse_norms
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
    tokens = latents[..., :width].flatten(0, 2)
    keep = pick_diverse(tokens, torch.ones(len(tokens)), budget_tokens).sort().values
    return gather_tokens(latents, frame_seconds, keep, width)


def pick_diverse(tokens: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Return the indices of min(``count``, S) of ``tokens`` (S, D) in the order in which they are picked, (n,) int64.

    Greedy maximum of the determinant of K = diag(r) Z Z^T diag(r) over the tokens picked so far (CDPruner; greedy search
    as in Chen et al., arXiv 1709.05135). Z is the tokens at norm 1, r the ``relevance``, (S,) float32, 0 or more. Of equal
    gains, the first token is picked, but for rounding. A token's gain is its squared length across the span of those
    picked, which is kept as an orthonormal basis: the same picks as from Cholesky rows, without the (n, S) matrix of those.
    Once no token adds volume, the search starts over among the rest (ours, because D directions are spent after D picks,
    and the budget is exact).
    """
    count = min(count, len(tokens))
    inverse = inverse_norms(tokens)
    weights = relevance.square() * (inverse > 0)
    picked: list[int] = []
    while len(picked) < count:
        round_of_picks = _pick_until_spent(tokens, inverse, relevance, weights, count - len(picked))
        picked += round_of_picks
        weights[round_of_picks] = -torch.inf
    return torch.tensor(picked, dtype=torch.int64, device=tokens.device)


def _pick_until_spent(tokens: Tensor, inverse: Tensor, relevance: Tensor, weights: Tensor, count: int) -> list[int]:
    """Pick until ``count`` tokens are picked, or what is left adds no volume. ``inverse``: (S,) one over their norms.
    ``weights``: (S,) their own volumes; -inf for those picked before."""
    left, width = weights.clone(), tokens.shape[1]
    most = max(0.0, float(left.max()))  # of what is left; looked at again where it would decide, as it only falls
    basis = tokens.new_empty(min(count, width), width, dtype=torch.float32)
    picked: list[int] = []

    def fall(vectors: Tensor, gains: Tensor, since: int) -> Tensor:
        return gains - (vectors @ basis[since : len(picked)].T).square().sum(1)

    gains = FallingScores(tokens, relevance * inverse, weights, fall)
    while len(picked) < len(basis):
        best, gain = gains.find_best()
        if picked and gain <= SPENT * most:
            most = max(0.0, float(left.max()))
            if gain <= SPENT * most:
                break
        direction = tokens[best].to(torch.float32) * inverse[best]
        for _ in range(2):  # once more, because one subtraction leaves rounding along the basis
            direction = direction - basis[: len(picked)].T @ (basis[: len(picked)] @ direction)
        basis[len(picked)] = torch.nn.functional.normalize(direction, dim=0)
        picked.append(best)
        left[best] = -torch.inf
        gains.pick(best)
    return picked


METHOD = Method(
    name="dpp",
    summary="the tokens that differ most from one another (a determinantal point process)",
    source="CDPruner, arXiv 2506.10967, without its relevance",
    deviations="one selection over the whole clip, not one for each frame; once every direction is spent, the search starts "
    "over among the rest",
    compress=keep_diverse_tokens,
)
