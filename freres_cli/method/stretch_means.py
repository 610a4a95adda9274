"""What two stretches merge into: the mean of their latents, and its trend."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def box_sizes(boxes: Tensor) -> Tensor:
    """Return how many latents each box (S, 6) covers: (S,) int64."""
    return (boxes[:, 1::2] - boxes[:, ::2]).prod(1)


def merge_weights(sizes: Pair, times: Pair, with_trends: bool) -> Tensor:
    """Return what decides how pairs of stretches merge, besides their latents: (k, 1) float32, and (k, 4) with trends.

    ``sizes``: of the first and of the second, (k,) int64, the number of latents in each. ``times``: of both, (k, 2), its
    frames, half-open. The columns: the share of the second in the mean, and the weights of ``merge_trends``.
    """
    n, m = sizes
    share = (m / (n + m))[:, None]
    if not with_trends:
        return share
    first, last = torch.minimum(times[0][:, 0], times[1][:, 0]), torch.maximum(times[0][:, 1], times[1][:, 1])
    later = (times[1].sum(1) - times[0].sum(1)).to(torch.float64) / 2
    spread_x, spread_y = (_frame_spread(time[:, 1] - time[:, 0]) for time in times)
    n, m = (size.to(torch.float64) for size in sizes)
    # Two single frames beside each other have no spread in time, and none between them.
    total = (n + m) * _frame_spread(last - first).clamp(min=0.5)
    weights = (n * spread_x / total, m * spread_y / total, n * m / (n + m) * later / total)
    return torch.cat([share, torch.stack(weights, dim=1).to(torch.float32)], dim=1)


def merge_stretches(x: Tensor, y: Tensor, weights: Tensor, channels: int) -> Tensor:
    """Return what pairs of stretches merge into, (k, C) or (k, C + D), in the dtype of ``x``.

    ``x``, ``y``: the first and the second of each pair, means (C) and, if they are kept, trends (D). ``weights``: of
    ``merge_weights``, where these are. ``channels``: C.
    """
    means = merge_means(x[:, :channels], y[:, :channels], weights[:, :1])
    if x.shape[1] == channels:
        return means
    return torch.cat([means, merge_trends(x, y, weights[:, 1:], channels)], dim=1)


def merge_trends(x: Tensor, y: Tensor, weights: Tensor, channels: int) -> Tensor:
    """Return the trends of merged pairs, (k, D), in the dtype of ``x``. ``x``, ``y``, ``channels``: as in
    ``merge_stretches``. ``weights``: of both trends, and of how far apart the means are, (k, 3).

    The trend of a stretch is the covariance of its latents with their frames over the standard deviation of the frames:
    how far, in the units of a latent, a straight line in time goes from the mean. Its square times the number of latents
    is what that line takes off the stretch's squared error. It never exceeds the latents, so it does not overflow where
    they do not. Covariances of merged sets add up exactly (Chan et al., 1979); the form is ours.
    """
    width = x.shape[1] - channels
    change = y[:, :width].to(torch.float32) - x[:, :width].to(torch.float32)
    parts = (x[:, channels:].to(torch.float32), y[:, channels:].to(torch.float32), change)
    a, b, between = (part * weight[:, None] for part, weight in zip(parts, weights.unbind(1), strict=True))
    return (a + b + between).to(x.dtype)


def _frame_spread(num_frames: Tensor) -> Tensor:
    """Standard deviation of the indices of frames in a row, float64."""
    return ((num_frames.to(torch.float64) ** 2 - 1) / 12).sqrt()


def merge_means(x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """Return the means of ``x`` (k, C) and ``y``, of which ``share`` (k, 1) is that of ``y``, in the dtype of ``x``."""
    start, stop = x.to(torch.float32), y.to(torch.float32)
    # In this form the mean of equal latents is that latent, bit for bit.
    return (start + (stop - start) * share).to(x.dtype)
