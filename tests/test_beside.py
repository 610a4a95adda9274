"""On a GPU the tower begins a batch before the one before it is reduced: in order, and never past a state that is written."""

from __future__ import annotations

import pytest
import torch

from freres_cli.pipeline.beside import MOST_BEGUN, BesideTower
from freres_cli.pipeline.compressor import Compressor
from tests import clips
from tests.family_contract import folders as folders
from tests.family_contract import load as load
from tests.labelled_device import labelled_device
from tests.tiny_models import CPU


def trace(device, dues=()):
    """What is begun and what is reduced, in which order, where a state is due after so many batches as ``dues`` say."""
    seen, reduced = [], []

    def batches():
        for number in range(6):
            seen.append(f"begin {number}")
            yield number

    beside = BesideTower(torch.device(device), lambda: len(reduced) in dues)
    for number, end in beside.run_ahead(batches()):
        assert (end is None) == (device == "cpu")
        with beside.queue(end):
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
