"""On a GPU the tower begins a batch before the one before it is reduced: in order, and never past a state that is written."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch

from freres_cli.pipeline import beside
from freres_cli.pipeline.beside import MOST_BEGUN, BesideTower
from freres_cli.pipeline.compressor import Compressor
from tests import clips
from tests.family_contract import CASES
from tests.family_contract import folders as folders
from tests.family_contract import load as load
from tests.labelled_device import SENT, labelled_device
from tests.tiny_models import CPU

QUEUE_OF = beside._queue_of


def trace(device, dues=()):
    """What is begun and what is reduced, in which order, where a state is due after so many batches as ``dues`` say."""
    seen, reduced = [], []

    def batches():
        for number in range(6):
            seen.append(f"begin {number}")
            yield number

    own = BesideTower(torch.device(device), lambda: len(reduced) in dues)
    for number, end in own.run_ahead(batches()):
        assert (end is None) == (device == "cpu")
        with own.queue(end):
            seen.append(f"reduce {number}")
        reduced.append(number)
    return seen


def test_on_a_cpu_each_batch_is_reduced_before_the_next_is_begun():
    assert trace("cpu") == [f"{what} {number}" for number in range(6) for what in ("begin", "reduce")]


def test_on_a_gpu_batches_are_begun_before(monkeypatch):
    with labelled_device(monkeypatch):
        assert MOST_BEGUN == 3
        seen = trace("cuda:0")
        first = ["begin 0", "begin 1", "begin 2", "begin 3", "reduce 0", "begin 4", "reduce 1", "begin 5"]
        assert seen == [*first, *(f"reduce {number}" for number in range(2, 6))]
        due = trace("cuda:0", dues=(1, 2, 3))
        assert due.index("begin 4") == due.index("reduce 3") + 1
        assert [event for event in due if event.startswith("reduce")] == [f"reduce {number}" for number in range(6)]


@pytest.mark.parametrize("error", [None, ValueError])
def test_queues_wait_for_each_other(monkeypatch, error):
    with labelled_device(monkeypatch) as device:
        towers = torch.cuda.current_stream()
        own = BesideTower(torch.device(device.name))
        for _, end in own.run_ahead(range(3)):
            queue = own._queue
            assert end.stream is towers
            num_waits = len(towers.log)
            with pytest.raises(error) if error else nullcontext(), own.queue(end):
                assert torch.cuda.current_stream() is queue and queue.log[-1] is end
                assert len(towers.log) == num_waits, "the tower waits for what is not begun yet"
                if error:
                    raise error
            assert towers.log[num_waits:] == [queue] and torch.cuda.current_stream() is towers
        with own.queue():
            assert queue.log[-1] is towers


def test_methods_on_one_device_share_a_queue(monkeypatch):
    with labelled_device(monkeypatch):
        real = QUEUE_OF.__wrapped__
        monkeypatch.setattr("freres_cli.pipeline.beside._queue_of", functools.cache(real))
        queues = {id(BesideTower(torch.device(name))._queue) for name in ("cuda:0", "cuda:0", "cuda:1")}
    assert len(queues) == 2 and hasattr(QUEUE_OF, "cache_clear")


class Frequent:
    """Checkpoints that are due again and again, until a state is offered. Keeps what each would hold."""

    def __init__(self):
        self.asked, self.states = 0, []

    def find(self, *_):
        return None

    def is_due(self):
        self.asked += 1
        return self.asked > 5

    def offer(self, make_state):
        if self.asked <= 5:
            return
        state, self.asked = make_state(), 0
        self.states.append((state.reducer.num_frames, max(state.known)))


@pytest.mark.parametrize("method", ["adaptive", "fre-res"])
def test_a_state_holds_the_pictures_up_to_its_last_frame(load, monkeypatch, tmp_path, method):
    path = clips.write_clip(tmp_path / "clip.mp4", 24)
    settings = {"preset": "bundled", "sample": "native", "grid": "4x5", "track_density": 1}
    monkeypatch.setattr("freres_cli.pipeline.encoding.MAX_BATCH_FRAMES", 2)
    plain = Compressor(models=load("qwen3_vl", CPU), budget_tokens=60, method=method, **settings).compress(path)
    with labelled_device(monkeypatch) as device:
        checkpoints = Frequent()
        compressor = Compressor(models=load("qwen3_vl", device), budget_tokens=60, method=method, **settings)
        bundle = compressor.compress(path, checkpoints=checkpoints)
    assert torch.equal(bundle.tokens().latents, plain.tokens().latents)
    assert len(checkpoints.states) >= 2
    for num_frames, last_picture in checkpoints.states:
        assert last_picture == num_frames - 1


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_the_host_sends_a_batch_without_waiting_for_the_one_before(load, name, monkeypatch):
    """A tensor made on the device from a list would wait for all that the device has to do."""
    with labelled_device(monkeypatch) as found:
        encoder = load(name, found).encoder
        SENT.clear()
        encoder.encode(CASES[name].frames(4))
    assert len(SENT) >= 3 and all(SENT), "pixels, means and deviations"
