"""Peers that pick by norm or by distance: what each keeps follows from its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freres_cli.baselines.aot import absorb, find_plan, lay_out, pick_anchors, share_out
from freres_cli.baselines.clustering import cut_by_similarity
from freres_cli.baselines.fastvid import keep_own_share
from freres_cli.baselines.flashvid import find_trees, pick_far_apart
from freres_cli.baselines.prumerge import count_outliers, merge_frame
from freres_cli.baselines.todre import pick_diverse
from tests.test_baselines import some_latents
from tests.test_change_baselines import kept_indices
from tests.test_merge_peers import compress, unit

# --- FlashVID, FastVID, ToDRE -----------------------------------------------------------------------------------------


def test_flashvid_picks_are_far_apart_by_greedy_search():
    units = unit(torch.randn(11, 5, generator=torch.Generator().manual_seed(0))).float()
    distance = (1 - units.double() @ units.double().T).numpy()
    others = [min(distance[i, j] for j in range(11) if j != i) for i in range(11)]
    expected = [int(np.argmax(others))]
    while len(expected) < 11:
        free = [i for i in range(11) if i not in expected]
        expected.append(max(free, key=lambda i: min(distance[i, j] for j in expected)))
    for count in range(1, 12):
        assert pick_far_apart(units, count).tolist() == expected[:count]


def test_flashvid_follows_what_moves():
    """Each frame is the one before moved by a cell: every tree runs along the motion, and breaks at a new segment."""
    row = torch.eye(8)
    latents = torch.stack([row.roll(t, 0) for t in range(6)])[:, None]
    is_picked = torch.zeros(6, 8, dtype=torch.bool)
    roots = find_trees(latents, is_picked, [0, 3], 0, 8).reshape(6, 8)
    cells = torch.arange(8)
    for frame in range(6):
        start = 0 if frame < 3 else 3
        assert torch.equal(roots[frame], start * 8 + (cells - (frame - start)) % 8)
    is_picked[1, 2] = True
    assert int(find_trees(latents, is_picked, [0, 3], 0, 8)[10]) == -1
    undone = find_trees(latents, ~torch.ones_like(is_picked), [0, 3], 21, 8)
    assert len(undone.unique()) == 21


def test_flashvid_picks_repeats_last_in_order():
    """Equal tokens are 0 apart, so none is picked twice before all others are, and then the first in order."""
    generator = torch.Generator().manual_seed(4)
    which = torch.cat([torch.arange(9), torch.randint(9, (191,), generator=generator)])
    units = unit(torch.randn(9, 64, generator=generator)).float()[which]
    picked = pick_far_apart(units, 60).tolist()
    assert picked[0] == 0 and sorted(which[picked[:9]].tolist()) == list(range(9))
    left = [index for index in range(200) if index not in picked[:9]]
    assert picked[9:] == left[:51]


def test_flashvid_merges_trees_of_a_frame_only():
    """Frames of one segment whose tokens are not like any of the frame before: each is a tree of its own. Deep rows say of
    which frame a token is."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(12, 6, 6, 64, generator=generator) + torch.randn(64, generator=generator)
    frame = torch.nn.functional.one_hot(torch.arange(12), 64).float()[:, None, None].expand(12, 6, 6, 64)
    assert max(stop - first for first, stop in cut_by_similarity(latents, 64, 0.9, 8)) > 1
    for budget in (60, 100, 144, 300):
        tokens = compress("flashvid-div", torch.cat([latents, frame], -1), budget, 64)
        of_frame = tokens.latents[:, 64:]
        assert torch.equal(of_frame, of_frame.round()) and torch.equal(
            of_frame.argmax(1), tokens.positions[:, 0].long()
        )
        # Frames have like numbers of trees, so of the rest as of the picked each gets its even share.
        counts = torch.bincount(tokens.positions[:, 0].long(), minlength=12)
        assert int(counts.max() - counts.min()) <= 2


def test_flashvid_keeps_seventy_percent_as_encoded():
    latents, _ = some_latents((6, 3, 4))
    tokens = compress("flashvid-div", latents, 40)
    same = (tokens.latents[:, None] == latents.flatten(0, 2)).all(-1).any(1)
    assert int(same.sum()) >= 28


