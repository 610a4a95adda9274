"""The blind baseline: no visual tokens at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def keep_nothing(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return an empty clip: the usual prompt, with nothing between the tokens that mark the video.

    Its grid is one cell at time 0, so neither the position of the question nor a timestamp reveals the clip's length.
    ``latents``: (T, H, W, C), only for dtype and channels. ``frame_seconds``: (T,), only for its dtype.
    ``budget_tokens`` is ignored. ``width``: D.
    """
    return VideoTokens(
        latents=latents.new_empty(0, latents.shape[-1]),
        positions=torch.empty(0, 3),
        seconds=torch.empty(0, dtype=torch.float64),
        kind=torch.empty(0, dtype=torch.uint8),
        gop=torch.empty(0, dtype=torch.int64),
        energy=torch.empty(0),
        grid=(1, 1, 1),
        width=width,
        frame_seconds=frame_seconds.new_zeros(1),
    )


METHOD = Method(
    name="blind",
    summary="no visual tokens: the question alone",
    source="common practice, to measure how well guessing does",
    has_budget=False,
    makes_bundles=False,
    streams=True,
    compress=keep_nothing,
)
