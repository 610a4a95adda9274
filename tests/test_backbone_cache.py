"""The cache with spare rows holds what that of transformers holds, and copies nothing while there is room."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, Qwen2VLConfig
from transformers.cache_utils import DynamicLayer

from freres_cli.backbones import attention, engine
from freres_cli.backbones.attention import CAUSAL_NO_MASK, use_attention
from freres_cli.backbones.base import Piece, PromptRows
from freres_cli.backbones.cache import LEAST_SPARE, ReservedLayer, reserve_rows
from freres_cli.backbones.quantized_cache import make_cache
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel
from freres_cli.devices import Storage
from tests import tiny_qwen2_vl
from tests.live_bytes import LiveBytes
from tests.tiny_models import video_tokens

tiny = tiny_qwen2_vl.tiny
STEPS = 2 * LEAST_SPARE + 3


def both_caches(tiny):
    config = tiny.model.decoder.config
    return make_cache(config), DynamicCache(config=config)


def decode_one(model, token, cache, position):
    return model.logits(model.decode(model.text_rows([token], cache.get_seq_length(), position), cache))


def is_same(ours, theirs):
    return all(
        torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
        for mine, other in zip(ours.layers, theirs.layers, strict=True)
    )


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)]
)
@torch.no_grad()
def test_logits_and_rows_are_those_of_the_growing_cache_to_the_bit(tiny, kernel, dtype):
    model, rows = copy.copy(tiny.model), tiny.whole_prompt(video_tokens(tiny.latents))
    model.decoder = copy.deepcopy(model.decoder).to(dtype)
    model.head_weight = model.head_weight.to(dtype)
    use_attention(model.decoder, CAUSAL_NO_MASK, kernel)
    rows = replace(rows, pieces=(Piece(rows.embeds.to(dtype)),))
    ours, theirs = both_caches(tiny)
    reserve_rows(ours, len(rows))
    for part in rows.split(30):
        assert torch.equal(model.decode(part, ours), model.decode(part, theirs))
    for step in range(STEPS):
        logits = decode_one(model, step % 7, theirs, rows.next_position + step)
        assert torch.equal(decode_one(model, step % 7, ours, rows.next_position + step), logits)
    assert is_same(ours, theirs)


@torch.no_grad()
def test_no_row_is_copied_while_there_is_room(tiny):
    rows = tiny.whole_prompt(video_tokens(tiny.latents))
    cache = tiny.model.new_cache()
    reserve_rows(cache, len(rows) + STEPS)
    tiny.model.decode(rows, cache)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for step in range(STEPS):
        decode_one(tiny.model, step % 7, cache, rows.next_position + step)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    moves, held = 0, cache.layers[0].keys.data_ptr()
    for step in range(STEPS, 3 * STEPS):
        decode_one(tiny.model, step % 7, cache, rows.next_position + step)
        moves += cache.layers[0].keys.data_ptr() != held
        held = cache.layers[0].keys.data_ptr()
    assert moves <= 2 * STEPS / LEAST_SPARE + 1, "without a reservation it moves once for many rows"


@torch.no_grad()
def test_whatever_is_done_to_it_it_equals_the_growing_cache(tiny):
    rows, model = tiny.whole_prompt(video_tokens(tiny.latents)), tiny.model
    ours, theirs = both_caches(tiny)
    reserve_rows(ours, len(rows) + 40)
    kept = []
    for cache in (ours, theirs):
        model.decode(rows, cache)
        twin = copy.deepcopy(cache)
        for branch, token in ((cache, 1), (twin, 2)):
            decode_one(model, token, branch, rows.next_position)
        for layer in cache.layers:
            layer.crop(-1)
        decode_one(model, 3, cache, rows.next_position)
        twin.reorder_cache(torch.tensor([0, 0]))
        for length in (1, 5):
            text = model.text_rows(list(range(length)), twin.get_seq_length(), rows.next_position)
            model.decode_batch(text.embeds.expand(2, -1, -1), text.positions.expand(-1, 2, -1), None, twin)
        kept.append(twin)
    assert is_same(ours, theirs) and is_same(*kept)
    for cache in (ours, theirs):
        for layer in cache.layers:
            layer.keys, layer.values = (rows.expand(3, -1, -1, -1) for rows in (layer.keys, layer.values))
        text = model.text_rows([4, 5], cache.get_seq_length(), rows.next_position)
        embeds = torch.cat([text.embeds[None] * scale for scale in (1, 2, 3)])
        model.decode_batch(embeds, text.positions.expand(-1, 3, -1), None, cache)
    assert is_same(ours, theirs), "sequences that shared their rows have their own after them"


def test_rows_that_somebody_replaced_are_not_those_of_the_buffers():
    first, more = torch.randn(2, 2, 1, 3, 4).unbind(), torch.randn(2, 2, 1, 1, 4).unbind()
    ours, theirs = ReservedLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*first)
        layer.batch_select_indices(torch.tensor([1, 0]))
        layer.update(*more)
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_gradients_are_those_of_the_growing_cache(tiny):
    rows = tiny.whole_prompt(video_tokens(tiny.latents))
    found = []
    for cache in both_caches(tiny):
        embeds = rows.embeds.clone().requires_grad_()
        hidden = tiny.model.decode(replace(rows, pieces=(Piece(embeds),)), cache)
        text = tiny.model.text_rows([1], len(rows), rows.next_position)
        (tiny.model.decode(text, cache).sum() + hidden.sum()).backward()
        found.append(embeds.grad)
    assert torch.equal(*found) and found[0].abs().sum() > 0


@pytest.mark.parametrize("kv", [None, *(pytest.param(kv, marks=pytest.mark.slow) for kv in ("int8", "fp8"))])
@torch.no_grad()
def test_a_prefill_takes_the_weights_the_cache_and_five_percent(monkeypatch, kv):
    """Qwen2-VL-7B on torch's meta device, which computes nothing. The kernel is taken to hold only its result. Of a cache in
    8 bits, the rows of one layer are there in the model's precision as well."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    with torch.device("meta"):
        half, _ = Qwen2VLLanguageModel.build_half(Qwen2VLConfig(text_config=text), torch.bfloat16)
    model = object.__new__(Qwen2VLLanguageModel)
    model.half, model.decoder, model.width, model.num_deep_layers = half, half.decoder, 3584, 0
    model.storage = Storage(kv)
    model.max_context_tokens = half.decoder.config.max_position_embeddings
    use_attention(half.decoder, CAUSAL_NO_MASK)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    monkeypatch.setattr(attention, "_causal_lower_right", lambda *_: None)
    num_rows = 12_000
    with LiveBytes() as live:
        embeds = torch.empty(num_rows, 3584, dtype=torch.bfloat16, device="meta")
        rows = PromptRows((Piece(embeds),), torch.empty(4, 1, num_rows, device="meta"), 0.0)
        prefix = engine.prefill_rows(model, rows, num_rows)
    weights = sum(parameter.nbytes for parameter in half.parameters())
    held = num_rows * model.kv_bytes_per_token
    assert held == sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)
    layer = 0 if kv is None else num_rows * 2 * 4 * 128 * 2
    assert held < live.peak and weights + live.peak < 1.05 * (weights + held) + layer
