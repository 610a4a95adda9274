"""Run the MLPs of a decoder on a part of the rows at a time.

The layers of a decoder hold most for a row inside their MLPs, three times the width of their matrices. In parts, a pass can
have more rows in the same memory, and attention, which takes most of the time of a long prompt, is faster on many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PART_ROWS = 4096


class RowParts(nn.Module):
    """An MLP, ``inner``, that takes at most ``PART_ROWS`` rows at a time. Each row's result depends on that row alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> Tensor:
        """(n, L, D) -> (n, L, D)."""
        if rows.shape[:-1].numel() <= PART_ROWS or torch.is_grad_enabled():
            whole: Tensor = self.inner(rows)
            return whole
        out = torch.empty_like(rows)
        # As matrices: of a part of three axes, torch would not see that it is one.
        parts = (tensor.flatten(0, 1).split(PART_ROWS) for tensor in (rows, out))
        for part, place in zip(*parts, strict=True):
            place.copy_(self.inner(part))
        return out


def use_row_parts(decoder: Any) -> None:
    """Let the MLPs of a decoder on a GPU run in parts. Layers of experts share out rows themselves, and stay as they are."""
    for layer in decoder.layers:
        if decoder.device.type == "cuda" and hasattr(layer.mlp, "down_proj"):
            layer.mlp = RowParts(layer.mlp)
