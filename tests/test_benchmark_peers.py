"""The benchmark of all methods: what it measures is real, its clip is like a video, and a method that fails is a row."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time

import pytest
import torch

from freres_cli.baselines.declaration import Method
from freres_cli.baselines.registry import METHODS
from freres_cli.bench.apart import STARTED, run_apart
from freres_cli.bench.latents import NUM_SCENES, MadeLatents
from freres_cli.cli.benchmark import command, peers, startup
from freres_cli.cli.benchmark.peers import measure_peers, measure_stream, measure_whole
from tests.pipeline_fixtures import forked as forked

GRID, WIDTH = (6, 6), 16
MEASURED = [name for name, method in METHODS.items() if method.has_budget and method.is_question_blind]


def test_made_latents_do_not_depend_on_the_batches_and_repeat_nothing():
    latents = MadeLatents(30, GRID, WIDTH)
    whole = latents.frames(0, 30)
    assert whole.shape == (30, *GRID, WIDTH) and whole.dtype == torch.bfloat16
    again = MadeLatents(30, GRID, WIDTH)
    parts = [again.frames(start, min(start + 7, 30)) for start in range(0, 30, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 30


def test_made_latents_change_slowly_between_a_few_cuts():
    latents = MadeLatents(300, (24, 24), 32)
    frames = latents.frames(0, 300).float().flatten(1)
    distance = 1 - torch.nn.functional.cosine_similarity(frames[1:], frames[:-1])
    cuts = [end - 1 for end in latents.cuts[:-1]]
    is_cut = torch.zeros(299, dtype=torch.bool)
    is_cut[cuts] = True
    assert len(cuts) == NUM_SCENES - 1 and latents.cuts[-1] == 300 and len(set(latents.cuts)) == NUM_SCENES
    assert float(distance[is_cut].min()) > 0.28 and float(distance[is_cut].max()) < 0.6
    assert float(distance[~is_cut].min()) > 0 and float(distance[~is_cut].max()) < 0.1


@pytest.mark.parametrize("name", MEASURED)
def test_every_method_keeps_its_tenth_of_a_small_clip(name):
    latents = MadeLatents(20, GRID, WIDTH)
    budget = 20 * 36 // 10
    measure = measure_stream if METHODS[name].compress is None else measure_whole
    figures = measure(name, latents, budget, None)
    assert 0 < figures["visual_tokens"] <= budget and figures["compress_s"] > 0
    assert METHODS[name].compress is None or figures["visual_tokens"] == budget
    assert figures["peak_above_latents_bytes"] >= 0


def test_memory_is_what_the_method_adds_to_the_latents(monkeypatch):
    """The clip is 8 MB, and the method holds 64 MB for a moment."""
    monkeypatch.setattr(peers, "METHODS", {"greedy": Method("greedy", "s", "s", compress=hold)})
    found = []
    for _ in range(3):  # what earlier tests left in this process may be freed while one is measured
        gc.collect()
        found.append(measure_whole("greedy", MadeLatents(28, (12, 12), 1024), 400, None)["peak_above_latents_bytes"])
    assert any(60e6 < num_bytes < 80e6 for num_bytes in found), found


def hold(latents, seconds, budget_tokens, width):
    torch.ones(16 * 10**6)
    return METHODS["uniform"].compress(latents, seconds, budget_tokens, width)


def test_rows_come_from_processes_of_their_own(capsys):
    measured = measure_peers(20, 120.0, ["full", "uniform"], GRID, WIDTH)
    row = measured["rows"][0]
    assert row["status"] == "ok" and row["visual_tokens"] == row["budget_tokens"] == 72 and len(measured["rows"]) == 1
    assert row["latents_bytes"] == 20 * 36 * WIDTH * 2 and measured["not_measured"] == {"full": "has no budget"}
    assert "uniform, 20 frames: " in capsys.readouterr().out
    json.dumps(measured, allow_nan=False)


def test_a_method_that_does_not_finish_is_a_row_and_is_measured_on_fewer_frames(monkeypatch):
    asked = []

    def answer(name, num_frames, limit_s, grid, width):
        asked.append(num_frames)
        status = "over_limit" if num_frames > 100 else "ok"
        return {"method": name, "num_frames": num_frames, "status": status, "message": "over 1 s"}

    monkeypatch.setattr(peers, "measure_peer", answer)
    rows = measure_peers(1000, 1.0, ["evs"])["rows"]
    assert [row["num_frames"] for row in rows] == asked == [1000, 100]
    assert [row["status"] for row in rows] == ["over_limit", "ok"]


def sleep(connection, *_):
    connection.send(STARTED)
    time.sleep(60)


def prepare_long(connection, *_):
    time.sleep(2)
    connection.send(STARTED)
    time.sleep(2)
    connection.send({"compress_s": 2.0})


def die(connection, *_):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(connection, *_):
    os._exit(3)


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [(sleep, "over_limit", "over 1 s"), (die, "out_of_memory", "killed"), (leave, "failed", "status 3")],
)
def test_a_process_that_sends_nothing_is_a_row_that_says_why(target, status, message, forked, monkeypatch):
    monkeypatch.setattr(peers, "run_peer", target)
    row = peers.measure_peer("evs", 20, 1.0 if target is sleep else 60.0, GRID, WIDTH)
    assert row["status"] == status and message in row["message"] and row["compress_s"] is None


@pytest.mark.slow
def test_making_the_latents_does_not_count_towards_the_limit(forked):
    """Four seconds in all, with a limit that is longer than either half."""
    outcome = run_apart(prepare_long, (), 3.0)
    assert outcome.value == {"compress_s": 2.0} and not outcome.is_late


def test_the_command_writes_the_part_and_runs_it_only_if_named(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "measure_peers", lambda *given: asked.append(given) or {"rows": []})
    words = ["benchmark", "-o", str(tmp_path / "r.json"), "peers", "--frames", "7", "--limit", "9"]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "evs,dtd"])
    command.main()
    assert asked == [(7, 9.0, None), (7, 9.0, ["evs", "dtd"])]
    assert json.loads((tmp_path / "r.json").read_text())["peers"] == {"rows": []}


def test_startup_is_measured_with_this_checkout():
    assert (startup.THIS / "freres_cli" / "cli" / "start.py").is_file()
