"""Attention over a long prompt in parts, and MLPs in parts of the rows: what the whole gives, on the CPU.

``test_cuda.py`` has cuDNN's kernels.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from freres_cli.backbones import engine, long_attention, row_parts
from freres_cli.backbones.attention import batch_attention
from freres_cli.backbones.row_parts import run_in_parts, use_row_parts


def attend_written_out(query, key, value, scaling, is_causal):
    """What cuDNN returns: a causal mask is aligned to the first key."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def heads_like(num_queries, num_keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 4, num_queries, 8), (1, 2, num_keys, 8), (1, 2, num_keys, 8))
    return [torch.randn(shape, generator=generator).mul(2).to(dtype) for shape in shapes]


@pytest.mark.parametrize("num_keys", [5, 10, 40])
@pytest.mark.parametrize("scaling", [None, 0.9])
def test_parts_give_what_causal_attention_gives(monkeypatch, num_keys, scaling):
    monkeypatch.setattr(long_attention, "_attend", attend_written_out)
    query, key, value = heads_like(5, num_keys)
    ours = long_attention.attend_long(query, key, value, scaling)
    mask = torch.ones(5, num_keys, dtype=torch.bool).tril(num_keys - 5)
    options = {"attn_mask": mask, "scale": scaling, "enable_gqa": True}
    torch.testing.assert_close(ours, scaled_dot_product_attention(query, key, value, **options), rtol=1e-5, atol=1e-6)


def test_only_whole_chunks_of_a_long_prompt_are_run_so(monkeypatch):
    taken = []
    monkeypatch.setattr(long_attention, "LEAST_CHUNK_TOKENS", 4)
    monkeypatch.setattr("freres_cli.backbones.attention.can_attend_long", lambda query, key: True)
    monkeypatch.setattr(
        "freres_cli.backbones.attention.attend_long", lambda query, *_: taken.append(query.shape[2]) or query
    )
    long = {"is_long": True}
    cases = [(count, long) for count in (8, 6, 5, 4, 3, 2)] + [(6, {**long, "kernel": "eager"}), (6, {})]
    for num_queries, options in cases:
        batch_attention(nn.Module(), *heads_like(num_queries, 12), None, **options)
    assert taken == [6, 4]


def test_chunks_of_a_long_prompt_leave_few_rows():
    for num_rows in range(long_attention.LONG_PROMPT_TOKENS, 300_000, 997):
        size = long_attention.fit_long_chunk(num_rows)
        num_chunks, rest = divmod(num_rows, size)
        assert all(long_attention.is_whole_chunk(size, size * (index + 1)) for index in range(num_chunks))
        assert rest <= num_rows % long_attention.LONG_CHUNK_TOKENS and rest < 0.05 * num_rows


def test_no_cpu_and_no_float32_is_tried():
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert not long_attention.is_fit(cpu, torch.bfloat16) and not long_attention.is_fit(cuda, torch.float32)


def test_a_kind_of_heads_that_fails_is_not_tried_again_and_a_note_says_so(monkeypatch):
    tries = []
    full = torch.OutOfMemoryError("full"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    errors = [*full, RuntimeError("no plan for these\nmore")]

    def fail(*_):
        tries.append(1)
        raise errors[min(len(tries), 3) - 1]

    monkeypatch.setattr(long_attention, "_PROBLEMS", {})
    monkeypatch.setattr(long_attention, "_attend", fail)
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    kind = long_attention.HeadKind.of(torch.device("cpu"), torch.float32, config)
    found = [long_attention.find_problem(kind) for _ in range(4)]
    # Memory may be there the next time.
    assert found == [*["out of memory"] * 2, *["no plan for these"] * 2] and len(tries) == 3
    assert len(long_attention.describe_problem(kind)) == 1
    assert not long_attention.describe_problem(dataclasses.replace(kind, head_width=16))
    # Also where there is none for what it is tried with.
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: fail())
    tries.clear()
    assert long_attention.find_problem(dataclasses.replace(kind, head_width=32)) == "out of memory"


def test_long_prompts_on_a_gpu_have_chunks_of_one_size():
    config = SimpleNamespace(num_experts=0)
    model = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        attention="sdpa",
        decoder=SimpleNamespace(config=config),
        activation_bytes_per_token=50_000,
    )
    longest = engine.LONG_PROMPT_TOKENS
    by_bytes = engine.choose_chunk(model, longest)
    chunk = long_attention.fit_long_chunk(longest)
    assert engine.choose_chunk(model, longest - 1, is_cuda=True) == by_bytes != chunk
    assert engine.choose_chunk(model, longest, is_cuda=True) == chunk
    for owner, name, value in (
        (model, "attention", "eager"),
        (model, "dtype", torch.float32),
        (config, "num_experts", 8),
    ):
        kept = getattr(owner, name)
        setattr(owner, name, value)
        assert engine.choose_chunk(model, longest, is_cuda=True) == by_bytes, name
        setattr(owner, name, kept)


@pytest.mark.parametrize("count", [1, 2])
def test_an_mlp_in_parts_gives_what_it_gives_whole(monkeypatch, count):
    monkeypatch.setattr(row_parts, "PART_ROWS", 4)
    inner, calls = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)), []

    def forward(rows):
        calls.append(rows.shape[:-1].numel())
        return inner(rows)

    rows = torch.randn(10, count, 6).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(run_in_parts(forward, rows), inner(rows))
    assert sum(calls) == 10 * count and max(calls) == 4
    assert run_in_parts(forward, rows).requires_grad and calls[-1] == 10 * count


def test_mlps_on_a_gpu_keep_their_names():
    layer = SimpleNamespace(mlp=nn.Module())
    layer.mlp.down_proj = nn.Linear(2, 2)
    layer.mlp.forward = lambda rows: layer.mlp.down_proj(rows)
    decoder = SimpleNamespace(layers=[layer], device=torch.device("cpu"))
    plain = layer.mlp.forward
    use_row_parts(decoder)
    assert layer.mlp.forward is plain
    decoder.device = torch.device("cuda:0")
    use_row_parts(decoder)
    assert layer.mlp.forward is not plain and [*dict(layer.mlp.named_parameters())] == [
        "down_proj.weight",
        "down_proj.bias",
    ]
