"""The attention functions used by towers and decoders, registered under the names that transformers looks up.

There are three functions, each with three kernels (``devices.ATTENTION_NAMES``). None of them builds a mask or looks at
positions, so fractional positions and later chunks of a prefill work the same with every kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from freres_cli.backbones.flash import attend_flash, takes_flash
from freres_cli.backbones.fused import Written
from freres_cli.backbones.long_attention import attend_long, can_attend_long, is_whole_chunk
from freres_cli.backbones.shared_prefix import Shared, attend_shared
from freres_cli.devices import flash_package
from freres_cli.errors import ResourceError

# If the name of the attention contains "flash", a tower passes all frames packed together with their boundaries instead
# of looping over frames in Python.
PACKED_FRAMES = "freres_flash_packed_frames"

# For towers that take whole frames as a batch and do not loop over them.
WHOLE_FRAMES = "freres_whole_frames"

# transformers builds no mask for a name that has no mask function.
CAUSAL_NO_MASK = "freres_causal_no_mask"

# From so many rows on, a chunk of a prompt on the CPU is attended to in two parts (ours: the mask of fewer is small, and so
# questions are read as on a device that has no such parts, to the bit).
LEAST_ROWS_IN_PARTS = 512

# PyTorch keeps which kernels are allowed for the whole process, and each of two threads would put back what it found.
_KERNEL_FLAGS = RLock()

Attend = Callable[[Tensor, Tensor, Tensor, float | None, bool], Tensor]


def packed_frames_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | Tensor = 0,
    kernel: str = "sdpa",
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within each of n segments (frames, or windows of a frame), in one call per distinct length.

    ``query``, ``key`` and ``value``: (1, heads, total, d), segments packed one after the other. ``cu_seq_lens_q``:
    (n + 1,), their boundaries. ``max_length_q``: the longest length. ``scaling``: factor of the scores, by default
    1/sqrt(d). ``kernel``: sdpa, flash or eager. ``module`` and ``attention_mask`` are part of transformers' interface
    and not used. Returns (1, total, heads, d) and None.
    Ours, because the stock tower calls the kernel once per segment and layer; with sdpa the results are bit-identical.
    """
    assert cu_seq_lens_q is not None
    total, longest = query.shape[2], int(max_length_q)
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (total, heads, d)
    if kernel == "flash" and (package := flash_package()) is not None:
        bounds = cu_seq_lens_q.to(torch.int32)
        out = package.flash_attn_varlen_func(*packed, bounds, bounds, longest, longest, softmax_scale=scaling)
        return out[None], None
    attend = _KERNELS[kernel]
    if (cu_seq_lens_q.shape[0] - 1) * longest == total:
        return _attend_segments(attend, packed, longest, scaling)[None], None
    out = torch.empty_like(packed[2])
    for length, rows in _rows_by_length(cu_seq_lens_q):
        out[rows] = _attend_segments(attend, [tensor[rows] for tensor in packed], length, scaling)
    return out[None], None


# The boundaries last seen, and what was found for them: every layer of a pass has the same, and looking them up waits for
# the device.
_LAST_ROWS: list[tuple[Tensor, list[tuple[int, Tensor]]]] = []


def _rows_by_length(bounds: Tensor) -> list[tuple[int, Tensor]]:
    """Each length of a segment, and the rows of all segments that have it. ``bounds``: (n + 1,)."""
    for known, found in _LAST_ROWS:
        if known is bounds:
            return found
    lengths, made = bounds.diff(), []
    for length in lengths.unique().tolist():
        starts = bounds[:-1][lengths == length]
        made.append((length, (starts[:, None] + torch.arange(length, device=starts.device)).flatten()))
    _LAST_ROWS[:] = [(bounds, made)]
    return made


def _attend_segments(attend: Attend, packed: list[Tensor], length: int, scaling: float | None) -> Tensor:
    """Attention within segments of one length: q, k, v (n*length, heads, d) -> (n*length, heads, d)."""
    query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in packed)
    return attend(query, key, value, scaling, False).transpose(1, 2).flatten(0, 1)


