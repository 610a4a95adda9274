"""Checks on visual tokens that several tests use."""

from __future__ import annotations

import torch

from freres_cli.records import VideoTokens


def same_tokens(a: VideoTokens, b: VideoTokens) -> None:
    """Both are the same to the bit, in every field."""
    names = ("latents", "positions", "seconds", "kind", "gop", "energy", "frame_seconds")
    assert (a.grid, a.width) == (b.grid, b.width)
    for name in names:
        assert getattr(a, name).dtype == getattr(b, name).dtype and torch.equal(getattr(a, name), getattr(b, name)), (
            name
        )
