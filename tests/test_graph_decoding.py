"""One step of a decoder on whole buffers: what the eager step computes. That a graph can record it needs a GPU."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from freres_cli.backbones import cache, generation, token_steps
from freres_cli.backbones.engine import lend_cache, prefill_video, score_options
from freres_cli.backbones.generation import generate
from freres_cli.backbones.graph_decoding import StepGraph
from tests.family_contract import CASES
from tests.family_contract import folders as folders
from tests.family_contract import load as load
from tests.tiny_models import CPU, video_tokens

NUM_NEW = 9
# A state is no buffer of rows, and experts differ from token to token: their steps are not recorded.
each_family = pytest.mark.parametrize(
    "name", [name for name in CASES if not CASES[name].is_hybrid and name != "qwen3_vl_moe"]
)


@pytest.fixture
def recorded(monkeypatch):
    """Steps as on a GPU, but run in place of recorded. Gives the graphs made, and how many there still were each time."""
    made, alive = [], []

    class Unrecorded(StepGraph):
        def __init__(self, model, cache):
            gc.collect()
            alive.append(sum(graph() is not None for graph in made))
            super().__init__(model, cache)
            made.append(weakref.ref(self))

        def _record(self):
            return self._step

    monkeypatch.setattr(token_steps, "StepGraph", Unrecorded)
    return SimpleNamespace(made=made, alive=alive)


def prefix_of(models, name):
    latents = models.encoder.encode(CASES[name].frames(3))
    model = models.language_model
    prompt = model.prompt("What moves?")
    return model, prefill_video(model, prompt.prefix, video_tokens(latents, width=models.encoder.width)), prompt.suffix


def answer_and_logits(model, prefix, suffix, monkeypatch):
    seen = []
    real = generation.check_scores
    monkeypatch.setattr(generation, "check_scores", lambda logits: seen.append(real(logits).clone()) or logits)
    answer = generate(model, prefix, suffix, NUM_NEW)
    list(answer)
    monkeypatch.setattr(generation, "check_scores", real)
    return answer.ids, torch.stack(seen)


@each_family
def test_a_step_on_whole_buffers_is_the_step_on_the_rows_there_are(load, name, recorded, monkeypatch):
    model, prefix, suffix = prefix_of(load(name, CPU), name)
    expected, logits = answer_and_logits(model, prefix, suffix, monkeypatch)
    assert not recorded.made
    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    for _ in range(2):  # the second answer finds the buffers, and rows of the first in them
        ids, ours = answer_and_logits(model, prefix, suffix, monkeypatch)
        assert ids == expected
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    assert len(recorded.made) == 1 and len(ids) > token_steps.STEPS_BEFORE_RECORDING + 1


def test_a_step_that_cannot_be_recorded_is_run_as_before_and_a_note_says_so_once(load, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen3_vl", CPU), "qwen3_vl")
    expected, _ = answer_and_logits(model, prefix, suffix, monkeypatch)
    tries = []

    def fail(self):
        tries.append(1)
        raise torch.OutOfMemoryError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    monkeypatch.setattr(StepGraph, "_record", fail)
    for _ in range(2):
        assert answer_and_logits(model, prefix, suffix, monkeypatch)[0] == expected and prefix.graph is None
    notes = [note for note in prefix.notes if "CUDA graph: operation not permitted when stream is capturing" in note]
    assert len(notes) == len(tries) == 1


def test_an_answer_longer_than_its_room_is_recorded_again(load, recorded, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen2_vl", CPU), "qwen2_vl")
    expected, logits = answer_and_logits(model, prefix, suffix, monkeypatch)
    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    monkeypatch.setattr(token_steps, "ROOM_FOR_ANSWER", 3)
    monkeypatch.setattr(cache, "ROOM_STEP", 1)
    monkeypatch.setattr(cache, "LEAST_SPARE", 0)
    monkeypatch.setattr(cache, "SPARE_PART", 10**6)
    rows = prefix.num_tokens
    for layer in prefix.cache.layers:  # no room yet
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    ids, ours = answer_and_logits(model, prefix, suffix, monkeypatch)
    # An old graph would keep the old buffers beside the new ones.
    assert ids == expected and len(recorded.made) > 1 and not any(recorded.alive)
    assert prefix.cache.get_seq_length() == rows
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    assert prefix.graph is recorded.made[-1]() and prefix.graph.is_of(prefix.cache)


def test_rows_of_an_answer_that_failed_do_not_reach_the_next_one(load, recorded, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen2_vl", CPU), "qwen2_vl")
    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    expected, _ = answer_and_logits(model, prefix, suffix, monkeypatch)
    for layer in prefix.cache.layers:
        for buffer in layer.buffers:
            buffer[..., prefix.num_tokens + len(suffix) + NUM_NEW :, :] = torch.nan
    assert answer_and_logits(model, prefix, suffix, monkeypatch)[0] == expected and len(recorded.made) == 1


def test_a_graph_goes_when_the_cache_has_moved(load, recorded, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen2_vl", CPU), "qwen2_vl")
    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    answer_and_logits(model, prefix, suffix, monkeypatch)
    assert prefix.graph is not None
    with lend_cache(prefix) as lent:
        model.decode(model.text_rows([5] * prefix.graph.num_rows, prefix.num_tokens, prefix.next_position), lent)
    assert prefix.graph is None


def test_a_copy_of_a_prefix_has_no_graph_of_its_own_yet(load, recorded, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen2_vl", CPU), "qwen2_vl")
    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    expected, _ = answer_and_logits(model, prefix, suffix, monkeypatch)
    twin = copy.deepcopy(prefix)
    assert prefix.graph is not None and twin.graph is None
    assert answer_and_logits(model, twin, suffix, monkeypatch)[0] == expected and len(recorded.made) == 2


@pytest.mark.parametrize(
    "ask", [lambda *given: list(generate(*given, 1)), lambda *given: score_options(*given, [(5,)])]
)
def test_a_graph_goes_before_a_question_that_its_buffers_cannot_hold(load, recorded, monkeypatch, ask):
    """It would keep them beside the larger ones."""
    model, prefix, suffix = prefix_of(load("qwen2_vl", CPU), "qwen2_vl")
    monkeypatch.setattr(token_steps, "can_record", lambda *_: True)
    answer_and_logits(model, prefix, suffix, monkeypatch)
    num_rows, seen, real = prefix.graph.num_rows, [], model.decode
    monkeypatch.setattr(model, "decode", lambda *given, **more: seen.append(prefix.graph) or real(*given, **more))
    ask(model, prefix, suffix)
    assert seen[0] is not None, "it fits"
    seen.clear()
    ask(model, prefix, (*suffix, *[5] * (num_rows - prefix.num_tokens)))
    assert seen[0] is None
