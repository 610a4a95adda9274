"""Anchor frames: where they are placed, which of their tokens are kept, and which frames are events."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIDE = 3  # paper section 3.2: 3x3 blocks, one token dropped in each
# Ours. The threshold follows the clip (median + 6 MAD of recent distances), because distances grow with the sampling
# step. Nothing below the floor is a cut. Until there is enough history only a clear cut counts, far above the rest.
EVENT_HISTORY = 256
MIN_EVENT_HISTORY = 8
EVENT_MADS = 6.0
EVENT_FLOOR = 0.15
EVENT_FIRST = 0.5
# Ours. In a whip pan every step is long, so only its onset is an event. A clear cut always is, even right after another.
EVENT_ONSET = 1.5


def anchor_schedule(num_frames: int, num_anchors: int) -> list[int]:
    """Return the frame indices of evenly spaced anchors (paper section 3.3). The first frame is always one of them."""
    if not 1 <= num_anchors <= num_frames:
        raise ValueError(f"num_anchors: expected 1..{num_frames}, got {num_anchors}")
    return [(i * num_frames) // num_anchors for i in range(num_anchors)]


def spread_order(count: int) -> list[int]:
    """Return 0..count-1 in an order whose every prefix covers the whole range evenly (bit reversal; ours, for cutting
    bundles)."""
    bits = max(1, (count - 1).bit_length())
    reversed_indices = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
    return [i for i in reversed_indices if i < count]


def prune_order(latents: Tensor, width: int) -> Tensor:
    """Return the tokens of an anchor frame, most important first: (N,) int64 raster indices.

    ``latents``: (H, W, C); a token's energy is the squared L2 norm of its first ``width`` channels. Block pruning keeps
    the first ``R`` of the order. With ``R = 8/9 N`` every full 3x3 block loses its token of lowest energy (paper section
    3.2); with any other ``R`` every block keeps the same share, to within a token. Ties keep raster order.
    """
    grid_h, grid_w = latents.shape[:2]
    energy = latents[..., :width].to(torch.float32).square().sum(-1).flatten().cpu()
    rows, columns = torch.arange(grid_h) // BLOCK_SIDE, torch.arange(grid_w) // BLOCK_SIDE
    block = (rows[:, None] * (int(columns[-1]) + 1) + columns[None, :]).flatten()
    by_energy = torch.argsort(energy, descending=True, stable=True)
    by_block = by_energy[torch.argsort(block[by_energy], stable=True)]
    sizes = torch.bincount(block)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(block.numel()) - starts[block[by_block]]
    share = torch.empty(block.numel(), dtype=torch.float64)
    share[by_block] = (rank.to(torch.float64) + 0.5) / sizes[block[by_block]].to(torch.float64)
    return by_energy[torch.argsort(share[by_energy], stable=True)]


class EventDetector:
    """Finds the frames that start something new: cuts, flashes, whip pans (paper section 3.3).

    The measure is the cosine distance between the latents of consecutive frames, with the running mean token subtracted:
    raw latents share a large common component that hides cuts (ours). ``tau``: a fixed threshold, or ``None`` for the
    running median plus 6 MAD.

    A return is an event too (ours): a frame that ends a run of long steps and shows what was seen before the run. The step
    back from a flash is as long as the step into it, so it does not stand out; without an anchor of its own, what follows
    the flash would be told as residuals of the flash.
    """

    def __init__(self, tau: float | None) -> None:
        self._tau = tau
        self._history: list[float] = []
        self._mean: Tensor | None = None
        self._num_frames = 0
        self._previous: Tensor | None = None
        self._before_run: Tensor | None = None

    def threshold(self) -> float:
        """Return the distance above which the next frame is an event."""
        if self._tau is not None:
            return self._tau
        if not self._history:
            return EVENT_FIRST
        history = torch.tensor(self._history, dtype=torch.float64)
        median = history.quantile(0.5)
        if len(self._history) < MIN_EVENT_HISTORY:
            return max(EVENT_FIRST, float(2.0 * median))
        mad = (history - median).abs().quantile(0.5)
        return max(EVENT_FLOOR, float(median + EVENT_MADS * mad))

    def _stands_out(self, distance: float) -> bool:
        before = self._history[-1] if self._history else 0.0
        return distance > EVENT_FIRST or distance > EVENT_ONSET * before

    def observe(self, latents: Tensor) -> tuple[float, bool]:
        """Take the next frame, (H, W, D). Return its distance to the previous one, and whether it is an event."""
        frame = latents.reshape(-1, latents.shape[-1]).to(torch.float32)
        self._num_frames += 1
        token = frame.mean(0)
        self._mean = token if self._mean is None else self._mean + (token - self._mean) / self._num_frames
        previous, self._previous = self._previous, frame
        if previous is None:
            return 0.0, False
        distance, threshold = _distance(frame, previous, self._mean), self.threshold()
        is_long = distance > threshold
        stands_out = is_long and (self._tau is not None or self._stands_out(distance))
        before = self._before_run
        is_return = is_long and before is not None and _distance(frame, before, self._mean) <= threshold
        is_event = stands_out or is_return
        if stands_out:
            self._before_run = previous
        elif is_event or not is_long:
            self._before_run = None
        # Cuts enter the history too: in a sparse sample, where every step is a cut, none stands out.
        self._history.append(distance)
        del self._history[:-EVENT_HISTORY]
        return distance, is_event


def _distance(frame: Tensor, other: Tensor, mean: Tensor) -> float:
    a, b = frame - mean, other - mean
    norm = float(a.norm() * b.norm())
    return 1.0 - float((a * b).sum()) / norm if norm > 1e-12 else 0.0
