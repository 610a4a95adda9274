"""The real processes of freres batch: what is killed at random moments leaves whole bundles, each made once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freres_cli.cli.benchmark.batch import KilledBatch, find_workers
from tests.clips import write_short_clips
from tests.runner import run_freres

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")]

FLAGS = ("--budget", "40", "--device", "cpu")
COMMAND = [sys.executable, "-c", "from freres_cli.cli.app import main; main()", "batch"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_short_clips(tmp_path_factory.mktemp("kills"), 6)


def test_killed_runs_leave_whole_bundles_each_made_once(clips, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    found = KilledBatch(clips, out, ("--actors", "2", *FLAGS), longest_s=1.0).run(num_kills=3)
    assert found.killed.total() == 3 and found.rounds >= 1
    assert (found.missing, found.broken, found.replaced, found.made_twice) == (0, 0, 0, 0)
    assert found.statuses["done"] + found.statuses["skipped"] >= 6


def test_workers_end_with_their_driver(clips, tmp_path):
    command = [*COMMAND, str(clips), "-o", str(tmp_path / "out"), "--actors", "2", *FLAGS]
    (tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(workers := find_workers(driver.pid)) < 2:
            assert driver.poll() is None
            time.sleep(0.01)
        while not list((tmp_path / "out").glob("*.pt")):  # so they are at work
            assert driver.poll() is None
            time.sleep(0.01)
        assert list((tmp_path / "scratch").glob("freres-batch-*"))
    finally:
        driver.kill()
        driver.wait()
    end = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert list((tmp_path / "scratch").glob("freres-batch-*")) == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_interrupted_run_ends_at_once_with_its_workers(clips, tmp_path):
    command = [*COMMAND, str(clips), "-o", str(tmp_path / "out"), *FLAGS]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (workers := find_workers(driver.pid)):
        time.sleep(0.01)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "Traceback" not in errors, errors
    assert not any(is_running(pid) for pid in workers)


def test_workers_fetch_from_a_store_and_store_there(clips, tmp_path):
    """``local://`` goes through fsspec, and is the one store here that several processes share."""
    run = run_freres("batch", f"local://{clips}", "-o", f"local://{tmp_path}/out", "--actors", 2, *FLAGS, "--json")
    rows = [json.loads(line) for line in run.out.splitlines()]
    assert run.status == 0 and [row["status"] for row in rows] == ["done"] * 6, run.err
    assert all(row["timings_s"]["fetch"] > 0 < row["timings_s"]["store"] for row in rows)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"clip{i}.pt" for i in range(6)} | {"rows.jsonl"}
    alone = tmp_path / "alone.pt"
    assert run_freres("compress", clips / "clip3.mp4", *FLAGS, "-o", alone).status == 0
    assert (tmp_path / "out" / "clip3.pt").read_bytes() == alone.read_bytes()
