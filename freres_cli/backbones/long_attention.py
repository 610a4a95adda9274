"""Attention over a long prompt on GPUs from compute capability 9.0 on, by cuDNN's kernels.

There they take 0.5 to 0.6 times as long as PyTorch's flash kernel, and a prompt of 46,102 tokens 0.8 times (H200, torch
2.11; ``cuda.json``). But cuDNN aligns a causal mask to the first key, prepares each shape of its arguments anew (50 ms),
and compiles each kind of kernel (0.5 to 0.9 s). So only whole chunks of long prompts are run by it: their shapes recur, and
a second thread has it compile while the weights are read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.sizes import find_head_width

# Rows of a chunk, and the shortest prompt that is run in such chunks (ours: below, preparing takes longer than it saves).
LONG_CHUNK_TOKENS = 7168
LONG_PROMPT_TOKENS = 32768
LEAST_CAPABILITY = (9, 0)
# Heads merged at a time, so that float32 copies stay small.
MERGED_HEADS = 8


def attend_long(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last q of kv rows, as attention to the rows before them and attention among themselves.

    ``query``: (n, heads, q, d). ``key``, ``value``: (n, kv_heads, kv, d). ``scaling``: factor of the scores, by default
    1/sqrt(d). Returns (n, heads, q, d).
    """
    num_before = key.shape[2] - query.shape[2]
    own = _attend(query, key[:, :, num_before:], value[:, :, num_before:], scaling, True)
    if not num_before:
        return own[0]
    return merge_parts(_attend(query, key[:, :, :num_before], value[:, :, :num_before], scaling, False), own)


def merge_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to two sets of keys, from the attention to each: exact but for rounding.

    ``first``, ``second``: what was read, (n, heads, q, d), and the logarithm of the sum of the exponentials of the scores,
    (n, heads, q) float32. Returns (n, heads, q, d), in the place of the first.
    """
    out = first[0]
    weights = torch.sigmoid(second[1] - first[1])[..., None]
    parts = (tensor.split(MERGED_HEADS, dim=1) for tensor in (out, second[0], weights))
    for mine, other, weight in zip(*parts, strict=True):
        mine.copy_(torch.lerp(mine.float(), other.float(), weight))
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    call: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, sums, *_ = call(query, key, value, None, True, 0.0, is_causal, False, scale=scaling)
    return out, sums.view(out.shape[:3])


@dataclass(frozen=True)
class HeadKind:
    """What cuDNN has to be tried for: the device, precision and number of heads of queries, those of keys and values, and
    the width of a head."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_width: int

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype, config: Any) -> HeadKind:
        """The heads of a decoder with this ``config``, that runs on ``device`` in ``dtype``."""
        return HeadKind(device, dtype, config.num_attention_heads, config.num_key_value_heads, find_head_width(config))


def is_fit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN is worth trying there, for a model of this precision."""
    return (
        device.type == "cuda"
        and dtype.itemsize == 2
        and torch.cuda.is_available()
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def can_attend_long(query: Tensor, key: Tensor) -> bool:
    """Whether ``attend_long`` runs with heads like these. The first call for a kind of heads tries it."""
    if torch.is_grad_enabled() or not is_fit(query.device, query.dtype):
        return False
    kind = HeadKind(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])
    return find_problem(kind) is None


# Why cuDNN does not attend with some kind of heads, or None if it does; and for which memory ran out when it was last tried.
# The lock is held while one is tried.
_PROBLEMS: dict[HeadKind, str | None] = {}
_STARVED: set[HeadKind] = set()
_TRYING = threading.Lock()


def find_problem(kind: HeadKind) -> str | None:
    """Why cuDNN does not attend with such heads, ``None`` if it does. Trying it has cuDNN compile what it needs."""
    with _TRYING:
        if kind not in _PROBLEMS:
            rows = torch.zeros(1, dtype=kind.dtype, device=kind.device)
            query = rows.new_zeros(1, 128, kind.num_heads, kind.head_width).transpose(1, 2)
            key, value = rows.new_zeros(2, 1, kind.num_kv_heads, 256, kind.head_width)
            try:
                with torch.no_grad():
                    attend_long(query, key, value, None)
                _PROBLEMS[kind] = None
            except torch.OutOfMemoryError:
                _STARVED.add(kind)
                return "out of memory"
            except RuntimeError as error:
                _PROBLEMS[kind] = str(error).strip().partition("\n")[0]
            _STARVED.discard(kind)
        return _PROBLEMS[kind]


def describe_problem(kind: HeadKind) -> tuple[str, ...]:
    """A note for a long prompt if cuDNN failed for such heads. It is run by PyTorch's own kernels instead."""
    with _TRYING:
        problem = "out of memory" if kind in _STARVED else _PROBLEMS.get(kind)
    if problem is None:
        return ()
    return (f"the prefill takes longer: cuDNN's attention failed, and PyTorch's is used: {problem}",)


def start_compiling(kind: HeadKind) -> str | None:
    """Have a thread try ``attend_long`` for such heads, so that what cuDNN compiles is there when a prompt comes.

    Return a note on what runs by it; ``None`` if nothing does.
    """
    if not is_fit(kind.device, kind.dtype):
        return None
    # No daemon: a process must not end while cuDNN compiles.
    threading.Thread(target=find_problem, args=(kind,)).start()
    return f"attention in prompts from {LONG_PROMPT_TOKENS} tokens on: cuDNN's kernels, the fastest on this GPU"
