"""Attention over a long prompt in two parts, and MLPs in parts of the rows: what the whole gives, on the CPU.

``test_cuda.py`` has cuDNN's kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from freres_cli.backbones import engine, long_attention, row_parts
from freres_cli.backbones.attention import batch_attention
from freres_cli.backbones.row_parts import RowParts


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


@pytest.mark.parametrize("num_keys", [5, 6, 40])
@pytest.mark.parametrize("scaling", [None, 0.9])
def test_two_parts_give_what_causal_attention_gives(monkeypatch, num_keys, scaling):
    monkeypatch.setattr(long_attention, "_attend", attend_written_out)
    monkeypatch.setattr(long_attention, "MERGED_HEADS", 3)
    query, key, value = heads_like(5, num_keys)
    ours = long_attention.attend_long(query, key, value, scaling)
    mask = torch.ones(5, num_keys, dtype=torch.bool).tril(num_keys - 5)
    options = {"attn_mask": mask, "scale": scaling, "enable_gqa": True}
    torch.testing.assert_close(ours, scaled_dot_product_attention(query, key, value, **options), rtol=1e-5, atol=1e-6)


def test_only_whole_chunks_of_a_long_prompt_are_run_so(monkeypatch):
    taken = []
    monkeypatch.setattr("freres_cli.backbones.attention.LONG_CHUNK_TOKENS", 5)
    monkeypatch.setattr("freres_cli.backbones.attention.can_attend_long", lambda query, key: True)
    monkeypatch.setattr(
        "freres_cli.backbones.attention.attend_long", lambda query, *_: taken.append(query.shape[2]) or query
    )
    for num_queries, options in ((5, {}), (4, {}), (1, {}), (5, {"kernel": "eager"}), (5, {"is_last_of_keys": False})):
        batch_attention(nn.Module(), *heads_like(num_queries, 9), None, **options)
    assert taken == [5]


def test_no_cpu_and_no_float32_is_tried():
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert not long_attention.is_fit(cpu, torch.bfloat16) and not long_attention.is_fit(cuda, torch.float32)


def test_a_kind_of_heads_that_fails_is_not_tried_again(monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise RuntimeError("no plan for these\nmore")

    monkeypatch.setattr(long_attention, "_PROBLEMS", {})
    monkeypatch.setattr(long_attention, "_attend", fail)
    kind = (torch.device("cpu"), torch.float32, 4, 2, 8)
    assert [long_attention.find_problem(*kind) for _ in range(2)] == ["no plan for these"] * 2
    assert tries == [1]


def test_long_prompts_on_a_gpu_have_chunks_of_one_size():
    model = SimpleNamespace(device=torch.device("cpu"), activation_bytes_per_token=50_000)
    longest = engine.LONG_PROMPT_TOKENS
    by_bytes = engine.choose_chunk(model, longest)
    assert engine.choose_chunk(model, longest - 1, is_cuda=True) == by_bytes != engine.LONG_CHUNK_TOKENS
    assert engine.choose_chunk(model, longest, is_cuda=True) == engine.LONG_CHUNK_TOKENS


def test_an_mlp_in_parts_gives_what_it_gives_whole(monkeypatch):
    monkeypatch.setattr(row_parts, "PART_ROWS", 4)
    calls = []
    inner = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    inner.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[-2]))
    rows = torch.randn(1, 10, 6)
    with torch.no_grad():
        torch.testing.assert_close(RowParts(inner)(rows), inner(rows))
    assert calls == [4, 4, 2, 10]
    assert RowParts(inner)(rows).requires_grad and calls[-1] == 10
