"""What a reader declares. To add a benchmark, write a file beside this one and list it in ``registry.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from freres_cli.evaluation.questions import Protocol, Question
from freres_cli.evaluation.readers.local_copy import LocalCopy


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark, and how its local copy is read.

    ``name``: as given to ``--benchmark``. ``layout``: files of the copy, in one line. ``marks``: a folder that holds all
    files of one of these sets is a copy of it; patterns are allowed. ``parts``: what ``--benchmark NAME:PART`` may name.
    ``protocol``: how it asks and reads answers. ``read``: (copy, part or ``None``) -> its questions.
    """

    name: str
    layout: str
    marks: tuple[tuple[str, ...], ...]
    protocol: Protocol
    read: Callable[[LocalCopy, str | None], list[Question]]
    parts: tuple[str, ...] = ()

    def is_in(self, copy: LocalCopy) -> bool:
        """Return whether the folder looks like a copy of it."""
        return any(all(copy.has(mark) for mark in marks) for marks in self.marks)
