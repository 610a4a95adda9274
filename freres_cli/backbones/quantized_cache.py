"""A KV cache in 8 bits: of each row of each head, its numbers as codes and the one scale that they share.

Ours: a scale for each row and head, because rows are only ever appended. A row is rounded when it is written and never
again, so a prefill in chunks gives the cache of one pass, and a batch that of each question alone. Scales over several
rows, which 2 bits need for keys (KIVI, arXiv 2402.02750), would have to wait for those rows or round them twice. Attention
also reads the newest rows rounded: what it sees does not depend on where a chunk ends.

A row is stored as bytes, its codes and then its scale, so whoever crops, reorders, copies or saves rows need not know.
Attention gets the rows of its own layer in the model's precision, and drops them when it is done.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from freres_cli.backbones.cache import ReservedLayer

# The codes of each storage, and the largest of them.
CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def row_format(head_width: int, dtype: torch.dtype, kv: str | None) -> tuple[int, torch.dtype]:
    """How many numbers a row of one head is stored as, and of which dtype.

    ``head_width``: d. ``dtype``: the model's precision, which scales have too. ``kv``: as in ``devices.Storage``.
    """
    return (head_width, dtype) if kv is None else (head_width + dtype.itemsize, torch.uint8)


def pack_rows(rows: Tensor, kv: str) -> Tensor:
    """Round rows to 8 bits: (..., d) -> (..., d + bytes of a scale) uint8.

    int8: off by at most half a scale. fp8 (e4m3): by at most 1/16 of a number, or 1/1024 of a scale near zero.
    """
    dtype, largest = CODES[kv]
    exact = rows.float()
    # Codes are made with the scale as it is stored. Below the smallest normal number it would be far off, or zero.
    tops = exact.abs().amax(-1, keepdim=True)
    scales = (tops / largest).to(rows.dtype).clamp(min=torch.finfo(rows.dtype).tiny)
    # A row that is not finite stays so.
    scales = scales.where(tops.isinf(), scales.clamp(max=largest_scale(rows.dtype, largest)))
    codes = (exact / scales.float()).clamp_(-largest, largest)
    if kv == "int8":
        codes.round_()
    return torch.cat([codes.to(dtype).view(torch.uint8), scales.view(torch.uint8)], dim=-1)


@functools.cache
def largest_scale(dtype: torch.dtype, largest: float) -> float:
    """The largest scale in ``dtype`` whose product with the ``largest`` code is finite in it."""
    scale = torch.tensor(torch.finfo(dtype).max / largest, dtype=dtype)
    if not (scale * largest).isfinite():
        scale = torch.nextafter(scale, torch.zeros_like(scale))
    return float(scale)


def unpack_rows(packed: Tensor, dtype: torch.dtype, kv: str) -> Tensor:
    """The rows that ``pack_rows`` rounded: (..., d + bytes of a scale) uint8 -> (..., d) of the model's ``dtype``."""
    scales = packed[..., -dtype.itemsize :].clone(memory_format=torch.contiguous_format).view(dtype)
    codes = packed[..., : -dtype.itemsize].view(CODES[kv][0])
    # Every code is exact in the model's precision, so there is one rounding, and no copy in float32.
    return codes.to(dtype).mul_(scales)


class QuantizedLayer(ReservedLayer):
    """One layer's keys and values as ``pack_rows`` stores them. ``kv``: int8 or fp8. No gradients pass through it."""

    def __init__(self, kv: str, **options: Any) -> None:
        super().__init__(**options)
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append rows, (n, heads, L, d), and return all keys and values as they are after rounding."""
        keys, values = self.append(pack_rows(key_states, self.kv), pack_rows(value_states, self.kv))
        dtype = key_states.dtype
        return unpack_rows(keys, dtype, self.kv), unpack_rows(values, dtype, self.kv)


def make_cache(config: Any, kv: str | None = None) -> DynamicCache:
    """An empty cache for one sequence of a decoder with this ``config``; ``kv``: as in ``devices.Storage``. Layers that
    keep a window or a state are those of transformers."""
    cache = DynamicCache(config=config)
    cache.layers = [
        layer if type(layer) is not DynamicLayer else ReservedLayer() if kv is None else QuantizedLayer(kv)
        for layer in cache.layers
    ]
    return cache
