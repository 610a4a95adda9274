"""Run one stage of a pipeline ahead of the next, in a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item], most: int) -> Generator[Item, None, None]:
    """Yield ``items`` in order, made in a thread that is at most ``most`` >= 1 of them ahead of the one yielded.

    An error of ``items`` is raised here, in its place. Closing this generator ends the thread: it finishes the item in its
    hands, and no other is begun. Close it (``contextlib.closing``), or the thread lives until the garbage collector comes.
    """
    iterator, end = iter(items), object()

    def make_next() -> Item | object:
        return next(iterator, end)

    pool = ThreadPoolExecutor(1, "read-ahead")
    waiting: deque[Future[Item | object]] = deque(pool.submit(make_next) for _ in range(most))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(make_next))
            yield item  # type: ignore[misc]
            del item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(iterator, Generator):
            iterator.close()
