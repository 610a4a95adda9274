"""Kernels for GPUs, by Triton, of what PyTorch computes in several passes over memory: norms, rotations, gates.

Each rounds where the layers of transformers round, so a result differs from theirs only where a sum is added up in another
order, or an exponential is computed in another way. ``fused.py`` says where they run. Import this module only where Triton
is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one program (ours: enough to keep a GPU's memory busy).
BLOCK = 2048
HEADS_AT_ONCE = 8


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _norm(x, weight, out, num_rows, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < width
    place = rows[:, None] * width + columns[None, :]
    is_inside = (rows < num_rows)[:, None] & is_column[None, :]
    values = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(values * values, 1) / width
    scaled = (values * tl.rsqrt(mean_square + eps)[:, None]).to(out.dtype.element_ty).to(tl.float32)
    factors = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + place, (scaled * factors[None, :]).to(out.dtype.element_ty), mask=is_inside)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis. ``x``: (..., d), contiguous. ``weight``: (d,) of the same dtype. Returns (..., d)."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    num_rows, columns = x.numel() // width, triton.next_power_of_2(width)
    rows = max(1, BLOCK // columns)
    with torch.cuda.device_of(x):
        _norm[(triton.cdiv(num_rows, rows),)](
            x, weight, out, num_rows, width, eps, rows, columns, num_warps=8 if columns > BLOCK else 4
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, out, num_heads, num_rows, x_n, x_h, x_l, out_n, out_h, out_l, angle_n, angle_l,
    half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n, index = row // num_rows, row % num_rows
    heads, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    is_column = columns < half
    is_inside = (heads < num_heads)[:, None] & is_column[None, :]
    place = x + n * x_n + index * x_l + heads[:, None] * x_h + columns[None, :]
    first = tl.load(place, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=is_inside, other=0.0).to(tl.float32)
    angle = n * angle_n + index * angle_l + columns
    cos_first = tl.load(cos + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + angle + half, mask=is_column, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + angle, mask=is_column, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + angle + half, mask=is_column, other=0.0).to(tl.float32)[None, :]
    straight_first, turned_first = first * cos_first, -second * sin_first
    straight_second, turned_second = second * cos_second, first * sin_second
    kind = out.dtype.element_ty
    if ROUNDS:
        straight_first, turned_first = straight_first.to(kind).to(tl.float32), turned_first.to(kind).to(tl.float32)
        straight_second, turned_second = straight_second.to(kind).to(tl.float32), turned_second.to(kind).to(tl.float32)
    target = out + n * out_n + index * out_l + heads[:, None] * out_h + columns[None, :]
    tl.store(target, (straight_first + turned_first).to(kind), mask=is_inside)
    tl.store(target + half, (straight_second + turned_second).to(kind), mask=is_inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels, i and d/2 + i, by their angles.

    ``x``: (n, heads, L, d), the last axis without gaps. ``cos``, ``sin``: (n or 1, L, d), contiguous. Products are rounded
    to the dtype of ``x`` if ``cos`` has it, as decoders do, and only their sum otherwise, as vision towers do. Returns
    (n, heads, L, d), laid out in memory as (n, L, heads, d).
    """
    n, num_heads, num_rows, width = x.shape
    out = x.new_empty(n, num_rows, num_heads, width).transpose(1, 2)
    half = width // 2
    heads = min(HEADS_AT_ONCE, triton.next_power_of_2(num_heads))
    with torch.cuda.device_of(x):
        _rotate[(n * num_rows, triton.cdiv(num_heads, heads))](
            x, cos, sin, out, num_heads, num_rows,
            *x.stride()[:3], *out.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, cos.stride(1),
            half, heads, triton.next_power_of_2(half), cos.dtype == x.dtype,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _gate(gate, up, out, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    is_inside = place < count
    kind = out.dtype.element_ty
    values = tl.load(gate + place, mask=is_inside, other=0.0).to(tl.float32)
    active = (values / (1.0 + tl.exp(-values))).to(kind).to(tl.float32)
    other = tl.load(up + place, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + place, (active * other).to(kind), mask=is_inside)


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """``silu(gates) * up``, both contiguous and of one shape."""
    out = torch.empty_like(gates)
    with torch.cuda.device_of(out):
        _gate[(triton.cdiv(out.numel(), BLOCK),)](gates, up, out, out.numel(), BLOCK, num_warps=8)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _quick_gelu(x, out, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    is_inside = place < count
    kind = out.dtype.element_ty
    values = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    scaled = (values * 1.702).to(kind).to(tl.float32)
    share = (1.0 / (1.0 + tl.exp(-scaled))).to(kind).to(tl.float32)
    tl.store(out + place, (values * share).to(kind), mask=is_inside)


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, of a contiguous tensor."""
    out = torch.empty_like(x)
    with torch.cuda.device_of(out):
        _quick_gelu[(triton.cdiv(out.numel(), BLOCK),)](x, out, out.numel(), BLOCK, num_warps=8)
    return out


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _blend(  # type: ignore[no-untyped-def]
    whole, sums, part, part_sums, num_heads, num_rows, width,
    whole_n, whole_h, whole_q, part_n, part_h, part_q,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    n, h = head // num_heads, head % num_heads
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    is_row = rows < num_rows
    is_inside = is_row[:, None] & (columns < width)[None, :]
    before = tl.load(sums + head * num_rows + rows, mask=is_row, other=0.0)
    added = tl.load(part_sums + head * num_rows + rows, mask=is_row, other=0.0)
    largest = tl.maximum(before, added)
    total = largest + tl.log(tl.exp(before - largest) + tl.exp(added - largest))
    share = 1.0 / (1.0 + tl.exp(before - added))
    place = whole + n * whole_n + h * whole_h + rows[:, None] * whole_q + columns[None, :]
    mine = tl.load(place, mask=is_inside, other=0.0)
    other = tl.load(
        part + n * part_n + h * part_h + rows[:, None] * part_q + columns[None, :], mask=is_inside, other=0.0
    ).to(tl.float32)
    tl.store(place, mine + (other - mine) * share[:, None], mask=is_inside)
    tl.store(sums + head * num_rows + rows, total, mask=is_row)


def blend(whole: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """Join attention to some keys with attention to others, in place.

    ``whole``: what was read from the first, (n, heads, q, d) float32. ``sums``: the logarithm of the sum of the exponentials
    of their scores, (n, heads, q) float32, contiguous. ``part``, ``part_sums``: the same of the others, in any dtype.
    """
    n, num_heads, num_rows, width = whole.shape
    columns = triton.next_power_of_2(width)
    rows = max(1, BLOCK // columns)
    grid = triton.cdiv(num_rows, rows), n * num_heads
    with torch.cuda.device_of(whole):
        _blend[grid](
            whole,
            sums,
            part,
            part_sums,
            num_heads,
            num_rows,
            width,
            *whole.stride()[:3],
            *part.stride()[:3],
            rows,
            columns,
        )
