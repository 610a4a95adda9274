"""Every failure freres reports: one line saying what is wrong, one hint saying what to do, one exit status.

And the words that several messages share.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from enum import IntEnum
from pathlib import Path
from typing import Self

# Of Python's, PyTorch's, CUDA's, and of cuBLAS, cuDNN and their like.
_OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "allocation_failed",
)


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

    def naming(self, path: object, *others: object) -> Self:
        """Return this failure with ``path`` in front, unless it names that or one of ``others``: an error of the settings
        names no file."""
        if any(str(known) in self.message for known in (path, *others)):
            return self
        return type(self)(f"{path}: {self.message}", self.hint).with_traceback(self.__traceback__)

    def without_frames(self) -> Self:
        """Return this failure without its traceback and cause, to keep it while work goes on: their frames hold on to every
        tensor they had. With FRERES_DEBUG=1 the failure itself, whose traceback is shown."""
        if os.environ.get("FRERES_DEBUG") == "1":
            return self
        _clear_frames(self)
        return type(self)(self.message, self.hint)


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


class ContextError(BackboneError):
    """A prompt that does not fit the model's context."""


class ResourceError(FreresError):
    """Not enough memory or disk, or a device that is not there."""

    exit_status = ExitStatus.RESOURCE


class DiskFullError(ResourceError):
    """A disk with no room for what is to be written, nor then for what comes after it."""


def as_freres_error(error: Exception, what: str) -> FreresError:
    """Return the failure of one of many things as one of ours, without its frames, so that the others go on. ``what``: is
    named first. Raises the interruption that it came from, if it did, and with FRERES_DEBUG=1 an unexpected error, with its
    traceback."""
    if isinstance(error, FreresError):
        return error.without_frames()
    if (interruption := find_interruption(error)) is not None:
        raise interruption from None
    if os.environ.get("FRERES_DEBUG") == "1":
        raise error
    reason = " ".join(str(error).split())[:200]
    if is_out_of_memory(error):
        return ResourceError(f"{what}: not enough memory", "use a smaller --budget or --grid, or a larger machine")
    return FreresError(f"{what}: unexpected {type(error).__name__}: {reason}", "this is a bug in freres")


def _clear_frames(error: BaseException | None) -> None:
    """Empty the frames that ``error`` and its causes came through, as far as they have ended: since Python 3.13 those of
    context managers hold on to each other until the collector comes by."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or of a device. Does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS)


def find_interruption(error: BaseException | None, before: BaseException | None = None) -> BaseException | None:
    """Return the interruption that ``error`` came from: a ``SystemExit`` or ``KeyboardInterrupt`` that was being handled
    when cleaning up failed, as torch's writer does when it is stopped half way. ``before``: what a caller was handling
    already, which is no cause of it."""
    while error is not None and error is not before and isinstance(error, Exception):
        error = error.__context__
    return None if error is before else error


def size_of(count: float) -> str:
    """Return bytes in binary units: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def explain_no_file(path: str | Path, what: str = "file") -> str:
    """Return the path, and why it is no regular file: ``PATH: no such file``, or a URL, a folder, a pipe or a device.
    ``what``: what it was to be."""
    name = str(path)
    if os.path.isdir(name):  # noqa: PTH112 (os.path takes names too long for the system)
        return f"{name}: is a folder"
    if os.path.exists(name):  # noqa: PTH110
        return f"{name}: is a pipe or device, not a file"
    if (url := re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", name, re.IGNORECASE | re.DOTALL)) is not None:
        # A path has lost all but one of the slashes.
        if url[1].lower() == "file":
            return f"{url[1]}:///{url[2]}: is a URL, not a file: name the path, /{url[2]}"
        return f"{url[1]}://{url[2]}: is a URL, not a file: download it first"
    return f"{name}: {_why_not_found(name) or f'no such {what}'}"


def _why_not_found(name: str) -> str | None:
    """Return why a file cannot be looked for, such as a folder that may not be entered."""
    try:
        os.stat(name)  # noqa: PTH116 (as above)
    except (OSError, ValueError) as error:
        code = getattr(error, "errno", errno.ENOENT)
        return None if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) else os.strerror(code).lower()
    return None


def round_count(count: float, digits: int = 3) -> str:
    """Return a count with so many digits, and a large one as a whole number, without an exponent."""
    return f"{count:.0f}" if abs(count) >= 10 ** (digits - 1) else f"{count:.{digits}g}"


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 token``, ``2 tokens``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
