"""Workers of a batch that break: they are replaced, a video gets a second try, and a run ends for no video's sake."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from freres_cli.bench.apart import start_deaf
from freres_cli.errors import BackboneError, ResourceError
from freres_cli.workflows import batch_process, batch_worker
from freres_cli.workflows.batch_process import READY, Supervisor, explain_end, run_local
from freres_cli.workflows.batch_worker import VideoWorker, WorkerSetup
from tests import broken_workers
from tests.broken_workers import FakeJob, FakeRow, FakeSetup
from tests.test_batch import job_of


@pytest.fixture(autouse=True)
def light_workers(monkeypatch):
    monkeypatch.setattr(batch_process, "_serve", broken_workers.serve)
    assert READY == broken_workers.READY


@pytest.fixture
def supervisor(tmp_path):
    made = Supervisor(FakeSetup(str(tmp_path)))
    yield made
    made.close()


def test_a_worker_is_kept_until_it_breaks_and_then_replaced(supervisor, tmp_path):
    first, second, third = (supervisor.run(FakeJob(video)) for video in ("ok-1", "ok-2", "unlucky-1"))
    assert first.pid == second.pid != third.pid
    assert (second.tries, third.tries) == (1, 2) and isinstance(third, FakeRow)
    scratch = Path((tmp_path / "scratch").read_text())
    assert scratch.name.startswith("freres-batch-") and not scratch.exists()


def test_a_video_that_breaks_two_workers_is_a_failed_row_and_the_next_is_done(supervisor):
    row = supervisor.run(FakeJob("killed-1"))
    assert row.status == "failed" and row.tries == 2 and not row.is_fatal
    assert isinstance(row.error, ResourceError) and "killed-1: its worker was killed by SIGKILL" in row.error.message
    assert supervisor.run(FakeJob("ok-1")).tries == 1


def test_a_worker_that_ends_before_it_is_ready_is_no_try_of_a_video(tmp_path):
    supervisor = Supervisor(FakeSetup(str(tmp_path), "once"))
    assert supervisor.run(FakeJob("ok-1")).tries == 1
    supervisor.close()


def test_a_worker_that_the_system_does_not_start_is_tried_again(supervisor, monkeypatch):
    """As where there are too many processes, or no memory for one more."""
    failures = [OSError(errno.EAGAIN, "no more processes")] * 2

    def start(process):
        if failures:
            raise failures.pop()
        start_deaf(process)

    monkeypatch.setattr(batch_process, "start_deaf", start)
    assert supervisor.run(FakeJob("ok-1")).tries == 1 and supervisor._num_ends == 2
    supervisor._end()
    failures.extend([OSError(errno.EAGAIN, "no more processes")] * 40)
    monkeypatch.setattr(batch_process, "MOST_ENDS", 3)
    row = supervisor.run(FakeJob("ok-2"))
    assert row.is_fatal and "could not be started: no more processes" in row.error.message


@pytest.mark.parametrize(("breaks", "jobs"), [("always", ("ok-1",)), ("later", ("ok-1", "unlucky-1"))])
def test_workers_that_cannot_start_end_the_run(tmp_path, monkeypatch, breaks, jobs):
    monkeypatch.setattr(batch_process, "MOST_ENDS", 2)
    supervisor = Supervisor(FakeSetup(str(tmp_path), breaks))
    *_, row = (supervisor.run(FakeJob(job)) for job in jobs)
    assert row.is_fatal and "2 workers in a row" in row.error.message and "ended with status 7" in row.error.message


@pytest.mark.parametrize(("jobs", "is_fatal"), [("killed-1 killed-2", True), ("ok-1 killed-2 killed-3", False)])
def test_workers_that_never_had_a_row_end_the_run_whichever_videos_they_broke_on(
    supervisor, monkeypatch, jobs, is_fatal
):
    monkeypatch.setattr(batch_process, "MOST_ENDS", 4)
    *_, row = (supervisor.run(FakeJob(job)) for job in jobs.split())
    assert row.status == "failed" and row.is_fatal == is_fatal


def test_every_job_has_one_row_whatever_breaks(tmp_path):
    videos = ["ok-0", "unlucky-1", "killed-2", "ok-3", "ok-4"]
    rows = dict(run_local([FakeJob(video) for video in videos], FakeSetup(str(tmp_path)), 2))
    assert [rows[number].video for number in range(5)] == videos
    assert [rows[number].tries for number in range(5)] == [1, 2, 2, 1, 1]
    assert isinstance(rows[2].error, ResourceError) and isinstance(rows[1], FakeRow)


def test_ctrl_c_does_not_reach_a_worker_that_is_starting(supervisor, monkeypatch, capfd):
    def start(process):
        start_deaf(process)
        os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(batch_process, "start_deaf", start)
    with ThreadPoolExecutor(1) as pool:  # as run_local does
        rows = [pool.submit(supervisor.run, FakeJob(video)).result() for video in ("ok-1", "unlucky-1", "ok-2")]
    assert [row.tries for row in rows] == [1, 2, 1] and supervisor._num_ends == 1, "only the unlucky one ended"
    assert capfd.readouterr().err == ""
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "this process still hears it"


def test_a_run_that_is_stopped_leaves_no_process_and_no_copy(tmp_path):
    found = run_local([FakeJob("ok-0"), FakeJob("sleep-1")], FakeSetup(str(tmp_path)), 2)
    next(found)
    while not (told := (tmp_path / "asleep")).exists() or not told.read_text():
        time.sleep(0.01)
    pid, scratch = told.read_text().split()
    assert Path(scratch, "copy").exists()
    found.close()
    assert not Path(f"/proc/{pid}").exists() and not Path(scratch).exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize(("given", "num_gpus", "taken"), [("3", 4, "1"), ("3", 1, "3"), ("", 4, "2"), ("x", 4, "x")])
def test_workers_count_on_from_the_rank_of_their_batch(monkeypatch, given, num_gpus, taken):
    """One that is no number is left for the error of the job that needs it."""
    monkeypatch.setenv("LOCAL_RANK", given)
    batch_process._take_gpu(2, num_gpus)
    assert os.environ["LOCAL_RANK"] == taken


def test_how_a_process_ended():
    assert explain_end(-9) == "was killed by SIGKILL, as when memory runs out"
    assert explain_end(-11) == "was killed by SIGSEGV" and explain_end(3) == "ended with status 3"


@pytest.mark.parametrize("output", ["memory://out", "out"])
def test_what_every_video_would_meet_ends_the_run_wherever_bundles_go(tmp_path, monkeypatch, output):
    def fail(*_, **__):
        raise BackboneError("weights: damaged")

    monkeypatch.setattr(batch_worker, "compress_many", fail)
    monkeypatch.chdir(tmp_path)
    row = VideoWorker(WorkerSetup(output, False, "bundled", "cpu"), tmp_path).run(job_of(tmp_path / "clip.mp4"))
    assert (row.status, row.is_fatal, row.error.message) == ("failed", True, "weights: damaged")
