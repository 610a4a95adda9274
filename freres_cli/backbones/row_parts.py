"""Run the MLPs of a decoder on a part of the rows at a time.

The layers of a decoder hold most for a row inside their MLPs, three times the width of their matrices. In parts, a pass can
have more rows in little more memory, and attention, which takes most of the time of a long prompt, is faster on many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

PART_ROWS = 4096


def use_row_parts(decoder: Any) -> None:
    """Let the MLPs of a decoder on a GPU run in parts. Layers of experts share out rows themselves, and stay as they are."""
    for layer in decoder.layers:
        if decoder.device.type == "cuda" and hasattr(layer.mlp, "down_proj"):
            # In place of a module around it, which would change the names of its weights.
            layer.mlp.forward = partial(run_in_parts, layer.mlp.forward)


def run_in_parts(forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """What ``forward`` makes of rows, (n, L, D) -> (n, L, D), from at most ``PART_ROWS`` of them at a time.

    ``forward``: whose result for a row depends on that row alone.
    """
    if rows.shape[:-1].numel() <= PART_ROWS or torch.is_grad_enabled():
        return forward(rows)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    # As matrices: of a part of three axes, torch would not see that it is one.
    parts = (tensor.flatten(0, 1).split(PART_ROWS) for tensor in (rows, out))
    for part, place in zip(*parts, strict=True):
        place.copy_(forward(part))
    return out
