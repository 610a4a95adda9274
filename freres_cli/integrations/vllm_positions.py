"""Positions of a prompt with bundles, as vLLM's integer buffers can hold them.

vLLM keeps M-RoPE positions in int64 and int32 buffers. A whole number travels as it is. A fraction travels as the bits of
its float32 (ours), which for values from 1e-19 up are integers that no position reaches, and fit an int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Encoded fractions are at or above this, positions below: 2^29 as float32 bits is 1.08e-19.
FIRST_FRACTION = 1 << 29


@dataclass(frozen=True)
class PlacedItem:
    """A bundle in a prompt. ``offset``: rows of the prompt before it. ``positions``: (N, 3) float32, relative.
    ``next_position``: that of the text after it, relative."""

    offset: int
    positions: Tensor
    next_position: float


def encode_positions(positions: Tensor) -> Tensor:
    """float32, at least 0 -> int64, from which ``decode_positions`` gives the same values. Raises ``ValueError`` for a
    position that cannot be told from the bits of a fraction."""
    if not bool(((positions >= 0) & (positions < FIRST_FRACTION)).all()):
        raise ValueError(
            f"positions: expected 0 to {FIRST_FRACTION}, got {float(positions.min())} to {positions.max()}"
        )
    bits = positions.contiguous().view(torch.int32).long()
    is_whole = positions == positions.floor()
    return torch.where(is_whole, positions.long(), bits)


def decode_positions(encoded: Tensor) -> Tensor:
    """int64 or int32 -> float32. See ``encode_positions``. Holds no branch, so it can be compiled."""
    bits = encoded.to(torch.int32).view(torch.float32)
    return torch.where(encoded >= FIRST_FRACTION, bits, encoded.to(torch.float32))


def place_prompt(num_rows: int, items: Sequence[PlacedItem]) -> tuple[Tensor, int]:
    """Return the encoded positions of a whole prompt, (3, L) int64, and what to add to the index of a later row to get its
    position.

    ``num_rows``: L. ``items``: its bundles, in order; every other row is text and takes one position.
    """
    parts, row, position = [], 0, 0.0
    for item in items:
        count = item.offset - row
        parts.append((torch.arange(count, dtype=torch.float32) + position).expand(3, -1))
        position += count
        parts.append(item.positions.T.to(torch.float32) + position)
        row, position = item.offset + len(item.positions), position + item.next_position
    parts.append((torch.arange(num_rows - row, dtype=torch.float32) + position).expand(3, -1))
    delta = position - row
    if delta != int(delta):
        raise ValueError(f"text after a video: expected a whole position, got {position}")
    return encode_positions(torch.cat(parts, dim=1)), int(delta)
