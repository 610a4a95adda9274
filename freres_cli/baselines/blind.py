"""The blind baseline: no visual token at all."""

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
    """Return an empty clip: the prompt is the usual one with nothing between the marks of the video.

    Its grid is one cell at time 0, so that neither the place of the question nor a timestamp tells the clip's length.
    ``latents``: (T, H, W, C), for type and channels; ``width``: D.
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
    summary="no visual token: the question alone",
    source="common practice, to see what guessing is worth",
    has_budget=False,
    makes_bundles=False,
    streams=True,
    compress=keep_nothing,
)
