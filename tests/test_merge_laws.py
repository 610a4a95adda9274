"""PruneVid, HoliTom, FlashVID and STTM: whole results against a plain program for each definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from freres_cli.baselines.holitom import find_windows
from freres_cli.baselines.prunevid import cut_by_clusters
from tests.test_merge_peers import compress, density_peaks, saved_by, unit
from tests.test_norm_laws import box_of, places_of, scenes, segments_by_definition, split


def moving_scenes(lengths, size, seed=0, motion=1.6):
    """Scenes whose cells move more and more in raster order."""
    return scenes(lengths, size, seed=seed, motion=torch.linspace(0.2, motion, size[0] * size[1]).reshape(*size, 1))


def clusters_by_definition(tokens, count, k):
    """The members of each cluster, by its centre; a centre comes first.

    With two neighbours, itself one, the two nearest tokens are equally dense, and rounding decides: no test asks for that.
    """
    assert k != 2 or len(tokens) == 2
    centres = density_peaks(tokens, count, k)
    distance = torch.cdist(tokens.double(), tokens[centres].double())
    found = {centre: [centre] for centre in centres}
    for i, nearest in enumerate(distance.argmin(1).tolist()):
        if i not in found:
            found[centres[nearest]].append(i)
    return found


def release_by_definition(alike, likeness, windows, num_cells, budget):
    """Lists of still cells; the least alike are let go until the clip has as many tokens as asked for."""
    still = [set(cells) for cells in alike]
    saved = [stop - first - 1 for first, stop in windows]
    left = sum((stop - first) * num_cells for first, stop in windows) - sum(
        n * len(cells) for n, cells in zip(saved, still, strict=True)
    )
    every = [(float(likeness[w][cell]), w, cell) for w, cells in enumerate(still) for cell in cells]
    for _, w, cell in sorted(every):
        if left < budget:
            still[w].remove(cell)
            left += saved[w]
    return [sorted(cells) for cells in still]


def sets_by_definition(alike, likeness, windows, num_cells, budget):
    """(window, frame or None if still, cells, tokens) of each set, in order of time."""
    still = release_by_definition(alike, likeness, windows, num_cells, budget)
    sets = []
    for w, (first, stop) in enumerate(windows):
        sets.append((w, None, still[w]))
        sets += [(w, frame, [i for i in range(num_cells) if i not in still[w]]) for frame in range(first, stop)]
    keeps_still = any(len(now) < len(before) for now, before in zip(still, alike, strict=True))
    fixed = [len(cells) if keeps_still and frame is None else 0 for _, frame, cells in sets]
    rest = [len(cells) - n for (_, _, cells), n in zip(sets, fixed, strict=True)]
    shares = split(budget - sum(fixed), rest, rest)
    return [(*part, n + more) for part, n, more in zip(sets, fixed, shares, strict=True)]


def check_places(tokens, expected):
    """``expected``: (place, box, row) of each token."""
    expected.sort(key=lambda part: part[0])
    places = torch.tensor([place for place, _, _ in expected])
    torch.testing.assert_close(tokens.positions, places.to(torch.float32), atol=1e-5, rtol=0)
    assert tokens.boxes.tolist() == [list(box) for _, box, _ in expected]
    torch.testing.assert_close(tokens.latents, torch.stack([row for *_, row in expected]), atol=1e-4, rtol=1e-4)


# --- PruneVid ---------------------------------------------------------------------------------------------------------


def cut_by_definition(means):
    """A quarter as many clusters as frames; each is its longest run, the first of several, and the rest joins the longer
    neighbour, the earlier of equal ones."""
    found = clusters_by_definition(means, max(1, len(means) // 4), 7)
    label_of = {frame: centre for centre, frames in found.items() for frame in frames}
    longest = {}
    for label, group in itertools.groupby(range(len(means)), key=label_of.get):
        run = list(group)
        if len(run) > len(longest.get(label, [])):
            longest[label] = run
    runs = sorted(longest.values())
    firsts = [0]
    for run, later in itertools.pairwise(runs):
        firsts.append(run[-1] + 1 if len(later) > len(run) else later[0])
    return list(zip(firsts, [*firsts[1:], len(means)], strict=True))


@pytest.mark.parametrize("num_frames", [1, 3, 7, 12, 15, 21, 30])
def test_prunevid_segments_are_the_longest_runs_of_clusters(num_frames):
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(num_frames, 3, generator=generator) + torch.randn(
            -(-num_frames // 3), 3, generator=generator
        ).repeat_interleave(3, 0)[:num_frames] * (seed % 3)
        assert cut_by_clusters(means) == cut_by_definition(means), seed


@pytest.mark.parametrize("budget", [7, 60, 150, 165, 186, 198, 249])
def test_prunevid_is_its_definition(budget):
    size, num_cells = (3, 5), 15
    latents = moving_scenes([5, 4, 6, 3], size)
    flat = latents.flatten(1, 2)
    windows = cut_by_definition(latents.mean((1, 2)))
    likeness = []
    for first, stop in windows:
        units = unit(flat[first:stop])
        pairs = [(units[a] * units[b]).sum(-1) for a, b in itertools.combinations(range(stop - first), 2)]
        likeness.append(torch.stack(pairs).mean(0) if pairs else torch.full((num_cells,), -1.0))
    alike = [(row > 0.8).nonzero().squeeze(1).tolist() for row in likeness]
    assert all(alike) and any(((row > 0.7) & (row < 0.8)).any() for row in likeness)
    expected = []
    for w, frame, cells, count in sets_by_definition(alike, likeness, windows, num_cells, budget):
        frames = range(*windows[w]) if frame is None else [frame]
        tokens = flat[list(frames)][:, cells].mean(0)
        for members in clusters_by_definition(tokens, count, 7).values() if count else []:
            index = [t * num_cells + cells[i] for t in frames for i in members]
            places = places_of(index, size)
            middle = np.mean(places, 0).tolist()
            nearest = [int(np.floor(x + 0.5)) for x in middle]
            expected.append((middle, box_of(places, nearest, size), latents.flatten(0, 2)[index].mean(0)))
    check_places(compress("prunevid", latents, budget), expected)


# --- HoliTom ----------------------------------------------------------------------------------------------------------


def windows_by_definition(pairs):
    """Of all cuts, those that save most, and of these, from the last on, the longest windows."""
    frames = len(pairs) + 1
    every = [cuts for n in range(frames) for cuts in itertools.combinations(range(1, frames), n)]
    best = min(every, key=lambda cuts: (-saved_by(pairs, cuts), [*cuts[::-1], 0]))
    return list(zip([0, *best], [*best, frames], strict=True))


def test_of_windows_that_save_as_much_the_last_is_longest():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.rand(1 + seed % 6, 4, generator=generator) < 0.3 + 0.01 * seed
        assert find_windows(pairs) == windows_by_definition(pairs)


@pytest.mark.parametrize("budget", [9, 10, 11, 41, 51, 61, 67, 78, 90])
def test_holitom_is_its_definition(budget):
    """100 tokens, so that 10 are just a tenth; one window is a single frame."""
    size, num_cells = (2, 5), 10
    latents = moving_scenes([4, 1, 5], size, seed=4, motion=1.0)
    flat = latents.flatten(1, 2)
    cosines = (unit(flat)[1:] * unit(flat)[:-1]).sum(-1)
    pairs = cosines > (0.65 if budget <= 10 else 0.8)
    windows = windows_by_definition(pairs)
    alike, least = [], []
    for first, stop in windows:
        alike.append([i for i in range(num_cells) if stop - first > 1 and bool(pairs[first : stop - 1, i].all())])
        least.append(cosines[first : stop - 1].min(0).values if stop - first > 1 else torch.zeros(num_cells))
    expected = []
    for w, frame, cells, count in sets_by_definition(alike, least, windows, num_cells, budget):
        if frame is None:
            first, stop = windows[w]
            tokens = flat[first:stop, cells].mean(0)
            for centre, members in clusters_by_definition(tokens, count, min(7, count)).items() if count else []:
                row, h, w0 = tokens[centre], cells[centre] // 5, cells[centre] % 5
                if len(members) > 1:
                    row = 0.6 * row + 0.4 * tokens[members[1:]].mean(0)
                expected.append(([(first + stop - 1) / 2, h, w0], [first, stop, h, h + 1, w0, w0 + 1], row))
        else:
            norms = flat[frame].norm(dim=1).tolist()
            for i in sorted(cells, key=lambda i: -norms[i])[:count]:
                h, w0 = divmod(i, 5)
                expected.append(([frame, h, w0], [frame, frame + 1, h, h + 1, w0, w0 + 1], flat[frame, i]))
    check_places(compress("holitom-norm", latents, budget), expected)


# --- FlashVID ---------------------------------------------------------------------------------------------------------


def far_apart_by_definition(tokens, count):
    distance = 1 - unit(tokens) @ unit(tokens).T
    others = distance + torch.diag(torch.full((len(tokens),), torch.inf))
    picked = [int(others.min(1).values.argmax())] if count else []
    while len(picked) < count:
        free = [i for i in range(len(tokens)) if i not in picked]
        picked.append(max(free, key=lambda i: float(distance[i, picked].min())))
    return picked


def links_by_definition(flat, picked, firsts, fewest):
    """Token -> the one of the frame before that it is linked to; tokens are (frame, cell)."""
    num_frames, num_cells = flat.shape[:2]
    units = unit(flat)
    free = [[i for i in range(num_cells) if (t, i) not in picked] for t in range(num_frames)]
    links = []
    for t in range(1, num_frames):
        for i in free[t] if t not in firsts and free[t - 1] else []:
            cosine, before = max((float(units[t, i] @ units[t - 1, j]), j) for j in free[t - 1])
            if cosine > 0.8:
                links.append((cosine, (t, i), (t - 1, before)))
    num_kept = min(len(links), sum(map(len, free)) - fewest)
    return {token: before for _, token, before in sorted(links, reverse=True)[:num_kept]}


@pytest.mark.parametrize(
    ("lengths", "budget"),
    [([9, 6, *[1] * 9, 2], 150), ([9, 6, *[1] * 9, 2], 285), ([7, 9], 5), ([7, 9], 97), ([7, 9], 180)],
)
def test_flashvid_is_its_definition(lengths, budget):
    """The left half of the picture changes little from scene to scene, so that trees would go on without a cut."""
    size, num_cells = (3, 4), 12
    latents = moving_scenes(lengths, size, motion=0.8)
    latents[:, :, :2] = (latents[:, :, :2] + latents[0, :, :2]) / 2
    flat, num_frames = latents.flatten(1, 2), len(latents)
    num_picked = round(0.7 * budget)
    shares = split(num_picked, [1] * num_frames, [num_cells] * num_frames)
    picked = {(t, i) for t, share in enumerate(shares) for i in far_apart_by_definition(flat[t], share)}
    firsts = [first for first, _ in segments_by_definition(latents)]
    links = links_by_definition(flat, picked, firsts, budget - num_picked)
    root, trees = {}, {}
    for token in np.ndindex(num_frames, num_cells):
        if token not in picked:
            root[token] = root[links[token]] if token in links else token
            trees.setdefault(root[token], []).append(token)
    expected = [([t, i // 4, i % 4], [t, t + 1, i // 4, i // 4 + 1, i % 4, i % 4 + 1], flat[t, i]) for t, i in picked]
    counts = [sum(head[0] == t for head in trees) for t in range(num_frames)]
    for t, share in enumerate(split(budget - num_picked, counts, counts)):
        heads = [head for head in trees if head[0] == t]
        means = torch.stack([torch.stack([flat[token] for token in trees[head]]).mean(0) for head in heads or [(0, 0)]])
        for centre, members in clusters_by_definition(means, share, min(7, share)).items() if share else []:
            index = [frame * num_cells + i for member in members for frame, i in trees[heads[member]]]
            place = [t, heads[centre][1] // 4, heads[centre][1] % 4]
            box = box_of(places_of(index, size), place, size)
            expected.append((place, box, latents.flatten(0, 2)[index].mean(0)))
    check_places(compress("flashvid-div", latents, budget), expected)


# --- STTM -------------------------------------------------------------------------------------------------------------


def quarters(box):
    """Halves along each side longer than 1, the first the larger one."""
    sides = [[(a, (a + b + 1) // 2), ((a + b + 1) // 2, b)] if b - a > 1 else [(a, b)] for a, b in (box[:2], box[2:])]
    return [rows + columns for rows in sides[0] for columns in sides[1]] if len(sides[0] + sides[1]) > 2 else []


class PlainTrees:
    """The quadtrees of a clip; a node is (frame, (h0, h1, w0, w1))."""

    def __init__(self, latents):
        self.latents, (self.num_frames, height, width, _) = latents.double(), latents.shape
        boxes = [(0, height, 0, width)]
        for box in boxes:
            boxes += quarters(box)
        limits = {}
        for number, box in enumerate(boxes):
            above = next((other for other in boxes if box in quarters(other)), None)
            for t in range(self.num_frames) if quarters(box) else []:
                apart = max(self.apart((t, box), (t, part)) for part in quarters(box))
                limits[t, box] = (min(apart, limits[t, above][0]) if above else apart, -number, -t)
        self.order = sorted(limits, key=limits.get, reverse=True)
        self.limits = [limits[node][0] for node in self.order]
        self.root = boxes[0]

    def apart(self, node, other):
        means = [self.latents[t, h0:h1, w0:w1].mean((0, 1)) for t, (h0, h1, w0, w1) in (node, other)]
        return 1 - float(unit(means[0]) @ unit(means[1]))

    def nodes(self, num_splits):
        found = {(t, self.root) for t in range(self.num_frames)}
        for t, box in self.order[:num_splits]:
            found.remove((t, box))
            found |= {(t, part) for part in quarters(box)}
        return found

    def pairs(self, nodes, limit):
        """Pairs that are alike enough, the most alike first."""
        found = []
        for (t, a), (u, b) in itertools.product(nodes, nodes):
            larger, smaller = (a, b) if a[1] - a[0] + a[3] - a[2] >= b[1] - b[0] + b[3] - b[2] else (b, a)
            inside = larger[0] <= smaller[0] < larger[1] and larger[2] <= smaller[2] < larger[3]
            if u == t + 1 and inside and (apart := self.apart((t, a), (u, b))) <= limit:
                found.append((apart, (t, a), (u, b)))
        return [pair[1:] for pair in sorted(found)]


def join(nodes, pairs, most=None):
    """Sets of nodes after the first ``most`` pairs that change anything."""
    sets, done = {node: {node} for node in nodes}, 0
    for one, other in pairs:
        if done != most and sets[one] is not sets[other]:
            done += 1
            sets[one] |= sets[other]
            for node in sets[one]:
                sets[node] = sets[one]
    return list({id(group): group for group in sets.values()}.values())


def sttm_by_definition(latents, budget):
    """Sets of nodes that become one token each."""
    trees = PlainTrees(latents)
    counts = []
    for num_splits in range(len(trees.order) + 1):
        limit = trees.limits[num_splits - 1] + 0.2 if num_splits else np.inf
        counts.append(len(join(trees.nodes(num_splits), trees.pairs(trees.nodes(num_splits), limit))))
    fits = [count <= budget for count in counts]
    assert fits == sorted(fits, reverse=True), "one threshold has about as many tokens as asked for"
    num_splits = sum(fits) - 1
    nodes = trees.nodes(num_splits)
    if len(nodes) >= budget:
        return join(nodes, trees.pairs(nodes, np.inf), len(nodes) - budget)
    t, box = trees.order[num_splits]
    upper, _, lower, _ = quarters(box)
    sides = [(upper[0], upper[1], *box[2:]), (lower[0], lower[1], *box[2:])]
    parts = sides if budget - len(nodes) == 1 else [*quarters(box)[:2], sides[1]]
    return [{node} for node in (nodes - {(t, box)}) | {(t, part) for part in parts}]


@pytest.mark.parametrize(
    ("motion", "budget"), [(0.3, 6), (0.3, 17), (0.3, 33), (1.6, 9), (1.6, 30), (1.6, 58), (1.6, 59)]
)
def test_sttm_is_its_definition(motion, budget):
    latents = scenes([2, 2], (4, 5), motion=motion)
    expected = []
    for group in sttm_by_definition(latents, budget):
        (t, (h0, h1, w0, w1)) = min(group, key=lambda node: (node[0], node[1][0], node[1][2]))
        cells = [(u, h, w) for u, (a, b, c, d) in group for h in range(a, b) for w in range(c, d)]
        hull = zip(np.min(cells, 0).tolist(), (np.max(cells, 0) + 1).tolist(), strict=True)
        row = torch.stack([latents[cell] for cell in cells]).mean(0)
        expected.append(([t, (h0 + h1 - 1) / 2, (w0 + w1 - 1) / 2], [edge for pair in hull for edge in pair], row))
    check_places(compress("sttm", latents, budget), expected)
