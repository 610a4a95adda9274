"""Merging peers: what each keeps follows from its definition, and all keep exactly the budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from freres_cli.baselines.clustering import cut_by_similarity, find_clusters, find_peaks
from freres_cli.baselines.holitom import find_windows
from freres_cli.baselines.prunevid import cut_by_clusters, measure_likeness
from freres_cli.baselines.quadtree import build_quadtree
from freres_cli.baselines.registry import METHODS
from freres_cli.baselines.shares import share_budget
from freres_cli.baselines.still import release_cells
from tests.test_baselines import some_latents
from tests.test_change_baselines import drifting_clip, kept_indices

NAMES = ["framefusion", "sttm", "prunevid", "flashvid-div", "aot-norm", "todre"]
NAMES += ["fastvid-norm", "visionzip-norm", "holitom-norm", "prumerge-norm"]
# Those whose tokens stay at cells of the grid.
AT_CELLS = ["framefusion", "flashvid-div", "todre", "fastvid-norm", "visionzip-norm", "prumerge-norm"]


def compress(name, latents, budget, width=None):
    seconds = torch.arange(latents.shape[0], dtype=torch.float64) / 5
    return METHODS[name].compress(latents, seconds, budget, width or latents.shape[-1])


def unit(tokens):
    return torch.nn.functional.normalize(tokens.double(), dim=-1)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 2, 3), (9, 1, 1), (1, 3, 4)])
@pytest.mark.parametrize("kind", ["random", "drift", "still", "zero"])
def test_every_budget_is_met_in_raster_order(name, grid, kind):
    latents, _ = some_latents(grid, 6)
    if kind == "drift":
        latents = latents.cumsum(0) + 3
    elif kind != "random":
        latents = latents[:1].repeat(grid[0], 1, 1, 1) * (kind == "still")
    full = math.prod(grid)
    # All budgets of random clips, and every third of the others: some methods take 0.1 s for each.
    for budget in sorted({*range(1, full + 2, 1 if kind == "random" else 3), full, full + 1}):
        tokens = compress(name, latents, budget, 3)
        places = tokens.positions.tolist()
        assert len(tokens) == min(budget, full) and places == sorted(places) and tokens.grid == grid
        assert bool(tokens.latents.isfinite().all())
        assert bool((tokens.positions >= 0).all() & (tokens.positions < torch.tensor(grid)).all())
        if name in AT_CELLS:
            assert kept_indices(tokens) == sorted(set(kept_indices(tokens)))
    assert torch.equal(tokens.latents, latents.flatten(0, 2))
    with pytest.raises(ValueError, match="at least 1"):
        compress(name, latents, 0)


def test_the_same_clip_gives_the_same_bits(name):
    latents, _ = drifting_clip()
    first, again = compress(name, latents, 41), compress(name, latents.clone(), 41)
    for field in fields(first):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_deep_rows_follow_the_main_channels(name):
    """DeepStack rows that copy the main channels come out as these do, and other rows change nothing that is kept."""
    latents, _ = drifting_clip()
    main = compress(name, latents, 41)
    twice = compress(name, torch.cat([latents, latents], -1), 41, 6)
    noise = compress(name, torch.cat([latents, torch.randn(latents.shape)], -1), 41, 6)
    assert torch.equal(twice.positions, main.positions) and torch.equal(noise.positions, main.positions)
    for tokens in (twice, noise):
        torch.testing.assert_close(tokens.latents[:, :6], main.latents)
    torch.testing.assert_close(twice.latents[:, 6:], twice.latents[:, :6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    latents = drifting_clip()[0].to(dtype)
    tokens, exact = compress(name, latents, 41), compress(name, latents.float(), 41)
    assert tokens.latents.dtype == dtype and torch.equal(tokens.positions, exact.positions)
    assert torch.equal(tokens.latents, exact.latents.to(dtype))


def test_a_clip_of_equal_tokens_gives_that_token(name):
    latents = some_latents((1, 1, 1), 6)[0].repeat(5, 2, 3, 1)
    for budget in (1, 6, 17):
        torch.testing.assert_close(compress(name, latents, budget).latents, latents.flatten(0, 2)[:budget])


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_shares_add_up_and_are_in_proportion():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        weights, rooms = (torch.randint(0, 9, (7,), generator=generator) for _ in range(2))
        for budget in range(int(rooms.sum()) + 3):
            shares = share_budget(budget, weights, rooms)
            assert int(shares.sum()) == min(budget, int(rooms.sum())) and bool((shares <= rooms).all())
        large = torch.full((7,), 10**6)
        if int(weights.sum()):
            exact = 1000 * weights / weights.sum()
            assert float((share_budget(1000, weights, large) - exact).abs().max()) <= 1


# --- DPC-kNN and segments ---------------------------------------------------------------------------------------------


def density_peaks(tokens, count, k):
    """DPC-kNN by its definition, in float64. Of equal densities the first is the denser one."""
    points = tokens.double().numpy()
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) / math.sqrt(points.shape[1])
    density = np.exp(-np.mean(np.sort(distance, axis=1)[:, :k] ** 2, axis=1))
    rank = np.argsort(np.argsort(-density, kind="stable"))
    gap = [min(row[rank < own], default=distance.max()) for row, own in zip(distance, rank, strict=True)]
    return sorted(np.argsort(-density * np.array(gap), kind="stable")[:count].tolist())


@pytest.mark.parametrize("chunk", [2**24, 40])
def test_cluster_centres_are_those_of_the_definition(monkeypatch, chunk):
    monkeypatch.setattr("freres_cli.baselines.clustering.CHUNK_VALUES", chunk)
    for seed, (size, k) in enumerate([(5, 3), (17, 4), (30, 7), (6, 9)]):
        tokens = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        for count in range(1, size + 1):
            centres, cluster = find_clusters(tokens, count, k)
            assert centres.tolist() == density_peaks(tokens, count, k)
            nearest = torch.cdist(tokens.double(), tokens[centres].double()).argmin(1)
            assert torch.equal(cluster, nearest)


@pytest.mark.parametrize("method", ["flashvid-div", "holitom-norm"])
def test_no_more_neighbours_are_asked_for_than_clusters(method, monkeypatch):
    """As in both originals: 7, or the number of clusters if that is less."""
    asked = set()

    def find(tokens, count, num_neighbours):
        asked.add((count, num_neighbours))
        return find_clusters(tokens, count, num_neighbours)

    module = METHODS[method].compress.__module__
    monkeypatch.setattr(f"{module}.find_clusters", find)
    latents = some_latents((4, 5, 6), 8)[0].repeat_interleave(4, 0)
    for budget in (20, 60, 300):
        compress(method, latents, budget)
    assert all(k == min(7, count) for count, k in asked)
    assert min(asked)[0] < 7 < max(asked)[0]


def test_densities_too_small_for_float32_still_rank():
    tokens = 15 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    for count in (1, 5, 12):
        assert find_peaks(tokens, count, 7).tolist() == density_peaks(tokens, count, 7)


def test_segments_are_cut_below_the_threshold_and_at_the_lowest_cosines():
    latents, _ = drifting_clip(12)
    means = unit(latents.mean((1, 2)))
    cosines = (means[1:] * means[:-1]).sum(1)
    for threshold, fewest in itertools.product((-1.0, 0.5, 0.9), (1, 3, 8)):
        cuts = {t + 1 for t in range(11) if cosines[t] < threshold} | {
            int(t) + 1 for t in cosines.argsort(stable=True)[: fewest - 1]
        }
        segments = cut_by_similarity(latents, 6, threshold, fewest)
        assert [first for first, _ in segments] == sorted(cuts | {0})
        assert [stop for _, stop in segments] == sorted(cuts | {12})
    long = cut_by_similarity(latents[:1].repeat(70, 1, 1, 1), 6, 0.9, 1)
    assert long[0][0] == 0 and long[-1][1] == 70 and all(stop - first <= 32 for first, stop in long)


# --- FrameFusion ------------------------------------------------------------------------------------------------------


def test_framefusion_on_a_still_clip_keeps_one_frame():
    latents = some_latents((1, 3, 4))[0].repeat(7, 1, 1, 1)
    tokens = compress("framefusion", latents, 12)
    torch.testing.assert_close(tokens.latents, latents[0].flatten(0, 1))
    assert bool((tokens.positions[:, 0] == 0).all()) and bool((tokens.boxes[:, :2] == torch.tensor([0, 7])).all())


@pytest.mark.parametrize("budget", [12, 13, 40, 100])
def test_framefusion_averages_runs_across_the_most_alike_neighbours(budget):
    latents, _ = drifting_clip()
    tokens = compress("framefusion", latents, budget)
    covered = torch.zeros(latents.shape[:3])
    for row, place, (t0, t1, h, _, w, _) in zip(
        tokens.latents, tokens.positions.tolist(), tokens.boxes.tolist(), strict=True
    ):
        torch.testing.assert_close(row, latents[t0:t1, h, w].mean(0))
        assert place == [t0, h, w]
        covered[t0:t1, h, w] += 1
    assert bool((covered == 1).all())
    cosines = (unit(latents)[1:] * unit(latents)[:-1]).sum(-1)
    is_start = torch.zeros(latents.shape[:3], dtype=torch.bool)
    is_start[tuple(tokens.positions.long().unbind(1))] = True
    if budget > 12:
        assert float(cosines[is_start[1:]].max()) <= float(cosines[~is_start[1:]].min())


# --- STTM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (1, 6)])
def test_quadtree_children_partition_their_node(size):
    tree = build_quadtree(*size)
    for node, (h0, h1, w0, w1) in enumerate(tree.boxes.tolist()):
        inside = [
            child for child, above in zip(tree.boxes.tolist(), tree.parent.tolist(), strict=True) if above == node
        ]
        cells = [(h, w) for a, b, c, d in inside for h in range(a, b) for w in range(c, d)]
        for a, b, c, d in inside:
            assert 2 * (b - a) <= h1 - h0 + 1 and 2 * (d - c) <= w1 - w0 + 1
        if (h1 - h0) * (w1 - w0) > 1:
            assert sorted(cells) == [(h, w) for h in range(h0, h1) for w in range(w0, w1)]
        else:
            assert inside == []


def test_sttm_keeps_a_frame_of_one_colour_as_its_root_and_splits_the_others():
    latents = some_latents((3, 4, 4))[0] * 5
    latents[1] = 1.0
    tokens = compress("sttm", latents, 33)
    middle = tokens.boxes[(tokens.boxes[:, 0] <= 1) & (tokens.boxes[:, 1] > 1)]
    assert middle.tolist() == [[1, 2, 0, 4, 0, 4]] and len(tokens) == 33


@pytest.mark.parametrize("budget", range(1, 37))
def test_sttm_leaves_of_one_frame_partition_it(budget):
    latents, _ = some_latents((1, 6, 6))
    tokens = compress("sttm", latents, budget)
    covered = torch.zeros(6, 6)
    for row, place, (_, _, h0, h1, w0, w1) in zip(
        tokens.latents, tokens.positions.tolist(), tokens.boxes.tolist(), strict=True
    ):
        torch.testing.assert_close(row, latents[0, h0:h1, w0:w1].mean((0, 1)))
        assert place == [0, (h0 + h1 - 1) / 2, (w0 + w1 - 1) / 2]
        covered[h0:h1, w0:w1] += 1
    assert bool((covered == 1).all())


def test_sttm_keeps_the_least_alike_pairs_apart():
    """One cell turns by a growing angle from frame to frame: the largest turns separate tokens."""
    angle = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.5])
    latents = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None]
    for budget in range(1, 6):
        starts = compress("sttm", latents, budget).boxes[:, 0].tolist()
        assert starts == [0, *range(6 - budget, 5)]


def test_sttm_joins_a_still_clip_over_time():
    latents = some_latents((1, 4, 4))[0].repeat(6, 1, 1, 1)
    tokens = compress("sttm", latents, 16)
    assert tokens.boxes[:, :2].tolist() == [[0, 6]] * 16
    torch.testing.assert_close(tokens.latents, latents[0].flatten(0, 1))


# --- PruneVid and HoliTom ---------------------------------------------------------------------------------------------


def test_likeness_is_the_mean_cosine_of_all_pairs():
    latents, _ = drifting_clip(5)
    units = unit(latents.flatten(1, 2))
    pairs = [(units[a] * units[b]).sum(-1) for a, b in itertools.combinations(range(5), 2)]
    torch.testing.assert_close(measure_likeness(latents, 6).double(), torch.stack(pairs).mean(0), atol=1e-5, rtol=0)
    assert bool(measure_likeness(latents[:1], 6).isneginf().all())


def test_prunevid_segments_are_runs_of_like_frames():
    scenes = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    segments = cut_by_clusters(scenes.repeat_interleave(torch.tensor([9, 8, 11]), 0))
    assert {9, 17} <= {first for first, _ in segments}
    for frames in range(1, 20):
        segments = cut_by_clusters(torch.randn(frames, 4, generator=torch.Generator().manual_seed(frames)))
        assert [t for first, stop in segments for t in range(first, stop)] == list(range(frames))
        assert len(segments) <= max(1, frames // 4)


def test_prunevid_averages_still_cells_over_their_segment():
    latents, _ = some_latents((4, 3, 3), 8)
    latents[:, :2] = latents[0, :2]
    still = compress("prunevid", latents, 6 + 4 * 3)
    assert still.positions[:, 0].tolist().count(1.5) == 6
    at_middle = still.positions[:, 0] == 1.5
    torch.testing.assert_close(still.latents[at_middle], latents[0, :2].flatten(0, 1))
    assert still.boxes[at_middle, :2].tolist() == [[0, 4]] * 6


def test_as_few_cells_are_released_as_the_budget_needs():
    windows = [(0, 3), (3, 4), (4, 9)]
    is_still = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    likeness = torch.tensor([[0.9, 0.7, 0.0], [0.0, 0.0, 0.0], [0.8, 0.0, 0.95]])
    for fewest in range(1, 28):
        kept = release_cells(is_still, likeness, windows, fewest)
        left = 27 - int((kept.sum(1) * torch.tensor([2, 0, 4])).sum())
        released = likeness[is_still & ~kept]
        assert left >= fewest and not bool((kept & ~is_still).any())
        assert (fewest <= 27 - 12) == (len(released) == 0)
        if len(released):
            assert float(released.max()) < float(likeness[kept].min() if bool(kept.any()) else 1)
            # Without the last of them there would be too few.
            window = int((likeness == released.max()).any(1).nonzero())
            assert left - (windows[window][1] - windows[window][0] - 1) < fewest


def saved_by(pairs, cuts):
    windows = list(zip([0, *cuts], [*cuts, pairs.shape[0] + 1], strict=True))
    return sum(int(pairs[first : stop - 1].all(0).sum()) * (stop - first - 1) for first, stop in windows)


@pytest.mark.parametrize("frames", range(1, 9))
def test_holitom_windows_save_as_much_as_any(frames):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.rand(frames - 1, 6, generator=generator) < 0.4 + 0.02 * seed
        windows = find_windows(pairs)
        assert [t for first, stop in windows for t in range(first, stop)] == list(range(frames))
        every = [cuts for n in range(frames) for cuts in itertools.combinations(range(1, frames), n)]
        assert saved_by(pairs, [first for first, _ in windows[1:]]) == max(saved_by(pairs, cuts) for cuts in every)


def test_holitom_keeps_still_cells_once_and_moving_tokens_of_largest_norm():
    latents, _ = some_latents((4, 3, 3), 8)
    latents[:, :2] = latents[0, :2]
    tokens = compress("holitom-norm", latents, 6 + 4 * 3)
    lengths = tokens.boxes[:, 1] - tokens.boxes[:, 0]
    assert lengths.tolist().count(4) == 6 and lengths.tolist().count(1) == 12
    fewer = compress("holitom-norm", latents, 12)
    moving = fewer.boxes[(fewer.boxes[:, 1] - fewer.boxes[:, 0]) == 1]
    norms = latents[:, 2].norm(dim=-1)
    for frame in range(4):
        kept = moving[moving[:, 0] == frame][:, 4]
        assert len(kept) == 2 and sorted(kept.tolist()) == sorted(norms[frame].argsort(descending=True)[:2].tolist())
