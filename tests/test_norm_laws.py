"""VisionZip, PruMerge, FastVID and AOT: whole results against a plain program for each definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from freres_cli.baselines.aot import find_plan, lay_out, pick_anchors
from freres_cli.baselines.prumerge import count_outliers
from freres_cli.baselines.shares import share_budget
from tests.test_change_baselines import kept_indices
from tests.test_merge_peers import compress, density_peaks, unit

D = 6


def random_clip(grid, seed=0, channels=2 * D):
    """Latents of one more size of norm than the next; the last channels are deep rows, which decide nothing."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(*grid, channels, generator=generator)
    return latents * (0.3 + 2 * torch.rand(*grid, 1, generator=generator))


def split(budget, weights, rooms):
    return share_budget(budget, torch.tensor(weights), torch.tensor(rooms)).tolist()


def by_norm(tokens, among=None):
    """Indices of tokens (N, C) by their norm over the first D channels, the largest first."""
    norms = tokens[:, :D].double().norm(dim=1).tolist()
    return sorted(range(len(tokens)) if among is None else among, key=lambda i: -norms[i])


def check(tokens, expected):
    """``expected``: raster index -> row of the tokens."""
    assert kept_indices(tokens) == sorted(expected)
    rows = torch.stack([expected[i].double() for i in sorted(expected)])
    torch.testing.assert_close(tokens.latents.double(), rows, atol=1e-4, rtol=1e-4)


# --- VisionZip --------------------------------------------------------------------------------------------------------


