"""The clip rebuilt from Fre-Res tracks: exact where nothing was dropped, and never further off than what was."""

from __future__ import annotations

import pytest
import torch
from scipy.fft import dct, idct

from freres_cli.method.rebuild import rebuild_frames
from freres_cli.method.residuals import pool_to_cells
from freres_cli.tracks import COLUMNS
from tests.compressed_clips import compress, smooth_clip

T, SIDE, WIDTH = 24, 4, 16
N = SIDE * SIDE
EVERY_CELL = {"pooled_side": SIDE, "keep_per_block": 9, "static_per_gop": 0}


def squared(difference):
    return float(difference.double().square().sum())


def noise_clip(num_frames=T, grid=(SIDE, SIDE), seed=0):
    return torch.randn(num_frames, *grid, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(SIDE, SIDE), (5, 7)])
def test_nothing_is_lost_where_every_token_is_kept(grid):
    latents = noise_clip(grid=grid)
    tracks, *_ = compress(latents, latents.shape[:3].numel())
    assert torch.equal(rebuild_frames(tracks), latents.flatten(1, 2))


@pytest.mark.parametrize("budget", [100, 150, 250])
def test_what_is_lost_is_the_energy_of_the_dropped_coefficients(budget):
    """With whole anchors and a cell for every token the transform is orthonormal, so energies add up (Parseval)."""
    latents = noise_clip()
    # As many bands as a GoP has residual frames: what no band misses needs no impulse.
    tracks, *_ = compress(latents, budget, anchors=2, max_coefficients=T, **EVERY_CELL)
    assert not tracks.is_impulse.any()
    assert tracks.anchor_cell.shape[0] == N * tracks.gop_anchor_frame.shape[0] and tracks.coefficient_gop.numel()
    lost = squared(rebuild_frames(tracks) - latents.flatten(1, 2))
    expected = float(tracks.gop_residual_energy.sum()) - float(tracks.coefficient_energy.sum())
    assert lost == pytest.approx(expected, rel=1e-4)


def test_frames_that_share_a_time_bin_lie_where_they_were():
    """256 residual frames in bins of two: one cell swings, and in another something is there for one bin."""
    latents = noise_clip(1, (3, 3)).repeat(257, 1, 1, 1)
    wave = torch.cos(torch.pi * 3 * (torch.arange(256) + 0.5) / 256)
    latents[1:, 0, 0] += wave[:, None]
    latents[201:203, 2, 2] += 5
    tracks, *_ = compress(latents, 30, anchors=1, reference_budget_tokens=30, **{**EVERY_CELL, "pooled_side": 3})
    assert tracks.gop_bin_frames.tolist() == [2] and tracks.is_impulse.any()
    off = (rebuild_frames(tracks) - latents.flatten(1, 2)).abs().amax(2)
    assert off[:, 0].max() < 0.01, "a quarter of a bin later, the wave is off by 0.02"
    assert off[201:203, 8].max() < 0.01 and off[:, 8].max() < 1


@pytest.mark.parametrize("grid", [(SIDE, SIDE), (5, 7)])
def test_a_cell_moves_as_scipys_inverse_transform(grid):
    latents = noise_clip(grid=grid)
    tracks, *_ = compress(latents, 120, pooled_side=3)
    frames = rebuild_frames(tracks)
    rows = {(int(g), int(c)): i for i, (g, c) in enumerate(zip(tracks.base_gop, tracks.base_cell, strict=True))}
    assert rows
    for gop, cell in rows:
        first, length = int(tracks.gop_anchor_frame[gop]), int(tracks.gop_num_residuals[gop])
        spectrum = torch.zeros(length, WIDTH)
        mine = (tracks.coefficient_gop == gop) & (tracks.coefficient_cell == cell)
        spectrum[tracks.coefficient_band[mine]] = tracks.coefficient_values[mine]
        moves = torch.from_numpy(idct(spectrum.numpy(), axis=0, norm="ortho"))
        pooled = pool_to_cells(frames.reshape(T, *grid, WIDTH), *tracks.pooled_grid)[first : first + 1 + length, cell]
        torch.testing.assert_close(pooled[1:] - pooled[0], moves, atol=1e-5, rtol=1e-5)


def test_kept_anchor_tokens_are_shown_bit_for_bit():
    latents = noise_clip()
    tracks, *_ = compress(latents, 100)
    frames = rebuild_frames(tracks)[tracks.gop_anchor_frame[tracks.anchor_gop], tracks.anchor_cell]
    assert torch.equal(frames, tracks.anchor_latents) and len(frames) < latents.shape[:3].numel()


@pytest.mark.parametrize("variant", ["absorber", "anchors", "temporal"])
@pytest.mark.parametrize("budget", [1, 2, 5, 17, 40])
def test_a_clip_of_one_token_is_rebuilt_at_any_budget(variant, budget):
    """Every place shows something that was kept, so all show the one token there is."""
    latents = torch.arange(1.0, WIDTH + 1).expand(T, SIDE, SIDE, WIDTH).contiguous()
    frames = rebuild_frames(compress(latents, budget, variant=variant)[0])
    torch.testing.assert_close(frames, latents.flatten(1, 2))


