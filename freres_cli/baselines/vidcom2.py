"""VidCom2, Video Compression Commander: more tokens for unusual frames, and in each frame the most unusual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # variances of the Gaussians, of the paper's code
TEMPERATURE = 0.01  # of the softmax over frames, of the paper's code


def keep_unusual_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return the min(B, T*H*W) tokens of ``latents`` (T, H, W, C) that differ most from their frame's and the clip's mean.

    B is ``budget_tokens``. Likeness is taken over the half of the first D channels that varies least over the clip, with
    tokens scaled to norm 1: that of a token to a mean is the sum of ``exp(-d^2 / (2 a))`` for a in ``WIDTHS``, d their
    distance. A frame's share of B follows from its tokens' mean likeness to the clip, as ``share_budget`` says; it keeps
    the tokens with the least sum of likeness to clip and frame, ties in raster order. ``frame_seconds``: (T,) float64.
    ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    to_clip, to_frame = measure_likeness(latents, width)
    counts = share_budget(-to_clip.mean(1, dtype=torch.float64), to_clip.shape[1], budget_tokens)
    unlike = -(to_clip + to_frame)
    per_frame = unlike.shape[1]
    kept = [frame * per_frame + pick_highest(unlike[frame], count) for frame, count in enumerate(counts.tolist())]
    return gather_tokens(latents, frame_seconds, torch.cat(kept), width)


def measure_likeness(latents: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the likeness of each token of ``latents`` (T, H, W, C) to the clip's mean and to its frame's: (T, N) float32
    each. ``width``: D."""
    channels = find_calm_channels(latents, width)
    means = torch.stack([_units(frame, channels).mean(0) for frame in latents])
    centre = means.mean(0)
    to_clip, to_frame = [], []
    # Frame by frame, so that no float32 copy of the clip is made.
    for frame, mean in zip(latents, means, strict=True):
        units = _units(frame, channels)
        to_clip.append(_likeness(units, centre))
        to_frame.append(_likeness(units, mean))
    return torch.stack(to_clip), torch.stack(to_frame)


def find_calm_channels(latents: Tensor, width: int) -> Tensor:
    """Return the half (rounded up) of the first ``width`` channels of ``latents`` (T, H, W, C) with the least variance over
    all tokens, increasing."""
    mean = sum(frame[..., :width].sum((0, 1), dtype=torch.float64) for frame in latents) / latents.shape[:3].numel()
    spread = sum((frame[..., :width].to(torch.float64) - mean).square().sum((0, 1)) for frame in latents)
    return spread.argsort(stable=True)[: -(-width // 2)].sort().values


def share_budget(unusual: Tensor, per_frame: int, budget_tokens: int) -> Tensor:
    """Return how many tokens each frame keeps, (T,) int64, min(B, T*N) in all.

    With p the softmax of ``unusual`` (T,) over ``TEMPERATURE``, a frame's share of B is in proportion to 1 + p - mean(p),
    but at most N; what a full frame cannot take goes to the others in proportion. Shares are rounded down, and the tokens
    left over go to the largest remainders, of equal ones to the most unusual frame (ours). ``per_frame``: N.
    ``budget_tokens``: B.
    """
    num_frames = unusual.shape[0]
    p = (unusual.to(torch.float64) / TEMPERATURE).softmax(0)
    weights = 1 + p - p.mean()
    left = min(budget_tokens, num_frames * per_frame)
    share = torch.full_like(weights, per_frame)
    is_open = torch.ones(num_frames, dtype=torch.bool)
    while bool(is_open.any()):
        wanted = weights * (left - int((~is_open).sum()) * per_frame) / weights[is_open].sum()
        is_full = is_open & (wanted >= per_frame)
        if not bool(is_full.any()):
            share[is_open] = wanted[is_open]
            break
        is_open &= ~is_full
    # Sums of float64 may fall short of a whole number by rounding.
    counts = (share + 1e-9).floor().to(torch.int64)
    order = unusual.argsort(descending=True, stable=True)
    order = order[(share - counts)[order].argsort(descending=True, stable=True)]
    counts[order[: left - int(counts.sum())]] += 1
    return counts


def _units(frame: Tensor, channels: Tensor) -> Tensor:
    return torch.nn.functional.normalize(frame.flatten(0, 1)[:, channels].to(torch.float32), dim=-1)


def _likeness(units: Tensor, mean: Tensor) -> Tensor:
    distance = (units - mean).square().sum(-1)
    return torch.stack([(-distance / (2 * a)).exp() for a in WIDTHS]).sum(0)


METHOD = Method(
    name="vidcom2",
    summary="more tokens for unusual frames, and in each the tokens least like its own mean and the clip's",
    source="VidCom2, arXiv 2505.14454",
    deviations="shares of frames are reconciled to meet the budget exactly, so a frame may keep no token",
    compress=keep_unusual_tokens,
)
