"""A video is prefilled once and reused by every question, within the limits of context and memory. On a tiny Qwen2-VL."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.generation import generate
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel
from freres_cli.errors import BackboneError, ContextError, ResourceError, UsageError
from tests import tiny_qwen2_vl
from tests.tiny_models import CPU, make_qwen2_vl, open_checkpoint, video_tokens
from tests.tiny_qwen2_vl import KEEP, largest_difference

tiny = tiny_qwen2_vl.tiny


@pytest.mark.parametrize("chunk_tokens", [1, 7, 33])
def test_prefill_in_chunks(tiny, chunk_tokens):
    rows = tiny.whole_prompt(video_tokens(tiny.latents))
    assert largest_difference(tiny.last_logits(rows, chunk_tokens), tiny.last_logits(rows)) < 1e-4


def test_a_prefix_is_reused_and_left_untouched(tiny):
    video = video_tokens(tiny.latents, KEEP)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video)
    before = copy.deepcopy(prefix.cache)
    rows = tiny.model.text_rows(tiny.prompt.suffix, prefix.num_tokens, prefix.next_position)
    with engine.lend_cache(prefix) as cache:
        reused = tiny.model.logits(engine.prefill(tiny.model, rows, cache))[0]
    assert largest_difference(reused, tiny.last_logits(tiny.whole_prompt(video))) < 1e-4
    answers = [list(generate(tiny.model, prefix, tiny.prompt.suffix, 5)) for _ in range(2)]
    assert answers[0] == answers[1]
    abandoned = iter(generate(tiny.model, prefix, tiny.prompt.suffix, 50))
    next(abandoned)
    with pytest.raises(UsageError, match="another question"):
        list(generate(tiny.model, prefix, tiny.prompt.suffix, 5))
    abandoned.close()
    for layer, old in zip(prefix.cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys) and torch.equal(layer.values, old.values)


def test_a_cache_that_cannot_be_cut_is_copied(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP))
    expected = engine.score_options(tiny.model, prefix, tiny.prompt.suffix, [(1, 2), (3, 4, 5)])
    prefix.cache.__class__ = type("Uncut", (type(prefix.cache),), {"is_croppable": False, "crop": None})
    assert torch.equal(engine.score_options(tiny.model, prefix, tiny.prompt.suffix, [(1, 2), (3, 4, 5)]), expected)
    assert prefix.cache.get_seq_length() == prefix.num_tokens


def test_options_are_scored_as_by_a_stock_forward(tiny):
    inputs = tiny.inputs()
    options = [tuple(b"yes"), tuple(b"n"), tuple("vielleicht ü".encode())]
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents))
    ours = engine.score_options(tiny.model, prefix, tiny.prompt.suffix, options)
    for option, score in zip(options, ours, strict=True):
        ids = torch.cat([inputs["input_ids"], torch.tensor([option])], dim=1)
        kinds = (ids == tiny.stock.config.video_token_id).int() * 2
        logits = tiny.stock(**inputs | {"input_ids": ids, "mm_token_type_ids": kinds}).logits[0]
        log_probs = logits[-len(option) - 1 : -1].log_softmax(-1)
        assert abs(log_probs[range(len(option)), option].sum() - score) < 1e-4
    assert prefix.cache.get_seq_length() == prefix.num_tokens
    with pytest.raises(BackboneError, match="at least one token"):
        engine.score_options(tiny.model, prefix, tiny.prompt.suffix, [()])


def test_kv_bytes_per_token_is_what_the_cache_holds(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)
    assert held == prefix.num_tokens * tiny.model.kv_bytes_per_token


def test_the_context_is_a_limit(tmp_path):
    make_qwen2_vl(tmp_path, layers=1, depth=1, context=100)
    model = Qwen2VLLanguageModel.load(open_checkpoint(tmp_path), CPU)
    with pytest.raises(ContextError, match="expected at most 100, got 1"):
        engine.prefill_video(model, tuple(range(30)), video_tokens(torch.zeros(4, 4, 5, 48)))
    assert engine.prefill_video(model, tuple(range(20)), video_tokens(torch.zeros(4, 4, 5, 48))).num_tokens == 100
    few = video_tokens(torch.zeros(90, 1, 1, 48), torch.tensor([0, 89]))
    prefix = engine.prefill_video(model, tuple(range(30)), few)
    assert prefix.notes == ("positions reach 120, beyond the model's context of 100",)
    with pytest.raises(ContextError, match="question: too long for the model"):
        generate(model, prefix, (1, 2), 90)


def running_out_of_memory(module):
    """A copy of a module whose forward pass does not fit in memory."""

    def fail(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    copied = copy.copy(module)
    copied.forward = fail
    return copied


def test_running_out_of_memory_is_one_line(tiny):
    model, vision = copy.copy(tiny.model), copy.copy(tiny.vision)
    model.decoder, vision.tower = (running_out_of_memory(half) for half in (model.decoder, vision.tower))
    with pytest.raises(ResourceError, match=rf"\d+ tokens, {(len(tiny.prompt.prefix) + 80) * 576} bytes of KV cache"):
        engine.prefill_video(model, tiny.prompt.prefix, video_tokens(tiny.latents))
    with pytest.raises(ResourceError, match="encoding 4 frames"):
        vision.encode(tiny.frames)


def test_a_prompt_may_fill_the_context_and_a_full_one_says_what_fills_it():
    model = SimpleNamespace(max_context_tokens=1000)
    assert engine.check_context(model, 1000, 0.0, 400) == ()
    for num_before, hint in ((400, "shorten it"), (950, "the video fills the context")):
        with pytest.raises(
            ContextError, match=f"at most {1000 - num_before} with its answer, got {1001 - num_before}"
        ) as e:
            engine.check_context(model, 1001, 0.0, num_before)
        assert hint in e.value.hint
    with pytest.raises(ContextError) as caught:
        engine.check_context(model, 1500, 0.0, 950)
    assert "the video fills the context" in caught.value.hint, "however long the question is"
