"""Whether stretches that were read from a file can be those of a clip."""

from __future__ import annotations

import math

import numpy as np
import torch

from freres_cli.stretches import Stretches

MOST_LATENTS = 2**62  # counts of them fit in int64


def check_stretches(made: Stretches) -> None:
    """Refuse stretches that no clip has. ``ValueError`` names the tensor.

    Takes time and memory in proportion to their number, whatever the size of the grid.
    """
    _require(math.prod(made.grid) < MOST_LATENTS, "boxes: expected a grid with fewer cells")
    _check_boxes(made)
    _check_trends(made)
    _check_merges(made)
    _check_energy(made)
    cuts = made.cut_frame.tolist()
    _require(all(a < b for a, b in zip([0, *cuts], [*cuts, made.grid[0]], strict=True)), "cut_frame: expected frames")


def _check_boxes(made: Stretches) -> None:
    first, stop = made.boxes[:, ::2], made.boxes[:, 1::2]
    is_inside = (first >= 0) & (first < stop) & (stop <= first.new_tensor(made.grid))
    _require(bool(is_inside.all()), "boxes: expected at least one cell each, on the grid")
    t, h, w = (first + stop).diff(dim=0).unbind(1)
    is_later = (t > 0) | ((t == 0) & ((h > 0) | ((h == 0) & (w > 0))))
    _require(bool(is_later.all()), "boxes: expected the order of the sequence")


def _check_trends(made: Stretches) -> None:
    _require(made.trends.dtype == made.latents.dtype, f"trends: expected {made.latents.dtype}, as the latents")
    is_moment = made.boxes[:, 1] - made.boxes[:, 0] == 1
    _require(not bool(made.trends[is_moment].any()), "trends: expected 0 for a stretch of one frame")


def _check_merges(made: Stretches) -> None:
    """Every merge joins two boxes that lie side by side into one, down to the whole clip: so they cover the clip once."""
    count = len(made)
    later = torch.arange(count - 1)[:, None] + count
    is_known = bool(((made.merges >= 0) & (made.merges < later)).all())
    _require(is_known and made.merges.unique().numel() == made.merges.numel(), "merges: expected each row once")
    last = _join_all(made.boxes.numpy(), made.merges.numpy())
    _require(last == [edge for size in made.grid for edge in (0, size)], "boxes: expected to cover the clip once")
    is_sum = bool((made.merge_loss >= 0).all()) and bool(made.merge_loss.sum().isfinite())
    _require(is_sum, "merge_loss: expected 0 or more, with a finite sum")


def _join_all(boxes: np.ndarray, merges: np.ndarray) -> list[int]:
    """Return the box that all boxes, (S, 6), make, merged in pairs, (S-1, 2), of which the second goes on where the first
    stops. Edge by edge in lists of numbers: the collector of garbage would go through every box that is an object."""
    axes = [(boxes[:, low].tolist(), boxes[:, low + 1].tolist()) for low in (0, 2, 4)]
    for a, b in zip(*merges.T.tolist(), strict=True):
        num_joined = 0
        for first, stop in axes:
            is_same = first[a] == first[b] and stop[a] == stop[b]
            num_joined += 0 if is_same else 1 if stop[a] == first[b] else 2
            first.append(first[a])
            stop.append(stop[b])
        _require(num_joined == 1, "merges: expected two that make a box")
    return [edges[-1] for axis in axes for edges in axis]


def _check_energy(made: Stretches) -> None:
    _require(bool((made.energy >= 0).all()), "energy: expected 0 or more")
    tokens, loss = made.curve_tokens.tolist(), made.curve_loss.tolist()
    _require(
        len(made) <= max(tokens, default=0) <= math.prod(made.grid) and tokens[-1] == 1,
        "curve_tokens: expected from at least as many as there are down to 1",
    )
    _require(all(a > b for a, b in zip(tokens, tokens[1:], strict=False)), "curve_tokens: expected fewer in each row")
    is_rising = all(a <= b for a, b in zip([0.0, *loss], loss, strict=False))
    _require(is_rising, "curve_loss: expected 0 or more, and more in each row")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
