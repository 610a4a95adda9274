"""Adaptive Fre-Res: neighbouring latents merge, cheapest first.

A GoP of the paper has one length for all cells. Here each cell has its own: its time line is cut where it changes, and
each stretch is one token, the mean of its latents. Where a whole neighbourhood moves together, cells merge as well. Ours,
after Ward (1963): the paper's GoPs spend as much on cells that stand still as on cells that move.

Merges are made in rounds: pairs that are the cheapest for both of their sides merge at once, as in clustering by mutual
nearest neighbours (de Rham, 1980). Latents stay on their device, which compares and averages them. The host knows the rest,
and learns in each round how far apart the stretches of new pairs are: sorting so few numbers is no work for a GPU.
Along a line whose costs only rise, as where a motion eases in without any noise, a round makes one merge: 800 such frames of
36 cells took 655 rounds and 1.5 s, where a steady motion took 53 and 0.3 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from freres_cli.method.cell_tree import CellTree, split_grid
from freres_cli.method.stretch_means import merge_stretches, merge_weights
from freres_cli.method.stretch_rows import FIRST, Floats, Ints, Pairs, Rows

# Ours. The cost of a merge is (n1 n2 / (n1 + n2))^a |m1 - m2|^2. At a = 1 this is the squared error it adds, which
# undervalues what is brief. Of questions about what things do, 0.3, 1/2 and 1 answer as many, and of all
# questions 1/2 and 1 (``choices.json``).
COST_EXPONENT = 0.5
# Ours. Beside the latents, a merge along time loses when they were: a cell that stands still would be one token, which a
# model takes for something that it sees once. Middles this far apart count as one latent in place of another, chosen at
# random, and no more than that however far they are, so that in long videos what is brief still comes first. What is equal
# to the bit merges for nothing: a slide is to cost little.
APART_S = 5.0
# Ours. A round looks at so many of the cheapest pairs, as a share of the stretches. While a clip is read a merge is for
# good, and the share is small. At the end merges are put in order afterwards, and the share may be larger: on 152 clips, at
# a twentieth of the tokens or more, the mean error was within 0.06 % of the energy of that of one merge at a time.
STREAM_SHARE = 0.1
TREE_SHARE = 0.25
# Pairs that are compared or merged at once, and rows that are read, have this many bytes in float32: they stay in a core's
# cache, which makes wide latents five times as fast as 8,192 pairs at once.
PAIR_BYTES_AT_ONCE = 2**20
DEVICE_PAIR_BYTES_AT_ONCE = 2**26  # a GPU is faster with more at once; this bounds its memory
ROWS_AT_ONCE = 1024  # bounds the memory of moving rows


@dataclass(frozen=True)
class MergeOrder:
    """How n stretches merge into one, cheapest first: stretch n + i is the result of merge i. On the CPU.

    ``pairs``: (n-1, 2) int64. ``loss``: (n-1,) float64, the squared error that each adds. ``boxes``: (2n-1, 6) int64, what
    each stretch stands for: frames and cells, t0, t1, h0, h1, w0, w1, half-open. ``slots``: (2n-1,), where ``Merger.read``
    finds it.
    """

    pairs: Tensor
    loss: Tensor
    boxes: Tensor
    slots: Tensor


class Merger:
    """The stretches of a clip, merged step by step.

    ``grid``: (H, W). ``channels``: C. ``width``: D, the channels that costs are computed over. ``dtype``: of the latents.
    A mean is rounded to it at every merge, so that a bundle can go on merging where compression stopped. ``most``: rows of
    memory while frames come in, if no more stretches are left than that; by default, up to twice as many as there are.
    ``keeps_trends``: carry the trend of each stretch beside its mean. ``device``: of the latents.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        width: int,
        dtype: torch.dtype,
        most: int | None = None,
        keeps_trends: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._tree = split_grid(*grid)
        self._channels, self._width = channels, width
        self._most = most
        self._storage = torch.zeros(0, channels + (width if keeps_trends else 0), dtype=dtype, device=device)
        self._used = 0  # rows of the storage
        self._rows = Rows.empty()
        self.lost = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return means (k, C) and trends (k, D), or (k, 0) if those are not kept, on the CPU. See ``merge_trends``.

        ``slots``: some of those of a ``MergeOrder``, (k,).
        """
        rows = torch.empty(slots.shape[0], self._storage.shape[1], dtype=self._storage.dtype)
        for part in self._parts(slots.shape[0]):  # they need no memory of their own on a device
            rows[part] = self._storage.index_select(0, slots[part].to(self._storage.device)).cpu()
        return rows[:, : self._channels], rows[:, self._channels :]

    def append(self, latents: Tensor, frame: int, shots: list[int], seconds: list[float]) -> None:
        """Add frames. ``latents``: (n, H, W, C). ``frame``: index of the first. ``shots``: of each, number of cuts before.
        ``seconds``: of each, its time."""
        cells = len(self._tree.leaves)
        count = cells * len(latents)
        wanted = 2 * (len(self) + count)
        # At once where it would be half of the way: two storages are there while one moves into the other.
        self._make_room(count, self._most if self._most is not None and 2 * wanted > self._most else wanted)
        new = self._storage[self._used : self._used + count]
        new[:, : self._channels] = latents.reshape(count, -1)
        new[:, self._channels :] = 0
        frames = np.arange(frame, frame + len(latents))
        of_each = (np.repeat(values, cells) for values in (frames, np.array(shots), np.array(seconds, np.float64)))
        self._rows.add(self._used, np.tile(self._tree.leaves.numpy(), len(latents)), *of_each)
        self._used += count

    def _make_room(self, count: int, wanted: int) -> None:
        """Make room in the storage for ``count`` more rows: drop those that were merged away. Grow to ``wanted`` rows, or
        to what is needed."""
        if self._used + count <= self._storage.shape[0]:
            return
        left = len(self)
        size = max(self._storage.shape[0], left + count, wanted)
        is_same = size == self._storage.shape[0]
        storage = self._storage if is_same else self._storage.new_empty(size, self._storage.shape[1])
        slots = torch.from_numpy(self._rows.close_up()).to(storage.device)
        # Slots ascend, so rows only ever move forward, and a few at a time need no second storage.
        for start in range(0, left, ROWS_AT_ONCE):
            part = slots[start : start + ROWS_AT_ONCE]
            storage[start : start + len(part)] = self._storage[part]
        self._rows.resize(size)
        self._storage, self._used = storage, left

    def merge_down(self, count: int, distance: float) -> Tensor:
        """Merge until ``count`` >= 1 stretches are left. The way depends on ``count``.

        ``distance``: the mean squared distance between two latents of the clip so far. Return the squared error that each
        merge adds, (k,) float64, on the CPU.
        """
        losses = [torch.zeros(0, dtype=torch.float64)]
        while len(self) > count:
            # Of n merges that are still to be made, none is dearer than the n-th cheapest pair.
            merges = self._choose(min(len(self) - count, max(1, int(STREAM_SHARE * len(self)))), distance)
            self._merge(merges.pairs, merges.pairs.a)
            losses.append(torch.from_numpy(merges.loss))
        added = torch.cat(losses)
        self.lost = running_sums(added, self.lost)[-1]
        return added

    def merge_all(self, distance: float) -> MergeOrder:
        """Merge until one stretch is left, and return in which order. Every stretch on the way stays readable.

        A merge comes no earlier than those that made its sides, and otherwise by cost: where it would come if one merge
        were made at a time, unless a merge made another one cheaper. Merges across a cut come last; in a round with few
        pairs, one may take a stretch that another merge would have needed. Nothing is left to merge afterwards.
        ``distance``: as in ``merge_down``.
        """
        count = len(self)
        self._make_room(count - 1, 2 * count - 1)
        slots = np.concatenate([self._rows.order, np.arange(self._used, self._used + count - 1)])
        number = np.empty(len(self._rows.cell), np.int64)
        number[slots] = np.arange(len(slots))
        heights = np.full(len(slots), FIRST)
        pairs, losses = np.empty((count - 1, 2), np.int64), np.empty(count - 1)
        made = 0
        while len(self) > 1:
            merges = self._choose(max(1, int(TREE_SHARE * len(self))), distance)
            new = slice(made, made + len(merges.loss))
            self._merge(merges.pairs, slots[count:][new])
            pairs[new, 0], pairs[new, 1] = number[merges.pairs.a], number[merges.pairs.b]
            heights[count:][new] = np.maximum(merges.key, heights[pairs[new]].max(1))
            losses[new] = merges.loss
            made = new.stop
        self._used += made
        return _sort(pairs, losses, heights[count:], self._rows.boxes(slots, self._tree), slots)

    @np.errstate(all="ignore")  # latents that overflow are refused with the result, by name
    def _choose(self, most: int, distance: float) -> _Merges:
        """Return the merges of a round, cheapest first, among the ``most`` cheapest pairs. They do not touch each other.
        ``distance``: as in ``merge_down``."""
        rows = self._rows
        new = rows.seek_partners(self._tree)
        rows.price(new, *self._price(new), APART_S)
        pairs, keys = rows.cheapest(most, distance)
        # The cheapest pair of each stretch: of what is written to one place, the last is there.
        ranks = np.arange(len(keys))
        best = np.empty(len(rows.cell), np.int64)
        best[np.stack([pairs.a, pairs.b], axis=1)[::-1].ravel()] = ranks[::-1].repeat(2)
        is_best = (best[pairs.a] == ranks) & (best[pairs.b] == ranks)
        pairs = Pairs(pairs.a[is_best], pairs.b[is_best], pairs.kind[is_best])
        loss = np.where(pairs.kind == 0, rows.loss[pairs.a], rows.mate_loss[pairs.a])
        return _Merges(pairs, loss, keys[is_best])

    def _price(self, pairs: Pairs) -> tuple[Floats, Floats]:
        """Return the cost of merging pairs, as far as latents decide it, and the squared error it adds."""
        count = len(pairs.a)
        slots = torch.from_numpy(np.stack([pairs.a, pairs.b])).to(self._storage.device, non_blocking=True)
        compared = self._storage[:, : self._width]
        distance = torch.empty(count, dtype=torch.float32, device=self._storage.device)
        for part in self._parts(count):
            # On a CPU index_select is 2 to 5 times as fast as an index.
            x, y = (compared.index_select(0, side[part]).to(torch.float32) for side in slots)
            distance[part] = (x - y).square().sum(-1)
        n, m = (self._sizes(side).astype(np.float64) for side in (pairs.a, pairs.b))
        weight, distances = n * m / (n + m), distance.cpu().numpy().astype(np.float64)
        return weight**COST_EXPONENT * distances, weight * distances

    def _sizes(self, slots: Ints) -> Ints:
        """Return how many latents each stretch stands for, (k,)."""
        return (self._rows.stop[slots] - self._rows.start[slots]) * self._tree.areas.numpy()[self._rows.cell[slots]]

    def _parts(self, count: int) -> Iterator[slice]:
        """Split ``count`` pairs or rows into parts whose bytes are at most those above."""
        most = PAIR_BYTES_AT_ONCE if self._storage.device.type == "cpu" else DEVICE_PAIR_BYTES_AT_ONCE
        size = max(1, most // (8 * self._storage.shape[1]))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _merge(self, pairs: Pairs, into: Ints) -> None:
        """Merge stretches ``b`` into ``a``, and have the results in the slots ``into``: those of ``a``, or new ones."""
        sizes = torch.from_numpy(self._sizes(pairs.a)), torch.from_numpy(self._sizes(pairs.b))
        times = torch.from_numpy(self._rows.times(pairs.a)), torch.from_numpy(self._rows.times(pairs.b))
        weights = merge_weights(sizes, times, self._storage.shape[1] > self._channels)
        slots = torch.from_numpy(np.stack([pairs.a, pairs.b, into]))
        slots, weights = (given.to(self._storage.device, non_blocking=True) for given in (slots, weights))
        for part in self._parts(len(into)):
            x, y = (self._storage.index_select(0, side[part]) for side in slots[:2])
            self._storage[slots[2, part]] = merge_stretches(x, y, weights[part], self._channels)
        self._rows.merge(pairs, into, self._tree)


def running_sums(losses: Tensor, start: float) -> list[float]:
    """Return ``start`` and its sums with the first losses, (k,), added one after the other: the same bits however they are
    split, which ``sum`` of Python 3.12 does not promise."""
    return list(accumulate(losses.tolist(), initial=start))


def left_after(pairs: Tensor, count: int) -> Tensor:
    """Return which of ``count`` stretches and of the results of merges are left after these, (k, 2): ascending, (n - k,)."""
    is_left = torch.ones(count + len(pairs), dtype=torch.bool)
    is_left[pairs.flatten()] = False
    return is_left.nonzero().squeeze(1)


def _sort(pairs: Ints, losses: Floats, heights: Ints, boxes: Ints, slots: Ints) -> MergeOrder:
    """Return merges in the order of ``heights``, (n-1,); of equals, the one made first. ``pairs``, ``losses``: of the merges
    as they were made. ``boxes``, ``slots``: of the n stretches, then of the results."""
    count, order = len(pairs) + 1, heights.argsort(kind="stable")
    place = np.arange(2 * count - 1)
    place[count:][order] = np.arange(count, 2 * count - 1)
    both = np.concatenate([np.arange(count), order + count])
    sorted_parts = (place[pairs[order]], losses[order], boxes[both], slots[both])
    return MergeOrder(*map(torch.from_numpy, sorted_parts))


@dataclass(frozen=True)
class _Merges:
    """Merges in order. ``loss``: the squared error that each adds. ``key``: as ``Rows.cheapest`` returns it."""

    pairs: Pairs
    loss: Floats
    key: Ints


# What the state of a merger consists of, besides tensors and plain values.
STATE_CLASSES = (Merger, CellTree, Rows)