def test_fastvid_keeps_the_salient_and_averages_the_rest():
    """One segment: the largest tokens stay; every other goes into a context token, of which 0.6 at least is its own."""
    latents = (some_latents((1, 3, 4))[0] * 0.1 + 1).repeat(3, 1, 1, 1)
    latents[:, 0, 1] *= 3
    tokens = compress("fastvid-norm", latents, 5 * 3)
    kept = kept_indices(tokens)
    assert {1, 13, 25} <= set(kept)
    assert keep_own_share(torch.tensor([0, 1, 9])).tolist() == pytest.approx([1, 0.6, 0.6])
    assert bool((tokens.boxes[:, 0] <= tokens.positions[:, 0]).all())


def test_todre_picks_the_least_similar_sum():
    units = unit(torch.randn(12, 5, generator=torch.Generator().manual_seed(0))).float()
    expected = [4]
    while len(expected) < 12:
        free = [i for i in range(12) if i not in expected]
        expected.append(min(free, key=lambda i: sum(float(units[i] @ units[j]) for j in expected)))
    assert pick_diverse(units, 4, 12).tolist() == expected


def test_todre_starts_at_the_largest_token_and_shares_parts(monkeypatch):
    latents, _ = some_latents((6, 2, 2))
    assert kept_indices(compress("todre", latents, 1)) == [int(latents.flatten(0, 2).norm(dim=1).argmax())]
    monkeypatch.setattr("freres_cli.baselines.todre.MOST_TOKENS", 8)
    parts = [int(index) // 8 for index in kept_indices(compress("todre", latents, 9))]
    assert [parts.count(part) for part in range(3)] == [3, 3, 3]


# --- by norm: VisionZip and PruMerge ----------------------------------------------------------------------------------


def test_visionzip_keeps_the_largest_norms_and_halves_context_with_what_joined():
    latents, _ = some_latents((1, 3, 4))
    flat = latents.flatten(0, 2)
    tokens = compress("visionzip-norm", latents, 8)
    order = flat.norm(dim=1).argsort(descending=True)
    dominant, rest = set(order[:7].tolist()), sorted(order[7:].tolist())
    target, *others = rest
    assert kept_indices(tokens) == sorted(dominant | {target})
    for index, row in zip(kept_indices(tokens), tokens.latents, strict=True):
        mixed = flat[index] if index in dominant else (flat[target] + flat[others].mean(0)) / 2
        torch.testing.assert_close(row, mixed)


def test_prumerge_outliers_lie_beyond_the_quartiles():
    norms = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    norms[1, 7], norms[2, [3, 9]] = 5, 9
    low, high = np.quantile(norms.numpy(), [0.25, 0.75], axis=1)
    assert count_outliers(norms).tolist() == (norms.numpy() > (high + 1.5 * (high - low))[:, None]).sum(1).tolist()
    assert count_outliers(norms).tolist() == [0, 1, 2, 0]


def test_prumerge_mixes_by_weight_and_loses_nothing():
    tokens = some_latents((1, 6, 6), 5)[0].flatten(0, 2)
    norms, kept = tokens.norm(dim=1), torch.tensor([0, 8, 20])
    merged = merge_frame(tokens, norms, kept, 4, 5)
    weights = norms / norms.sum()
    cosines = unit(tokens) @ unit(tokens).T - 2 * torch.eye(36)
    for row, index in zip(merged, kept.tolist(), strict=False):
        near = cosines[index].argsort(descending=True)[:2]
        mixed = tokens[index] + (weights[near, None] * tokens[near]).sum(0)
        torch.testing.assert_close(row, mixed / (1 + weights[near].sum()))
    rest = torch.tensor([i for i in range(36) if i not in kept.tolist()])
    torch.testing.assert_close(merged[3], (weights[rest, None] * tokens[rest]).sum(0) / weights[rest].sum())


def test_prumerge_gives_more_tokens_to_frames_with_outliers():
    latents = some_latents((2, 4, 6))[0] * 0.01 + 1
    latents[1, 2, 3] *= 9
    frames = compress("prumerge-norm", latents, 12).positions[:, 0].tolist()
    assert (frames.count(0), frames.count(1)) == (2, 10)


# --- AOT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_sources", "num_targets"), [(1, 1), (7, 3), (3, 7), (20, 20)])
def test_aot_plan_gives_and_takes_equal_shares(num_sources, num_targets):
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(num_sources, 6, generator=generator)
    targets = torch.randn(num_targets, 6, generator=generator)
    plan = find_plan(sources, targets).double()
    np.testing.assert_allclose(plan.sum(1), 1 / num_sources, rtol=1e-4)
    np.testing.assert_allclose(plan.sum(0), 1 / num_targets, rtol=2e-2)
    assert bool((plan >= 0).all())


def test_aot_plan_carries_each_token_to_its_like():
    targets = torch.eye(5)
    plan = find_plan(targets.flip(0), targets)
    assert plan.argmax(1).tolist() == [4, 3, 2, 1, 0] and float(plan.max(1).values.min()) > 0.19
    mixed = absorb(torch.ones(5, 2), torch.full((5, 2), 3.0), plan)
    torch.testing.assert_close(mixed, torch.full((5, 2), (1 + 0.2 * 3) / 1.2), atol=1e-4, rtol=0)


def test_aot_anchors_are_large_and_in_every_window():
    norms = torch.rand(64, generator=torch.Generator().manual_seed(0))
    norms[:16] += 1
    anchors = pick_anchors(norms, 8, 32)
    assert len(anchors.unique()) == 32 and set(range(16)) <= set(anchors.tolist())
    windows = anchors // 8 * 3 // 8 * 3 + anchors % 8 * 3 // 8
    assert torch.bincount(windows, minlength=9).min() >= 1


@pytest.mark.parametrize(("num_frames", "per_frame"), [(1, 5), (2, 1), (3, 36), (9, 7), (36, 36), (64, 729)])
def test_aot_spends_the_whole_budget(num_frames, per_frame):
    for num_tokens in {1, 2, 3, per_frame, *range(1, num_frames * per_frame, max(1, num_frames * per_frame // 97))}:
        if num_tokens >= num_frames * per_frame:
            continue
        layout = lay_out(num_frames, per_frame, num_tokens)
        lengths = [stop - first for first, stop in layout.clips]
        assert sum(lengths) == num_frames and len(lengths) <= 8 and 1 <= layout.num_anchors <= per_frame
        merged = sum(length > 1 for length in lengths) * layout.has_merged
        assert layout.num_anchors * (len(lengths) + merged) + layout.num_distinct == num_tokens
        assert 0 <= layout.num_distinct <= layout.num_anchors * (num_frames - len(lengths))


def test_aot_has_the_anchors_of_the_paper():
    """64 frames of 729 tokens: 126 anchors where a tenth is kept, 205 where a quarter is; 8 clips."""
    for share, anchors in ((0.1, 126), (0.15, 144), (0.2, 196), (0.25, 205)):
        layout = lay_out(64, 729, round(64 * 729 * share))
        assert (layout.num_anchors, len(layout.clips)) == (anchors, 8)


def test_aot_keeps_what_appears_in_a_clip():
    """A clip keeps the anchors of its first frame, the same after they took in its later frames, and what is new."""
    first = torch.eye(6)[None, None]
    second = first.clone()
    second[0, 0, 2] = 1.0
    clip = torch.cat([first, second, second, second])
    layout = lay_out(4, 6, 9)
    assert layout.clips == [(0, 1), (1, 2), (2, 4)] and (layout.num_anchors, layout.num_distinct) == (2, 1)
    tokens = compress("aot-norm", clip, 9)
    times = tokens.positions[:, 0].tolist()
    assert [times.count(time) for time in (0.0, 1.0, 2.0, 3.0)] == [2, 2, 2, 3]  # the merged anchors lie at 3
    assert torch.equal(tokens.latents[:2].argmax(1), tokens.positions[:2, 2].long())


def test_aot_gives_all_of_a_token_that_is_not_kept_to_the_anchors():
    """An anchor that takes in its like of one later frame, a little changed, moves half of the way."""
    first = torch.eye(6)
    later = first + 0.2
    merged = absorb(first, later, share_out(find_plan(later, first)))
    moved = (merged - first).norm(dim=1) / (later - first).norm(dim=1)
    assert float(moved.min()) > 0.4
