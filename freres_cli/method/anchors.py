"""Anchor frames: where they are placed, which of their tokens are kept, and which frames are events."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

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
VALUES_AT_ONCE = 1 << 22  # bounds the memory of the distances


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
        self._sorted: list[float] = []  # the history
        self._num_frames = 0
        self._total: Tensor | None = None  # of the mean tokens of all frames so far, (D,) float64
        self._last: Tensor | None = None  # the last frame of the batch before, (N, D)
        self._frames: Tensor | None = None  # those of this batch, (n, N, D) float32, the one before each, and the mean
        self._previous: Tensor | None = None
        self._means: Tensor | None = None
        self._before_run: Tensor | None = None

    def threshold(self) -> float:
        """Return the distance above which the next frame is an event."""
        if self._tau is not None:
            return self._tau
        if not self._sorted:
            return EVENT_FIRST
        median = _median(self._sorted)
        if len(self._sorted) < MIN_EVENT_HISTORY:
            return max(EVENT_FIRST, 2.0 * median)
        mad = _median(sorted(abs(value - median) for value in self._sorted))
        return max(EVENT_FLOOR, median + EVENT_MADS * mad)

    def _stands_out(self, distance: float) -> bool:
        before = self._history[-1] if self._history else 0.0
        return distance > EVENT_FIRST or distance > EVENT_ONSET * before

    def _remember(self, distance: float) -> None:
        self._history.append(distance)
        insort(self._sorted, distance)
        if len(self._history) > EVENT_HISTORY:
            del self._sorted[bisect_left(self._sorted, self._history.pop(0))]

    def measure(self, latents: Tensor) -> Tensor:
        """Take the next frames, (n, H, W, D). Return the distance of each to the one before, (n,) float64 on their device;
        0 for the first of all."""
        frames = latents.flatten(1, 2).to(torch.float32)
        tokens = frames.mean(1, dtype=torch.float32).to(torch.float64)
        is_first = self._total is None
        total = tokens.new_zeros(tokens.shape[1]) if self._total is None else self._total
        # The running sum goes through the batch, so the result does not depend on how frames are batched; on a GPU, but for
        # rounding.
        totals = torch.cat([total[None], tokens]).cumsum(0)[1:]
        counts = torch.arange(1, len(frames) + 1, device=frames.device) + self._num_frames
        self._frames, self._means = frames, (totals / counts[:, None]).to(torch.float32)
        self._previous = torch.cat([frames[:1] if self._last is None else self._last[None], frames[:-1]])
        # Views would keep the batch alive.
        self._total, self._last = totals[-1].clone(), frames[-1].clone()
        distances = _distances(frames, self._previous, self._means)
        if is_first:
            distances[0] = 0.0
        return distances

    def judge(self, distances: Sequence[float], is_repeat: Sequence[bool]) -> list[bool]:
        """Return which frames of the batch are events. ``distances``: what ``measure`` returned for it.

        ``is_repeat``: which frames have the time of the one before. Unless they differ, they are that frame once more, as in
        a sample that is denser than the video, and no steps: counted, they would hide how long the others are. Nothing is
        read from the device, but for a long step that follows an event in the same run.
        """
        found = []
        for index, (distance, is_again) in enumerate(zip(distances, is_repeat, strict=True)):
            is_step = self._num_frames > 0 and not (is_again and distance < EVENT_FLOOR)
            found.append(is_step and self._is_event(index, distance))
            self._num_frames += 1
        self._frames = self._previous = self._means = None
        return found

    def _is_event(self, index: int, distance: float) -> bool:
        assert self._frames is not None and self._previous is not None and self._means is not None
        threshold, before = self.threshold(), self._before_run
        is_long = distance > threshold
        stands_out = is_long and (self._tau is not None or self._stands_out(distance))
        is_return = False
        if is_long and before is not None:
            frame = slice(index, index + 1)
            is_return = float(_distances(self._frames[frame], before[None], self._means[frame])) <= threshold
        is_event = stands_out or is_return
        if stands_out:
            self._before_run = self._previous[index].clone()
        elif is_event or not is_long:
            self._before_run = None
        # Cuts enter the history too: in a sparse sample, where every step is a cut, none stands out.
        self._remember(distance)
        return is_event


def _median(ordered: Sequence[float]) -> float:
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return high - (high - low) * 0.5


def _distances(frames: Tensor, others: Tensor, means: Tensor) -> Tensor:
    """The cosine distance of each pair of frames, (n, N, D), less a mean token, (n, D): (n,) float64."""
    parts = []
    per_pass = max(1, VALUES_AT_ONCE // frames[0].numel())
    for rows in torch.arange(frames.shape[0]).split(per_pass):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        a, b = (x[part] - means[part, None] for x in (frames, others))
        # Over D first: the order of the additions does not depend on the number of frames.
        dot, norm_a, norm_b = (x.sum(-1).sum(-1) for x in (a * b, a.square(), b.square()))
        norm = (norm_a.sqrt() * norm_b.sqrt()).to(torch.float64)
        parts.append(torch.where(norm > 1e-12, 1.0 - dot / norm, 0.0))
    return torch.cat(parts)
