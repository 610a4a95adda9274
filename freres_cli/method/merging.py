"""Adaptive Fre-Res: neighbouring latents merge, cheapest first, until the budget is met.

A GoP of the paper has one length for all cells. Here each cell has its own: its time line is cut where it changes, and
each stretch is one token, the mean of its latents. Where a whole neighbourhood moves together, cells merge as well. Ours,
after Ward (1963): the paper's GoPs spend as much on cells that stand still as on cells that move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Ours. The cost of a merge is (n1 n2 / (n1 + n2))^a |m1 - m2|^2. At a = 1 this is the squared error it adds, which
# undervalues what is brief. On 60 clips of the world, 1/2 was a little better than 1, within noise, and better than 0.3.
COST_EXPONENT = 0.5
# Ours. In a round, merges that do not touch each other run together: those among this share of the cheapest that are the
# cheapest for both sides.
ROUND_SHARE = 0.04
NONE = -1
# Pairs that are compared or merged at once have this many bytes in float32: they stay in a core's cache, which makes wide
# latents five times as fast as 8,192 pairs at once.
PAIR_BYTES_AT_ONCE = 2**20
DEVICE_PAIR_BYTES_AT_ONCE = 2**26  # a GPU is faster with more at once; this bounds its memory
ROWS_AT_ONCE = 1024  # bounds the memory of moving rows


# (slots that remain, slots merged into them, squared error added by each)
OnMerges = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class CellTree:
    """The rectangles of cells that tokens can stand for: halves of halves of the grid, down to single cells.

    ``rectangles``: (K, 4) h0, h1, w0, w1, half-open. ``parent``, ``sibling``: (K,), -1 for the whole grid. ``leaves``:
    (H*W,), the rectangle of each cell in raster order.
    """

    rectangles: Tensor
    parent: Tensor
    sibling: Tensor
    leaves: Tensor


def split_grid(grid_h: int, grid_w: int) -> CellTree:
    """Return the tree of a grid. The longer side is halved; the first half is the larger one."""
    rectangles, parent, sibling = [(0, grid_h, 0, grid_w)], [NONE], [NONE]
    leaves = torch.empty(grid_h, grid_w, dtype=torch.int64)
    index = 0
    while index < len(rectangles):
        h0, h1, w0, w1 = rectangles[index]
        if (h1 - h0) * (w1 - w0) == 1:
            leaves[h0, w0] = index
        else:
            if h1 - h0 >= w1 - w0:
                middle = (h0 + h1 + 1) // 2
                halves = [(h0, middle, w0, w1), (middle, h1, w0, w1)]
            else:
                middle = (w0 + w1 + 1) // 2
                halves = [(h0, h1, w0, middle), (h0, h1, middle, w1)]
            at = len(rectangles)
            rectangles += halves
            parent += [index, index]
            sibling += [at + 1, at]
        index += 1
    return CellTree(torch.tensor(rectangles), torch.tensor(parent), torch.tensor(sibling), leaves.flatten())


class Merger:
    """The stretches of a clip, merged step by step.

    ``grid``: (H, W). ``channels``: C. ``width``: D, the channels that costs are computed over. ``dtype``: of the latents.
    A mean is rounded to it at every merge, so that a bundle can go on merging where compression stopped. ``most``: rows of
    memory, as long as no more stretches are left than that; by default, up to twice as many as there are stretches.
    ``keeps_trends``: carry the trend of each stretch beside its mean. ``device``: where latents are kept, compared and
    merged; which ones are is decided on the host.
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
        self._changed = torch.zeros(0, dtype=torch.bool)  # since costs were last computed
        self._rows = _new_rows(torch.zeros(0, dtype=torch.int64), 0, 0, self._tree.leaves[:0])
        self._pending: _Merges | None = None
        self.lost = 0.0
        self.on_merges: OnMerges | None = None

    def __len__(self) -> int:
        return self._rows.slot.shape[0]

    @property
    def slots(self) -> Tensor:
        """The name of each stretch in ``on_merges``, (n,)."""
        return self._rows.slot

    @property
    def values(self) -> Tensor:
        """The means of the stretches, (n, C)."""
        return self._storage[self._rows.slot, : self._channels].cpu()

    @property
    def trends(self) -> Tensor:
        """The trends of the stretches, (n, D), or (n, 0) if they are not kept. See ``merge_trends``."""
        return self._storage[self._rows.slot, self._channels :].cpu()

    @property
    def boxes(self) -> Tensor:
        """(n, 6) int64, the frames and cells each stretch stands for, t0, t1, h0, h1, w0, w1, half-open."""
        return self._boxes_of(slice(None))

    def _boxes_of(self, rows: Tensor | slice) -> Tensor:
        return torch.cat([self._rows.time[rows], self._tree.rectangles[self._rows.cell[rows]]], dim=1)

    def append(self, latents: Tensor, frame: int, shot: int) -> None:
        """Add a frame. ``latents``: (H, W, C). ``frame``: its index; ``shot``: number of cuts before it."""
        count = self._tree.leaves.shape[0]
        self._pending = None
        self._make_room(count)
        slot = torch.arange(self._used, self._used + count)
        new_storage = self._storage[self._used : self._used + count]
        self._used += count
        new_storage[:, : self._channels] = latents.reshape(count, -1)
        new_storage[:, self._channels :] = 0
        self._changed[slot] = True
        new = _new_rows(slot, frame, shot, self._tree.leaves)
        self._rows = _Rows(*(torch.cat(pair) for pair in zip(self._rows.columns(), new.columns(), strict=True)))

    def _make_room(self, count: int) -> None:
        """Make room in the storage for ``count`` more rows: drop those that were merged away, or grow."""
        if self._used + count <= self._storage.shape[0]:
            return
        alive = len(self)
        size = max(self._storage.shape[0], 2 * (alive + count))
        if self._most is not None:
            size = max(alive + count, min(size, self._most))
        is_same = size == self._storage.shape[0]
        storage = self._storage if is_same else self._storage.new_empty(size, self._storage.shape[1])
        # Slots ascend, so rows only ever move forward, and a few at a time need no second storage.
        for part in torch.arange(alive).split(ROWS_AT_ONCE):
            storage[part] = self._storage[self._rows.slot[part]]
        changed = torch.zeros(size, dtype=torch.bool)
        changed[:alive] = self._changed[self._rows.slot]
        # Costs stay valid: partners are found under their new names. One that was merged away is none of them.
        names = torch.full((self._storage.shape[0] + 1,), NONE)
        names[self._rows.slot] = torch.arange(alive)
        self._rows.partner = names[self._rows.partner]
        self._storage, self._changed = storage, changed
        self._rows.slot, self._used = torch.arange(alive), alive

    def merge_down(self, count: int, most_lost: float = torch.inf) -> None:
        """Merge until ``count`` >= 1 stretches are left, or one more merge would lose more than ``most_lost`` in all.

        The merges and their order do not depend on where this stops, so that a smaller budget goes on from a larger one.
        """
        while len(self) > count:
            if self._pending is None:
                self._pending = self._choose()
            fits = self._pending.loss.cumsum(0) + self.lost <= most_lost
            taken = min(len(self) - count, int(fits.cummin(0).values.sum()))
            self._merge(self._pending.take(slice(taken)))
            is_done = taken == len(fits)
            self._pending = None if is_done else self._pending.take(slice(taken, None))
            if not is_done:
                return

    def _choose(self) -> _Merges:
        """Return the merges of a round, cheapest first. They do not touch each other."""
        rows = self._rows
        partner = self._refresh()
        a, kind = (partner != NONE).nonzero().unbind(1)
        b = partner[a, kind]
        crosses = rows.shots[a, 1] != rows.shots[b, 0]
        tie = (rows.time[a, 0] * self._tree.rectangles.shape[0] + rows.cell[a]) * 2 + kind
        order = tie.argsort()
        for key in (rows.cost[a, kind], crosses):
            order = order[key[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.shape[0])
        best = torch.full((len(self),), order.shape[0])
        for end in (a, b):
            best.scatter_reduce_(0, end, rank, "amin")
        order = order[: max(1, int(ROUND_SHARE * order.shape[0]))]
        a, b, kind, rank = a[order], b[order], kind[order], rank[order]
        chosen = (rank == best[a]) & (rank == best[b])
        a, b, kind = a[chosen], b[chosen], kind[chosen]
        return _Merges(rows.slot[a], rows.slot[b], kind, rows.loss[a, kind])

    def _refresh(self) -> Tensor:
        """Find each stretch's partners, and compute the costs that are out of date. Return (n, 2) rows, -1 for none."""
        rows = self._rows
        span = int(rows.time[:, 1].max()) + 1
        keys, order = (rows.cell * span + rows.time[:, 0]).sort()

        def find(cell: Tensor, frame: Tensor) -> Tensor:
            wanted = cell * span + frame
            at = torch.searchsorted(keys, wanted).clamp(max=len(self) - 1)
            return torch.where(keys[at] == wanted, order[at], NONE)

        after = find(rows.cell, rows.time[:, 1])
        sibling = self._tree.sibling[rows.cell]
        beside = find(sibling, rows.time[:, 0])
        fits = (sibling > rows.cell) & (beside != NONE) & (rows.time[beside, 1] == rows.time[:, 1])
        partner = torch.stack([after, torch.where(fits, beside, NONE)], dim=1)
        slots = torch.where(partner == NONE, NONE, rows.slot[partner])
        changed = self._changed[rows.slot]
        stale = (slots != rows.partner) | changed[:, None] | ((partner != NONE) & changed[partner])
        rows.partner = slots
        a, kind = (stale & (partner != NONE)).nonzero().unbind(1)
        b = partner[a, kind]
        rows.cost[a, kind], rows.loss[a, kind] = self._price(a, b)
        self._changed.fill_(False)
        return partner

    def _price(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Cost and added squared error, float64, of merging rows ``a`` and ``b``."""
        slots = [self._rows.slot[rows].to(self._storage.device) for rows in (a, b)]
        distance = torch.empty(a.shape[0], dtype=torch.float64, device=self._storage.device)
        for part in self._parts(a.shape[0]):
            x, y = (self._storage[slot[part], : self._width].to(torch.float32) for slot in slots)
            distance[part] = (x - y).square().sum(-1).to(torch.float64)
        distance = distance.cpu()
        n, m = (box_sizes(self._boxes_of(rows)).to(torch.float64) for rows in (a, b))
        weight = n * m / (n + m)
        return weight**COST_EXPONENT * distance, weight * distance

    def _parts(self, count: int) -> Iterator[slice]:
        """Split ``count`` pairs into parts whose bytes are at most those above."""
        most = PAIR_BYTES_AT_ONCE if self._storage.device.type == "cpu" else DEVICE_PAIR_BYTES_AT_ONCE
        size = max(1, most // (8 * self._storage.shape[1]))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _merge(self, merges: _Merges) -> None:
        rows = self._rows
        row_of = torch.empty(self._storage.shape[0], dtype=torch.int64)
        row_of[rows.slot] = torch.arange(len(self))
        a, b = row_of[merges.a], row_of[merges.b]
        device = self._storage.device
        slots_a, slots_b = merges.a.to(device), merges.b.to(device)
        boxes_a, boxes_b = self._boxes_of(a).to(device), self._boxes_of(b).to(device)
        for part in self._parts(a.shape[0]):
            x, y = self._storage[slots_a[part]], self._storage[slots_b[part]]
            merged = merge_stretches(x, y, boxes_a[part], boxes_b[part], self._channels)
            self._storage[slots_a[part]] = merged
        self._changed[merges.a] = True
        self.lost = add_up(merges.loss, self.lost)
        if self.on_merges is not None:
            self.on_merges(merges.a, merges.b, merges.loss)
        rows.time[a, 1] = rows.time[b, 1]
        rows.cell[a] = torch.where(merges.kind == 0, rows.cell[a], self._tree.parent[rows.cell[a]])
        rows.shots[a, 1] = torch.maximum(rows.shots[a, 1], rows.shots[b, 1])
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[b] = False
        self._rows = _Rows(*(column[keep] for column in rows.columns()))


def add_up(losses: Tensor, start: float) -> float:
    """Return ``start`` plus the losses, added one after the other: the same bits however they are split."""
    return sum(losses.tolist(), start)


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


@dataclass(frozen=True)
class _Merges:
    """Merges in order: slots ``b`` go into slots ``a``. ``kind``: 0 along time, 1 with the sibling cells. ``loss``: the
    squared error that each adds."""

    a: Tensor
    b: Tensor
    kind: Tensor
    loss: Tensor

    def take(self, part: slice) -> _Merges:
        return _Merges(self.a[part], self.b[part], self.kind[part], self.loss[part])


@dataclass
class _Rows:
    """One row a stretch: ``slot``, its place in the storage; ``time`` t0, t1; ``cell``, its rectangle; ``shots``, first and
    last. For the two merges it may take part in as the first, along time and with the sibling cells: ``partner``, the
    other's slot; ``cost``; ``loss``, the squared error added."""

    slot: Tensor
    time: Tensor
    cell: Tensor
    shots: Tensor
    partner: Tensor
    cost: Tensor
    loss: Tensor

    def columns(self) -> tuple[Tensor, ...]:
        return self.slot, self.time, self.cell, self.shots, self.partner, self.cost, self.loss


# What the state of a merger consists of, besides tensors and plain values.
STATE_CLASSES = (Merger, CellTree, _Rows, _Merges)


def _new_rows(slot: Tensor, frame: int, shot: int, cell: Tensor) -> _Rows:
    count = slot.shape[0]
    return _Rows(
        slot,
        torch.tensor([[frame, frame + 1]]).expand(count, 2),
        cell,
        torch.full((count, 2), shot),
        torch.full((count, 2), NONE),
        torch.full((count, 2), torch.inf, dtype=torch.float64),
        torch.zeros(count, 2, dtype=torch.float64),
    )
