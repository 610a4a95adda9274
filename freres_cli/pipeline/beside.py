"""On a GPU, the method's work on a batch runs beside the tower's on the next ones, in a queue of its own.

The method waits for the device several times in a batch. In one queue the tower would have nothing to do meanwhile, and each
wait would be for the tower as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Batch = TypeVar("Batch")


# Ours: a clip's merges come in lumps, during which so many batches may be begun. Each takes the memory of its latents. Where
# a tower makes the host wait, as those of transformers do, its queue holds fewer.
MOST_BEGUN = 3


@cache
def _queue_of(device: torch.device) -> torch.cuda.Stream:
    """The queue of all methods on a device: PyTorch and its libraries keep memory for each. Its kernels are small, and the
    tower's large ones make room for them."""
    return torch.cuda.Stream(device, priority=-1)


class BesideTower:
    """The queue of a method, and the batches that the tower is given before those before them are reduced.

    ``device``: of both. ``is_due``: asked before each batch; while it is true, no batch is begun before all others are
    reduced. ``is_ahead``: whether any is. On a CPU there is one thread of work, and nothing is begun before its time.
    """

    def __init__(self, device: torch.device, is_due: Callable[[], bool] = lambda: False) -> None:
        self._device, self._is_due = device, is_due
        self._queue = _queue_of(device) if device.type == "cuda" else None
        self.is_ahead = False

    def run_ahead(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, torch.cuda.Event | None], None, None]:
        """Yield the batches in order, each after up to ``MOST_BEGUN`` more are begun, with its end in the tower's queue."""
        if self._queue is None:
            yield from ((batch, None) for batch in batches)
            return
        ends, begun = self._with_ends(batches), deque[tuple[Batch, torch.cuda.Event]]()
        while True:
            while len(begun) <= MOST_BEGUN and not (begun and self._is_due()):
                pair = next(ends, None)
                if pair is None:
                    break
                begun.append(pair)
            if not begun:
                return
            pair = begun.popleft()
            self.is_ahead = bool(begun)
            yield pair

    def _with_ends(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.cuda.Event]]:
        for batch in batches:
            end = torch.cuda.Event()
            end.record(torch.cuda.current_stream(self._device))
            yield batch, end

    @contextmanager
    def queue(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """Within the block, work goes into the method's queue. ``after``: what it waits for there, by default all so far.

        What the tower is given later waits for it: so memory that the method has done with can be used again.
        """
        if self._queue is None:
            yield
            return
        towers = torch.cuda.current_stream(self._device)
        if after is None:
            self._queue.wait_stream(towers)
        else:
            self._queue.wait_event(after)
        try:
            with torch.cuda.stream(self._queue):
                yield
        finally:
            towers.wait_stream(self._queue)