def batch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    kernel: str = "sdpa",
    is_last_of_keys: bool = True,
    attended: list[Tensor] | None = None,
    key_bias: Tensor | None = None,
    is_long: bool = False,
    shared: Shared | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of a batch without padding: causal if ``is_last_of_keys``, else from every query to every key.

    ``query``: (n, heads, q, d). ``key`` and ``value``: (n, kv_heads, kv, d). With ``is_last_of_keys`` the queries are the
    last q of the kv positions. ``scaling``: factor of the scores, by default 1/sqrt(d). ``kernel``: sdpa, flash or eager.
    ``attended``: gets the weights of the last query, as ``attend_last`` gives them; no others are computed. ``key_bias``:
    of a single query to keys that are not all filled, as ``attend_row`` takes it. ``is_long``: of a long prompt, whose
    whole chunks have kernels of their own. ``shared``: what the n sequences continue, of which ``key`` and ``value`` are then
    no part, as ``attend_shared`` takes it. ``module`` and ``attention_mask`` are part of transformers' interface and not
    used. Returns (n, q, heads, d) and None.
    """
    if key_bias is not None:
        return attend_row(query, key, value, scaling, key_bias), None
    if shared is not None:
        out = attend_shared(query, key, value, scaling, cast(int, module.layer_idx), shared, kernel)
        return out.transpose(1, 2).contiguous(), None
    if attended is not None:
        attended.append(attend_last(query, key, scaling))
    if is_long and kernel == "sdpa" and is_whole_chunk(query.shape[2], key.shape[2]) and can_attend_long(query, key):
        out = attend_long(query, key, value, scaling)
    else:
        out = _KERNELS[kernel](query, key, value, scaling, is_last_of_keys)
    return out.transpose(1, 2).contiguous(), None


def attend_row(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, key_bias: Tensor) -> Tensor:
    """Attention of one query to a buffer of keys, of which the last ones may not be filled yet.

    ``query``: (1, heads, 1, d). ``key``, ``value``: (1, kv_heads, kv, d). ``scaling``: factor of the scores, by default
    1/sqrt(d). ``key_bias``: (kv,) float32, added to the scores: 0, or minus infinity for keys that are not there. Returns
    (1, 1, heads, d). Ours: as products of matrices, because its shapes do not change from token to token, no kernel with a
    mask reads shared keys once, and scores stay in float32.
    """
    groups = query[0, :, 0].unflatten(0, (key.shape[1], -1))  # (kv_heads, heads of each, d)
    scores = _score(groups, key[0]) * (query.shape[-1] ** -0.5 if scaling is None else scaling) + key_bias
    return torch.bmm(scores.softmax(-1).to(value.dtype), value[0]).flatten(0, 1)[None, None]


def attend_last(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Return the attention weights of the last query of the first sequence, (heads, kv) float32.

    ``query``: (n, heads, q, d). ``key``: (n, kv_heads, kv, d). ``scaling``: factor of the scores, by default 1/sqrt(d).
    """
    row = query[0, :, -1].unflatten(0, (key.shape[1], -1))  # (kv_heads, heads of each, d)
    scores = _score(row, key[0]) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return scores.softmax(-1).flatten(0, 1)


def _score(groups: Tensor, key: Tensor) -> Tensor:
    """Return the products of one query, (kv_heads, heads of each, d), with keys, (kv_heads, kv, d), in float32: in 16 bits,
    scores far from 0 would be off by a tenth of a weight and more."""
    if groups.is_cuda and groups.dtype.itemsize == 2:  # where a product can be had as it was added up
        return torch.bmm(groups, key.mT, torch.float32)
    # One head at a time: a copy of all keys would take as much memory as those of two layers.
    return torch.stack([row.float() @ own.float().mT for row, own in zip(groups, key, strict=True)])


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool) -> Tensor:
    """The kernel that PyTorch picks, with a mask only where it needs one."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_on_cpu = query.device.type == "cpu"
    if is_causal and not is_on_cpu and takes_flash(query, key, value):
        # Not what PyTorch picks: from compute capability 9.0 on that is cuDNN's kernel, which prepares each new shape for
        # 45 ms, and every token of an answer has one.
        return attend_flash(query, key, value, scaling, num_queries > 1)[0]
    if query.is_cuda and query.shape[1] != key.shape[1] and not _has_grouped_kernel(query):
        # PyTorch would hold all scores: 4 bytes for each pair.
        key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    is_late = is_causal and LEAST_ROWS_IN_PARTS <= num_queries < num_keys
    if is_late and is_on_cpu and takes_flash(query, key, value):
        return _attend_parts(query, key, value, scaling)
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if not is_causal or num_queries in (1, num_keys):
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal and num_queries > 1, **options)
    bias = _causal_lower_right(num_queries, num_keys)
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)


def _has_grouped_kernel(query: Tensor) -> bool:
    """Whether a kernel on CUDA takes heads that share keys and values: in 16 bits, from compute capability 8.0 on."""
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(query.device) < (8, 0)
    return query.dtype.itemsize == 2 and not is_old


def _attend_parts(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last q of kv rows on the CPU: among themselves, and to all before them, put together.

    Ours, because PyTorch's kernel aligns a causal mask to the first key. With a mask of its own it would hold 4 bytes for
    each pair, and compute those that are hidden.
    """
    num_before = key.shape[2] - query.shape[2]
    own, sums = attend_flash(query, key[:, :, num_before:], value[:, :, num_before:], scaling, True)
    part, part_sums = attend_flash(query, key[:, :, :num_before], value[:, :, :num_before], scaling, False)
    whole = own.float() if own.dtype.itemsize == 2 else own
    Written.blend(whole, sums, part, part_sums)
    return whole.to(own.dtype)


