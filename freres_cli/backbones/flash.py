"""PyTorch's flash kernels, asked for by name: only these say what the exponentials of the scores add up to, by which parts
of an attention are put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend


def takes_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend_flash`` can be called with these, without gradients.

    ``query``: (n, heads, q, d). ``key``, ``value``: (n, kv_heads, kv, d).
    """
    if torch.is_grad_enabled():
        return False
    is_grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":
        choice = torch._fused_sdp_choice(query, key, value, enable_gqa=is_grouped)
        return bool(choice == SDPBackend.FLASH_ATTENTION.value)
    if not query.is_cuda or query.dtype.itemsize != 2 or query.shape[-1] % 8:
        return False
    # Not the choice of PyTorch, which may be cuDNN.
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, is_grouped))


def attend_flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """What the queries read, (n, heads, q, d), and the logarithm of the sum of the scores' exponentials, (n, heads, q) float.

    ``query``, ``key``, ``value``: as in ``takes_flash``. ``scaling``: factor of the scores, by default 1/sqrt(d).
    ``is_causal``: a CPU aligns the mask to the first key, a GPU to the last.
    """
    if query.is_cuda:
        cuda: Any = torch.ops.aten._scaled_dot_product_flash_attention
        out, sums, *_ = cuda(query, key, value, 0.0, is_causal, False, scale=scaling)
    else:
        cpu: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums, *_ = cpu(query, key, value, 0.0, is_causal, scale=scaling)
    return out, sums
