"""Every failure freres reports: one line saying what is wrong, one hint saying what to do, one exit status."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of the ``freres`` command."""

    DONE = 0
    BUG = 1
    USAGE = 2
    VIDEO = 3
    BUNDLE = 4
    BACKBONE = 5
    RESOURCE = 6
    INTERRUPTED = 130


class FreresError(Exception):
    """A failure the user can act on.

    ``message`` reads ``PATH: what is wrong: expected E, got V``; ``hint`` says what to do next.
    Only ``cli/app.py`` turns it into ``error:`` and ``hint:`` lines.
    """

    exit_status = ExitStatus.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[FreresError], tuple[str, str | None]]:
        # Errors cross process borders in 'freres profile'.
        return type(self), (self.message, self.hint)


class UsageError(FreresError):
    """A flag, argument or combination of them that cannot be carried out, or an output that cannot be written."""

    exit_status = ExitStatus.USAGE


class PresetError(FreresError):
    """A preset that does not exist, does not parse, or holds an unknown or illegal value."""

    exit_status = ExitStatus.USAGE


class VideoError(FreresError):
    """A file that is missing, is not a video, or cannot be decoded."""

    exit_status = ExitStatus.VIDEO


class BundleError(FreresError):
    """A bundle that is missing, damaged, unsafe, or made for something else."""

    exit_status = ExitStatus.BUNDLE


class BackboneError(FreresError):
    """A model that cannot be found, loaded, or used for what is asked."""

    exit_status = ExitStatus.BACKBONE


class ResourceError(FreresError):
    """Not enough memory or disk, or a device that is not there."""

    exit_status = ExitStatus.RESOURCE


def find_interruption(error: BaseException | None) -> BaseException | None:
    """Return the interruption that ``error`` came from: a ``SystemExit`` or ``KeyboardInterrupt`` that was being handled
    when cleaning up failed, as torch's writer does when it is stopped half way."""
    while error is not None and isinstance(error, Exception):
        error = error.__context__
    return error
