"""In which order tokens stand: a cut bundle has a prefix of each kind."""

from __future__ import annotations

import torch

from freres_cli.method.anchors import spread_order
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
