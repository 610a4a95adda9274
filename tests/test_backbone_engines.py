"""Every family gives the same answers through our decoder loop as through transformers' ``generate``, and to several
questions at once as to one at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from freres_cli.backbones import attention, batches, engine
from freres_cli.backbones.generation import generate
from freres_cli.errors import BackboneError
from tests import family_contract
from tests.family_contract import STEPS, difference
from tests.stock_paths import injected

tiny, one_thread = family_contract.tiny, family_contract.one_thread

# "Both engines" are the public API with visual tokens injected, and our own loop over the decoder.


def everything(tiny):
    return torch.arange(len(tiny.latents.flatten(0, 2)))


def test_injected_tokens_equal_the_stock_pixels_when_all_are_kept(tiny):
    inputs = tiny.path.forward_inputs(tiny.path.ids)
    public = injected(tiny.path, everything(tiny), tiny.latents.flatten(0, 2), tiny.case.num_deep)
    assert difference(tiny.stock(**public).logits, tiny.stock(**inputs).logits) == 0.0
    told = tiny.stock.generate(**inputs, max_new_tokens=16, do_sample=False)
    public = injected(tiny.path, everything(tiny), tiny.latents.flatten(0, 2), tiny.case.num_deep)
    assert tiny.stock.generate(**public, max_new_tokens=16, do_sample=False).tolist() == told.tolist()


def test_both_engines_agree_on_a_subset(tiny):
    latents = tiny.latents.flatten(0, 2)[tiny.keep]
    public = injected(tiny.path, tiny.keep, latents, tiny.case.num_deep)
    told = tiny.stock.generate(
        **public, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = told.sequences[0, public["input_ids"].shape[1] :].tolist()
    ours = tiny.steps(tiny.whole_prompt(tiny.tokens(tiny.keep)), tokens[:-1])
    assert len(tokens) == STEPS and len(set(tokens)) > 2
    assert max(difference(a, b[0]) for a, b in zip(ours, told.logits, strict=True)) < 1e-4
    prefix, suffix = tiny.ask(tiny.tokens(tiny.keep))
    answer = generate(tiny.model, prefix, suffix, STEPS)
    list(answer)
    assert answer.ids == tokens


class MaskShapes(TorchDispatchMode):
    """Records every operation outside the kernels whose result has ``shape`` as its last two sides."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found, self.is_in_kernel = shape, [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and tuple(out.shape[-2:]) == self.shape and not self.is_in_kernel:
            self.found.append(str(function))
        return out


def test_a_later_chunk_of_a_prefill_builds_no_mask(tiny, monkeypatch):
    rows, cache = tiny.whole_prompt(tiny.tokens()), tiny.model.new_cache()
    parts = list(rows.split(37))
    engine.prefill(tiny.model, parts[0], cache)
    shapes, biases = MaskShapes((37, 74)), []
    real, real_bias = attention.scaled_dot_product_attention, attention._causal_lower_right

    def bias_of(*sides):
        with _disable_current_modes():  # a tensor subclass cannot be made inside one; its size is checked below
            return real_bias(*sides)

    def kernel(*args, attn_mask=None, is_causal=False, **options):
        biases.append(attn_mask)
        shapes.is_in_kernel = True
        out = real(*args, attn_mask=attn_mask, is_causal=is_causal, **options)
        shapes.is_in_kernel = False
        return out

    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(attention, "_causal_lower_right", bias_of)
    with shapes:
        engine.prefill(tiny.model, parts[1], cache)
    assert shapes.found == []
    assert len(biases) == sum(getattr(layer, "keys", None) is not None for layer in cache.layers) > 1
    assert all(type(bias).__name__ == "CausalBias" and bias.untyped_storage().nbytes() == 0 for bias in biases)


QUESTIONS = ("Why?", family_contract.QUESTION, "How many red squares, would you say?", "Why?", "Who?")
OPTIONS = [
    [tuple(b"A"), tuple(b"B")],
    [tuple(b"yes"), tuple(b"n"), tuple("vielleicht ü".encode())],
    [tuple(b"one"), tuple(b"two")],
    [tuple(b"because"), tuple(b"A")],
    [tuple(b"me")],
]


def test_several_questions_at_once_are_scored_as_one_at_a_time(tiny):
    video = tiny.tokens(tiny.keep)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video)
    suffixes = [tiny.model.prompt(question).suffix for question in QUESTIONS]
    batch = batches.score_options_batch(tiny.model, prefix, suffixes, OPTIONS)
    for suffix, options, scores in zip(suffixes, OPTIONS, batch, strict=True):
        assert difference(engine.score_options(tiny.model, prefix, suffix, options), scores) < 1e-4
    assert prefix.cache.get_seq_length() == prefix.num_tokens and not prefix.is_lent
    assert tiny.model.decoder.config._attn_implementation == attention.CAUSAL_NO_MASK
    assert difference(batch[0][0], batch[3][1]) < 1e-4 and difference(batch[0][0], batch[0][1]) > 1e-2


def test_several_questions_at_once_are_answered_as_one_at_a_time(tiny):
    model = copy.copy(tiny.model)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(tiny.keep))
    suffixes = [tiny.model.prompt(question).suffix for question in QUESTIONS]

    def singles():
        answers = [generate(model, prefix, suffix, STEPS) for suffix in suffixes]
        for answer in answers:
            list(answer)
        return [answer.ids for answer in answers]

    expected = singles()
    assert len({tuple(ids) for ids in expected}) >= 3
    assert batches.answer_batch(model, prefix, suffixes, STEPS) == expected
    # A token that some answers contain and others do not, so that some end earlier.
    in_some = next(token for ids in expected for token in ids if not all(token in other for other in expected))
    model.stop_ids = frozenset([in_some])
    stopped = singles()
    assert len({len(ids) for ids in stopped}) > 1
    assert batches.answer_batch(model, prefix, suffixes, STEPS) == stopped


def test_a_batch_is_refused_as_a_single_is(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(tiny.keep))
    with pytest.raises(BackboneError, match="at least one token each"):
        batches.score_options_batch(tiny.model, prefix, [(1, 2)], [[()]])
    with pytest.raises(BackboneError, match="question: too long for the model's context"):
        batches.answer_batch(tiny.model, prefix, [(1, 2)], 5000)
    assert batches.answer_batch(tiny.model, prefix, [], 5) == []