def _repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Keys or values of every head, from those that groups of heads share: (n, kv_heads, kv, d) -> (n, heads, kv, d)."""
    return tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool) -> Tensor:
    """The flash_attn package, whose causal mask is aligned to the last key, or else only PyTorch's flash kernel."""
    if (package := flash_package()) is not None:
        swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out: Tensor = package.flash_attn_func(*swapped, softmax_scale=scaling, causal=is_causal)
        return out.transpose(1, 2)
    if takes_flash(query, key, value):  # without gradients
        if is_causal:
            return _attend_sdpa(query, key, value, scaling, is_causal)  # which calls the same kernel, with a mask
        return attend_flash(query, key, value, scaling, False)[0]
    with _KERNEL_FLAGS, sdpa_kernel(SDPBackend.FLASH_ATTENTION), _no_kernel_refused(query):
        return _attend_sdpa(query, key, value, scaling, is_causal)


@contextmanager
def _no_kernel_refused(query: Tensor) -> Any:
    try:
        yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        got = f"heads of width {query.shape[-1]} in {str(query.dtype).removeprefix('torch.')} on {query.device}"
        raise ResourceError(f"attention flash: no flash kernel takes {got}", "use --attn sdpa") from error


def _attend_eager(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool) -> Tensor:
    """Attention written out, with the whole score matrix in memory: slow, but the same on every machine."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if is_causal:
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(
            num_keys - num_queries + 1
        )
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


_KERNELS: dict[str, Attend] = {"sdpa": _attend_sdpa, "flash": _attend_flash, "eager": _attend_eager}


def register() -> None:
    """Register all of them with transformers. Doing so twice is harmless."""
    for kernel in _KERNELS:
        calls: dict[str, Callable[..., Any]] = {
            PACKED_FRAMES: partial(packed_frames_attention, kernel=kernel),
            WHOLE_FRAMES: partial(batch_attention, kernel=kernel, is_last_of_keys=False),
            CAUSAL_NO_MASK: partial(batch_attention, kernel=kernel),
        }
        for call, function in calls.items():
            AttentionInterface.register(_name(call, kernel), function)


def _name(call: str, kernel: str) -> str:
    """The registered name. It never adds "flash": transformers would take a decoder's attention for its own, and gaps
    between positions for several packed sequences."""
    return call if kernel == "sdpa" else f"{call}_{'fused' if kernel == 'flash' else kernel}"


def use_attention(model: nn.Module, call: str, kernel: str = "sdpa") -> None:
    """Make every layer of ``model`` use one of the functions above, or any that transformers knows, with a kernel.

    Sets the field that the layers read, because ``set_attn_implementation`` would first look for a flash-attention
    package.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation = _name(call, kernel)


def _causal_lower_right(num_queries: int, num_keys: int) -> Tensor:
    """``torch.nn.attention.bias.causal_lower_right`` without the (2, q, kv) float32 tensor that it allocates."""
    bias = CausalBias.__new__(CausalBias)
    CausalBias.__init__(bias, CausalVariant.LOWER_RIGHT, num_queries, num_keys)
    return bias


@contextmanager
def attention_for_padding(model: nn.Module) -> Iterator[None]:
    """Make ``model`` use an attention that accepts a mask inside the block.

    Not cuDNN's, which prepares each new shape for 45 ms: every token of an answer has one.
    """
    config = model.config
    assert isinstance(config, PretrainedConfig)
    before = config._attn_implementation
    use_attention(model, "sdpa")
    try:
        with _KERNEL_FLAGS, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        use_attention(model, before)


register()
