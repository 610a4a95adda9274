"""Merging neighbouring latents: the error is exact, the order does not depend on where it stops, cuts are respected."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from freres_cli.method import merging
from freres_cli.method.cell_tree import split_grid
from freres_cli.method.merging import Merger, left_after
from freres_cli.method.stretch_means import merge_means

D = 8
FPS = 4


def walk(num_frames, grid_h, grid_w, seed=0, channels=D):
    """Latents that drift, with a jump in some cells: (T, H, W, C) float32."""
    torch.manual_seed(seed)
    clip = 0.2 * torch.randn(num_frames, grid_h, grid_w, channels).cumsum(0)
    clip = clip + 3 * torch.randn(1, grid_h, grid_w, channels)
    clip[num_frames // 2 :, 0] += 2
    return clip


@dataclass
class Merged:
    values: torch.Tensor
    boxes: torch.Tensor
    lost: float

    def __len__(self):
        return len(self.boxes)


def times(num_frames, first=0):
    return [frame / FPS for frame in range(first, first + num_frames)]


def feed(clip, shots=None, width=D, most=None):
    merger = Merger(clip.shape[1:3], clip.shape[-1], width, clip.dtype, most)
    merger.append(clip, 0, shots or [0] * len(clip), times(len(clip)))
    return merger


def merge(clip, count, shots=None, width=D, distance=0.0):
    """The clip after the first merges of the order in which all of it merges. ``distance``: 0, so that latents alone
    decide, but where time is what is tested."""
    merger = feed(clip, shots, width)
    order = merger.merge_all(distance)
    steps = max(0, len(order.loss) + 1 - count)
    left = left_after(order.pairs[:steps], len(order.loss) + 1)
    return Merged(merger.read(order.slots[left])[0], order.boxes[left], float(order.loss[:steps].sum()))


def merge_in_place(clip, count, shots=None, width=D, distance=0.0):
    merger = feed(clip, shots, width)
    merger.merge_down(count, distance)
    left, lost, order = len(merger), merger.lost, merger.merge_all(distance)
    return Merged(merger.read(order.slots[:left])[0], order.boxes[:left], lost)


def rebuild(merger, clip):
    """Every latent as the stretch that stands for it shows it."""
    shown = torch.full_like(clip, torch.nan)
    for value, (t0, t1, h0, h1, w0, w1) in zip(merger.values, merger.boxes.tolist(), strict=True):
        assert shown[t0:t1, h0:h1, w0:w1].isnan().all()  # no two stretches overlap
        shown[t0:t1, h0:h1, w0:w1] = value
    return shown


@pytest.mark.parametrize("how", [merge, merge_in_place])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 5), (7, 4)])
@pytest.mark.parametrize("share", [1, 0.5, 0.1, 0.02, 0])
def test_the_error_is_exact_and_the_clip_is_covered_once(grid, share, how):
    clip = walk(12, *grid)
    count = max(1, int(share * clip[..., 0].numel()))
    merged = how(clip, count)
    assert len(merged) == count
    shown = rebuild(merged, clip)
    assert not shown.isnan().any()
    assert merged.lost == pytest.approx(float((clip - shown).square().sum()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("most", [356, 601])
def test_merges_do_not_depend_on_when_rows_of_memory_are_cleared(most, monkeypatch):
    """Costs that were computed before rows moved stay valid, and none is left over from before a merge."""
    monkeypatch.setattr(merging, "STREAM_SHARE", 0.5)  # many merges since costs were last computed
    clip, found = walk(30, 8, 8), []
    for rows in (most, None):
        merger = Merger((8, 8), D, D, clip.dtype, rows)
        for frame in range(0, len(clip), 2):
            merger.append(clip[frame : frame + 2], frame, [0, 0], times(2, frame))
            if frame % 4 == 2:
                merger.merge_down(100, 1.0)
        assert rows is None or merger._storage.shape[0] <= rows
        lost, order = merger.lost, merger.merge_all(1.0)
        found.append((order.pairs, order.loss, order.boxes, merger.read(order.slots)[0], torch.tensor(lost)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_frames_may_come_in_any_batches():
    clip, found = walk(12, 3, 5), []
    for size in (1, 5, 12):
        merger = Merger((3, 5), D, D, clip.dtype)
        for frame, part in zip(range(0, 12, size), clip.split(size), strict=True):
            shots = [int(index > 6) for index in range(frame, frame + len(part))]
            merger.append(part, frame, shots, times(len(part), frame))
        found.append(merger.merge_all(1.0))
    for order in found[1:]:
        assert torch.equal(order.pairs, found[0].pairs) and torch.equal(order.loss, found[0].loss)


def test_pairs_may_be_compared_in_any_parts(monkeypatch):
    clip, found = walk(12, 3, 5), []
    for num_bytes in (1, 1000, 2**20):
        monkeypatch.setattr(merging, "PAIR_BYTES_AT_ONCE", num_bytes)
        merged = merge(clip, 20)
        found.append((merged.values, merged.boxes, merged.lost))
    for values, boxes, lost in found[1:]:
        assert torch.equal(values, found[0][0]) and torch.equal(boxes, found[0][1]) and lost == found[0][2]


def test_without_merges_the_latents_stay_bit_for_bit():
    clip = walk(5, 2, 3).bfloat16()
    merger = merge(clip, 100)
    assert torch.equal(rebuild(merger, clip), clip) and merger.lost == 0


def test_one_stretch_is_the_mean_of_all():
    clip = walk(9, 3, 4)
    merger = merge(clip, 1)
    assert torch.allclose(merger.values[0], clip.mean((0, 1, 2)), atol=1e-4)
    assert merger.lost == pytest.approx(float((clip - clip.mean((0, 1, 2))).square().sum()), rel=1e-4)


def greedy(line, count, exponent, distance):
    """Ward's merging of one time line, one pair at a time, as its definition reads: the starts of the stretches."""
    parts = [[value] for value in line]

    def cost(a, b):
        n, m = len(a), len(b)
        change = (torch.stack(a).mean(0) - torch.stack(b).mean(0)).square().sum()
        apart = (n + m) / 2 / FPS / 5.0  # the middles of two stretches that touch
        return float((n * m / (n + m)) ** exponent * change) + (distance * min(1, apart**2) if change else 0)

    while len(parts) > count:
        costs = [cost(a, b) for a, b in itertools.pairwise(parts)]
        at = costs.index(min(costs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [0, *itertools.accumulate(len(part) for part in parts)][:-1]


@pytest.mark.parametrize("how", [merge, merge_in_place])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distance", [0, 5, 500])
def test_one_merge_a_round_is_the_greedy_of_the_definition(monkeypatch, seed, how, distance):
    """Order by height changes nothing then: a merge makes only merges cheaper that take part in its result."""
    monkeypatch.setattr(merging, "TREE_SHARE", 0)
    monkeypatch.setattr(merging, "STREAM_SHARE", 0)
    clip = walk(24, 1, 1, seed)
    for count in (16, 9, 4, 1):
        starts = sorted(how(clip, count, distance=distance).boxes[:, 0].tolist())
        assert starts == greedy(clip.flatten(1), count, 0.5, distance)


def test_what_stands_still_is_seen_again_and_again():
    """Noise alone would cut it anywhere."""
    clip = 0.01 * walk(1, 1, 1).repeat(128, 1, 1, 1) + 1e-3 * torch.randn(128, 1, 1, D)
    for distance, is_even in ((0.0, False), (1.0, True)):
        merged = merge(clip, 16, distance=distance)
        lengths = merged.boxes[:, 1] - merged.boxes[:, 0]
        assert bool(lengths.max() <= 16) == is_even, lengths


def test_what_is_equal_is_one_token_however_long_it_is():
    clip = 0.01 * walk(1, 3, 4).repeat(200, 1, 1, 1)  # cells so alike that merging them would cost less than time does
    merged = merge(clip, 12, distance=float(D))
    assert merged.lost == 0 and set(merged.boxes[:, 1].tolist()) == {200}


def test_what_is_brief_outlasts_time_however_long_a_clip_is():
    clip = 1e-3 * torch.randn(3000, 1, 1, D)
    clip[1200] += 1
    boxes = merge(clip, 3, distance=D / 2).boxes[:, :2]
    assert sorted(boxes.tolist()) == [[0, 1200], [1200, 1201], [1201, 3000]]


@pytest.mark.parametrize("how", [merge, merge_in_place])
@pytest.mark.parametrize("count", [256, 128, 51, 26])
def test_rounds_of_merges_lose_hardly_more_than_one_at_a_time(monkeypatch, count, how):
    clip = walk(32, 4, 4)
    in_rounds = how(clip, count).lost
    monkeypatch.setattr(merging, "TREE_SHARE", 0)
    assert in_rounds == pytest.approx(merge(clip, count).lost, rel=0.03)


def test_each_merge_is_of_stretches_that_are_there_and_touch():
    clip = walk(16, 3, 4).bfloat16()
    order = feed(clip).merge_all(0.0)
    there, boxes = set(range(192)), order.boxes.tolist()
    for index, (a, b) in enumerate(order.pairs.tolist()):
        there -= {a, b}
        there.add(192 + index)
        assert len(there) == 191 - index
        low = [min(x, y) for x, y in zip(boxes[a][::2], boxes[b][::2], strict=True)]
        high = [max(x, y) for x, y in zip(boxes[a][1::2], boxes[b][1::2], strict=True)]
        assert [*low, *high] == [*boxes[192 + index][::2], *boxes[192 + index][1::2]]
        sides = [[stop - start for start, stop in zip(boxes[i][::2], boxes[i][1::2], strict=True)] for i in (a, b)]
        assert sum(x != y for x, y in zip(*sides, strict=True)) <= 1
    assert there == {2 * 192 - 2}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_equal_merges_for_nothing_before_anything_is_lost(seed):
    """A few bright cells on black: their order among equals must not keep black from merging along time."""
    torch.manual_seed(seed)
    clip, is_bright = torch.zeros(40, 6, 6, D), torch.rand(40, 6, 6) < 0.03
    clip[is_bright] = torch.randn(int(is_bright.sum()), D)
    runs = int((is_bright[1:] | is_bright[:-1]).sum()) + 36  # of each cell, along time alone
    assert merge(clip, runs).lost == 0


def test_a_line_of_equal_latents_takes_few_rounds(monkeypatch):
    rounds, choose = [], Merger._choose
    monkeypatch.setattr(Merger, "_choose", lambda *args: rounds.append(1) or choose(*args))
    merge(walk(1, 3, 4).repeat(200, 1, 1, 1), 12)
    assert len(rounds) < 40


def test_a_clip_that_stands_still_loses_nothing_at_one_token_a_cell():
    clip = walk(1, 3, 4).repeat(20, 1, 1, 1)
    merged = merge(clip, 12)
    assert merged.lost == 0 and torch.equal(rebuild(merged, clip), clip)
    assert set(merged.boxes[:, 1].tolist()) == {20}


def test_frames_without_detail_merge_in_space_first():
    clip = torch.randn(6, 1, 1, D).repeat(1, 4, 4, 1)
    merger = merge(clip, 6)
    assert merger.lost == 0 and torch.equal(rebuild(merger, clip), clip)


@pytest.mark.parametrize("how", [merge, merge_in_place])
def test_no_stretch_crosses_a_cut_while_each_shot_has_merges_left(how):
    clip = walk(1, 2, 2).repeat(12, 1, 1, 1)  # along time nothing changes, so merging over the cut would be free
    shots = [0] * 5 + [1] * 7
    assert set(how(clip, 2, shots=shots).boxes[:, :2].flatten().tolist()) == {0, 5, 12}
    assert len(how(clip, 1, shots=shots)) == 1


def test_only_the_main_channels_decide_and_all_are_averaged():
    clip = walk(10, 2, 2, channels=3 * D)
    loud = clip.clone()
    loud[..., D:] *= 100
    quiet, merger = merge(clip[..., :D].contiguous(), 7), merge(loud, 7)
    assert torch.equal(quiet.boxes, merger.boxes) and quiet.lost == merger.lost
    order = merger.boxes[:, 0]
    for value, (t0, t1, h0, h1, w0, w1) in zip(merger.values, merger.boxes.tolist(), strict=True):
        assert torch.allclose(value, loud[t0:t1, h0:h1, w0:w1].mean((0, 1, 2)), rtol=1e-3, atol=1e-2)
    assert order.numel() == 7


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 6), (13, 24)])
def test_the_tree_halves_the_grid_down_to_cells(grid):
    tree = split_grid(*grid)
    h0, h1, w0, w1 = tree.rectangles.unbind(1)
    sizes = (h1 - h0) * (w1 - w0)
    assert sizes[0] == grid[0] * grid[1] and (sizes[tree.leaves] == 1).all()
    assert (h0[tree.leaves] * grid[1] + w0[tree.leaves]).tolist() == list(range(grid[0] * grid[1]))
    inner = (sizes > 1).nonzero().squeeze(1)
    for node in inner.tolist():
        children = (tree.parent == node).nonzero().squeeze(1)
        assert children.numel() == 2 and sizes[children].sum() == sizes[node]
        assert tree.sibling[children].tolist() == children.flip(0).tolist()


@pytest.mark.parametrize("size", [1e25, torch.inf, torch.nan])
@pytest.mark.filterwarnings("error")
def test_what_overflows_merges_without_a_word(size):
    """Whoever takes the result refuses it by name."""
    merged = merge(walk(6, 2, 2) * size, 3, distance=size)
    assert len(merged) == 3


def test_what_is_equal_merges_for_nothing_beside_what_overflows():
    """Squares of what is finite may not be."""
    clip = walk(24, 1, 1)
    clip[4:20] = clip[4]
    clip[0] *= 3e19
    assert [4, 20] in merge(clip, 9, distance=torch.inf).boxes[:, :2].tolist()


def test_means_are_weighted_and_keep_the_dtype():
    x, y = torch.tensor([[1.0, 3.0]]).bfloat16(), torch.tensor([[5.0, 3.0]]).bfloat16()
    mean = merge_means(x, y, torch.tensor([[1 / 4]]))
    assert mean.tolist() == [[2.0, 3.0]] and mean.dtype == torch.bfloat16
