"""Adaptive Fre-Res: latents go in frame by frame, stretches within the budget come out, and become tokens."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile
from statistics import median

import torch
from torch import Tensor

from freres_cli.method.merging import Merger, left_after, running_sums
from freres_cli.method.stretch_means import box_sizes, merge_stretches, merge_weights
from freres_cli.method.stretch_modules import StretchModules
from freres_cli.method.tokens import seconds_at
from freres_cli.records import VideoTokens
from freres_cli.stretches import Stretches, share_kept

# Ours. A clip with at most twice as many latents as this, or as twice the budget if that is more, is merged as a whole. Of a
# longer one no more stretches than that are in memory: the cheapest merges are made as it arrives.
MOST_STRETCHES = 16384
# Ours. At a cut, half of the cells change by more than this share of the mean squared distance between two tokens.
CUT_SHARE = 0.5
# Ours. It also stands out: of a flat picture nothing is left but noise, which is new in every frame.
CUT_ONSET = 1.5
CUT_HISTORY = 15  # frames
DEVICE_BYTES_AT_ONCE = 2**26  # of frames in float32 that are looked at together
CURVE_STEPS_AN_OCTAVE = 8


class CutDetector:
    """Finds hard cuts: the frames in which most cells change at once. A flash, or an object that appears, is no cut.

    The measure is the median over cells of the squared distance to the frame before, in units of that between two random
    tokens of the clip so far (ours: a global distance is ruled by the few cells with the largest latents). It must also be
    ``CUT_ONSET`` times its median over the ``CUT_HISTORY`` frames before.
    """

    def __init__(self) -> None:
        self._previous: Tensor | None = None
        self._sum = torch.zeros((), dtype=torch.float64)
        self._squares = 0.0
        self._count = 0
        self._recent: list[float] = []  # changes, the last ``CUT_HISTORY``

    def observe(self, latents: Tensor) -> tuple[list[bool], list[float]]:
        """Take the next frames, (n, H, W, D). Return for each whether it is the first one after a cut, and ``distance`` of
        the tokens up to it.

        What is needed of a device is copied from it once.
        """
        # On a CPU one frame at a time: how sums of more are split among threads would show in their last bits.
        most = 1 if latents.device.type == "cpu" else max(1, DEVICE_BYTES_AT_ONCE // (4 * latents[0].numel()))
        measures = torch.cat([self._measure(frames.flatten(1, 2)) for frames in latents.split(most)]).cpu()
        is_cut, distances = [], []
        for change, squares, total in zip(*measures[:, :2].T.tolist(), measures[:, 2:], strict=True):
            self._sum = self._sum + total
            self._squares += squares
            self._count += latents.shape[1:3].numel()
            usual = median(self._recent) if self._recent else 0.0
            distances.append(self.distance)
            is_cut.append(change > max(CUT_SHARE * distances[-1], CUT_ONSET * usual))
            if self._count > latents.shape[1:3].numel():  # the first frame has none before it
                self._recent = [*self._recent[1 - CUT_HISTORY :], change]
        return is_cut, distances

    def _measure(self, frames: Tensor) -> Tensor:
        """Take frames, (m, P, D). Return (m, 2 + D) float64: of each its change, 0 for the first of all, its squares, its
        sum."""
        frames = frames.to(torch.float32)
        previous = torch.cat([frames[:1] if self._previous is None else self._previous, frames[:-1]])
        self._previous = frames[-1:].clone()  # a view of it would keep its whole batch alive
        changes = (frames - previous).square().sum(-1)
        # One by one: medians with their places, as CUDA gives those of several rows, are not deterministic there.
        change = torch.stack([one.median() for one in changes]).to(torch.float64)
        squares, total = frames.square().sum((1, 2), dtype=torch.float64), frames.sum(1, dtype=torch.float64)
        return torch.cat([torch.stack([change, squares], dim=1), total], dim=1)

    @property
    def distance(self) -> float:
        """Mean squared distance between two of the tokens so far."""
        return 2 * self.energy / max(1, self._count)

    @property
    def energy(self) -> float:
        """Squared distance of all tokens so far from their mean, summed."""
        return max(0.0, self._squares - float(self._sum.square().sum()) / max(1, self._count))


class StretchCompressor:
    """Turns a stream of latents into stretches. Memory is bounded. How the same latents are batched does not change the
    result: on a CPU to the bit, on a GPU but for rounding.

    ``grid``: (H, W). ``width``: D. ``budget_tokens``: most stretches; ``None`` for no limit. ``quality``: share of the
    latents' energy to keep, with as few stretches as possible; ``None`` to use the whole budget. ``keeps_trends``: keep how
    each stretch changes, which trained modules read.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        width: int,
        budget_tokens: int | None,
        quality: float | None = None,
        keeps_trends: bool = False,
    ) -> None:
        if budget_tokens is not None and budget_tokens < 1:
            raise ValueError(f"budget: expected at least 1, got {budget_tokens}")
        self._grid, self._width, self._keeps_trends = grid, width, keeps_trends
        self._budget, self._quality = budget_tokens, quality
        self._most = max(MOST_STRETCHES, budget_tokens or 0)
        self._detector = CutDetector()
        self._merger: Merger | None = None
        self._cuts: list[int] = []
        self._seconds = array("d")  # 8 bytes a frame

    @property
    def num_frames(self) -> int:
        """Number of frames so far."""
        return len(self._seconds)

    @property
    def num_cuts_found(self) -> int:
        return len(self._cuts)

    def push(self, latents: Tensor, seconds: Iterable[float]) -> None:
        """Take the next frames: ``latents`` (n, H, W, C) and their n times in ``seconds``. Raises ``ValueError`` for another
        grid or number of times, and takes nothing then."""
        if tuple(latents.shape[1:3]) != self._grid:
            raise ValueError(f"latents: expected a grid of {self._grid}, got {tuple(latents.shape[1:3])}")
        seconds = list(seconds)
        if len(seconds) != latents.shape[0]:
            raise ValueError(f"seconds: expected {latents.shape[0]}, got {len(seconds)}")
        if not seconds:
            return
        if self._merger is None:
            shape = (self._grid, latents.shape[-1], self._width)
            self._merger = Merger(*shape, latents.dtype, 2 * self._most, self._keeps_trends, latents.device)
        before, shots = self._detector.distance, []
        cuts, distances = self._detector.observe(latents[..., : self._width])
        for second, is_cut in zip(seconds, cuts, strict=True):
            if is_cut:
                self._cuts.append(len(self._seconds))
            shots.append(len(self._cuts))
            self._seconds.append(second)
        first = len(self._seconds) - len(shots)
        cells, done = latents.shape[1] * latents.shape[2], 0
        while done < len(shots):
            if len(self._merger) + cells > 2 * self._most:
                self._merger.merge_down(self._most, distances[done - 1] if done else before)
            part = slice(done, done + max(1, (2 * self._most - len(self._merger)) // cells))
            self._merger.append(latents[part], first + done, shots[part], seconds[part])
            done = part.stop

    def finish(self) -> Stretches:
        """Return the stretches; nothing can follow. Raises ``ValueError`` if there were no frames."""
        if self._merger is None:
            raise ValueError("no frames: expected at least 1")
        merger, energy, distance = self._merger, self._detector.energy, self._detector.distance
        curve = _Curve(len(merger), merger.lost)
        if len(merger) < self.num_frames * math.prod(self._grid):  # not as a whole
            curve.add(merger.merge_down(self._most, distance))
        count, order = len(merger), merger.merge_all(distance)
        curve.add(order.loss)
        steps = 0
        if self._quality is not None:
            steps = _count_keeping(self._quality, order.loss, merger.lost, energy)
        if self._budget is not None:
            steps = max(steps, count - self._budget)
        left = left_after(order.pairs[:steps], count)
        left = left[sequence_order(order.boxes[left])]
        values, trends = merger.read(order.slots[left])
        return Stretches(
            width=self._width,
            grid=(len(self._seconds), *self._grid),
            frame_seconds=torch.tensor(self._seconds, dtype=torch.float64),
            latents=values,
            trends=trends,
            boxes=order.boxes[left],
            merges=_rename(order.pairs[steps:], left, count + steps),
            merge_loss=order.loss[steps:],
            energy=torch.tensor([energy, running_sums(order.loss[:steps], merger.lost)[-1]], dtype=torch.float64),
            curve_tokens=torch.tensor(curve.tokens, dtype=torch.int64),
            curve_loss=torch.tensor(curve.losses, dtype=torch.float64),
            cut_frame=torch.tensor(self._cuts, dtype=torch.int64),
        )


class _Curve:
    """The squared error at numbers of tokens that do not depend on the budget."""

    def __init__(self, count: int, lost: float) -> None:
        self._wanted = {round(2 ** (i / CURVE_STEPS_AN_OCTAVE)) for i in range(CURVE_STEPS_AN_OCTAVE * 32)}
        self._count, self._lost = count, lost
        self.tokens, self.losses = [count], [lost]

    def add(self, loss: Tensor) -> None:
        for value in loss.tolist():
            self._count -= 1
            self._lost += value
            if self._count in self._wanted:
                self.tokens.append(self._count)
                self.losses.append(self._lost)


def _rename(pairs: Tensor, left: Tensor, first: int) -> Tensor:
    """Return merges (m, 2) of rows: stretch ``left[i]`` is row i, and the result of merge i is stretch ``first`` + i."""
    rows = torch.full((first + len(pairs),), -1)
    rows[left] = torch.arange(len(left))
    rows[first:] = torch.arange(len(pairs)) + len(left)
    return rows[pairs]


def sequence_order(boxes: Tensor) -> Tensor:
    """Return the order of tokens in the prompt: by the middle of their time, then of their rows, then of their columns.

    ``boxes``: (S, 6), disjoint, so no two middles are equal.
    """
    order = torch.arange(boxes.shape[0])
    for low in (4, 2, 0):
        order = order[(boxes[order, low] + boxes[order, low + 1]).argsort(stable=True)]
    return order


def _count_keeping(quality: float, losses: Tensor, lost: float, energy: float) -> int:
    """Return how many of the first merges keep this share of the energy, of which ``lost`` is gone already. The shares are
    those that are reported, to the bit: so asking for the quality of a bundle gives that bundle."""
    shares = (share_kept(total, energy) for total in running_sums(losses, lost)[1:])
    return sum(1 for _ in takewhile(lambda share: share >= quality, shares))


def count_for_quality(stretches: Stretches, quality: float) -> int:
    """Return the fewest tokens, of all smaller budgets, that keep this share of the energy, or S if none does."""
    energy, lost = stretches.energy.tolist()
    return len(stretches) - _count_keeping(quality, stretches.merge_loss, lost, energy)


def cut_stretches(stretches: Stretches, budget_tokens: int) -> Stretches:
    """Return the stretches that compressing to ``budget_tokens`` gives, bit for bit, if the clip was merged as a whole or
    both budgets are at most ``MOST_STRETCHES``. Raises ``ValueError`` if the budget is below one."""
    if budget_tokens < 1:
        raise ValueError(f"budget: expected at least 1, got {budget_tokens}")
    count = len(stretches)
    steps = count - budget_tokens
    if steps <= 0:
        return stretches
    pairs = stretches.merges[:steps]
    kept, channels = torch.cat([stretches.latents, stretches.trends], dim=1), stretches.latents.shape[1]
    values = torch.cat([kept, kept.new_empty(steps, kept.shape[1])])
    boxes = torch.cat([stretches.boxes, stretches.boxes.new_empty(steps, 6)])
    for part in _levels(pairs, count):
        a, b = pairs[part].unbind(1)
        both = boxes[a], boxes[b]
        sizes, times = (box_sizes(both[0]), box_sizes(both[1])), (both[0][:, :2], both[1][:, :2])
        weights = merge_weights(sizes, times, kept.shape[1] > channels)
        values[part + count] = merge_stretches(values[a], values[b], weights, channels)
        low, high = torch.minimum(boxes[a], boxes[b]), torch.maximum(boxes[a], boxes[b])
        boxes[part + count] = torch.stack([low, high], dim=2)[:, range(6), [0, 1] * 3]
    left = left_after(pairs, count)
    left = left[sequence_order(boxes[left])]
    lost = running_sums(stretches.merge_loss[:steps], float(stretches.energy[1]))[-1]
    return replace(
        stretches,
        latents=values[left, :channels],
        trends=values[left, channels:],
        boxes=boxes[left],
        merges=_rename(stretches.merges[steps:], left, count + steps),
        merge_loss=stretches.merge_loss[steps:].clone(),
        energy=torch.stack([stretches.energy[0], torch.tensor(lost, dtype=torch.float64)]),
    )


def _levels(pairs: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split merges into parts, (k,) indices each, that need the results of the parts before them only."""
    level = [0] * (count + len(pairs))
    for index, (a, b) in enumerate(pairs.tolist(), start=count):
        level[index] = 1 + max(level[a], level[b])
    levels = torch.tensor(level[count:])
    return levels.argsort(stable=True).split(levels.bincount()[1:].tolist())


def build_stretch_tokens(stretches: Stretches, modules: StretchModules | None = None) -> VideoTokens:
    """Return the visual tokens of a clip: each stretch at the middle of its time and its cells.

    If every latent of the clip was kept, nothing was merged away and ``modules`` are not applied.
    """
    is_whole = len(stretches) == math.prod(stretches.grid)
    boxes = stretches.boxes
    middle = (boxes[:, ::2] + boxes[:, 1::2] - 1).to(torch.float32) / 2
    shot = torch.searchsorted(stretches.cut_frame, boxes[:, 0].contiguous(), right=True)
    return VideoTokens(
        latents=stretches.latents if modules is None or is_whole else modules(stretches),
        positions=middle,
        seconds=seconds_at(stretches.frame_seconds, middle[:, 0]),
        kind=stretches.kind,
        gop=shot,
        energy=stretches.latents[:, : stretches.width].to(torch.float32).square().sum(-1),
        grid=stretches.grid,
        width=stretches.width,
        frame_seconds=stretches.frame_seconds,
        boxes=boxes,
    )
