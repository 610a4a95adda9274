"""Where tokens went: each counts once in all, wherever and however its time and its cells are cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from freres_cli.content import Content
from freres_cli.method.allocation import (
    frame_edges_s,
    frames_at,
    map_frames,
    map_in_space,
    sum_in_time,
    token_boxes,
)
from freres_cli.method.energy import lost_in_time, report_energy
from freres_cli.method.residuals import cell_edges
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.tokens import make_tokens
from freres_cli.records import TOKEN_KINDS
from freres_cli.tracks import Tracks
from tests.compressed_clips import compress, smooth_clip
from tests.forged_bundles import make_stretches, make_tracks, smooth_latents
from tests.forged_bundles import make_tokens as uniform_tokens
from tests.tiny_models import video_tokens

BUDGET = 300


@pytest.fixture(scope="module", params=["tracks", "stretches", "tokens"])
def content(request) -> Content:
    made = {"tracks": make_tracks, "stretches": make_stretches, "tokens": uniform_tokens}
    return made[request.param](smooth_latents(), BUDGET)


def boxes_of(content):
    tokens = make_tokens(content)
    return tokens, token_boxes(tokens, content.pooled_grid if isinstance(content, Tracks) else None)


def test_every_token_stands_for_a_part_of_the_clip(content):
    tokens, boxes = boxes_of(content)
    size = torch.tensor(content.grid, dtype=torch.float64)
    assert bool((boxes[:, ::2] >= 0).all()) and bool((boxes[:, 1::2] <= size + 1e-9).all())
    assert bool((boxes[:, ::2] < boxes[:, 1::2]).all())
    middle = tokens.positions.double() + 0.5
    assert bool(((boxes[:, ::2] - 0.51 <= middle) & (middle <= boxes[:, 1::2] + 0.51)).all()), "its position is in it"


@pytest.mark.parametrize("num_bins", [1, 7, 40, 64])
def test_parts_of_the_clip_sum_to_all_tokens(content, num_bins):
    tokens, boxes = boxes_of(content)
    edges = torch.linspace(0, content.grid[0], num_bins + 1, dtype=torch.float64)
    assert float(sum_in_time(boxes, edges).sum()) == pytest.approx(len(tokens))
    for axis in (1, 2):
        mapped = map_frames(boxes, content.grid, edges, axis)
        assert mapped.shape == (content.grid[axis], num_bins)
        torch.testing.assert_close(mapped.sum(0), sum_in_time(boxes, edges))
    cells = map_in_space(boxes, content.grid[1:], torch.ones(len(tokens)))
    assert float(cells.sum()) == pytest.approx(len(tokens)) and float(cells.min()) >= 0


@pytest.mark.parametrize(("grid", "side"), [((7, 13), 4), ((5, 5), 3), ((9, 16), 6)])
def test_a_token_of_fre_res_stands_for_the_cell_it_was_pooled_over(grid, side):
    """Also where the grid does not divide into equal cells."""
    tracks, plan, _ = compress(smooth_clip(40, grid), 12 * side * side, pooled_side=side)
    tokens = build_tokens(tracks)
    edges = [list(itertools.pairwise(cell_edges(*pair))) for pair in zip(grid, plan.pooled_grid, strict=True)]
    cells = {(*rows, *columns) for rows in edges[0] for columns in edges[1]}
    boxes = token_boxes(tokens, plan.pooled_grid)[:, 2:]
    for kind in ("dynamic", "static"):
        own = boxes[tokens.kind == TOKEN_KINDS.index(kind)].tolist()
        assert own and {tuple(map(int, box)) for box in own} <= cells


def test_every_latent_has_one_token_if_all_are_kept():
    tokens = video_tokens(torch.randn(5, 3, 4, 6))
    boxes = token_boxes(tokens)
    edges = torch.arange(6, dtype=torch.float64)
    assert torch.equal(map_frames(boxes, (5, 3, 4), edges, 1), torch.full((3, 5), 4.0, dtype=torch.float64))
    assert torch.equal(map_in_space(boxes, (3, 4), torch.ones(60)), torch.full((3, 4), 5.0, dtype=torch.float64))


def test_stretches_cover_every_latent_once():
    """Weighted by its size, each stretch adds 1 for every latent that it stands for."""
    content = make_stretches(smooth_latents(), BUDGET)
    _, boxes = boxes_of(content)
    sizes = (boxes[:, 1::2] - boxes[:, ::2]).prod(1)
    edges = torch.arange(content.grid[0] + 1, dtype=torch.float64)
    in_a_frame = math.prod(content.grid[1:])
    torch.testing.assert_close(
        sum_in_time(boxes, edges, sizes), torch.full((content.grid[0],), float(in_a_frame), dtype=torch.float64)
    )


def test_the_tokens_of_a_gop_stay_in_it():
    content = make_tracks(smooth_latents(), BUDGET)
    tokens, boxes = boxes_of(content)
    first = content.gop_anchor_frame[tokens.gop].double()
    last = first + 1 + content.gop_num_residuals[tokens.gop]
    assert bool((boxes[:, 0] >= first).all()) and bool((boxes[:, 1] <= last + 1e-9).all())
    anchors = tokens.kind == TOKEN_KINDS.index("anchor")
    assert torch.equal(boxes[anchors, 1] - boxes[anchors, 0], torch.ones(int(anchors.sum()), dtype=torch.float64))
    boxes_in_space = {tuple(map(int, box)) for box in boxes[tokens.kind == TOKEN_KINDS.index("summary"), 2:].tolist()}
    assert boxes_in_space == {(0, content.grid[1], 0, content.grid[2])}
    sizes = (boxes[:, 3] - boxes[:, 2]) * (boxes[:, 5] - boxes[:, 4])
    assert set(sizes[anchors].tolist()) == {1.0}


def test_times_and_places_are_inverse():
    seconds = torch.tensor([0.5, 0.6, 1.0, 3.0], dtype=torch.float64)
    edges = frame_edges_s(seconds)
    assert edges.tolist() == [0.5, 0.6, 1.0, 3.0, 5.0]
    assert frames_at(edges, edges).tolist() == [0, 1, 2, 3, 4]
    assert frames_at(edges, torch.tensor([2.0])).tolist() == [2.5]


def test_losses_over_time_sum_to_all_that_was_lost_and_lie_where_they_were():
    tracks = make_tracks(smooth_latents(), BUDGET)
    losses = report_energy(tracks).losses
    total = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in losses)
    edges = frame_edges_s(tracks.frame_seconds)
    for count in (1, 9, 70):
        bounds = torch.linspace(float(edges[0]), float(edges[-1]), count + 1, dtype=torch.float64)
        assert float(lost_in_time(losses, bounds).sum()) == pytest.approx(total)
    worst = losses[0]
    around = torch.tensor([0.0, worst.start_s, worst.end_s, 4.0], dtype=torch.float64)
    lost = lost_in_time(losses, around)
    assert float(lost[1]) == pytest.approx(worst.lost_energy_per_s * (worst.end_s - worst.start_s))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_frame_that_is_sampled_several_times_shares_its_time(times):
    """Ten frames a second for four seconds, each sampled as often: none lasts 0 s, and the last one until the end."""
    seconds = torch.arange(40, dtype=torch.float64) / 10
    edges = frame_edges_s(seconds.repeat_interleave(times))
    torch.testing.assert_close(edges, torch.arange(40 * times + 1, dtype=torch.float64) / (10 * times))
    assert torch.equal(edges[:-1:times], seconds), "it begins when it is shown, to the bit"


def test_edges_increase_however_often_a_time_repeats():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        steps = torch.rand(30, generator=generator, dtype=torch.float64)
        seconds = (steps * (steps > 0.6)).cumsum(0)
        edges = frame_edges_s(seconds)
        assert bool((edges.diff() > 0).all())
        torch.testing.assert_close(frames_at(edges, edges), torch.arange(31, dtype=torch.float64))
        # A frame is on screen at its own time, and no longer than until the next one.
        is_next = seconds.diff() > 0
        assert bool((edges[:-1] >= seconds).all()) and torch.equal(edges[1:-1][is_next], seconds[1:][is_next])


@pytest.mark.parametrize("count", [1, 4])
def test_frames_of_one_time_last_until_the_clip_ends(count):
    seconds = torch.full((count,), 0.5, dtype=torch.float64)
    for end_s, length in ((4.5, 4.0), (None, 1.0), (0.5, 1.0), (0.0, 1.0)):
        wanted = 0.5 + torch.linspace(0, length, count + 1, dtype=torch.float64)
        torch.testing.assert_close(frame_edges_s(seconds, end_s), wanted)


@pytest.mark.parametrize("seconds", [[0, 1, 2], [0, 1, 1, 1], [0, 1, 2, 3, 3, 3]])
def test_the_last_frame_ends_where_the_clip_does_if_that_is_sooner(seconds):
    seconds = torch.tensor(seconds, dtype=torch.float64)
    whole = frame_edges_s(seconds)
    for end_s in (float(seconds[-1]) + 0.5, float(whole[-1]), 100.0, float(seconds[-1]), 0.0):
        edges = frame_edges_s(seconds, end_s)
        assert edges[-1] == (min(end_s, float(whole[-1])) if end_s > seconds[-1] else whole[-1])
        assert bool((edges.diff() > 0).all()) and torch.equal(
            edges[: int((seconds < seconds[-1]).sum()) + 1][:2], whole[:2]
        )


def test_what_is_lost_is_lost_before_the_clip_ends():
    """And the sum over parts of the clip, as inspect shows them, is the sum of all losses."""
    tracks = make_tracks(smooth_latents(), BUDGET)
    end_s = float(tracks.frame_seconds[-1]) + 0.01
    losses = report_energy(tracks, end_s).losses
    edges = frame_edges_s(tracks.frame_seconds, end_s)
    bounds = torch.linspace(float(edges[0]), float(edges[-1]), 6, dtype=torch.float64)
    total = sum(loss.lost_energy_per_s * (loss.end_s - loss.start_s) for loss in losses)
    assert float(lost_in_time(losses, bounds).sum()) == pytest.approx(total) and total > 0
    assert max(loss.end_s for loss in losses) == pytest.approx(end_s)


def test_no_loss_is_spread_over_no_time():
    """Times that repeat are those between them: the losses, and the worst first, are those of evenly sampled frames."""
    tracks = make_tracks(smooth_latents(), BUDGET)
    count = tracks.frame_seconds.shape[0]
    even = torch.arange(count, dtype=torch.float64) / 8
    told = report_energy(replace(tracks, frame_seconds=even)).losses
    twice = report_energy(replace(tracks, frame_seconds=even[::2].repeat_interleave(2)[:count])).losses
    assert all(loss.end_s > loss.start_s for loss in twice)
    assert [(loss.start_s, loss.end_s) for loss in twice] == [(loss.start_s, loss.end_s) for loss in told]
    assert [loss.lost_energy_per_s for loss in twice] == pytest.approx([loss.lost_energy_per_s for loss in told])
    still = report_energy(replace(tracks, frame_seconds=torch.zeros(count, dtype=torch.float64))).losses
    assert min(loss.end_s - loss.start_s for loss in still) >= 1 / count - 1e-9
