"""EVS and DTD: what they keep follows from their definitions, whatever the clip."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from freres_cli.baselines.dtd import drop_repeated_tokens
from freres_cli.baselines.evs import keep_changed_tokens
from tests.test_baselines import GRID_CASES, some_latents

METHODS = [keep_changed_tokens, drop_repeated_tokens]
H, W, WIDTH = 3, 4, 6
N = H * W


def drifting_clip(frames=9, channels=WIDTH, seed=0):
    """A walk from a random first frame; every cell has a step length of its own."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(frames, H, W, channels, generator=generator) * torch.rand(H, W, 1, generator=generator)
    return steps.cumsum(0) + torch.randn(H, W, channels, generator=generator), torch.arange(frames).double() / 5


def kept_indices(tokens):
    t, h, w = tokens.positions.long().unbind(1)
    _, grid_h, grid_w = tokens.grid
    return ((t * grid_h + h) * grid_w + w).tolist()


def one_minus_cosine(a, b):
    a, b = a.double(), b.double()
    return 1 - float(a @ b) / (float(a.norm()) * float(b.norm()))


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("grid", GRID_CASES)
def test_exactly_the_budget_is_kept_bit_for_bit_in_raster_order(method, grid):
    latents, seconds = some_latents(grid)
    full = latents.shape[:3].numel()
    for budget in {1, 2, 3, 5, full // 4, full // 2, full - 1, full, full + 5} - {0}:
        tokens = method(latents, seconds, budget, 4)
        kept = kept_indices(tokens)
        assert kept == sorted(set(kept)) and len(kept) == min(budget, full) and tokens.grid == grid
        assert torch.equal(tokens.latents, latents.flatten(0, 2)[kept])
        assert torch.equal(tokens.seconds, seconds[tokens.positions[:, 0].long()])
    with pytest.raises(ValueError, match="at least 1"):
        method(latents, seconds, 0, 4)


def test_below_one_frame_the_first_is_thinned_evenly(method):
    latents, seconds = drifting_clip()
    for budget in range(1, N):
        kept = kept_indices(method(latents, seconds, budget, WIDTH))
        gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)] + [kept[0] + N - kept[-1]]
        assert max(kept) < N and max(gaps) - min(gaps) <= 1
    assert kept_indices(method(latents, seconds, N, WIDTH)) == list(range(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_still_clip_keeps_the_first_frame_and_then_goes_in_raster_order(method, dtype):
    first, seconds = some_latents((1, H, W), 33)[0], torch.arange(5, dtype=torch.float64)
    latents = first.expand(5, H, W, 33).to(dtype)
    for budget in (N, N + 1, 2 * N + 5, 5 * N):
        assert kept_indices(method(latents, seconds, budget, 33)) == list(range(budget))


def test_the_scale_of_a_token_does_not_matter(method):
    """Powers of two, so that scaling does not round."""
    latents, seconds = drifting_clip()
    scales = 2.0 ** torch.randint(-3, 4, latents.shape[:3], generator=torch.Generator().manual_seed(1))
    for budget in (20, 47, 80):
        same = kept_indices(method(latents, seconds, budget, WIDTH))
        assert kept_indices(method(latents * scales[..., None], seconds, budget, WIDTH)) == same


def test_only_the_channels_of_the_language_model_decide_and_all_are_kept(method):
    latents, seconds = drifting_clip(channels=3 * WIDTH)
    whole = method(latents, seconds, 40, WIDTH)
    assert kept_indices(whole) == kept_indices(method(latents[..., :WIDTH], seconds, 40, WIDTH))
    assert whole.latents.shape[1] == 3 * WIDTH
    assert kept_indices(whole) != kept_indices(method(latents, seconds, 40, 3 * WIDTH))


def test_what_flashes_is_kept_when_it_comes_and_when_it_goes(method):
    latents = some_latents((1, H, W))[0].repeat(8, 1, 1, 1)
    latents[4, 1, 2] *= -1
    tokens = method(latents, torch.arange(8, dtype=torch.float64), N + 2, 8)
    assert tokens.positions[N:].tolist() == [[4, 1, 2], [5, 1, 2]]


def test_evs_keeps_the_largest_changes_to_the_frame_before():
    latents, seconds = drifting_clip()
    flat = latents.flatten(1, 2)
    changes = {
        t * N + n: one_minus_cosine(flat[t, n], flat[t - 1, n]) if t else math.inf for t in range(9) for n in range(N)
    }
    ranked = sorted(changes, key=lambda index: -changes[index])
    for budget in (N, 30, 71, 9 * N - 1):
        assert kept_indices(keep_changed_tokens(latents, seconds, budget, WIDTH)) == sorted(ranked[:budget])


def every_threshold(flat):
    """A threshold between any two changes that a token (T, N, D) can have since an earlier one of its cell."""
    pairs = combinations(range(flat.shape[0]), 2)
    changes = sorted({one_minus_cosine(flat[a, n], flat[b, n]) for a, b in pairs for n in range(N)})
    return [0.0, *[(low + high) / 2 for low, high in zip(changes, changes[1:], strict=False)], 3.0]


def kept_by_threshold(flat, threshold):
    """DTD with a threshold, one token at a time: what is kept, and the rest by falling change."""
    kept, rest, last = [], [], list(flat[0])
    for index in range(flat.shape[0] * N):
        t, n = divmod(index, N)
        change = one_minus_cosine(flat[t, n], last[n]) if t else math.inf
        if change >= threshold:
            kept.append(index)
            last[n] = flat[t, n]
        else:
            rest.append((-change, index))
    return kept, [index for _, index in sorted(rest)]


def test_dtd_keeps_what_a_threshold_keeps_and_the_most_changed_of_the_rest():
    latents, seconds = drifting_clip(5)
    flat = latents.flatten(1, 2)
    walks = [kept_by_threshold(flat, threshold) for threshold in every_threshold(flat)]
    num_filled = []
    for budget in range(N, 5 * N):
        tokens = kept_indices(drop_repeated_tokens(latents, seconds, budget, WIDTH))
        filled = [budget - len(kept) for kept, rest in walks if tokens == sorted(kept + rest[: budget - len(kept)])]
        assert filled, budget
        num_filled.append(min(filled))
    # The count jumps at a threshold only where keeping a token changes what later ones are compared with.
    assert max(num_filled) <= 3 and num_filled.count(0) > len(num_filled) / 2


def test_dtd_fills_what_no_threshold_keeps_with_the_largest_changes():
    """All cells turn alike, so any threshold keeps whole frames; the rest of the budget is a part of one frame."""
    angle = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.5, 1.5])
    latents = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None].expand(6, H, W, 2)
    seconds = torch.arange(6, dtype=torch.float64)
    kept = kept_indices(drop_repeated_tokens(latents, seconds, 2 * N + 3, 2))
    assert kept == [*range(N), *range(2 * N, 2 * N + 3), *range(4 * N, 5 * N)]


def test_slow_drift_is_kept_by_dtd_and_not_by_evs():
    """One cell turns a little with every frame, the other turns away and back twice."""
    frames = torch.arange(20)
    angle = torch.stack([frames * 0.1, ((frames == 6) | (frames == 13)) * 0.35], 1)
    latents, seconds = torch.stack([angle.cos(), angle.sin()], -1)[:, None], frames.double()

    def drift(method):
        return [t for t, _, w in method(latents, seconds, 6, 2).positions.tolist() if w == 0]

    assert drift(keep_changed_tokens) == [0] and drift(drop_repeated_tokens) == [0, 4, 8, 12, 16]
