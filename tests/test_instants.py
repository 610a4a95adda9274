"""Shared instants: the laws of ``method.instants``, checked against every possible choice on small clips."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from freres_cli.method import instants
from freres_cli.method.instants import share_instants
from freres_cli.records import nearest_frames


def outside(frame: int, first: int, last: int) -> int:
    return max(first - frame, frame - last, 0)


def whole_frames(frames: Tensor, low: Tensor | None, high: Tensor | None, num_frames: int) -> list[tuple[int, int]]:
    """First and last of the frames that are free for each token: those in its stretch, and its own."""
    if low is None or high is None:
        return [(f, f) for f in frames.tolist()]
    spans = []
    for f, a, b in zip(frames.tolist(), low.tolist(), high.tolist(), strict=True):
        inside = [x for x in range(num_frames) if a <= x < b]
        spans.append((min([f, *inside]), max([f, *inside])))
    return spans


def cost_of(before: Tensor, after: Tensor, spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Frames outside the stretches, and tokens that moved."""
    pairs = zip(after.tolist(), spans, strict=True)
    return sum(outside(f, *span) for f, span in pairs), int((before != after).sum())


def best_cost(
    frames: Tensor, is_movable: Tensor, num_frames: int, max_runs: int, spans: list[tuple[int, int]]
) -> tuple[int, int]:
    """The least cost over all sets of frames."""
    fixed = set(frames[~is_movable].tolist())
    free = [f for f in range(num_frames) if f not in fixed]
    movable = is_movable.nonzero()[:, 0].tolist()
    found = []
    for num_more in range(max(max_runs, len(fixed), 1) - len(fixed) + 1):
        for more in combinations(free, num_more):
            chosen = fixed | set(more)
            if chosen:
                far = sum(min(outside(f, *spans[j]) for f in chosen) for j in movable)
                found.append((far, sum(int(frames[j]) not in chosen for j in movable)))
    return min(found)


def draw(seed: int, with_stretches: bool) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    num_frames = int(torch.randint(4, 10, (), generator=generator))
    size = int(torch.randint(3, 14, (), generator=generator))
    t = torch.rand(size, generator=generator) * (num_frames - 1)
    is_movable = torch.rand(size, generator=generator) < 0.8
    t[~is_movable] = t[~is_movable].round()
    if not with_stretches:
        return t, is_movable, num_frames, None, None
    reach = torch.rand(2, size, generator=generator) * num_frames / 3
    return t, is_movable, num_frames, t - reach[0], t + reach[1]


@pytest.mark.parametrize("with_stretches", [False, True])
def test_no_choice_of_frames_is_better(with_stretches):
    moved = 0
    for seed in range(120):
        t, is_movable, num_frames, low, high = draw(seed, with_stretches)
        frames = nearest_frames(t, num_frames)
        spans = whole_frames(frames, low, high, num_frames)
        for max_runs in range(5):
            new = share_instants(t, is_movable, num_frames, max_runs, low, high)
            after = nearest_frames(new, num_frames)
            num_fixed = frames[~is_movable].unique().numel()
            if frames.unique().numel() <= max_runs:
                assert torch.equal(new, t)
                continue
            assert after.unique().numel() <= max(max_runs, num_fixed, 1)
            assert torch.equal(new[~is_movable], t[~is_movable])
            assert torch.equal(new[after == frames], t[after == frames])
            best = best_cost(frames, is_movable, num_frames, max_runs, spans)
            assert cost_of(frames, after, spans) == best
            moved += best[1]
    assert moved > 500


def test_a_token_prefers_an_instant_in_its_stretch():
    t = torch.tensor([0.0, 4.0, 6.0])
    anchors = torch.tensor([True, False, True])
    low, high = torch.tensor([0.0, 0.5, 5.5]), torch.tensor([0.5, 5.0, 6.5])
    assert share_instants(t, ~anchors, 7, 2).tolist() == [0.0, 6.0, 6.0]
    # frames 1 to 4 are its own: 0 is one frame outside, and 6 is two
    assert share_instants(t, ~anchors, 7, 2, low, high).tolist() == [0.0, 0.0, 6.0]


def test_anchors_beyond_the_bound_stay_and_take_the_others():
    t = torch.tensor([0.0, 5.0, 9.0, 1.2, 6.9, 8.0])
    is_movable = torch.tensor([False, False, False, True, True, True])
    assert share_instants(t, is_movable, 10, 1).tolist() == [0.0, 5.0, 9.0, 0.0, 5.0, 9.0]


def test_a_long_clip_keeps_the_bound_and_the_same_result():
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(6000, generator=generator) * 17_999
    is_movable = torch.ones(6000, dtype=torch.bool)
    is_movable[::200] = False
    t[::200] = t[::200].round()
    runs = [share_instants(t, is_movable, 18_000, 60) for _ in range(2)]
    assert torch.equal(*runs)
    assert nearest_frames(runs[0], 18_000).unique().numel() <= 60
    assert torch.equal(runs[0][::200], t[::200])
    # a token moves by less than a gap between 30 even frames
    assert float((runs[0] - t).abs().mean()) < 18_000 / 60


def test_fewer_candidates_cost_little(monkeypatch):
    t = torch.rand(400, generator=torch.Generator().manual_seed(1)) * 199
    movable = torch.ones(400, dtype=torch.bool)
    exact = share_instants(t, movable, 200, 12)
    monkeypatch.setattr(instants, "MAX_CANDIDATES", 60)
    rough = share_instants(t, movable, 200, 12)
    frames = nearest_frames(t, 200)
    shifts = [float((nearest_frames(new, 200) - frames).abs().sum()) for new in (exact, rough)]
    assert shifts[0] <= shifts[1] < 1.2 * shifts[0]
    assert torch.equal(share_instants(t, movable, 200, 200), t)
