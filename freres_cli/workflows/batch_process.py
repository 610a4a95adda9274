"""Workers of a batch in processes of their own: one that breaks is replaced, and its video is tried once more."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from freres_cli.bench.apart import start_deaf
from freres_cli.devices import local_rank, use_one_heap
from freres_cli.errors import ResourceError, UsageError
from freres_cli.workflows.batch_worker import BatchRow, Job, VideoWorker, WorkerSetup, broken_row

READY = "ready"
MOST_TRIES = 2
# A supervisor gives up if so many workers end before they are ready, or before one has a row: it is not the videos.
MOST_ENDS = 20


def _serve(connection: Connection, setup: WorkerSetup, rank: int, scratch: str) -> None:
    """What a worker process does: rows for jobs, until the other end is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    use_one_heap()  # a worker may serve for days
    threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    import torch

    if setup.num_threads is not None:
        torch.set_num_threads(setup.num_threads)
    _take_gpu(rank, torch.cuda.device_count())
    worker = VideoWorker(setup, Path(scratch))
    connection.send(READY)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(worker.run(connection.recv()))


def _take_gpu(rank: int, num_gpus: int) -> None:
    """Number this process among those of its machine, which chooses its GPU. ``rank``: among the workers of this batch."""
    # Whoever starts a batch for each GPU gives each its own rank, to which the workers of one batch add theirs.
    if num_gpus > 1:
        with contextlib.suppress(UsageError):  # told by the job that needs it
            os.environ["LOCAL_RANK"] = str((local_rank() + rank) % num_gpus)


def _end_with_parent(scratch: str) -> None:
    """End this process at once when the driver is gone, however it ended: nobody would read its rows, or remove its copies
    of remote files."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


class Supervisor:
    """One worker process at a time, and what to do when it breaks. ``setup``: of the workers. ``rank``: its number among the
    supervisors of this machine, which chooses the GPU."""

    def __init__(self, setup: WorkerSetup, rank: int = 0) -> None:
        self._setup, self._rank = setup, rank
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._num_ends, self._num_rows = 0, 0

    def run(self, job: Job) -> BatchRow:
        """Return the row of a job. A worker that ends before it has one is replaced, and the job is tried once more."""
        tries, ends, reason = 0, 0, ""
        while tries < MOST_TRIES:
            try:
                connection = self._open()
                tries += 1
                connection.send(job)
                row: BatchRow = connection.recv()
            except (EOFError, OSError) as failure:
                is_started, ends = self._process is not None, ends + 1
                reason = self._end()
                if isinstance(failure, OSError) and not is_started:
                    reason = f"could not be started: {failure.strerror or failure}"
                if max(ends, 0 if self._num_rows else self._num_ends) >= MOST_ENDS:
                    what = f"{MOST_ENDS} workers in a row ended before they had a result: the last one {reason}"
                    error = ResourceError(what, "see if memory is short; try one video with freres compress")
                    return replace(broken_row(job, self._setup, tries, reason), error=error, is_fatal=True)
                continue
            self._num_rows += 1
            return replace(row, tries=tries)
        return broken_row(job, self._setup, tries, reason)

    def _open(self) -> Connection:
        """The connection to a worker that is ready. Raises ``EOFError`` if it ends first."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("closed")
            if self._process is not None and self._connection is not None:
                if not self._process.is_alive():
                    raise EOFError
                return self._connection
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._scratch = tempfile.TemporaryDirectory(prefix="freres-batch-", ignore_cleanup_errors=True)
            arguments = (theirs, self._setup, self._rank, self._scratch.name)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            start_deaf(process)  # which may fail, where there are too many processes
            self._process = process
            theirs.close()
            connection = self._connection
        if connection.recv() != READY:
            raise EOFError
        return connection

    def _end(self) -> str:
        """Clear away a worker, running or not, and return how it ended."""
        with self._lock:
            process, connection, scratch = self._process, self._connection, self._scratch
            self._process = self._connection = self._scratch = None
        code = None
        if process is not None:
            process.join(timeout=0 if self._is_closed else 5)
            code = process.exitcode
            process.kill()
            process.join()
        if connection is not None:
            connection.close()
        if scratch is not None:
            scratch.cleanup()
        self._num_ends += 1
        return explain_end(code)

    def close(self) -> None:
        """End the worker, whatever it is doing. A thread that waits for it gets a failed row, or a ``RuntimeError``."""
        self._is_closed = True
        self._end()


def explain_end(code: int | None) -> str:
    """Return how a process ended, by its exit code as ``multiprocessing`` has it: minus the signal's number."""
    if code is None:
        return "stopped answering"
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    return f"was killed by {name}" + (", as when memory runs out" if -code == signal.SIGKILL else "")


def run_local(jobs: Sequence[Job], setup: WorkerSetup, num_actors: int) -> Generator[tuple[int, BatchRow]]:
    """Yield the number and the row of each job as it is done, with ``num_actors`` workers on this machine. Each has one job
    at a time; the others wait here."""
    supervisors = [Supervisor(setup, rank) for rank in range(num_actors)]
    idle: SimpleQueue[Supervisor] = SimpleQueue()
    for supervisor in supervisors:
        idle.put(supervisor)

    def work(job: Job) -> BatchRow:
        supervisor = idle.get()
        try:
            return supervisor.run(job)
        finally:
            idle.put(supervisor)

    todo = iter(enumerate(jobs))
    with ThreadPoolExecutor(num_actors) as pool:
        pending: dict[Future[BatchRow], int] = {}
        try:
            while True:
                for number, job in islice(todo, num_actors - len(pending)):
                    pending[pool.submit(work, job)] = number
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        finally:
            for supervisor in supervisors:
                supervisor.close()
