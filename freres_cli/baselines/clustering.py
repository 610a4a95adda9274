"""Clusters of tokens and segments of time, shared by several methods.

DPC-kNN (Du, Ding, Jia 2016; for tokens: TCFormer, arXiv 2204.08680): a token is the centre of a cluster if it has close
neighbours and is far from any token with closer ones. Originals add random noise to break ties; ours go in raster order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import lazy_module
from freres_cli.baselines.evs import measure_change

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

CHUNK_VALUES = 2**24  # distances or latents held at a time: bounds the memory
ROUNDING = 1e-6  # of the squared norms: what a difference of two float32 products cannot tell from zero
MOST_FRAMES = 32  # of a segment: what is quadratic in a segment stays linear in the clip

Span = tuple[int, int]


def square_distances(tokens: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of each of ``tokens`` (n, D) to each of ``others`` (m, D), both float32: (n, m).

    It is 0 where rounding leaves nothing of it, as for equal tokens.
    """
    scale = tokens.square().sum(1)[:, None] + others.square().sum(1)
    squares = scale - 2 * (tokens @ others.T)
    return squares.masked_fill_(squares <= ROUNDING * scale, 0.0)


def find_peaks(tokens: Tensor, count: int, num_neighbours: int) -> Tensor:
    """Return the ``count`` <= n centres of DPC-kNN among ``tokens`` (n, D) float32: (count,) int64, increasing.

    The density of a token is exp(-m), m the mean squared distance, divided by D, to its ``num_neighbours`` nearest tokens,
    itself included; its gap is the distance to the nearest token of higher density, or of equal density and earlier; the
    first has the largest distance of all. Centres have the largest density * gap, ties in order. Logarithms are compared,
    so that large latents do not underflow. Of two neighbours each, the two nearest tokens are equally dense but for rounding,
    which then picks one. Time is n*n*D, memory n times a chunk.
    """
    size = tokens.shape[0]
    if count >= size:
        return torch.arange(size)
    step = max(1, CHUNK_VALUES // size)
    log_density, farthest = torch.empty(size), torch.zeros(())
    for start in range(0, size, step):
        squares = square_distances(tokens[start : start + step], tokens) / tokens.shape[1]
        nearest = squares.topk(min(num_neighbours, size), largest=False).values
        log_density[start : start + step] = -nearest.mean(1)
        farthest = farthest.maximum(squares.max())
    order = log_density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(size)
    gap = torch.empty(size)
    for start in range(0, size, step):
        squares = square_distances(tokens[start : start + step], tokens) / tokens.shape[1]
        is_denser = rank < rank[start : start + step, None]
        gap[start : start + step] = squares.masked_fill_(~is_denser, torch.inf).min(1).values
    gap[order[0]] = farthest
    score = log_density + gap.log() / 2
    return score.argsort(descending=True, stable=True)[:count].sort().values


def find_clusters(tokens: Tensor, count: int, num_neighbours: int) -> tuple[Tensor, Tensor]:
    """Return the centres (count,) of ``find_peaks``, and for each of ``tokens`` (n, D) the nearest centre, (n,) int64 in
    0..count-1, the first of several; a centre belongs to itself."""
    centres = find_peaks(tokens, count, num_neighbours)
    cluster = torch.empty(tokens.shape[0], dtype=torch.int64)
    step = max(1, CHUNK_VALUES // centres.shape[0])
    for start in range(0, tokens.shape[0], step):
        cluster[start : start + step] = square_distances(tokens[start : start + step], tokens[centres]).argmin(1)
    cluster[centres] = torch.arange(centres.shape[0])
    return centres, cluster


def mean_frames(latents: Tensor, width: int) -> Tensor:
    """Return the mean token of each frame of ``latents`` (T, H, W, C), over the first ``width`` channels: (T, D) float32."""
    return torch.stack([frame[..., :width].to(torch.float32).mean((0, 1)) for frame in latents])


def cut_by_similarity(latents: Tensor, width: int, threshold: float, fewest: int) -> list[Span]:
    """Return the segments of FastVID's and FlashVID's DySeg, [first, stop) in order, over ``latents`` (T, H, W, C).

    A segment starts where the cosine of the mean tokens, over the first ``width`` channels, of a frame and the one before
    is below ``threshold``, and at the ``fewest`` - 1 frames of lowest cosine, ties in order. Segments of more than
    ``MOST_FRAMES`` frames are cut into equal parts (ours, to bound the time).
    """
    units = torch.nn.functional.normalize(mean_frames(latents, width), dim=1)
    change = measure_change(units[1:], units[:-1])
    lowest = change.argsort(descending=True, stable=True)[: fewest - 1]
    is_first = change > 1 - threshold
    is_first[lowest] = True
    starts = [0, *(is_first.nonzero().squeeze(1) + 1).tolist(), latents.shape[0]]
    return [
        part
        for first, stop in zip(starts, starts[1:], strict=False)
        for part in cut_evenly(first, stop, -(-(stop - first) // MOST_FRAMES))
    ]


def cut_evenly(first: int, stop: int, count: int) -> list[Span]:
    """Return ``count`` spans of [first, stop), in order, as equal as they can be."""
    ends = [first + index * (stop - first) // count for index in range(count + 1)]
    return list(zip(ends, ends[1:], strict=False))
