"""Two workers on two cores, each with one thread: threads that wait for each other cost more than they gain."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, here and in the commands that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
