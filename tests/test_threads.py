"""Threads that share a model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from freres_cli.pipeline import models as models_module
from freres_cli.pipeline.models import Models, make_source

NUM_THREADS = 3


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
