"""The stretches that are being merged, as the host knows them: all but their latents."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from freres_cli.method.cell_tree import NONE, CellTree

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
DTYPES = {"Ints": np.int64, "Floats": np.float64, "Flags": np.bool_}

FIRST = -(2**63)  # the sign bit; the key of what no merge made
LAST = 2**63 - 1  # above the keys of all merges


@dataclass
class Pairs:
    """Stretches ``a`` that may merge with stretches ``b``, slots (k,). ``kind``: (k,), 0 along time, 1 with the sibling
    cells."""

    a: Ints
    b: Ints
    kind: Ints


@dataclass
class Rows:
    """Everything that decides which stretches merge. Arrays but the last two have a row for each slot: the place of a
    stretch's latents in the storage.

    ``cell``: its rectangle in the tree. ``start``, ``stop``: its frames. ``first_shot``, ``last_shot``, ``first_s``,
    ``last_s``: of its first and its last frame. ``after``: the slot of the stretch that follows in the same cells, ``mate``:
    that of the sibling cells at the same time, -1 for none. Of the merge with the one that follows: ``cost``, as far as
    latents decide it, ``apart``, the share of a latent that time adds if they differ, ``sign``, the sign bit if it crosses
    no cut, and ``loss``, the squared error that it adds. Of that with the sibling, in the row of the first of the two:
    ``mate_key``, as ``cheapest`` returns it, and ``mate_loss``. ``fresh``: whether it is new since partners were last sought.

    ``order``: the slots of the stretches that are left, by cell, then by time; ``order_keys``: their ``_sort_keys``.
    """

    cell: Ints
    start: Ints
    stop: Ints
    first_shot: Ints
    last_shot: Ints
    first_s: Floats
    last_s: Floats
    after: Ints
    mate: Ints
    cost: Floats
    apart: Floats
    sign: Ints
    loss: Floats
    mate_key: Ints
    mate_loss: Floats
    fresh: Flags
    order: Ints
    order_keys: Ints

    @staticmethod
    def empty() -> Rows:
        """Return rows without slots."""
        arrays: dict[str, Any] = {one.name: np.zeros(0, DTYPES[str(one.type)]) for one in fields(Rows)}
        return Rows(**arrays)

    def __len__(self) -> int:
        return len(self.order)

    # A state of a long compression is written by torch, which reads nothing but its own.
    def __getstate__(self) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({one.name: state[one.name].numpy() for one in fields(self)})

    def _by_slot(self) -> list[str]:
        return [one.name for one in fields(self)[:-2]]

    def resize(self, num_slots: int) -> None:
        """Have this many slots, and no fewer than there are."""
        more = num_slots - len(self.cell)
        for name in self._by_slot() if more > 0 else ():
            setattr(self, name, np.pad(getattr(self, name), (0, more)))

    def close_up(self) -> Ints:
        """Give the stretches that are left the first slots, in the order of those that they have. Return these, ascending."""
        slots = np.sort(self.order)
        new_slot = np.full(len(self.cell) + 1, NONE)
        new_slot[slots] = np.arange(len(slots))
        for name in self._by_slot():
            array = getattr(self, name)
            array[: len(slots)] = array[slots]
        for array in (self.after, self.mate):
            array[: len(slots)] = new_slot[array[: len(slots)]]
        self.order = new_slot[self.order]
        return slots

    def add(self, first_slot: int, cells: Ints, frames: Ints, shots: Ints, seconds: Floats) -> None:
        """Add latents that nothing was merged with, in slots from ``first_slot`` on. ``cells``, ``frames``, ``shots``,
        ``seconds``: of each, (n,)."""
        slots = np.arange(first_slot, first_slot + len(cells))
        self.cell[slots], self.start[slots], self.stop[slots] = cells, frames, frames + 1
        self.first_shot[slots] = self.last_shot[slots] = shots
        self.first_s[slots] = self.last_s[slots] = seconds
        self._enter(slots, slots)

    def _enter(self, slots: Ints, unplaced: Ints) -> None:
        """Have no partners for new stretches in ``slots``, and put ``unplaced``, some of them, into the order."""
        self.after[slots] = self.mate[slots] = NONE
        self.mate_key[slots], self.fresh[slots] = LAST, True
        keys = _sort_keys(self.cell[unplaced], self.start[unplaced])
        by_key = keys.argsort(kind="stable")
        keys = keys[by_key]
        at = self.order_keys.searchsorted(keys)
        self.order, self.order_keys = np.insert(self.order, at, unplaced[by_key]), np.insert(self.order_keys, at, keys)

    def seek_partners(self, tree: CellTree) -> Pairs:
        """Find which stretches may merge now, and return those pairs that were not there before. ``price`` is next."""
        order = self.order
        cell, start, stop, fresh = self.cell[order], self.start[order], self.stop[order], self.fresh[order]
        follows = (cell[1:] == cell[:-1]) & (start[1:] == stop[:-1])
        is_new = follows & ((self.after[order[:-1]] != order[1:]) | fresh[1:])
        self.after[order] = NONE
        self.after[order[:-1][follows]] = order[1:][follows]
        along = order[:-1][is_new]
        new = order[fresh]
        # The sibling of the whole grid has a key that no stretch has.
        wanted = _sort_keys(tree.sibling.numpy()[self.cell[new]], self.start[new])
        at = np.minimum(self.order_keys.searchsorted(wanted), len(order) - 1)
        mate = order[at]
        is_mate = (self.order_keys[at] == wanted) & (self.stop[mate] == self.stop[new])
        new, mate = new[is_mate], mate[is_mate]
        is_first = self.cell[new] < self.cell[mate]
        once = is_first | ~self.fresh[mate]
        first, second = np.where(is_first, new, mate)[once], np.where(is_first, mate, new)[once]
        self.mate[first], self.mate[second] = second, first
        self.fresh[order] = False
        kind = np.repeat(np.arange(2), (len(along), len(first)))
        return Pairs(np.concatenate([along, first]), np.concatenate([self.after[along], second]), kind)

    def price(self, pairs: Pairs, cost: Floats, loss: Floats, apart_s: float) -> None:
        """Take what merges cost.

        ``pairs``: those of ``seek_partners``. ``cost``: as far as latents decide it, ``loss``: the squared error they add,
        (k,) each. ``apart_s``: so many seconds between two middles count as a latent.
        """
        # A float of 0 or more has the order of its bits. Merges that cross no cut get the sign bit, and come first.
        sign = np.where(self.last_shot[pairs.a] == self.first_shot[pairs.b], FIRST, 0)
        along, beside = pairs.kind == 0, pairs.kind == 1
        a, b = pairs.a[along], pairs.b[along]
        middles = (self.first_s[b] + self.last_s[b]) - (self.first_s[a] + self.last_s[a])
        self.apart[a] = np.minimum(np.square(middles / (2 * apart_s)), 1)
        self.cost[a], self.loss[a], self.sign[a] = cost[along], loss[along], sign[along]
        a = pairs.a[beside]
        self.mate_key[a], self.mate_loss[a] = cost[beside].view(np.int64) | sign[beside], loss[beside]

    def cheapest(self, most: int, distance: float) -> tuple[Pairs, Ints]:
        """Return the ``most`` cheapest pairs, cheapest first, and their keys: whether they cross a cut, then their cost, as
        one number. ``distance``: what time is measured by. What is equal merges for nothing."""
        order = self.order
        after = self.after[order]
        added = np.where(self.loss[order] > 0, distance * self.apart[order], 0.0)
        along = (self.cost[order] + added).view(np.int64) | self.sign[order]
        along[after == NONE] = LAST
        # Of equal costs, merges along time come first, and of these every second one: so a line of equal latents halves in a
        # round, and no cells merge before their time lines have.
        keys = np.concatenate([along[::2], along[1::2], self.mate_key[order]])
        found = np.arange(len(keys))
        if most < len(keys):
            found = np.flatnonzero(keys <= np.partition(keys, most - 1)[most - 1])
        found = found[keys[found].argsort(kind="stable")[:most]]
        found = found[keys[found] != LAST]
        places = np.arange(len(order))
        place = np.concatenate([places[::2], places[1::2], places])[found]
        a, kind = order[place], np.where(found < len(order), 0, 1)
        return Pairs(a, np.where(kind == 0, after[place], self.mate[a]), kind), keys[found]

    def merge(self, pairs: Pairs, into: Ints, tree: CellTree) -> None:
        """Merge stretches ``b`` into ``a``, and have the results in the slots ``into``, (k,): those of ``a``, or new ones."""
        a, b = pairs.a, pairs.b
        for left in (self.mate[a], self.mate[b]):
            left = left[left != NONE]
            self.mate[left], self.mate_key[left] = NONE, LAST
        place = np.empty(len(self.cell), np.int64)
        place[self.order] = np.arange(len(self))
        rises = pairs.kind == 1
        self.cell[into] = np.where(rises, tree.parent.numpy()[self.cell[a]], self.cell[a])
        self.start[into], self.stop[into] = self.start[a], self.stop[b]
        self.first_shot[into], self.last_shot[into] = self.first_shot[a], self.last_shot[b]
        self.first_s[into], self.last_s[into] = self.first_s[a], self.last_s[b]
        stays = np.ones(len(self), bool)
        stays[place[b]] = stays[place[a[rises]]] = False
        self.order[place[a]] = into
        self.order, self.order_keys = self.order[stays], self.order_keys[stays]
        self._enter(into, into[rises])

    def times(self, slots: Ints) -> Ints:
        """Return the frames of stretches, (k, 2), half-open."""
        return np.stack([self.start[slots], self.stop[slots]], axis=1)

    def boxes(self, slots: Ints, tree: CellTree) -> Ints:
        """Return what stretches stand for, (k, 6): frames and cells, t0, t1, h0, h1, w0, w1, half-open."""
        return np.concatenate([self.times(slots), tree.rectangles.numpy()[self.cell[slots]]], axis=1)


def _sort_keys(cell: Ints, frame: Ints) -> Ints:
    return cell << 32 | frame
