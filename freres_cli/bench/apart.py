"""A measurement in a process of its own, so that one that runs out of time or memory is a result, too."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STARTED = "started"
# ``freres`` in a process of its own, from the code that is running or that of the working folder: append its arguments.
FRERES = (sys.executable, "-c", "from freres_cli.cli.start import main; main()")


@dataclass(frozen=True)
class Outcome:
    """What a process came to.

    ``value``: what it sent; ``None`` if it sent nothing. ``is_late``: it ran out of time, and was killed. ``exit_code``: as
    ``multiprocessing`` has it, at the time it was looked at.
    """

    value: Any
    is_late: bool
    exit_code: int | None

    @property
    def is_starved(self) -> bool:
        """Whether the system killed it, as Linux does with SIGKILL to a process that takes too much memory."""
        return self.value is None and not self.is_late and self.exit_code == -signal.SIGKILL


def start_deaf(process: BaseProcess) -> None:
    """Start a process that was made to be spawned, and that Ctrl-C does not reach: who starts it decides what becomes of it.

    Ctrl-C reaches every process of a terminal, and one that is still importing would print a traceback. Its threads and
    processes do not hear it, either. Safe in any thread.
    """
    # Its start would let this thread hear Ctrl-C again.
    multiprocessing.resource_tracker.ensure_running()
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def run_apart(target: Callable[..., None], arguments: tuple[Any, ...], timeout_s: float) -> Outcome:
    """Call ``target`` in a fresh process, and return what it sends through a connection, its first argument.

    ``arguments``: those after it. ``timeout_s``: the process is killed after this time; sending ``STARTED`` starts the
    clock anew, once preparations are done.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    start_deaf(process)
    theirs.close()
    value, is_late = None, False
    try:
        while ours.poll(timeout_s):
            value = ours.recv()
            if value != STARTED:
                break
        else:
            value, is_late = None, True
    except EOFError:
        value = None
        process.join(timeout=10)
    finally:
        # Also when this process is asked to exit: the other must not keep running.
        process.join(timeout=0 if value is None else 10)
        exit_code = process.exitcode
        process.kill()
        process.join()
    return Outcome(value, is_late, exit_code)


def limit_memory() -> None:
    """Make allocations fail when the machine's memory is used up, before the system kills other processes."""
    if sys.platform != "linux":
        return
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + available, mapped + available))


def children_cpu_s() -> float:
    """Return the CPU seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
