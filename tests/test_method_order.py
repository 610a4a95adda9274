"""In which order tokens stand: a cut bundle has a prefix of each kind."""

from __future__ import annotations

import pytest
import torch

from freres_cli.method.anchors import spread_order
from freres_cli.method.select import cut_tracks
from freres_cli.method.tokens import DYNAMIC, build_tokens
from tests.compressed_clips import compress, smooth_clip


def test_the_first_tokens_of_each_kind_are_of_gops_all_over_the_clip():
    """So a cut bundle, which has a prefix of each kind, sees the whole clip."""
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300, anchors=8, reference_budget_tokens=300)
    count = len(tracks.gop_anchor_frame)
    assert count == 8 and spread_order(8)[:4] == [0, 4, 2, 6]
    for gop in (tracks.anchor_gop, tracks.static_gop, tracks.summary_gop):
        assert gop[:count].tolist() == spread_order(count)


def test_of_cuts_that_found_no_room_the_strongest_are_summed_up():
    latents = torch.cat([smooth_clip(9, (6, 6), seed=s) * (1 + 0.2 * s) for s in range(12)])
    tracks, _, _ = compress(latents, 100, anchors=1, reference_budget_tokens=100, events=True, tau=0.3)
    refused = tracks.gop_event_distance[tracks.gop_start == 2]
    told = tracks.gop_event_distance[tracks.summary_gop[tracks.gop_start[tracks.summary_gop] == 2]]
    assert len(told) > 4 and torch.equal(told, refused.sort(descending=True).values[: len(told)])


def test_an_impulse_in_a_last_bin_that_is_not_full_lies_at_its_frame():
    """398 frames are 397 residuals in bins of 4: the last bin holds one, and its impulse lies at that very frame."""
    latents = 0.01 * smooth_clip(3, (3, 3), width=4)[:1].repeat(398, 1, 1, 1)
    latents[397, 1, 1] += 5.0
    tracks, _, _ = compress(latents, 15, anchors=1, reference_budget_tokens=15, static_per_gop=0)
    tokens = build_tokens(tracks)
    assert tracks.gop_bin_frames.tolist() == [4] and tracks.is_impulse.sum() == 1
    dynamic = tokens.kind == DYNAMIC
    assert tokens.positions[dynamic][tokens.energy[dynamic].argmax()].tolist() == [397, 1, 1]


@pytest.mark.parametrize("budget", [40, 120, 250])
def test_a_cut_bundle_holds_bases_of_what_it_kept_only(budget):
    """A cut bundle holds the pooled anchors of those cells that kept a coefficient, as a compressed one does."""
    latents = smooth_clip(60, (8, 8))
    tracks, _, settings = compress(latents, 400)
    for made in (tracks, cut_tracks(tracks, settings, budget)):
        used = set(zip(made.coefficient_gop.tolist(), made.coefficient_cell.tolist(), strict=True))
        assert set(zip(made.base_gop.tolist(), made.base_cell.tolist(), strict=True)) == used
    assert len(made.base_gop) < len(tracks.base_gop)
