"""A worker process that breaks as its jobs say, light enough to be started many times."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

READY = "ready"


@dataclass(frozen=True)
class FakeJob:
    """``video``: what to do, and a number. ``name``: as a job has it."""

    video: str
    name: str = "bundle"


@dataclass(frozen=True)
class FakeRow:
    """A row with what a supervisor looks at. ``pid``: of the process that made it."""

    video: str
    pid: int
    tries: int = 1


@dataclass(frozen=True)
class FakeSetup:
    """``folder``: holds a file for everything that has happened once."""

    folder: str
    breaks_at_start: str = "never"

    def bundle_of(self, job: FakeJob) -> str:
        return f"{job.name}.pt"


def is_first(folder: str, what: str) -> bool:
    """Whether this has not happened before."""
    try:
        Path(folder, what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def serve(connection, setup: FakeSetup, rank: int, scratch: str) -> None:
    """Stands in for the worker's own function."""
    first = is_first(setup.folder, "start")
    if setup.breaks_at_start == "always" or setup.breaks_at_start == ("once" if first else "later"):
        os._exit(7)
    connection.send(READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        what = job.video.partition("-")[0]
        (Path(scratch) / "copy").touch()
        if what == "sleep":
            Path(setup.folder, "asleep").write_text(f"{os.getpid()} {scratch}")
            time.sleep(60)
        if what == "killed" or (what == "unlucky" and is_first(setup.folder, job.video)):
            Path(setup.folder, "scratch").write_text(scratch)
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(FakeRow(job.video, os.getpid()))
