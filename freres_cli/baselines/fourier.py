"""Fourier Compressor: the low spatial frequencies of every frame, turned back into a smaller frame."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.lowres import choose_rows, shrink_frames, split_axis
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def crop_frequencies(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return every frame of ``latents`` (T, H, W, C) at fewer tokens, from its lowest frequencies: min(B, T*H*W) tokens.

    B is ``budget_tokens``; the cells are those of ``lowres.shrink_frames``. A frame of h x w cells is the first h x w
    coefficients of its orthonormal 2-D DCT-II, inverted at that size and multiplied by sqrt(h*w / (H*W)), so that a
    constant frame keeps its value. Where rows have different numbers of cells, each row is cropped to its own number after
    the crop along columns (ours). ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is
    below one.
    """
    return shrink_frames(latents, frame_seconds, budget_tokens, width, partial(crop_frames, keeps_scale=True))


def crop_frames(latents: Tensor, num_cells: int, keeps_scale: bool) -> tuple[Tensor, Tensor]:
    """Return ``latents`` (T, H, W, C) at ``num_cells`` tokens a frame, and what each spans, as ``lowres.pool_cells`` does.

    ``keeps_scale``: whether a constant frame keeps its value; if not, it grows by sqrt(H*W / (h*w)).
    """
    _, grid_h, grid_w, _ = latents.shape
    cells_of_row = choose_rows(grid_h, grid_w, num_cells)
    num_rows = len(cells_of_row)
    frames = torch.einsum("rh,thwc->trwc", make_crop(grid_h, num_rows, keeps_scale), latents.to(torch.float32))
    heights = split_axis(grid_h, num_rows)
    values, spans = [], []
    for row, columns in enumerate(cells_of_row):
        values.append(torch.einsum("kw,twc->tkc", make_crop(grid_w, columns, keeps_scale), frames[:, row]))
        spans.append(torch.cat([heights[row].expand(columns, 2), split_axis(grid_w, columns)], dim=1))
    return torch.cat(values, dim=1), torch.cat(spans)


def make_crop(size: int, count: int, keeps_scale: bool) -> Tensor:
    """Return the matrix (count, size) float32 that takes an axis of ``size`` to ``count`` <= ``size`` samples: orthonormal
    DCT-II, its first ``count`` coefficients, inverse at that length. At full size it is exactly the identity.

    ``keeps_scale``: whether to multiply by sqrt(count / size).
    """
    if count == size:
        return torch.eye(size)
    crop = _dct(count).T @ _dct(size)[:count]
    return (crop * math.sqrt(count / size) if keeps_scale else crop).to(torch.float32)


def _dct(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix, (size, size) float64, a row for each frequency."""
    index = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * index[:, None] * (index + 0.5))
    waves[0] /= math.sqrt(2)
    return waves * math.sqrt(2 / size)


METHOD = Method(
    name="fourier",
    summary="every frame cropped to its lowest spatial frequencies, at the scale of the latents",
    source="Fourier Compressor, arXiv 2508.06038, made training-free",
    deviations="no trained weights, so tokens are multiplied by sqrt(hw/HW) to keep their scale; rows of a frame may differ "
    "by a token, and frames too, to meet the budget exactly; below one token a frame, evenly spread frames are kept",
    mixes=True,
    compress=crop_frequencies,
)
