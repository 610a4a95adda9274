"""ApET: a few basis tokens, and the tokens that they approximate worst, into which the others are merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
from freres_cli.baselines.groups import average_groups, locate, place_rows
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

NUM_BASIS, TOKENS_A_FRAME = 10, 32  # of the authors' code for video: ten of the tokens that a frame keeps are its basis
RIDGE = 1e-5  # of the authors' code
CHUNK_VALUES = 2**24  # values in float32 at a time


def merge_into_unusual_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): some of the basis, and those that it explains worst.

    B is ``budget_tokens``. The first S tokens of ``choose_basis`` are kept as they are, S at most ten in 32 of B, as in the
    authors' code for video. The B - S others are those with the largest error, as ``measure_error`` says, ties in raster
    order. Every token that is not kept joins the one of these with the largest cosine over the first D channels, and each
    becomes the mean of what it holds, at its own place. Time grows with B*T*H*W; memory beyond the latents with B.
    ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    tokens = latents[..., :width].flatten(0, 2)
    owner = torch.arange(tokens.shape[0])
    kept = owner
    if budget_tokens < tokens.shape[0]:
        basis = choose_basis(tokens)
        seeds = basis[: budget_tokens * NUM_BASIS // TOKENS_A_FRAME]
        error = measure_error(tokens, basis)
        error[seeds] = -1.0
        unusual = pick_highest(error, budget_tokens - len(seeds))
        owner = _join(tokens, unusual)
        owner[seeds] = len(unusual) + torch.arange(len(seeds))
        kept = torch.cat([unusual, seeds])
    rows, _ = average_groups(latents, owner, len(kept))
    num_frames, grid_h, grid_w = latents.shape[:3]
    return place_rows(rows, locate(kept, (num_frames, grid_h, grid_w)), latents, frame_seconds, width)


def choose_basis(tokens: Tensor) -> Tensor:
    """Return ten of ``tokens`` (N, D), or all if there are fewer, by farthest-point sampling: (M,) int64.

    The first is farthest from the mean of all (ours), each further one from the nearest of those before. Ties go to the
    first token, but for rounding.
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
    summary="some of ten basis tokens as they are, and those that these explain worst, each averaged with what is like it",
    source="ApET, arXiv 2602.19870, ahead of the language model",
    deviations="basis, choice and merging are over the whole clip, where the authors' code for video works frame by frame; "
    "sampling of the basis starts at the token farthest from the mean, not at random; fewer basis tokens are kept where "
    "the budget is below 32; nothing is dropped in later layers",
    mixes=True,
    compress=merge_into_unusual_tokens,
)
