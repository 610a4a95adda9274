"""Laws that hold for every method of the registry that reduces latents to a budget, whatever it keeps."""

from __future__ import annotations

import pytest
import torch

from freres_cli.baselines.full import keep_every_token
from freres_cli.baselines.registry import METHODS

D = 6
REDUCING = sorted(name for name, method in METHODS.items() if method.compress is not None and method.has_budget)
GRIDS = [(1, 1, 1), (1, 3, 4), (7, 1, 1), (2, 1, 5), (3, 2, 2), (5, 3, 4), (9, 2, 3), (16, 4, 4)]
# Methods whose tokens are, on purpose, not on the scale of the latents.
UNSCALED = {"fourier-raw"}


@pytest.fixture(params=REDUCING)
def name(request):
    return request.param


@pytest.fixture
def reduce(name):
    def run(latents, budget, width=D):
        seconds = 2 + torch.arange(latents.shape[0], dtype=torch.float64) / 4
        return METHODS[name].compress(latents, seconds, budget, width)

    return run


def random_clip(grid, channels=D, seed=0):
    return torch.randn(*grid, channels, generator=torch.Generator().manual_seed(seed))


def drifting_clip(grid=(9, 3, 4), channels=D, seed=0):
    """Frames that resemble their neighbours, as those of a video do."""
    return random_clip(grid, channels, seed).cumsum(0)


def some_budgets(grid):
    total, per_frame = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
    if total <= 12:
        return range(1, total + 3)
    near = {per_frame - 1, per_frame, per_frame + 1, total // 20, total // 4 - 1, total // 4, total // 2 + 1, total - 1}
    return sorted((near | {1, 2, 3, 5, 7, total, total + 5}) - {0})


def raster_keys(tokens):
    t, h, w = tokens.positions.double().unbind(1)
    return (t * tokens.grid[1] + h) * tokens.grid[2] + w


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_exactly_the_budget_is_used_on_the_grid_and_in_order(reduce, grid):
    latents = random_clip(grid)
    for budget in some_budgets(grid):
        tokens = reduce(latents, budget)
        assert len(tokens) == min(budget, latents.shape[:3].numel()), budget
        assert tokens.grid == grid and tokens.width == D and tokens.latents.shape[1] == D
        last = torch.tensor(grid) - 1.0
        assert bool(((tokens.positions >= 0) & (tokens.positions <= last)).all())
        order = [tuple(place) for place in tokens.positions.tolist()]
        assert order == sorted(order)
        # Frames are a quarter of a second apart, from second 2.
        assert torch.allclose(tokens.seconds, 2 + tokens.positions[:, 0].double() / 4, atol=1e-6)
        assert tokens.latents.isfinite().all() and tokens.energy.isfinite().all()


def test_a_budget_below_one_is_refused(reduce):
    for budget in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            reduce(drifting_clip(), budget)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_clip_that_fits_the_budget_is_kept_as_it_is(reduce, grid):
    latents = random_clip(grid)
    total = latents.shape[:3].numel()
    whole = keep_every_token(latents, torch.zeros(grid[0], dtype=torch.float64), total, D)
    for budget in (total, total + 1, 10 * total):
        tokens = reduce(latents, budget)
        assert torch.equal(tokens.latents, whole.latents) and torch.equal(tokens.positions, whole.positions)


def test_the_same_clip_gives_the_same_tokens_to_the_bit(reduce):
    latents = drifting_clip()
    for budget in (5, 23, 60):
        one, two = reduce(latents, budget), reduce(latents.clone(), budget)
        assert torch.equal(one.latents, two.latents) and torch.equal(one.positions, two.positions)
        assert torch.equal(one.seconds, two.seconds) and torch.equal(one.energy, two.energy)


@pytest.mark.parametrize("budget", [1, 5, 12, 13, 50, 83])
def test_no_latent_is_kept_twice(reduce, budget):
    """In a clip that moves, in one that stands still, and in one where every token is zero."""
    for latents in (drifting_clip((7, 3, 4)), random_clip((1, 3, 4)).expand(7, 3, 4, D), torch.zeros(7, 3, 4, D)):
        tokens = reduce(latents, budget)
        # The middles of two groups that were merged may coincide.
        if tokens.spans is None:
            assert len(tokens.positions.unique(dim=0)) == budget


def test_the_latents_that_are_given_are_not_changed(reduce):
    latents = drifting_clip()
    before = latents.clone()
    reduce(latents, 23)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("budget", [1, 7, 12, 40, 107])
def test_deep_rows_never_decide(reduce, budget):
    """Whatever stands in the channels after the first D, the same tokens come out of the first D."""
    main = drifting_clip()
    deep = [torch.zeros(9, 3, 4, 2 * D), drifting_clip(channels=2 * D, seed=1), 100 * random_clip((9, 3, 4), 2 * D, 2)]
    first, *others = (reduce(torch.cat([main, rows], -1), budget) for rows in deep)
    assert first.latents.shape == (budget, 3 * D) and bool((first.latents[:, D:] == 0).all())
    for other in others:
        assert torch.equal(other.positions, first.positions) and torch.equal(other.seconds, first.seconds)
        assert torch.equal(other.latents[:, :D], first.latents[:, :D]) and torch.equal(other.energy, first.energy)


@pytest.mark.parametrize("budget", [1, 7, 12, 40, 107])
def test_deep_rows_are_reduced_as_the_main_rows_are(reduce, budget):
    """Deep rows that are twice the main ones, and minus them, come out so."""
    main = drifting_clip()
    rows = reduce(torch.cat([main, 2 * main, -main], -1), budget).latents
    assert torch.allclose(rows[:, D : 2 * D], 2 * rows[:, :D], rtol=1e-5, atol=1e-5)
    assert torch.allclose(rows[:, 2 * D :], -rows[:, :D], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 5, 12, 13, 50])
