"""Attention over a long prompt on GPUs from compute capability 9.0 on, by cuDNN's kernels.

There they take 0.5 to 0.6 times as long as PyTorch's flash kernel, and a prompt of 46,102 tokens 0.75 times (H200, torch
2.11; ``cuda.json``). But cuDNN aligns a causal mask to the first key, prepares each shape of its arguments anew (50 ms),
and compiles each kind of kernel (0.5 to 0.9 s). So only whole chunks of long prompts are run by it, all of one size: such a
prompt has two shapes, and a second thread has cuDNN compile while the weights are read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.fused import Written, find_kernels
from freres_cli.backbones.sizes import find_head_width
from freres_cli.errors import is_out_of_memory

# The most and the fewest rows of a chunk, and the shortest prompt that is run in such chunks (ours: below, preparing takes
# longer than it saves).
LONG_CHUNK_TOKENS = 7168
LEAST_CHUNK_TOKENS = 5888
LONG_PROMPT_TOKENS = 32768
# Chunks are multiples of so many rows, which is how many these kernels take at a time.
CHUNK_STEP = 128
LEAST_CAPABILITY = (9, 0)


def fit_long_chunk(num_rows: int) -> int:
    """Return how many rows a chunk of a long prompt has: as many as leave the fewest rows after the last whole chunk, which
    PyTorch's kernel runs and takes twice as long for."""
    return min(range(LONG_CHUNK_TOKENS, LEAST_CHUNK_TOKENS - 1, -CHUNK_STEP), key=lambda size: num_rows % size)


def is_whole_chunk(num_queries: int, num_keys: int) -> bool:
    """Whether so many rows of a long prompt, the last of so many keys, are a whole chunk after others of its size."""
    return num_queries >= LEAST_CHUNK_TOKENS and num_keys % num_queries == 0


def attend_long(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last q of kv rows, as attention among themselves and to each q rows before them.

    ``query``: (n, heads, q, d). ``key``, ``value``: (n, kv_heads, kv, d), where q divides kv. ``scaling``: factor of the
    scores, by default 1/sqrt(d). Returns (n, heads, q, d).
    """
    num_queries, num_before = query.shape[2], key.shape[2] - query.shape[2]
    own, sums = _attend(query, key[:, :, num_before:], value[:, :, num_before:], scaling, True)
    if not num_before:
        return own
    blend = (find_kernels(query.device, query.dtype)[0] or Written).blend
    # Of 16 bits, each part would lose some.
    whole, dtype = own.float(), own.dtype
    del own
    for start in range(0, num_before, num_queries):
        part = slice(start, start + num_queries)
        blend(whole, sums, *_attend(query, key[:, :, part], value[:, :, part], scaling, False))
    return whole.to(dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """What was read, (n, heads, q, d), and the logarithm of the sum of the scores' exponentials, (n, heads, q) float32."""
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
            try:
                rows = torch.zeros(1, dtype=kind.dtype, device=kind.device)
                query = rows.new_zeros(1, CHUNK_STEP, kind.num_heads, kind.head_width).transpose(1, 2)
                key, value = rows.new_zeros(2, 1, kind.num_kv_heads, 2 * CHUNK_STEP, kind.head_width)
                with torch.no_grad():
                    attend_long(query, key, value, None)
                _PROBLEMS[kind] = None
            except RuntimeError as error:
                if is_out_of_memory(error):
                    _STARVED.add(kind)
                    return "out of memory"
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
