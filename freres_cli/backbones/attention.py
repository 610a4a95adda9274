"""The two attention calls the towers and decoders are run with, under the names transformers looks them up by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

# A tower hands over packed frames with their boundaries, instead of looping over frames in Python, when the name of the
# attention contains "flash".
PACKED_FRAMES = "freres_flash_packed_frames"

# transformers builds no mask for a name it has no mask function for.
CAUSAL_NO_MASK = "freres_causal_no_mask"


def packed_frames_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | Tensor = 0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention inside each of n stretches (frames, or windows of a frame), in one call for each length there is.

    ``query key value``: (1, heads, total, d), stretches packed one after the other. ``cu_seq_lens_q``: (n + 1,) their
    boundaries. ``max_length_q``: the longest. Returns (1, total, heads, d).
    Ours: the stock tower calls the kernel once per stretch and layer; the result is the same to the bit.
    """
    assert cu_seq_lens_q is not None
    total, longest = query.shape[2], int(max_length_q)
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (total, heads, d)
    if (cu_seq_lens_q.shape[0] - 1) * longest == total:
        return _attend_batch(packed, longest, scaling)[None], None
    out = torch.empty_like(packed[2])
    lengths = cu_seq_lens_q.diff()
    for length in lengths.unique().tolist():
        starts = cu_seq_lens_q[:-1][lengths == length]
        rows = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
        out[rows] = _attend_batch([tensor[rows] for tensor in packed], length, scaling)
    return out[None], None


def _attend_batch(packed: list[Tensor], length: int, scaling: float | None) -> Tensor:
    """Attention inside stretches of one length: q, k, v (n*length, heads, d) -> (n*length, heads, d)."""
    query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in packed)
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention of the last ``q`` of ``kv`` positions, without building a mask on kernels that need none.

    ``query``: (1, heads, q, d). ``key value``: (1, kv_heads, kv, d). Returns (1, q, heads, d).
    One sequence, no padding.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    has_groups = query.shape[1] != key.shape[1]
    if num_queries == 1 or num_queries == num_keys:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=num_queries > 1, scale=scaling, enable_gqa=has_groups
        )
    else:
        bias = _causal_lower_right(num_queries, num_keys)
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=has_groups)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make both known to transformers. Registering twice is harmless."""
    AttentionInterface.register(PACKED_FRAMES, packed_frames_attention)
    AttentionInterface.register(CAUSAL_NO_MASK, causal_attention)


def use_attention(model: nn.Module, name: str) -> None:
    """Run every layer of ``model`` with the attention registered as ``name``.

    Sets the field the layers read. ``set_attn_implementation`` would first look for a flash-attention package.
    """
    model.config._attn_implementation = name


def _causal_lower_right(num_queries: int, num_keys: int) -> Tensor:
    """``torch.nn.attention.bias.causal_lower_right`` without the (2, q, kv) float32 tensor that one allocates."""
    bias: Tensor = CausalBias.__new__(CausalBias)
    CausalBias.__init__(bias, CausalVariant.LOWER_RIGHT, num_queries, num_keys)
    return bias


@contextmanager
def attention_for_padding(model: nn.Module) -> Iterator[None]:
    """Run ``model`` with the attention that takes a mask, for as long."""
    before = model.config._attn_implementation
    use_attention(model, "sdpa")
    try:
        yield
    finally:
        use_attention(model, before)


register()

__all__ = ["CAUSAL_NO_MASK", "PACKED_FRAMES", "attention_for_padding", "use_attention"]
