"""What two stretches merge into: the mean of their latents, and its trend."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def box_sizes(boxes: Tensor) -> Tensor:
    """Return how many latents each box (S, 6) covers: (S,) int64."""
    return (boxes[:, 1::2] - boxes[:, ::2]).prod(1)


def merge_stretches(x: Tensor, y: Tensor, sizes: Pair, times: Pair, channels: int) -> Tensor:
    """Return what pairs of stretches merge into, (k, C) or (k, C + D), in the dtype of ``x``.

    ``x``, ``y``: the first and the second of each pair, means (C) and, if they are kept, trends (D). ``sizes``: of both,
    (k,), the number of latents in each. ``times``: of both, (k, 2), its frames, half-open. ``channels``: C.
    """
    means = merge_means(x[:, :channels], y[:, :channels], *sizes)
    if x.shape[1] == channels:
        return means
    return torch.cat([means, merge_trends(x, y, sizes, times, channels)], dim=1)


def merge_trends(x: Tensor, y: Tensor, sizes: Pair, times: Pair, channels: int) -> Tensor:
    """Return the trends of merged pairs, (k, D), in the dtype of ``x``. Arguments as in ``merge_stretches``.

    The trend of a stretch is the covariance of its latents with their frames over the standard deviation of the frames:
    how far, in the units of a latent, a straight line in time goes from the mean. Its square times the number of latents
    is what that line takes off the stretch's squared error. It never exceeds the latents, so it does not overflow where
    they do not. Covariances of merged sets add up exactly (Chan et al., 1979); the form is ours.
    """
    width = x.shape[1] - channels
    n, m = (size.to(torch.float64) for size in sizes)
    first, last = torch.minimum(times[0][:, 0], times[1][:, 0]), torch.maximum(times[0][:, 1], times[1][:, 1])
    spread_x, spread_y = (_frame_spread(time[:, 1] - time[:, 0]) for time in times)
    spread = _frame_spread(last - first)
    later = (times[1].sum(1) - times[0].sum(1)).to(torch.float64) / 2
    # Two single frames beside each other have no spread in time, and none between them.
    total = (n + m) * spread.clamp(min=0.5)
    weights = (n * spread_x / total, m * spread_y / total, n * m / (n + m) * later / total)
    change = y[:, :width].to(torch.float32) - x[:, :width].to(torch.float32)
    parts = (x[:, channels:].to(torch.float32), y[:, channels:].to(torch.float32), change)
    a, b, between = (part * weight[:, None].to(torch.float32) for part, weight in zip(parts, weights, strict=True))
    return (a + b + between).to(x.dtype)


def _frame_spread(num_frames: Tensor) -> Tensor:
    """Standard deviation of the indices of frames in a row, float64."""
    return ((num_frames.to(torch.float64) ** 2 - 1) / 12).sqrt()


def merge_means(x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """Return the means of ``x`` (k, C), of ``n`` (k,) latents each, and ``y``, of ``m`` each, in the dtype of ``x``."""
    start, stop = x.to(torch.float32), y.to(torch.float32)
    # In this form the mean of equal latents is that latent, bit for bit.
    return (start + (stop - start) * (m / (n + m))[:, None]).to(x.dtype)
