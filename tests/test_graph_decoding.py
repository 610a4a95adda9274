"""One step of a decoder on whole buffers: what the eager step computes. That a graph can record it needs a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from freres_cli.backbones import generation
from freres_cli.backbones.engine import prefill_video
from freres_cli.backbones.generation import generate
from freres_cli.backbones.graph_decoding import StepGraph
from tests.family_contract import CASES, by_family
from tests.family_contract import folders as folders
from tests.family_contract import load as load
from tests.tiny_models import CPU, video_tokens

NUM_NEW = 9
each_family = by_family([name for name in CASES if not CASES[name].is_hybrid and name != "qwen3_vl_moe"])


@pytest.fixture
def recorded(monkeypatch):
    """Steps as on a GPU, but run in place of recorded. Gives how many graphs were made."""
    made = []

    class Unrecorded(StepGraph):
        def __init__(self, model, buffers):
            super().__init__(model, buffers, is_recorded=False)
            made.append(self)

    monkeypatch.setattr(generation, "StepGraph", Unrecorded)
    return made


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
    assert not recorded
    monkeypatch.setattr(generation, "can_record", lambda *_: True)
    for _ in range(2):  # the second answer finds the buffers, and rows of the first in them
        ids, ours = answer_and_logits(model, prefix, suffix, monkeypatch)
        assert ids == expected
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    assert len(recorded) == 1 and len(ids) > generation.STEPS_BEFORE_RECORDING + 1


def test_a_step_that_cannot_be_recorded_is_run_as_before_and_a_note_says_so(load, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen3_vl", CPU), "qwen3_vl")
    expected, _ = answer_and_logits(model, prefix, suffix, monkeypatch)

    def fail(self):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(generation, "can_record", lambda *_: True)
    monkeypatch.setattr(StepGraph, "_record", fail)
    ids, _ = answer_and_logits(model, prefix, suffix, monkeypatch)
    assert ids == expected and prefix.graph is None
    assert [note for note in prefix.notes if "CUDA graph: operation not permitted when stream is capturing" in note]


def test_a_copy_of_a_prefix_has_no_graph_of_its_own_yet(load, recorded, monkeypatch):
    model, prefix, suffix = prefix_of(load("qwen2_vl", CPU), "qwen2_vl")
    monkeypatch.setattr(generation, "can_record", lambda *_: True)
    expected, _ = answer_and_logits(model, prefix, suffix, monkeypatch)
    twin = copy.deepcopy(prefix)
    assert prefix.graph is not None and twin.graph is None
    assert answer_and_logits(model, twin, suffix, monkeypatch)[0] == expected and len(recorded) == 2
