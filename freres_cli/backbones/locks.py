"""The lock of something that threads share."""

from __future__ import annotations

import threading
from types import TracebackType


class ThreadLock:
    """Lets one thread of a process in at a time; that thread may enter again.

    What holds it can be copied and pickled: the copy has a lock of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ThreadLock], tuple[()]]:
        return type(self), ()
