"""Baselines: each keeps exactly its budget, and its tokens are the latents at their positions."""

from __future__ import annotations

import pytest
import torch

from freres_cli.baselines.blind import keep_nothing
from freres_cli.baselines.full import keep_every_token
from freres_cli.baselines.lowres import choose_rows, pool_frames
from freres_cli.baselines.registry import METHODS
from freres_cli.baselines.uniform import sample_uniform_frames
from tests.token_checks import same_tokens

GRID_CASES = [(1, 1, 1), (7, 3, 3), (12, 4, 6), (5, 1, 9), (9, 9, 9)]


def some_latents(grid, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*grid, channels, generator=generator), torch.arange(grid[0], dtype=torch.float64) / 7


@pytest.mark.parametrize("grid", GRID_CASES)
def test_baselines_keep_exactly_the_budget(grid):
    latents, seconds = some_latents(grid)
    full = latents.shape[:3].numel()
    for budget in {1, 2, 3, 5, full // 4, full // 2, full - 1, full, full + 5} - {0}:
        uniform = sample_uniform_frames(latents, seconds, budget, 8)
        assert len(uniform) == min(budget, full)
        per_frame = grid[1] * grid[2]
        assert len(uniform.positions[:, 0].unique()) == min(grid[0], -(-budget // per_frame))
        lowres = pool_frames(latents, seconds, budget, 8)
        assert len(lowres) == min(budget, full) and len(lowres.positions.unique(dim=0)) == len(lowres)
        _, per_frame = lowres.positions[:, 0].unique(return_counts=True)
        assert len(per_frame) == min(budget, grid[0]) and int(per_frame.max() - per_frame.min()) <= 1
    assert len(keep_nothing(latents, seconds, 0, 8)) == 0


@pytest.mark.parametrize("grid", GRID_CASES)
def test_kept_tokens_are_the_latents_at_their_places(grid):
    latents, seconds = some_latents(grid)
    for tokens in (
        keep_every_token(latents, seconds, 10**6, 8),
        sample_uniform_frames(latents, seconds, max(1, latents.shape[:3].numel() // 3), 4),
    ):
        t, h, w = tokens.positions.long().unbind(1)
        assert torch.equal(tokens.latents, latents[t, h, w]) and torch.equal(tokens.seconds, seconds[t])
        raster = (t * grid[1] + h) * grid[2] + w
        assert bool((raster.diff() > 0).all()) and tokens.grid == grid
    with pytest.raises(ValueError, match="at least all"):
        keep_every_token(latents, seconds, latents.shape[:3].numel() - 1, 8)


def test_uniform_frames_stand_at_the_centres_of_equal_parts():
    latents, seconds = some_latents((12, 2, 2))
    tokens = sample_uniform_frames(latents, seconds, 12, 8)
    assert tokens.positions[:, 0].unique().tolist() == [2, 6, 10]


def test_low_resolution_frames_are_means_at_the_middle_of_their_cells():
    """The latent of a token is its own place, so a mean of latents is a mean of places."""
    places = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in (4, 7, 9)]).reshape(4, 7, 9, 3)
    for budget in (4 * 12, 4 * 13, 4 * 13 + 3, 250):
        tokens = pool_frames(places, torch.arange(4, dtype=torch.float64), budget, 3)
        assert len(tokens) == budget and tokens.grid == (4, 7, 9)
        assert torch.allclose(tokens.latents, tokens.positions, atol=1e-5)
    whole = pool_frames(places, torch.arange(4, dtype=torch.float64), 4 * 63, 3)
    same_tokens(whole, keep_every_token(places, torch.arange(4, dtype=torch.float64), 4 * 63, 3))
    thin = pool_frames(places, torch.arange(4, dtype=torch.float64), 2, 3)
    assert thin.positions.tolist() == [[1, 3, 4], [3, 3, 4]]


def test_low_resolution_cells_are_not_strips():
    assert choose_rows(9, 9, 7) == [2, 3, 2] and choose_rows(9, 9, 9) == [3, 3, 3] and choose_rows(9, 9, 1) == [1]
    assert choose_rows(1, 9, 4) == [4] and choose_rows(9, 1, 4) == [1] * 4 and choose_rows(9, 9, 81) == [9] * 9
    for num_cells in range(1, 49):
        rows = choose_rows(8, 6, num_cells)
        widths = [6 / columns for columns in rows]
        assert sum(rows) == num_cells and max(max(8 / len(rows) / w, w * len(rows) / 8) for w in widths) <= 3


def test_every_method_is_offered():
    selecting = {"uniform", "evs", "dtd", "vidcom2", "dycoke", "divprune", "ktv", "dpp"}
    asking = {"cdpruner", "fastv", "framefusion-prune"}
    mixing = {"lowres", "fourier", "fourier-raw", "ts-llava", "tome", "apet"}
    merging = {"framefusion", "sttm", "prunevid", "flashvid-div", "todre"}
    by_norm = {"aot-norm", "fastvid-norm", "visionzip-norm", "holitom-norm", "prumerge-norm"}
    assert set(METHODS) == {"full", "blind", "fre-res", "adaptive"} | selecting | mixing | asking | merging | by_norm
