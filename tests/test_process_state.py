"""What the Python API changes in the process of its user: NOTES of freres(3) names all of it."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from freres_cli import Compressor, load_bundle
from freres_cli.bench.clock import PeakMemory
from freres_cli.errors import UsageError
from freres_cli.pipeline import compressor as compressor_module
from tests.clips import write_clip

# torch sets it where its compiler is imported.
OF_LIBRARIES = {"TORCHINDUCTOR_CACHE_DIR"}


def read_state():
    return {
        "environment": {name: value for name, value in os.environ.items() if name not in OF_LIBRARIES},
        "folder": Path.cwd(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "garbage": (gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()),
        "logging": [logging.getLogger(name).level for name in (None, "torchao", "torch.utils._pytree", "libav")],
        "weights": (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_),
    }


def test_the_process_of_a_user_stays_as_it_is(tmp_path):
    clip, before = write_clip(tmp_path / "clip.mp4", 6, fps=6), read_state()
    session = Compressor(budget_tokens=20, device="cpu").compress(clip).open(device="cpu")
    session.ask("What moves?", max_new_tokens=2)
    session.ask_many(["Why?", "What moves, and where?"], max_new_tokens=2)
    session.find_evidence("Why?")
    assert read_state() == before


def test_memory_is_given_back_at_once_for_long_videos_only(monkeypatch):
    told = []
    monkeypatch.setattr(compressor_module, "return_large_memory", lambda: told.append("mallopt"))
    monkeypatch.setattr(compressor_module, "LONG_FRAMES", 3)
    compressor = Compressor(budget_tokens=20, device="cpu", grid="2x2")
    for count, expected in ((3, []), (4, ["mallopt"])):
        compressor.compress(np.zeros((count, 8, 8, 3), np.uint8), seconds=range(count))
        assert told == expected


STATES = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("method", ["adaptive", "fre-res"])
@pytest.mark.parametrize("name", STATES)
def test_results_do_not_depend_on_what_a_caller_has_set(tmp_path, name, method):
    clip = write_clip(tmp_path / "clip.mp4", 24, fps=6)

    def answers(session):
        return session.ask("What moves?", choices=["a", "b"]).choices, session.ask("Why?", max_new_tokens=3).text

    compressor = Compressor(budget_tokens=40, method=method, device="cpu")
    plain = compressor.compress(clip)
    expected = answers(plain.open(device="cpu"))
    with STATES[name]():
        made = compressor.compress(clip)
        session, smaller = made.open(device="cpu"), made.repack(20)
        read = load_bundle(made.save(tmp_path / "b.pt").path)
        assert answers(session) == expected and torch.equal(made.tokens().latents, plain.tokens().latents)
    assert torch.equal(read.tokens().latents, plain.tokens().latents)
    assert torch.equal(smaller.tokens().latents, plain.repack(20).tokens().latents)
    assert answers(session) == expected, "what was prefilled before is continued"
    assert session.ask_many(["Why?"], max_new_tokens=3)[0].text == expected[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_is_refused_by_name(tmp_path, dtype):
    clip = write_clip(tmp_path / "clip.mp4", 6, fps=6)
    compressor = Compressor(budget_tokens=20, device="cpu")
    bundle = compressor.compress(clip)
    session = bundle.open(device="cpu")
    torch.set_default_dtype(dtype)
    try:
        for call in (lambda: compressor.compress(clip), bundle.tokens, bundle.open, lambda: session.ask("Why?")):
            with pytest.raises(UsageError, match=r"default dtype: expected float32, got (bfloat16|float64)"):
                call()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_memory_counts_from_a_reset_on():
    held = mmap.mmap(-1, 64 << 20)  # what the C library takes, it may keep
    held.write(b"1" * (64 << 20))
    memory = PeakMemory(torch.device("cpu"))
    with_held = memory.read_bytes()
    held.close()
    memory.reset()
    assert memory.read_bytes() < with_held - (32 << 20)
