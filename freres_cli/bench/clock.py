"""Timers that do not stop the device, and peak memory over a span."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class StageTimer:
    """Adds up the seconds of named stages, without waiting for the device in between.

    On CUDA, events mark both ends of a stage in the queue that is current, so its seconds are those in which that queue was
    busy with it or waited for it; stages in two queues share the device, and each takes longer. ``stage`` is for the thread
    that gives the device its work; ``host_stage``, for work that does not touch the device, may run in another one at the
    same time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._names: list[str] = []  # of the stages entered, the innermost last
        self._start: float | torch.cuda.Event = 0.0
        self._running: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage. On CUDA, reading them waits for the stages that still run."""
        while self._running:
            self._running[0][2].synchronize()
            self._add_first()
        return self._seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block on the device, and add its seconds to ``name``. A stage within it stops its clock."""
        if self._names:
            self._stop(self._names[-1])
        self._names.append(name)
        self._start = self._mark()
        try:
            yield
        finally:
            self._stop(self._names.pop())
            if self._names:
                self._start = self._mark()

    @contextmanager
    def host_stage(self, name: str) -> Iterator[None]:
        """Time the block on the CPU, and add its seconds to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - start)

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _stop(self, name: str) -> None:
        start, end = self._start, self._mark()
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)
            self._add(name, end - start)
            return
        self._running.append((name, start, end))
        while self._running and self._running[0][2].query():  # so that a long video does not keep all events
            self._add_first()

    def _add_first(self) -> None:
        name, start, end = self._running.popleft()
        self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class PeakMemory:
    """Peak memory since ``reset``: allocated on the device for CUDA, resident memory of this process for the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start a new span."""
        if self._device.type == "cuda":
            torch.cuda.init()  # a new process has no device to reset yet
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read_bytes(self) -> int:
        """Return the peak of the span in bytes, or the peak of the whole process if the system cannot reset it."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        with contextlib.suppress(OSError, ValueError):
            status = Path("/proc/self/status").read_text().split()
            return int(status[status.index("VmHWM:") + 1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def total_memory_bytes(device: torch.device) -> int:
    """Return the memory of a device in bytes; for the CPU, of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