def test_places_that_nothing_is_known_of_show_the_last_frame_before_them():
    """All tokens of the second GoP are taken away: it shows the end of the first one, and the third is as it was."""
    latents = smooth_clip(T, (SIDE, SIDE))
    tracks, *_ = compress(latents, 200, anchors=3, **EVERY_CELL)
    assert tracks.anchor_gop.bincount().tolist() == [N] * 3 and tracks.coefficient_gop.unique().numel() == 3
    whole = rebuild_frames(tracks)
    tables = {"anchor": "anchor_gop", "coefficient": "coefficient_gop", "base": "base_gop", "static": "static_gop"}
    tables["summary"] = "summary_gop"

    def without(gop):
        kept = {
            name: getattr(tracks, name)[getattr(tracks, tables[column.table]) != gop]
            for name, column in COLUMNS.items()
            if column.table in tables
        }
        return rebuild_frames(type(tracks)(**{**vars(tracks), **kept}))

    second, third = tracks.gop_anchor_frame[1:].tolist()
    frames = without(1)
    assert torch.equal(frames[:second], whole[:second]) and torch.equal(frames[third:], whole[third:])
    assert torch.equal(frames[second:third], whole[second - 1].expand(third - second, N, WIDTH))
    frames = without(0)
    assert torch.equal(frames[:second], whole[second].expand(second, N, WIDTH))


def test_a_pooled_place_shows_the_means_that_were_kept():
    """Without raw anchors, a still clip is its pooled cells."""
    latents = noise_clip(1).repeat(T, 1, 1, 1)
    tracks, *_ = compress(latents, 60, variant="temporal", pooled_side=2, static_per_gop=4)
    means = pool_to_cells(latents[0], 2, 2)
    assert tracks.static_gop.numel() and not tracks.anchor_gop.numel()
    places = torch.tensor([[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2).flatten()
    shown = rebuild_frames(tracks)
    known = {int(c) for c in tracks.static_cell[tracks.static_gop == 0]}
    assert known
    for cell in known:
        torch.testing.assert_close(shown[0, places == cell], means[cell].expand(4, WIDTH), atol=1e-5, rtol=1e-5)


def test_a_place_without_a_token_shows_the_mean_of_the_anchor_tokens_in_its_cell():
    latents = noise_clip(1, (6, 6)).repeat(T, 1, 1, 1)
    tracks, *_ = compress(latents, 30, anchors=1, pooled_side=3, static_per_gop=0, variant="anchors")
    shown, kept = rebuild_frames(tracks)[0].reshape(6, 6, WIDTH), torch.zeros(36, dtype=torch.bool)
    kept[tracks.anchor_cell[tracks.anchor_gop == 0]] = True
    kept = kept.reshape(6, 6)
    num_shown = 0
    for h in range(0, 6, 2):
        for w in range(0, 6, 2):
            own, cell = kept[h : h + 2, w : w + 2], latents[0, h : h + 2, w : w + 2]
            for value in shown[h : h + 2, w : w + 2][~own] if bool(own.any()) else ():
                torch.testing.assert_close(value, cell[own].mean(0))
                num_shown += 1
    assert num_shown


def test_a_summary_moves_with_its_low_bands():
    """All cells are equal, so the mean over cells is the course of each, as far as its bands go."""
    course = noise_clip(T, (1, 1))
    tracks, *_ = compress(
        course.expand(T, SIDE, SIDE, WIDTH).contiguous(), 12, variant="temporal", static_per_gop=0, anchors=1
    )
    num_bands = tracks.summary_spectrum.shape[1]
    assert tracks.gop_anchor_frame.tolist() == [0] and 0 < num_bands < T - 1
    bare = sorted(set(range(N)) - set(tracks.base_cell.tolist()))
    spectrum = dct((course[1:] - course[0]).flatten(1).numpy(), axis=0, norm="ortho")
    spectrum[num_bands:] = 0
    expected = course[0].flatten() + torch.from_numpy(idct(spectrum, axis=0, norm="ortho"))
    frames = rebuild_frames(tracks)
    assert bare
    for place in bare:
        torch.testing.assert_close(frames[1:, place], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(frames[0, place], course[0].flatten())


def test_long_gops_keep_the_scale_of_their_coefficients():
    """More residual frames than time bins: a jump that stays is a lone DC coefficient, and comes back whole."""
    before, after = noise_clip(2)
    latents = torch.cat([before[None], after.expand(300, SIDE, SIDE, WIDTH)])
    tracks, *_ = compress(latents, 2 * N + 1, anchors=1, max_coefficients=1, **EVERY_CELL)
    assert tracks.gop_bin_frames.tolist() == [4] and tracks.coefficient_gop.shape[0] == N
    torch.testing.assert_close(rebuild_frames(tracks), latents.flatten(1, 2), atol=1e-5, rtol=1e-5)


def test_more_tokens_lose_less_of_a_smooth_clip():
    latents = smooth_clip(T, (6, 6))
    lost = [squared(rebuild_frames(compress(latents, b)[0]) - latents.flatten(1, 2)) for b in (40, 150, 400, 864)]
    assert lost == sorted(lost, reverse=True) and lost[-1] == 0 < lost[1] < lost[0]
