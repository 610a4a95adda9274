"""Threads that share a model."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from freres_cli import Compressor, Query
from freres_cli.backbones.language import DecoderLanguageModel
from freres_cli.backbones.locks import ThreadLock
from freres_cli.pipeline import models as models_module
from freres_cli.pipeline.models import Models, make_source

NUM_THREADS = 3
QUESTION, OPTIONS = "What moves first?", ("a cat", "the red ring", "up")
QUERIES = [Query("Why?"), Query("Where is the red ring now?"), Query(QUESTION, OPTIONS)]
WAIT_S = 20.0


FRAMES, SECONDS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), [0.0, 1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def bundle():
    return Compressor(budget_tokens=20, device="cpu").compress(FRAMES, seconds=SECONDS)


@pytest.fixture(scope="module")
def models():
    loaded = Models(make_source("bundled", "cpu"))
    return Models(loaded.source, language_model=loaded.language_model)


def run_together(work):
    """Run ``work(number)`` in three threads that begin at the same time."""
    ready = threading.Barrier(NUM_THREADS)

    def begin(number):
        ready.wait()
        return work(number)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(begin, range(NUM_THREADS)))


@pytest.mark.parametrize("half", ["encoder", "language_model", "prompt_counter"])
def test_threads_load_one_model(half, monkeypatch):
    name = {"encoder": "load_vision_encoder", "prompt_counter": "load_prompt_counter"}.get(half, "load_language_model")
    load, loads = getattr(models_module, name), []

    def load_slowly(*arguments, **named):
        loads.append(name)
        time.sleep(0.05)
        return load(*arguments, **named)

    monkeypatch.setattr(models_module, name, load_slowly)
    shared = Models(make_source("bundled", "cpu"))
    first, *others = run_together(lambda _: getattr(shared, half))
    assert all(other is first for other in others) and len(loads) == 1


def test_one_model_is_loaded_at_a_time(monkeypatch):
    """Loading replaces functions of torch for a while; what two loads at once put back, in the wrong order, stays."""
    running, most = [], []

    def load(*_, **__):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return torch.nn.Identity()

    for name in ("load_vision_encoder", "load_language_model"):
        monkeypatch.setattr(models_module, name, load)
    run_together(
        lambda number: getattr(Models(make_source("bundled", "cpu")), ("encoder", "language_model")[number % 2])
    )
    assert most == [1] * NUM_THREADS


def test_threads_may_share_a_compressor(bundle):
    compressor = Compressor(budget_tokens=20, device="cpu")
    for made in run_together(lambda _: compressor.compress(FRAMES, seconds=SECONDS)):
        assert torch.equal(made.tokens().latents, bundle.tokens().latents)


def answer_all(session):
    """What a session says, in each way it can be asked, without the time it took."""
    said = [session.ask(QUESTION, max_new_tokens=3), session.ask(QUESTION, choices=OPTIONS)]
    said += session.ask_many(QUERIES, max_new_tokens=3)
    shares = session.find_evidence(QUERIES[0]).shares
    session.forget_prefix()
    return [(answer.text, answer.choices) for answer in said], shares.tolist()


@pytest.mark.parametrize("is_shared", [True, False], ids=["one session", "a session each"])
def test_threads_that_share_a_model_get_the_answers_of_one(bundle, models, monkeypatch, is_shared):
    running, most = [], []

    def note(run):
        def run_noted(*arguments, **named):
            running.append(1)
            most.append(len(running))
            time.sleep(0.001)
            try:
                return run(*arguments, **named)
            finally:
                running.pop()

        return run_noted

    first = bundle.open(models=models)
    expected = answer_all(first)
    for name in ("_run", "decode_batch"):
        monkeypatch.setattr(DecoderLanguageModel, name, note(getattr(DecoderLanguageModel, name)))
    sessions = [first if is_shared else bundle.open(models=models) for _ in range(NUM_THREADS)]
    assert run_together(lambda number: answer_all(sessions[number])) == [expected] * NUM_THREADS
    assert set(most) == {1}, "layers and attention of the decoder change for a while as it runs"


def test_a_reader_that_never_ends_keeps_no_other_session_from_the_model(bundle, models):
    slow, other = bundle.open(models=models), bundle.open(models=models)
    begun, ended = threading.Event(), threading.Event()

    def hold(_):
        begun.set()
        assert ended.wait(WAIT_S)

    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(slow.ask, QUESTION, max_new_tokens=2, on_text=hold)
        assert begun.wait(WAIT_S)
        try:
            assert pool.submit(other.ask, QUESTION, choices=OPTIONS).result(WAIT_S).text in OPTIONS
        finally:
            ended.set()
        assert held.result(WAIT_S).num_new_tokens <= 2


def test_a_thread_may_ask_another_session_while_it_reads(bundle, models):
    first, other = bundle.open(models=models), bundle.open(models=models)
    heard = []
    first.ask(QUESTION, max_new_tokens=2, on_text=lambda _: heard.append(other.ask(QUESTION, choices=OPTIONS).text))
    assert heard and set(heard) <= set(OPTIONS)


def test_copies_have_a_lock_of_their_own(bundle, models):
    session = bundle.open(models=models)
    copied = copy.deepcopy(session)
    assert copied.model.lock is not session.model.lock
    assert copied.ask(QUESTION, choices=OPTIONS).choices == session.ask(QUESTION, choices=OPTIONS).choices
    # Those that run the same decoder share its lock.
    assert copy.copy(session.model).lock is session.model.lock
    lock = ThreadLock()
    with lock, lock, pickle.loads(pickle.dumps(lock)) as held:
        assert held is None
