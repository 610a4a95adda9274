"""Adaptive Fre-Res: neighbouring latents merge, cheapest first.

A GoP of the paper has one length for all cells. Here each cell has its own: its time line is cut where it changes, and
each stretch is one token, the mean of its latents. Where a whole neighbourhood moves together, cells merge as well. Ours,
after Ward (1963): the paper's GoPs spend as much on cells that stand still as on cells that move.

Merges are made in rounds: pairs that are the cheapest for both of their sides merge at once, as in clustering by mutual
nearest neighbours (de Rham, 1980). Rounds run where the latents are; of each, the host learns how many pairs there are.
Along a line whose costs only rise, as where a motion eases in without any noise, a round makes one merge: 800 such frames of
36 cells took 544 rounds and 4.5 s, where a steady motion took 53 and 0.5 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from freres_cli.method.cell_tree import NONE, CellTree, split_grid
from freres_cli.method.stretch_means import merge_stretches
from freres_cli.method.stretch_rows import FIRST, Rows

# Ours. The cost of a merge is (n1 n2 / (n1 + n2))^a |m1 - m2|^2. At a = 1 this is the squared error it adds, which
# undervalues what is brief. On 60 clips of the world, 1/2 was a little better than 1, within noise, and better than 0.3.
COST_EXPONENT = 0.5
# Ours. Beside the latents, a merge along time loses when they were: a cell that stands still would be one token, which a
# model takes for something that it sees once. Middles this far apart count as one latent in place of another, chosen at
# random, and no more than that however far they are, so that in long videos what is brief still comes first. What is equal
# to the bit merges for nothing: a slide is to cost little.
APART_S = 5.0
# Ours. A round looks at so many of the cheapest pairs, as a share of the stretches. While a clip is read a merge is for
# good, and the share is small. At the end merges are put in order afterwards, and the share may be larger: on 22 clips, at
# a twentieth of the tokens or more, the mean error was within 0.15 % of the energy of that of one merge at a time.
STREAM_SHARE = 0.1
TREE_SHARE = 0.25
# Pairs that are compared or merged at once, and rows that are read, have this many bytes in float32: they stay in a core's
# cache, which makes wide latents five times as fast as 8,192 pairs at once.
PAIR_BYTES_AT_ONCE = 2**20
DEVICE_PAIR_BYTES_AT_ONCE = 2**26  # a GPU is faster with more at once; this bounds its memory
ROWS_AT_ONCE = 1024  # bounds the memory of moving rows
GONE = 2**30  # the rectangle of a stretch that was merged into another
LAST = 2**63 - 1  # above the keys of all merges


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
        self._tree = split_grid(*grid).to(device)
        self._channels, self._width = channels, width
        self._most = most
        self._storage = torch.zeros(0, channels + (width if keeps_trends else 0), dtype=dtype, device=device)
        self._used = 0  # rows of the storage
        nothing = self._tree.leaves[:0]
        self._rows = Rows.of(nothing, 0, nothing, nothing, nothing, nothing.to(torch.float64))
        self._num_left = 0
        self._num_named = 0
        self.lost = 0.0

    def __len__(self) -> int:
        return self._num_left

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return means (k, C) and trends (k, D), or (k, 0) if those are not kept, on the CPU. See ``merge_trends``.

        ``slots``: some of those of a ``MergeOrder``, (k,).
        """
        rows = torch.empty(slots.shape[0], self._storage.shape[1], dtype=self._storage.dtype)
        for part in self._parts(slots.shape[0]):  # they need no memory of their own on a device
            rows[part] = self._storage[slots[part].to(self._storage.device)].cpu()
        return rows[:, : self._channels], rows[:, self._channels :]

    def _boxes_of(self, rows: Tensor | slice) -> Tensor:
        return torch.cat([self._rows.time[rows], self._tree.rectangles[self._rows.cell[rows]]], dim=1)

    def append(self, latents: Tensor, frame: int, shots: list[int], seconds: list[float]) -> None:
        """Add frames. ``latents``: (n, H, W, C). ``frame``: index of the first. ``shots``: of each, number of cuts before.
        ``seconds``: of each, its time."""
        cells = self._tree.leaves.shape[0]
        count = cells * len(latents)
        wanted = 2 * (len(self) + count)
        # At once where it would be half of the way: two storages are there while one moves into the other.
        self._make_room(count, self._most if self._most is not None and 2 * wanted > self._most else wanted)
        slot = torch.arange(self._used, self._used + count, device=self._storage.device)
        new_storage = self._storage[self._used : self._used + count]
        self._used += count
        new_storage[:, : self._channels] = latents.reshape(count, -1)
        new_storage[:, self._channels :] = 0
        shot = torch.tensor(shots).to(slot.device)
        frames = torch.arange(frame, frame + len(latents), device=slot.device)
        leaves = self._tree.leaves.repeat(len(latents))
        times = torch.tensor(seconds, dtype=torch.float64).to(slot.device)
        frames, shot, times = (one.repeat_interleave(cells) for one in (frames, shot, times))
        new = Rows.of(slot, self._num_named, leaves, frames, shot, times)
        self._num_named += count
        self._num_left += count
        self._rows = Rows(torch.cat([self._rows.ints, new.ints]), torch.cat([self._rows.floats, new.floats]))

    def _make_room(self, count: int, wanted: int) -> None:
        """Make room in the storage for ``count`` more rows: drop those that were merged away. Grow to ``wanted`` rows, or
        to what is needed."""
        if self._used + count <= self._storage.shape[0]:
            return
        self._settle()
        left = len(self)
        size = max(self._storage.shape[0], left + count, wanted)
        is_same = size == self._storage.shape[0]
        storage = self._storage if is_same else self._storage.new_empty(size, self._storage.shape[1])
        slots, order = self._rows.slot.sort()
        # Slots ascend, so rows only ever move forward, and a few at a time need no second storage.
        for start in range(0, left, ROWS_AT_ONCE):
            part = slots[start : start + ROWS_AT_ONCE]
            storage[start : start + len(part)] = self._storage[part]
        self._rows.slot[order] = torch.arange(left, device=slots.device)
        self._storage, self._used = storage, left

    def merge_down(self, count: int, distance: float) -> Tensor:
        """Merge until ``count`` >= 1 stretches are left. The way depends on ``count``.

        ``distance``: the mean squared distance between two latents of the clip so far. Return the squared error that each
        merge adds, (k,) float64, on the CPU.
        """
        losses = [self._rows.loss[:0, 0]]
        while len(self) > count:
            # Of n merges that are still to be made, none is dearer than the n-th cheapest pair.
            merges = self._choose(min(len(self) - count, max(1, int(STREAM_SHARE * len(self)))), distance)
            self._merge(merges, None)
            losses.append(merges.loss)
        added = torch.cat(losses).cpu()
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
        self._settle()
        rows, first_slot, first_name = self._rows, self._used, self._num_named
        rows.height.fill_(FIRST)
        slots = torch.cat([rows.slot, torch.arange(first_slot, first_slot + count - 1, device=rows.slot.device)]).cpu()
        boxes, names = [self._boxes_of(slice(None))], rows.name
        pairs, losses, heights = [names.new_zeros(0, 2)], [rows.loss[:0, 0]], [names[:0]]
        while len(self) > 1:
            merges = self._choose(max(1, int(TREE_SHARE * len(self))), distance)
            pairs.append(torch.stack([self._rows.name[merges.a], self._rows.name[merges.b]], dim=1))
            self._merge(merges, torch.arange(self._used, self._used + len(merges.a), device=names.device))
            self._used += len(merges.a)
            losses.append(merges.loss)
            heights.append(self._rows.height[merges.a])
            boxes.append(self._boxes_of(merges.a))
        made, loss, height, all_boxes = (torch.cat(parts).cpu() for parts in (pairs, losses, heights, boxes))
        return _sort(names.cpu(), first_name, MergeOrder(made, loss, all_boxes, slots), height)

    def _settle(self) -> None:
        """Put the rows in the order of cells, then of time, without those that were merged away."""
        order = _keys(self._rows.cell, self._rows.time[:, 0]).argsort()[: len(self)]
        self._rows = Rows(self._rows.ints[order], self._rows.floats[order])

    def _choose(self, most: int, distance: float) -> _Merges:
        """Return the merges of a round, cheapest first, among the ``most`` cheapest pairs. They do not touch each other.
        ``distance``: as in ``merge_down``."""
        self._settle()
        rows, partner = self._rows, self._refresh()
        # A float of 0 or more has the order of its bits. Merges that cross no cut get the sign bit, and come first.
        costs = rows.cost.clone()
        apart = (rows.seconds[partner[:, 0]].sum(1) - rows.seconds.sum(1)) / (2 * APART_S)
        costs[:, 0] += torch.where(rows.loss[:, 0] > 0, distance * apart.square().clamp(max=1), 0.0)
        bits = costs.view(torch.int64)
        crosses = rows.shots[:, 1:] != rows.shots[:, 0][partner]
        keys = torch.where(partner == NONE, LAST, torch.where(crosses, bits, bits | FIRST)).flatten()
        # Of equal costs, merges along time come first, and of these every second one: so a line of equal latents halves in a
        # round, and no cells merge before their time lines have.
        index = torch.arange(keys.shape[0], device=keys.device).view(-1, 2)
        index = torch.cat([index[::2, 0], index[1::2, 0], index[:, 1]])
        order = index[keys[index].argsort(stable=True)[:most]]
        key, a = keys[order], order // 2
        is_pair = key != LAST
        b = torch.where(is_pair, partner.flatten()[order], a)
        rank = torch.arange(order.shape[0], device=keys.device)
        best = torch.full((len(self),), order.shape[0], device=keys.device)
        for end in (a, b):
            best.scatter_reduce_(0, end, rank, "amin")
        chosen = (is_pair & (rank == best[a]) & (rank == best[b])).nonzero().squeeze(1)
        order = order[chosen]
        a, kind = order // 2, order % 2
        return _Merges(a, b[chosen], kind, rows.loss[a, kind], key[chosen])

    def _refresh(self) -> Tensor:
        """Find each stretch's partners, and compute the costs that are out of date. Return (n, 2) rows, -1 for none."""
        rows, tree = self._rows, self._tree
        follows = (rows.cell[1:] == rows.cell[:-1]) & (rows.time[1:, 0] == rows.time[:-1, 1])
        here = torch.arange(len(self), device=rows.cell.device)
        after = torch.where(pad(follows, (0, 1)), here + 1, NONE)
        sibling, start = tree.sibling[rows.cell], rows.time[:, 0]
        beside = torch.searchsorted(_keys(rows.cell, start), _keys(sibling, start)).clamp(max=len(self) - 1)
        is_beside = (rows.cell[beside] == sibling) & (rows.time[beside] == rows.time).all(1)
        partner = torch.stack([after, torch.where((sibling > rows.cell) & is_beside, beside, NONE)], dim=1)
        is_pair = partner != NONE
        names = torch.where(is_pair, rows.name[partner], NONE)
        # What ends elsewhere, or has other cells, has other partners: one whose partners are the same has not changed itself.
        a, kind = ((names != rows.partner) & is_pair).nonzero().unbind(1)
        rows.partner.copy_(names)
        rows.cost[a, kind], rows.loss[a, kind] = self._price(a, partner[a, kind])
        return partner

    def _price(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Cost and added squared error, float64, of merging rows ``a`` and ``b``."""
        pair = self._rows.pick(a), self._rows.pick(b)
        distance = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
        for part in self._parts(a.shape[0]):
            x, y = (self._storage[rows.slot[part], : self._width].to(torch.float32) for rows in pair)
            distance[part] = (x - y).square().sum(-1).to(torch.float64)
        n, m = (rows.size.to(torch.float64) for rows in pair)
        weight = n * m / (n + m)
        return weight**COST_EXPONENT * distance, weight * distance

    def _parts(self, count: int) -> Iterator[slice]:
        """Split ``count`` pairs or rows into parts whose bytes are at most those above."""
        most = PAIR_BYTES_AT_ONCE if self._storage.device.type == "cpu" else DEVICE_PAIR_BYTES_AT_ONCE
        size = max(1, most // (8 * self._storage.shape[1]))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _merge(self, merges: _Merges, into: Tensor | None) -> None:
        """Merge rows ``b`` into rows ``a``. ``into``: new places for the results; ``None`` to overwrite those of ``a``."""
        count = merges.a.shape[0]
        mine, other = self._rows.pick(merges.a), self._rows.pick(merges.b)
        into = mine.slot if into is None else into
        for part in self._parts(count):
            x, y = self._storage[mine.slot[part]], self._storage[other.slot[part]]
            sizes, times = (mine.size[part], other.size[part]), (mine.time[part], other.time[part])
            self._storage[into[part]] = merge_stretches(x, y, sizes, times, self._channels)
        mine.slot.copy_(into)
        mine.name.copy_(torch.arange(self._num_named, self._num_named + count, device=into.device))
        mine.time[:, 1] = other.time[:, 1]
        mine.cell.copy_(torch.where(merges.kind == 0, mine.cell, self._tree.parent[mine.cell]))
        mine.shots[:, 1] = torch.maximum(mine.shots[:, 1], other.shots[:, 1])
        mine.height.copy_(torch.maximum(merges.key, torch.maximum(mine.height, other.height)))
        mine.size.add_(other.size)
        self._rows.ints[merges.a] = mine.ints
        self._rows.seconds[merges.a, 1] = self._rows.seconds[merges.b, 1]
        self._rows.cell[merges.b] = GONE
        self._num_named += count
        self._num_left -= count


def running_sums(losses: Tensor, start: float) -> list[float]:
    """Return ``start`` and its sums with the first losses, (k,), added one after the other: the same bits however they are
    split, which ``sum`` of Python 3.12 does not promise."""
    return list(accumulate(losses.tolist(), initial=start))


def left_after(pairs: Tensor, count: int) -> Tensor:
    """Return which of ``count`` stretches and of the results of merges are left after these, (k, 2): ascending, (n - k,)."""
    is_left = torch.ones(count + len(pairs), dtype=torch.bool)
    is_left[pairs.flatten()] = False
    return is_left.nonzero().squeeze(1)


def _keys(cell: Tensor, frame: Tensor) -> Tensor:
    return cell << 32 | frame


def _sort(names: Tensor, first_name: int, made: MergeOrder, height: Tensor) -> MergeOrder:
    """Return merges in the order of ``height``, (n-1,); of equals, the one made first. ``names``: of the n stretches.
    ``made``: merges as they were made, of names in place of stretches; their results are named on from ``first_name``."""
    count, order = len(names), height.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(count - 1)
    known, row = names.sort()
    is_made = made.pairs >= first_name
    given = row[torch.searchsorted(known, made.pairs).clamp(max=count - 1)]
    pairs = torch.where(is_made, place[(made.pairs - first_name).clamp(min=0)] + count, given)
    both = torch.cat([torch.arange(count), order + count])
    return MergeOrder(pairs[order], made.loss[order], made.boxes[both], made.slots[both])


@dataclass(frozen=True)
class _Merges:
    """Merges in order: rows ``b`` go into rows ``a``. ``kind``: 0 along time, 1 with the sibling cells. ``loss``: the
    squared error that each adds. ``key``: whether they cross a cut, then their cost, as one number."""

    a: Tensor
    b: Tensor
    kind: Tensor
    loss: Tensor
    key: Tensor


# What the state of a merger consists of, besides tensors and plain values.
STATE_CLASSES = (Merger, CellTree, Rows)
