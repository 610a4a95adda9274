"""ToDRE, its first stage: tokens that are least like those picked before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import unit_tokens
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.shares import clamp_budget, share_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

MOST_TOKENS = 4096  # compared with each other: 64 MiB of cosines


def keep_diverse_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C) that ``pick_diverse`` picks, at their own places.

    B is ``budget_tokens``. Clips of more than ``MOST_TOKENS`` tokens are picked from in parts of as many frames as have
    so many, at least one; the budget is shared in proportion. The first pick of a part is its token of largest norm.
    Decisions are over the first D channels. Time is quadratic in a part, linear in the clip. ``frame_seconds``: (T,)
    float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    per_frame = latents.shape[1] * latents.shape[2]
    num_tokens = clamp_budget(latents, budget_tokens)
    step = max(1, MOST_TOKENS // per_frame)
    parts = latents.split(step)
    sizes = torch.tensor([part.shape[0] * per_frame for part in parts])
    shares = share_budget(num_tokens, sizes, sizes).tolist()
    kept = []
    for index, (part, count) in enumerate(zip(parts, shares, strict=True)):
        if count:
            norms = part[..., :width].to(torch.float32).flatten(0, 2).norm(dim=1)
            picked = pick_diverse(unit_tokens(part, width).flatten(0, 1), int(norms.argmax()), count)
            kept.append(picked.sort().values + index * step * per_frame)
    return gather_tokens(latents, frame_seconds, torch.cat(kept), width)


def pick_diverse(units: Tensor, first: int, count: int) -> Tensor:
    """Return ``count`` <= n of ``units`` (n, D), tokens of norm 1, in the order of picking: (count,) int64.

    After ``first``, each pick is the token whose cosines to all picked before sum to the least, ties in order.
    """
    cosines = units @ units.T
    total = torch.zeros(units.shape[0])
    picked = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        picked[index] = first
        total += cosines[first]
        total[first] = torch.inf
        first = int(total.argmin())
    return picked


METHOD = Method(
    name="todre",
    summary="the tokens least like those picked before them, from the token of largest norm on",
    source="ToDRE, arXiv 2505.18757",
    deviations="first stage only: the second needs the decoder's attention; starts at the token of largest norm, in "
    "place of the tower's highest attention (the paper finds a random start nearly as good); clips of more "
    "than 4096 tokens are picked from in parts",
    compress=keep_diverse_tokens,
)
