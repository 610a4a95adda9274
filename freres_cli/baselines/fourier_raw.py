"""Fourier Compressor without rescaling: what the authors feed to a model that was trained for it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method
from freres_cli.baselines.fourier import crop_frames
from freres_cli.baselines.lowres import shrink_frames
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    from torch import Tensor


def crop_raw_frequencies(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return the tokens of ``fourier.crop_frequencies`` without its factor: a frame of h x w cells is sqrt(H*W / (h*w))
    times larger.

    ``latents``: (T, H, W, C). ``frame_seconds``: (T,) float64. ``budget_tokens``: B. ``width``: D. Raises ``ValueError``
    if the budget is below one.
    """
    return shrink_frames(latents, frame_seconds, budget_tokens, width, partial(crop_frames, keeps_scale=False))


METHOD = Method(
    name="fourier-raw",
    summary="every frame cropped to its lowest spatial frequencies, at the scale of the orthonormal transform",
    source="Fourier Compressor, arXiv 2508.06038",
    deviations="no trained weights, which the authors' form needs: its tokens are sqrt(HW/hw) times too large for a model as "
    "it is; rows of a frame may differ by a token, and frames too, to meet the budget exactly; below one token a frame, "
    "evenly spread frames are kept",
    mixes=True,
    compress=crop_raw_frequencies,
)