def zip_by_definition(tokens, count):
    num_context = round(count * 10 / 64)
    dominant = by_norm(tokens)[: count - num_context]
    rest = [i for i in range(len(tokens)) if i not in dominant]
    targets = [rest[k * (len(rest) // num_context)] for k in range(num_context)]
    found, joined = {i: tokens[i] for i in dominant}, {i: [] for i in targets}
    units = unit(tokens[:, :D])
    for i in rest:
        if targets and i not in targets:
            joined[max(targets, key=lambda j: float(units[i] @ units[j]))].append(i)
    return found | {i: (tokens[i] + tokens[own].mean(0)) / 2 if own else tokens[i] for i, own in joined.items()}


@pytest.mark.parametrize("budget", [4, 12, 36, 47, 60, 90, 107])
def test_visionzip_is_its_definition(budget):
    latents = random_clip((3, 5, 8))
    expected = {}
    for frame, count in enumerate(split(budget, [1] * 3, [40] * 3)):
        found = zip_by_definition(latents[frame].flatten(0, 1), count)
        expected |= {40 * frame + i: row for i, row in found.items()}
    check(compress("visionzip-norm", latents, budget, D), expected)


# --- PruMerge ---------------------------------------------------------------------------------------------------------


def prune_and_merge_by_definition(tokens, count, size):
    """Raster index -> row for one frame."""
    num_tokens = len(tokens)
    if count == num_tokens:
        return dict(enumerate(tokens))
    order = by_norm(tokens)
    num_outliers = math.ceil((count - 1) / 4) if count > 1 else 1
    kept = order[:num_outliers]
    rest, others = sorted(order[num_outliers:]), count - 1 - num_outliers
    kept += [rest[int((i + 0.5) * len(rest) / others)] for i in range(others)]
    norms, units = tokens[:, :D].double().norm(dim=1), unit(tokens[:, :D])
    weights = norms / norms.sum()
    found = {}
    for i in kept:
        near = sorted((j for j in range(num_tokens) if j != i), key=lambda j: -float(units[i] @ units[j]))
        near = near[: max(1, round(num_tokens * 32 / 576))]
        found[i] = (tokens[i] + weights[near] @ tokens[near].double()) / (1 + weights[near].sum())
    if count > 1:
        dropped = [i for i in range(num_tokens) if i not in kept]
        places = np.array([divmod(i, size[1]) for i in dropped])
        middle = dropped[int(((places - places.mean(0)) ** 2).sum(1).argmin())]
        found[middle] = weights[dropped] @ tokens[dropped].double() / weights[dropped].sum()
    return found


@pytest.mark.parametrize(("size", "budget"), [((6, 9), 2), ((6, 9), 30), ((6, 9), 77), ((6, 9), 140), ((2, 3), 13)])
def test_prumerge_is_its_definition(size, budget):
    num_cells = size[0] * size[1]
    latents = random_clip((3, *size), seed=3)
    latents[1, 0, 1] *= 9
    latents[2, 1, :2] *= 9
    weights = []
    for tokens in latents.flatten(1, 2):
        low, high = np.quantile(tokens[:, :D].norm(dim=1).numpy(), [0.25, 0.75])
        weights.append(1 + 4 * int((tokens[:, :D].norm(dim=1) > high + 1.5 * (high - low)).sum()))
    expected = {}
    for frame, count in enumerate(split(budget, weights, [num_cells] * 3)):
        if count:
            found = prune_and_merge_by_definition(latents[frame].flatten(0, 1), count, size)
            expected |= {num_cells * frame + i: row for i, row in found.items()}
    check(compress("prumerge-norm", latents, budget, D), expected)


def test_an_outlier_of_prumerge_is_beyond_one_and_a_half_of_the_distance():
    """Quartiles of 0 to 8 are 2 and 6: the limit is 12 itself, exclusive."""
    norms = torch.arange(9.0).repeat(3, 1)
    norms[:, 8] = torch.tensor([11.9, 12.0, 12.1])
    assert count_outliers(norms).tolist() == [0, 0, 1]


def test_the_remainder_of_prumerge_holds_only_what_was_dropped():
    """Where all that is dropped is zero over the main channels, it counts alike."""
    latents = torch.zeros(1, 2, 4, 2 * D)
    latents[0, 1, 2, 0] = 5.0
    latents[..., D] = torch.arange(8.0).reshape(2, 4)
    tokens = compress("prumerge-norm", latents, 2, D)
    (remainder,) = [row for row, place in zip(tokens.latents, kept_indices(tokens), strict=True) if place != 6]
    assert remainder.tolist() == pytest.approx([0.0] * D + [22 / 7] + [0.0] * (D - 1))


# --- FastVID ----------------------------------------------------------------------------------------------------------


def scenes(lengths, size=(3, 4), channels=32, seed=0, motion=0.4):
    """Scenes with a mean in common and a picture each. ``motion``: how much, of all cells or of each, (H, W, 1)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(len(lengths), 1, 1, channels, generator=generator)
    cells = torch.randn(len(lengths), *size, channels, generator=generator)
    frames = (1 + 0.8 * pictures + cells).repeat_interleave(torch.tensor(lengths), 0)
    return frames + motion * torch.randn(frames.shape, generator=generator)


def segments_by_definition(latents):
    """Cut where the cosine of mean tokens is below 0.9, and at the 7 lowest."""
    means = unit(latents.mean((1, 2)))
    cosines = (means[1:] * means[:-1]).sum(1).tolist()
    cuts = {t + 1 for t, cosine in enumerate(cosines) if cosine < 0.9}
    cuts |= {t + 1 for t in sorted(range(len(cosines)), key=lambda t: cosines[t])[:7]}
    starts = sorted(cuts | {0})
    return list(zip(starts, [*starts[1:], len(latents)], strict=True))


def box_of(cells, own, size):
    """Around the cells (t, h, w) of a group if it fills that, else its own, and the time of all."""
    low, high = np.min(cells, 0), np.max(cells, 0) + 1
    if math.prod(high - low) == len(cells):
        return [int(edge) for pair in zip(low, high, strict=True) for edge in pair]
    return [int(low[0]), int(high[0]), own[1], own[1] + 1, own[2], own[2] + 1]


def places_of(index, size):
    return [(i // (size[0] * size[1]), i // size[1] % size[0], i % size[1]) for i in index]


def prune_segment_by_definition(tokens, count):
    """``tokens``: (L, N, C). (frame, cell) of each token -> those that joined it."""
    length, num_cells = tokens.shape[:2]
    anchors = list(range(0, length, 4))
    num_context = min(round(0.4 * count), len(anchors) * num_cells)
    context = []
    for frame, share in zip(anchors, split(num_context, [1] * len(anchors), [num_cells] * len(anchors)), strict=True):
        context += [(frame, cell) for cell in density_peaks(tokens[frame], share, 4)] if share else []
    room = [num_cells - sum(frame == t for frame, _ in context) for t in range(length)]
    groups = {place: [] for place in context}
    for frame, share in enumerate(split(count - num_context, [1] * length, room)):
        free = [cell for cell in range(num_cells) if (frame, cell) not in context]
        norms = tokens[frame].double().norm(dim=1).tolist()
        groups |= {(frame, cell): [] for cell in sorted(free, key=lambda i: -norms[i])[:share]}
    units = unit(tokens)
    for place in np.ndindex(length, num_cells):
        if context and place not in groups:
            groups[max(context, key=lambda other: float(units[place] @ units[other]))].append(place)
    return groups


@pytest.mark.parametrize(
    ("lengths", "budget"),
    [([9, 6, *[1] * 9, 2], 60), ([9, 6, *[1] * 9, 2], 160), ([7, 9], 97), ([7, 9], 9), ([16], 44)],
)
def test_fastvid_is_its_definition(lengths, budget):
    latents = scenes(lengths)
    flat = latents.flatten(1, 2)
    segments = segments_by_definition(latents)
    sizes = [12 * (stop - first) for first, stop in segments]
    expected, boxes = {}, {}
    for (first, stop), count in zip(segments, split(budget, sizes, sizes), strict=True):
        groups = prune_segment_by_definition(flat[first:stop], count) if count else {}
        for (frame, cell), joined in groups.items():
            index, own = (first + frame) * 12 + cell, flat[first + frame, cell]
            members = [(first + t) * 12 + i for t, i in joined]
            share = max(1 / (len(joined) + 1), 0.6)
            others = latents.flatten(0, 2)[members].mean(0) if members else own
            expected[index] = share * own + (1 - share) * others
            cells = places_of([index, *members], (3, 4))
            boxes[index] = box_of(cells, cells[0], (3, 4))
    tokens = compress("fastvid-norm", latents, budget)
    check(tokens, expected)
    assert tokens.boxes.tolist() == [boxes[index] for index in sorted(boxes)]


# --- AOT --------------------------------------------------------------------------------------------------------------


def layout_by_definition(num_frames, per_frame, budget):
    """Clips, anchors of a frame, whether merged anchors are kept, and what is left."""
    share = budget / (num_frames * per_frame)
    of_paper = np.interp(share, [0.10, 0.15, 0.20, 0.25], [126, 144, 196, 205]) / 729
    wanted, larger = max(1, round(float(of_paper) * per_frame)), math.ceil(budget / num_frames)
    for count in range(min(8, num_frames), 0, -1):
        clips = [(i * num_frames // count, (i + 1) * num_frames // count) for i in range(count)]
        num_merged = sum(stop - first > 1 for first, stop in clips)
        most = wanted * (num_frames + num_merged)
        if most <= budget and larger * count <= budget:
            return clips, larger, False, budget - larger * count
        if wanted * (count + num_merged) <= budget <= most:
            return clips, wanted, True, budget - wanted * (count + num_merged)
    if num_frames == 1 or budget == 1:
        return [(0, num_frames)], budget, False, 0
    return [(0, num_frames)], budget // 2, True, budget % 2


@pytest.mark.parametrize(("num_frames", "per_frame"), [(20, 20), (5, 20), (1, 9), (9, 2)])
def test_aot_spends_a_budget_by_its_definition(num_frames, per_frame):
    for budget in range(1, num_frames * per_frame):
        layout = lay_out(num_frames, per_frame, budget)
        found = (layout.clips, layout.num_anchors, layout.has_merged, layout.num_distinct)
        assert found == layout_by_definition(num_frames, per_frame, budget), budget


def anchors_by_definition(tokens, size, count):
    height, width = size
    kept = by_norm(tokens)[: math.ceil(count / 2)]
    windows = [[] for _ in range(9)]
    for i in range(len(tokens)):
        windows[i // width * 3 // height * 3 + i % width * 3 // width].append(i)
    free = [[i for i in window if i not in kept] for window in windows]
    for left, share in zip(free, split(count // 2, list(map(len, windows)), list(map(len, free))), strict=True):
        kept += by_norm(tokens, left)[:share]
    return sorted(kept)


@pytest.mark.parametrize("size", [(4, 7), (7, 4), (2, 9), (1, 1)])
def test_aot_picks_anchors_by_its_definition(size):
    tokens = random_clip((1, *size), channels=D)[0].flatten(0, 1)
    for count in range(1, len(tokens) + 1):
        assert pick_anchors(tokens.norm(dim=1), size[1], count).tolist() == anchors_by_definition(tokens, size, count)


def plan_by_definition(sources, targets):
    """A hundred rounds of Sinkhorn's algorithm, in float64."""
    kernel = ((unit(sources) @ unit(targets).T - 1) / 0.1).exp().numpy()
    scale = np.ones(len(sources))
    for _ in range(100):
        target_scale = 1 / len(targets) / (kernel.T @ scale)
        scale = 1 / len(sources) / (kernel @ target_scale)
    return torch.from_numpy(scale[:, None] * kernel * target_scale)


def test_the_plan_of_aot_is_that_of_a_hundred_rounds():
    """Ten and eleven tokens, one way and the other: the rounds come slowly to the plan."""
    generator = torch.Generator().manual_seed(0)
    ways = [torch.tensor([1.0, 0.2, 0.0]), torch.tensor([-1.0, 0.2, 0.0])]
    sources, targets = (
        torch.cat([ways[0].expand(n, 3), ways[1].expand(21 - n, 3)]) + 0.1 * torch.randn(21, 3, generator=generator)
        for n in (10, 11)
    )
    for one, other in ((sources, targets), (sources, targets[:4]), (sources[9:12], targets)):
        torch.testing.assert_close(find_plan(one, other).double(), plan_by_definition(one, other), atol=1e-6, rtol=1e-3)


def take_in(anchors, others, shares):
    return (anchors + shares.T @ others) / (1 + shares.sum(0))[:, None]


def frame_by_definition(tokens, size, count):
    """The cells of the anchors of a frame, and these after they took in its other tokens."""
    cells = anchors_by_definition(tokens, size, count)
    others = [i for i in range(len(tokens)) if i not in cells]
    anchors = tokens[cells].double()
    if not others:
        return cells, anchors
    return cells, take_in(anchors, tokens[others].double(), plan_by_definition(tokens[others, :D], anchors[:, :D]))


def shares_by_definition(sources, targets):
    plan = plan_by_definition(sources[:, :D], targets[:, :D])
    return plan / plan.sum(1, keepdim=True)


@pytest.mark.parametrize("budget", [1, 3, 40, 64, 87, 250, 399])
def test_aot_is_its_definition(budget):
    """20 frames that drift, of 4 x 5 tokens."""
    latents = (random_clip((20, 4, 5)).cumsum(0) + 3 * random_clip((1, 4, 5), seed=1)).flatten(1, 2)
    clips, num_anchors, has_merged, num_distinct = layout_by_definition(20, 20, budget)
    frames = [frame_by_definition(tokens, (4, 5), num_anchors) for tokens in latents]
    match = {}
    for first, stop in clips:
        for frame in range(first + 1, stop):
            best = shares_by_definition(frames[frame][1], frames[first][1]).max(1).values.tolist()
            match |= {(frame, rank): value for rank, value in enumerate(best)}
    distinct = sorted(match, key=match.get)[:num_distinct]
    expected = []
    for first, stop in clips:
        cells, merged = frames[first]
        expected += [(first, (first, first + 1), cell, row) for cell, row in zip(cells, merged, strict=True)]
        for frame in range(first + 1, stop):
            own, rows = frames[frame]
            keep = [rank for rank in range(num_anchors) if (frame, rank) in distinct]
            expected += [(frame, (frame, frame + 1), own[rank], rows[rank]) for rank in keep]
            gone = [rank for rank in range(num_anchors) if rank not in keep]
            if gone:
                merged = take_in(merged, rows[gone], shares_by_definition(rows, merged)[gone])
        if has_merged and stop - first > 1:
            # In the middle of the frames that they took in.
            expected += [((first + stop) / 2, (first + 1, stop), i, row) for i, row in zip(cells, merged, strict=True)]
    expected.sort(key=lambda part: (part[0], part[2]))
    tokens = compress("aot-norm", latents.unflatten(1, (4, 5)), budget, D)
    assert tokens.positions.tolist() == [[time, cell // 5, cell % 5] for time, _, cell, _ in expected]
    assert tokens.boxes[:, :2].tolist() == [list(span) for _, span, _, _ in expected]
    rows = torch.stack([row for *_, row in expected])
    torch.testing.assert_close(tokens.latents.double(), rows, atol=1e-3, rtol=1e-3)
