"""A KV cache with spare rows, into which each new token is written.

The cache of transformers is copied whole for each new token. This one holds the same keys and values, so the results are
the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import __version__
from transformers.cache_utils import DynamicLayer

# The argument by which a decoder of transformers takes its cache.
CACHE_ARGUMENT = "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"

# Spare rows, as a share of the rows (ours: little enough for memory to stay within 5 % of weights and cache), and the least
# that a cache grows by after the prefill.
SPARE_PART = 32
LEAST_SPARE = 32
# Room is a multiple of so many rows: products with buffers of other lengths take a GPU ten times as long (``cuda.json``).
ROOM_STEP = 64


class ReservedLayer(DynamicLayer):
    """One layer's keys and values, as the first rows of buffers that have room for more.

    ``num_reserved``: for how many rows there has to be room when the buffers are next allocated. Whoever replaces ``keys``
    and ``values``, as cropping, reordering and copying do, need not know about the buffers: rows are written into them only
    while ``keys`` and ``values`` are their first rows.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_reserved = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append rows, (n, heads, L, d), and return all keys and values.

        Gradients need the earlier tensors as they were, so with gradients the cache is copied as that of transformers.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._buffers = None
            return super().update(key_states, value_states, *args, **options)
        return self.append(key_states, value_states)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows as they are stored, (n, heads, L, w), and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start = self.get_seq_length()
        end = start + keys.shape[-2]
        room_keys, room_values = self._room_for(end, keys, values)
        room_keys[..., start:end, :] = keys
        room_values[..., start:end, :] = values
        self.keys, self.values = room_keys[..., :end, :], room_values[..., :end, :]
        return self.keys, self.values

    @property
    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """The buffers of keys and of values, (n, heads, rows with room, w), ``None`` while there are none."""
        return self._buffers

    def make_room(self, num_rows: int) -> None:
        """Have buffers with room for at least ``num_rows``, which begin with the rows that there are."""
        assert self.keys is not None and self.values is not None
        self._room_for(num_rows, self.keys[..., :0, :], self.values[..., :0, :])

    def _room_for(self, num_rows: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers for ``num_rows`` rows that begin with the rows of the cache: those there are, or else new ones."""
        held = self._buffers
        if (
            held is not None
            and num_rows <= held[0].shape[-2]
            and _begins(held[0], self.keys, key_states)
            and _begins(held[1], self.values, value_states)
        ):
            return held
        self._buffers = held = None
        start = self.get_seq_length()
        spare = max(LEAST_SPARE, start // SPARE_PART) if start else 0
        size = -(-max(self.num_reserved, num_rows + spare) // ROOM_STEP) * ROOM_STEP
        # One after the other: the old keys are gone before there are new values.
        room_keys = key_states.new_empty((*key_states.shape[:-2], size, key_states.shape[-1]))
        if start and self.keys is not None:
            room_keys[..., :start, :] = self.keys
        self.keys = room_keys[..., :start, :]
        room_values = value_states.new_empty((*value_states.shape[:-2], size, value_states.shape[-1]))
        if start and self.values is not None:
            room_values[..., :start, :] = self.values
        self.values = room_values[..., :start, :]
        self._buffers = (room_keys, room_values)
        return self._buffers

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences ``beam_idx``, which may repeat, and drop the room for more rows."""
        self._buffers = None
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Drop all rows, and the room for them."""
        self._buffers = None
        super().reset()


def _begins(room: Tensor, rows: Tensor | None, states: Tensor) -> bool:
    """Whether ``rows`` are the first rows of ``room``, and ``states`` may be written after them."""
    if room.shape[:-2] != states.shape[:-2] or room.dtype != states.dtype:
        return False
    if rows is None or rows.numel() == 0:
        return True
    return rows.data_ptr() == room.data_ptr() and rows.stride() == room.stride() and rows.shape[:-2] == room.shape[:-2]


def reserve_rows(cache: Any, num_rows: int) -> None:
    """Let a cache be allocated for ``num_rows`` rows, and some text after them, when it next has to grow."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, ReservedLayer):
            layer.num_reserved = num_rows + num_rows // SPARE_PART
