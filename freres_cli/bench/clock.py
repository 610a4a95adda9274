"""Timers that wait for the device, and peak memory over a span."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from freres_cli.devices import synchronize


class StageTimer:
    """Adds up the seconds of named stages. The device is idle at both ends of each stage."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block and add its seconds to ``name``."""
        synchronize(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
