"""Every family answers alike through the decoder, as ``ask`` runs it, and through transformers' public ``generate``; and
several questions at once as one at a time."""

from __future__ import annotations

import pytest
import torch

from freres_cli.backbones import attention, batches, engine
from freres_cli.backbones.generation import generate
from freres_cli.errors import BackboneError
from tests import family_contract
from tests.family_contract import STEPS, difference

tiny, one_thread = family_contract.tiny, family_contract.one_thread

# The public API with visual tokens injected is called engine A below, our own loop over the decoder engine B.


def everything(tiny):
    return torch.arange(len(tiny.latents.flatten(0, 2)))


def test_injected_tokens_equal_the_stock_pixels_when_all_are_kept(tiny):
    inputs = tiny.path.forward_inputs(tiny.path.ids)
    injected = tiny.path.injected(everything(tiny), tiny.latents.flatten(0, 2))
    assert difference(tiny.stock(**injected).logits, tiny.stock(**inputs).logits) == 0.0
    told = tiny.stock.generate(**inputs, max_new_tokens=16, do_sample=False)
    injected = tiny.path.injected(everything(tiny), tiny.latents.flatten(0, 2))
    assert tiny.stock.generate(**injected, max_new_tokens=16, do_sample=False).tolist() == told.tolist()


def test_both_engines_agree_on_a_subset(tiny):
    latents = tiny.latents.flatten(0, 2)[tiny.keep]
    injected = tiny.path.injected(tiny.keep, latents)
    told = tiny.stock.generate(
        **injected, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = told.sequences[0, injected["input_ids"].shape[1] :].tolist()
    ours = tiny.steps(tiny.whole_prompt(tiny.tokens(tiny.keep)), tokens[:-1])
    assert len(tokens) == STEPS and len(set(tokens)) > 2
    assert max(difference(a, b[0]) for a, b in zip(ours, told.logits, strict=True)) < 1e-4
    prefix, suffix = tiny.ask(tiny.tokens(tiny.keep))
    answer = generate(tiny.model, prefix, suffix, STEPS)
    list(answer)
    assert answer.ids == tokens


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


def test_several_questions_at_once_are_answered_as_one_at_a_time(tiny, monkeypatch):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(tiny.keep))
    suffixes = [tiny.model.prompt(question).suffix for question in QUESTIONS]

    def singles():
        answers = [generate(tiny.model, prefix, suffix, STEPS) for suffix in suffixes]
        for answer in answers:
            list(answer)
        return [answer.ids for answer in answers]

    expected = singles()
    assert len({tuple(ids) for ids in expected}) >= 3
    assert batches.answer_batch(tiny.model, prefix, suffixes, STEPS) == expected
    # A token that some answers hold and others do not: they end one before the other.
    in_some = next(token for ids in expected for token in ids if not all(token in other for other in expected))
    monkeypatch.setattr(tiny.model, "stop_ids", frozenset([in_some]))
    stopped = singles()
    assert len({len(ids) for ids in stopped}) > 1
    assert batches.answer_batch(tiny.model, prefix, suffixes, STEPS) == stopped


def test_a_batch_is_refused_as_a_single_is(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(tiny.keep))
    with pytest.raises(BackboneError, match="at least one token each"):
        batches.score_options_batch(tiny.model, prefix, [(1, 2)], [[()]])
    with pytest.raises(BackboneError, match="more tokens than the model's context"):
        batches.answer_batch(tiny.model, prefix, [(1, 2)], 5000)
    assert batches.answer_batch(tiny.model, prefix, [], 5) == []
