"""Key frames, and the frames between two of them, in which the picture changes evenly from one to the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Ours: half a second of 30 fps video. It bounds what is waited for, and how long a change too fine for colours is unseen.
MOST_APART = 16


def measure_colours(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean colours of frames, ``pixels`` (n, h, w, 3) uint8: (n, 12HW) float32, in levels of 255, of cells half
    as wide and high as a token. ``grid``: (H, W) of tokens. Ours: a token shows no finer change much, and noise averages
    out."""
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32)
    return F.adaptive_avg_pool2d(channels_first, (2 * grid[0], 2 * grid[1])).flatten(1)


class KeyFinder:
    """Chooses key frames such that every other frame lies on the straight line between the two around it.

    ``levels``: a frame lies on it if no colour of ``measure_colours`` is further away than this. The first and the last
    frame are key frames, and no two are more than ``MOST_APART`` frames apart. Each line is made as long as that allows, so
    the choice depends on the frames alone. A flash, and the frames on both sides of a cut, are key frames if the change is
    more than twice the levels. Ours, as piecewise linear approximation does it (Keogh et al., 2001).
    """

    def __init__(self, levels: float) -> None:
        self._levels = levels
        self._key: Tensor | None = None
        self._since: list[Tensor] = []

    def observe(self, colours: Tensor) -> bool:
        """Take the next frame, ``colours`` (12HW,). Return whether the frame before it has to be a key frame; of the first
        frame, which is one, nothing is said."""
        if self._key is None:
            self._key = colours
            return False
        is_end = bool(self._since) and not self._is_straight(self._key, colours)
        if is_end:
            self._key, self._since = self._since[-1], []
        self._since.append(colours)
        return is_end

    def _is_straight(self, start: Tensor, stop: Tensor) -> bool:
        length = len(self._since) + 1
        if length > MOST_APART:
            return False
        share = torch.arange(1, length)[:, None] / length
        off = torch.stack(self._since) - (start + (stop - start) * share)
        return float(off.abs().max()) <= self._levels


def draw_line(start: Tensor, stop: Tensor, length: int) -> Tensor:
    """Return ``length`` evenly spaced steps from ``start`` (exclusive) to ``stop``, in its dtype: (length, ...). The last
    is ``stop`` itself, and between equal ends all are equal, bit for bit."""
    share = (torch.arange(1, length) / length).reshape(-1, *[1] * start.ndim).to(start.device)
    first, last = start.to(torch.float32), stop.to(torch.float32)
    return torch.cat([(first + (last - first) * share).to(stop.dtype), stop[None]])
