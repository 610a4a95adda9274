"""What compress and batch print of many videos: a row as each is done, and how the run ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from freres_cli.cli.output import print_notes, print_path, print_warning
from freres_cli.errors import ExitStatus, FreresError, ResourceError, count_of


class VideoRow(Protocol):
    """The outcome for one video. ``status``: done, skipped or failed. ``error``: why it failed."""

    @property
    def video(self) -> Path | str: ...
    @property
    def bundle(self) -> Path | str: ...
    @property
    def status(self) -> str: ...
    @property
    def error(self) -> FreresError | None: ...


class VideoRows:
    """Prints rows as they come. A note that several videos share is told once.

    ``print_line``: prints the JSON line of a row in place of text; ``None`` for text. ``quiet``: print no notes.
    """

    def __init__(self, print_line: Callable[[Any], None] | None, quiet: bool) -> None:
        self._print_line, self._quiet = print_line, quiet
        self._told: set[str] = set()
        self._lost: ResourceError | None = None

    def show(self, row: VideoRow, said: str, notes: Sequence[str]) -> None:
        """Print a row. ``said``: what became of a video that did not fail. ``notes``: about it."""
        try:
            self._show(row, said, notes)
        except SystemExit as end:
            # A reader that closed the pipe has seen enough; the other videos are still to be compressed. A signal ends
            # the run.
            if end.code not in (None, ExitStatus.DONE):
                raise
        except ResourceError as error:
            # Where lines cannot be written, bundles can be.
            self._lost = self._lost or error

    def finish(self, rows: Sequence[VideoRow]) -> None:
        """Raise the error of the first failed video, if one failed, with how many did, else of the first row that could not
        be printed."""
        failed = [(row, row.error) for row in rows if row.error is not None]
        if failed:
            row, error = failed[0]
            raise tell_how_many(error.naming(row.video, row.bundle), len(failed), len(rows))
        if self._lost is not None:
            raise self._lost

    def _show(self, row: VideoRow, said: str, notes: Sequence[str]) -> None:
        if row.error is not None:
            print_warning(f"failed: {row.error.naming(row.video, row.bundle).message}")
        if self._print_line is not None:
            self._print_line(row)
            return
        if row.error is not None:
            return
        fresh = [note for note in notes if note not in self._told]
        self._told.update(fresh)
        print_notes([*fresh, f"{row.video}: {said}"], self._quiet)
        print_path(row.bundle)


def count_statuses(rows: Sequence[VideoRow]) -> Counter[str]:
    """Return how many videos have each status."""
    return Counter(row.status for row in rows)


def tell_how_many(first: FreresError, num_failed: int, num_videos: int) -> FreresError:
    """Return the failure of a run in which some videos failed. ``first``: the failure of the first of them."""
    told = f"{num_failed} of {count_of(num_videos, 'video')} failed: {first.message}"
    return type(first)(told, first.hint)
