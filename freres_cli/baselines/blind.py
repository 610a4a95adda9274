"""The blind baseline: no visual token at all."""

from __future__ import annotations

import torch
from torch import Tensor

from freres_cli.records import VideoTokens


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
