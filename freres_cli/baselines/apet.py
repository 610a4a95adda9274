"""ApET: the tokens that a few basis tokens approximate worst; the others are merged into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
from freres_cli.baselines.shares import clamp_budget
from freres_cli.baselines.tome import place_groups
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

NUM_BASIS = 10  # of the authors' code
RIDGE = 1e-5  # of the authors' code
CHUNK_VALUES = 2**24  # values in float32 at a time


def merge_into_unusual_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) means of tokens of ``latents`` (T, H, W, C), at the mean positions of what they hold.

    B is ``budget_tokens``. The tokens with the largest error, as ``measure_error`` says, are kept, ties in raster order.
    Every other token joins the kept one with the largest cosine over the first D channels, and each becomes the mean of
    what it holds. Time grows with B*T*H*W; memory beyond the latents with B. ``frame_seconds``: (T,) float64. ``width``:
    D. Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    tokens = latents[..., :width].flatten(0, 2)
    if budget_tokens >= tokens.shape[0]:
        return place_groups(latents, frame_seconds, torch.arange(tokens.shape[0]), width)
    kept = pick_highest(measure_error(tokens, choose_basis(tokens)), budget_tokens)
    return place_groups(latents, frame_seconds, _join(tokens, kept), width)


def choose_basis(tokens: Tensor) -> Tensor:
    """Return ten of ``tokens`` (N, D), or all if there are fewer, by farthest-point sampling: (M,) int64.

    The first is farthest from the mean of all (ours), each further one from the nearest of those before. Ties go to the
    first token.
    """
    mean = torch.stack([part.sum(0, dtype=torch.float64) for part in _parts(tokens)]).sum(0) / tokens.shape[0]
    chosen = [int(_distances(tokens, mean).argmax())]
    nearest = torch.full(tokens.shape[:1], torch.inf)
    while len(chosen) < min(NUM_BASIS, tokens.shape[0]):
        nearest = torch.minimum(nearest, _distances(tokens, tokens[chosen[-1]]))
        nearest[chosen[-1]] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def measure_error(tokens: Tensor, basis: Tensor) -> Tensor:
    """Return the norm of what a ridge regression on the basis leaves of each of ``tokens`` (N, D): (N,) float32.

    ``basis``: (M,) their indices.
    """
    rows = tokens[basis].to(torch.float64)
    gram = rows @ rows.T + RIDGE * torch.eye(rows.shape[0], dtype=torch.float64)
    # (D, M): from a token to its coefficients.
    solve = torch.linalg.solve(gram, rows).T.to(torch.float32)
    rows = rows.to(torch.float32)
    return torch.cat([(own - own @ solve @ rows).norm(dim=-1) for own in (p.to(torch.float32) for p in _parts(tokens))])


def _join(tokens: Tensor, kept: Tensor) -> Tensor:
    """Return which of the ``kept`` each token holds or joins: (N,) int64."""
    centres = torch.nn.functional.normalize(tokens[kept].to(torch.float32), dim=-1)
    step = max(1, CHUNK_VALUES // max(centres.shape))
    owner = torch.cat([(part.to(torch.float32) @ centres.T).argmax(1) for part in tokens.split(step)])
    owner[kept] = torch.arange(kept.shape[0])
    return owner


def _distances(tokens: Tensor, point: Tensor) -> Tensor:
    """Squared distances to a point (D,): (N,)."""
    return torch.cat([(part.to(torch.float32) - point.to(torch.float32)).square().sum(-1) for part in _parts(tokens)])


def _parts(tokens: Tensor) -> tuple[Tensor, ...]:
    return tokens.split(max(1, CHUNK_VALUES // tokens.shape[1]))


METHOD = Method(
    name="apet",
    summary="the tokens that ten basis tokens approximate worst, each the mean of itself and the tokens most like it",
    source="ApET, arXiv 2602.19870, ahead of the language model",
    deviations="sampling of the basis starts at the token farthest from the mean, not at random; basis tokens are not mixed "
    "into the weakest kept ones; nothing is dropped in later layers",
    compress=merge_into_unusual_tokens,
)
