"""What the host knows of stretches while they merge, against its definition, pair by pair."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from freres_cli.method.cell_tree import split_grid
from freres_cli.method.stretch_rows import LAST, Pairs, Rows

GRID = (2, 3)
NUM_SLOTS = 300
TREE = split_grid(*GRID)
RECTANGLES, SIBLING = TREE.rectangles.tolist(), TREE.sibling.tolist()


def make(num_frames):
    rows = Rows.empty()
    rows.resize(NUM_SLOTS)
    add(rows, 0, 0, num_frames)
    return rows


def add(rows, slot, frame, num_frames):
    frames = np.repeat(np.arange(frame, frame + num_frames), 6)
    rows.add(slot, np.tile(TREE.leaves.numpy(), num_frames), frames, frames // 5, frames / 4)


def box(rows, slot):
    return (int(rows.start[slot]), int(rows.stop[slot]), *RECTANGLES[rows.cell[slot]])


def there(rows):
    """Every pair that is known."""
    order = rows.order
    along, beside = order[rows.after[order] >= 0], order[rows.mate[order] >= 0]
    beside = beside[rows.cell[beside] < rows.cell[rows.mate[beside]]]
    kind = np.repeat([0, 1], [len(along), len(beside)])
    return Pairs(np.concatenate([along, beside]), np.concatenate([rows.after[along], rows.mate[beside]]), kind)


def named(rows, pairs):
    together = zip(pairs.kind.tolist(), pairs.a.tolist(), pairs.b.tolist(), strict=True)
    return [(kind, box(rows, a), box(rows, b)) for kind, a, b in together]


def defined(rows):
    """Every pair that may merge, as its definition reads."""
    found = set()
    for a, b in itertools.permutations(rows.order.tolist(), 2):
        if rows.cell[a] == rows.cell[b] and rows.stop[a] == rows.start[b]:
            found.add((0, box(rows, a), box(rows, b)))
        is_same_time = box(rows, a)[:2] == box(rows, b)[:2]
        if is_same_time and SIBLING[rows.cell[a]] == rows.cell[b] and rows.cell[a] < rows.cell[b]:
            found.add((1, box(rows, a), box(rows, b)))
    return found


def disjoint(pairs, rng):
    """Some of the pairs, none of which touches another."""
    taken, places = set(), []
    for place in rng.permutation(len(pairs.a)).tolist():
        both = {int(pairs.a[place]), int(pairs.b[place])}
        if not both & taken and rng.random() < 0.4:
            taken |= both
            places.append(place)
    return Pairs(pairs.a[places], pairs.b[places], pairs.kind[places])


@pytest.mark.parametrize("seed", range(12))
def test_partners_are_those_of_the_definition_and_each_pair_is_new_once(seed):
    rng, rows, frame, used, known = np.random.default_rng(seed), make(4), 4, 24, set()
    while frame < 20 or len(rows) > 1:
        sought, wanted = rows.seek_partners(TREE), defined(rows)
        new = named(rows, sought)
        assert len(new) == len(set(new)) and set(new) == wanted - known
        assert set(named(rows, there(rows))) == wanted
        rows.price(sought, np.ones(len(new)), np.ones(len(new)), 1.0)
        pairs, keys = rows.cheapest(len(wanted), 0.0)
        assert sorted(named(rows, pairs)) == sorted(wanted)
        assert [(a[1] - 1) // 5 != b[0] // 5 for _, a, b in named(rows, pairs)] == (keys >= 0).tolist(), "cuts"
        known, some = wanted, disjoint(there(rows), rng)
        is_in_place = rng.random() < 0.5 or used + len(some.a) > NUM_SLOTS
        rows.merge(some, some.a if is_in_place else np.arange(used, used + len(some.a)), TREE)
        used += 0 if is_in_place else len(some.a)
        keys = [(int(rows.cell[slot]), int(rows.start[slot])) for slot in rows.order]
        assert keys == sorted(keys)
        if rng.random() < 0.3:
            used = len(rows.close_up())
        if frame < 20 and used + 12 <= NUM_SLOTS:
            add(rows, used, frame, 2)
            frame, used = frame + 2, used + 12


@pytest.mark.parametrize("most", [1, 5, 30, 1000])
@pytest.mark.parametrize("distance", [0.0, 2.0])
def test_the_cheapest_pairs_come_in_order(most, distance):
    """Those across a cut last; of equal ones, those along time first, of which every second one comes before the others."""
    rng, rows = np.random.default_rng(most), make(7)
    pairs = rows.seek_partners(TREE)
    cost, loss = rng.integers(0, 3, len(pairs.a)).astype(float), rng.integers(0, 2, len(pairs.a)).astype(float)
    rows.price(pairs, cost, loss, 0.5)
    place, ranked = {slot: place for place, slot in enumerate(rows.order.tolist())}, []
    for kind, a, b, own, lost in zip(pairs.kind, pairs.a, pairs.b, cost, loss, strict=True):
        is_cut = rows.start[a] // 5 != rows.start[b] // 5
        apart = distance * 0.25**2 if kind == 0 and lost else 0  # frames are 0.25 s apart, and 1 s counts as a latent
        ranked.append((is_cut, own + apart, kind, place[a] % 2 if kind == 0 else 0, place[a], (kind, a, b)))
    found, keys = rows.cheapest(most, distance)
    wanted = [last for *_, last in sorted(ranked)][:most]
    assert list(zip(found.kind, found.a, found.b, strict=True)) == wanted
    assert (keys[1:] >= keys[:-1]).all() and (keys < LAST).all()