def test_a_constant_clip_stays_constant_and_zeros_stay_zero(reduce, name, budget):
    value = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, -7.0])
    tokens = reduce(value.expand(7, 3, 4, D), budget)
    assert len(tokens) == budget and tokens.latents.isfinite().all()
    if name not in UNSCALED:
        assert torch.allclose(tokens.latents, value.expand(budget, D), atol=1e-5)
    zeros = reduce(torch.zeros(7, 3, 4, D), budget)
    assert len(zeros) == budget and bool((zeros.latents == 0).all()) and zeros.positions.isfinite().all()


@pytest.mark.parametrize("budget", [1, 11, 12, 30])
def test_a_still_clip_keeps_latents_of_its_picture(reduce, budget):
    """Nothing moves, and a few tokens are zero."""
    picture = random_clip((1, 3, 4))
    picture[0, 1, 1:3] = 0
    tokens = reduce(picture.expand(8, 3, 4, D), budget)
    assert len(tokens) == budget and tokens.latents.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_as_float32_does_on_the_same_values(reduce, dtype):
    """The values are so large that a squared norm overflows in float16."""
    latents = (100 * drifting_clip()).to(dtype)
    for budget in (3, 12, 41):
        half, single = reduce(latents, budget), reduce(latents.float(), budget)
        assert half.latents.dtype == dtype and torch.equal(half.positions, single.positions)
        assert torch.equal(half.latents, single.latents.to(dtype)) and half.latents.isfinite().all()


def test_boxes_lie_around_their_tokens(reduce):
    latents = drifting_clip()
    for budget in (2, 12, 35):
        tokens = reduce(latents, budget)
        if tokens.spans is None:
            assert torch.equal(tokens.positions, tokens.positions.round())
        if tokens.boxes is None:
            continue
        first, stop = tokens.boxes[:, 0::2], tokens.boxes[:, 1::2]
        assert bool(((tokens.positions > first - 1) & (tokens.positions < stop)).all())


def test_a_method_says_if_its_tokens_mix_latents(reduce, name):
    """Else each is the latent at its own place."""
    mixes = False
    for latents in (random_clip((8, 6, 6)), drifting_clip()):
        for budget in (12, 40):
            tokens = reduce(latents, budget)
            t, h, w = tokens.positions.round().long().unbind(1)
            mixes |= not torch.equal(tokens.latents, latents[t, h, w])
    assert METHODS[name].mixes == mixes


def test_methods_that_pick_tokens_or_name_what_they_mix_say_that_they_do_not():
    assert not any(method.mixes for name, method in METHODS.items() if name not in REDUCING)
