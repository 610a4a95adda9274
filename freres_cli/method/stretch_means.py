"""What two stretches merge into: the mean of their latents, and its trend."""

from __future__ import annotations

import torch
from torch import Tensor


def box_sizes(boxes: Tensor) -> Tensor:
    """Return how many latents each box (S, 6) covers: (S,) int64."""
    return (boxes[:, 1::2] - boxes[:, ::2]).prod(1)


def merge_stretches(x: Tensor, y: Tensor, boxes_x: Tensor, boxes_y: Tensor, channels: int) -> Tensor:
    """Return what pairs of stretches merge into, (k, C) or (k, C + D), in the dtype of ``x``.

    ``x``, ``y``: the first and the second of each pair, means (C) and, if they are kept, trends (D). ``boxes_x``,
    ``boxes_y``: (k, 6), what they stand for. ``channels``: C.
    """
    n, m = box_sizes(boxes_x), box_sizes(boxes_y)
    means = merge_means(x[:, :channels], y[:, :channels], n, m)
    if x.shape[1] == channels:
        return means
    return torch.cat([means, merge_trends(x, y, boxes_x, boxes_y, channels)], dim=1)


def merge_trends(x: Tensor, y: Tensor, boxes_x: Tensor, boxes_y: Tensor, channels: int) -> Tensor:
    """Return the trends of merged pairs, (k, D), in the dtype of ``x``. Arguments as in ``merge_stretches``.

    The trend of a stretch is the covariance of its latents with their frames over the standard deviation of the frames:
    how far, in the units of a latent, a straight line in time goes from the mean. Its square times the number of latents
    is what that line takes off the stretch's squared error. It never exceeds the latents, so it does not overflow where
    they do not. Covariances of merged sets add up exactly (Chan et al., 1979); the form is ours.
    """
    width = x.shape[1] - channels
    n, m = box_sizes(boxes_x).to(torch.float64), box_sizes(boxes_y).to(torch.float64)
    first, last = torch.minimum(boxes_x[:, 0], boxes_y[:, 0]), torch.maximum(boxes_x[:, 1], boxes_y[:, 1])
    spread_x, spread_y = (_frame_spread(boxes[:, 1] - boxes[:, 0]) for boxes in (boxes_x, boxes_y))
    spread = _frame_spread(last - first)
    later = (boxes_y[:, 0] + boxes_y[:, 1] - boxes_x[:, 0] - boxes_x[:, 1]).to(torch.float64) / 2
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
