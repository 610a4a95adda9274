"""One thread a process: two workers on two cores wait for each other's threads, and a fork of a process with threads of
OpenMP waits for ever."""

from __future__ import annotations

import os

# Before torch is imported, here and in the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
