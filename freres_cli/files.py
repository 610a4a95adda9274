"""Writing files, whatever their format: a destination is checked before the work, and a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

from freres_cli.errors import DiskFullError, ResourceError, UsageError, find_interruption

MAX_NAME_BYTES = 255
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".freres-", ".tmp"

# What is no path of this machine, as typed; a Path has lost one of the slashes.
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

KERNEL_PLACES = ("/proc/", "/sys/", "/dev/fd/", "/dev/std")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def check_destination(path: Path, force: bool, flag: str = "-o") -> None:
    """Refuse, before any work is done, a destination that cannot be written.

    ``force``: an existing file may be replaced. ``flag``: the flag, or the argument, that named ``path``. Raises
    ``UsageError``.
    """
    another = f"name a file with {flag}"
    if not can_be_name(path):
        raise UsageError(f"{str(path)!r:.80}: cannot be the name of a file", another)
    if str(path) == "-":
        raise UsageError(f"{path}: standard output is not supported: expected a file name", another)
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise UsageError(f"{path.name[:40]}...: name too long: expected at most {MAX_NAME_BYTES} bytes")
    if os.path.isdir(path):  # noqa: PTH112 (os.path takes names too long for the system)
        raise UsageError(f"{path}: is a folder: expected a file name", another)
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise UsageError(f"{path}: not a regular file: expected a file name", another)
    if _is_in_kernel(path):
        raise UsageError(f"{path}: is in a file system of the kernel, which holds no files of users", another)
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
        raise UsageError(f"{path}: is a link to a file that does not exist", f"remove the link, or {another}")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        if os.path.exists(path.parent):  # noqa: PTH110
            raise UsageError(f"{path}: {path.parent} is not a folder", another)
        raise UsageError(f"{path}: folder {path.parent} does not exist", "make the folder first")
    if os.path.exists(path) and not force:  # noqa: PTH110
        raise UsageError(
            f"{path}: already exists", f"name another file with {flag}, or overwrite it with {_force(flag)}"
        )
    # A link is followed: the file is written where it points.
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: folder {folder} is not writable", f"name another file with {flag}")


class InputFiles:
    """The files that a run reads: none of its outputs may replace one, not even where existing files may be replaced.

    ``named``: what each is called in messages, and its path, ``None`` if there is none.
    """

    def __init__(self, named: Iterable[tuple[str, Path | None]]) -> None:
        self._names: dict[object, str] = {}
        for name, path in named:
            self.add(name, path)

    def add(self, name: str, path: Path | None) -> None:
        """Add a file. ``name``, ``path``: as in the constructor."""
        if path is not None:
            self._names.setdefault(_identify(path), name)

    def refuse(self, output: Path | None, flag: str = "-o") -> None:
        """Refuse an output that is one of these files, by whatever link or name. ``flag``: as in ``check_destination``.
        Raises ``UsageError``."""
        if output is not None and (name := self._names.get(_identify(output))) is not None:
            raise UsageError(f"{output}: is the {name} itself", f"name another file with {flag}")


def _identify(path: Path) -> object:
    """The file behind a path, whatever links lead there; of one that is not there yet, its path without links."""
    try:
        found = os.stat(path)  # noqa: PTH116 (names too long for the system are no files)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def can_be_name(path: str | Path) -> bool:
    """Return whether the system has a way to write this name: without a null character, or half of a character."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _is_in_kernel(path: Path) -> bool:
    """Whether a path leads through a place that the kernel makes up, such as /proc/self/fd or /dev/stdout."""
    places = (os.path.abspath(path), os.path.realpath(path))  # noqa: PTH100
    return any(place.startswith(KERNEL_PLACES) for place in places)


def _force(flag: str) -> str:
    """How to overwrite: by a flag of the command, or by an argument where ``flag`` is one."""
    return "--force" if flag.startswith("-") else "force=True"


def make_folder(path: Path, flag: str = "-o") -> None:
    """Make a folder and its parents, unless they exist. ``flag``: the flag that named it. Raises ``UsageError``."""
    if str(path) == "-":
        raise UsageError(f"{path}: standard output is not supported: expected a folder", f"name one with {flag}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be a folder: {error.strerror}", f"name another with {flag}") from error


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make the output folder of a whole command, and its parents, as ``make_folder`` does. If the command fails, those that
    it made and the folders inside are removed again, as far as they are empty. Not for a part of the work: a folder that is
    still empty may be the one that another part is about to write in."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        inside = [Path(folder) for folder, _, _ in os.walk(path, topdown=False)] if missing else []
        for folder in (*inside, *missing[1:]):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, force: bool, flag: str = "-o") -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and move it into place.

    A link keeps pointing where it points. Without ``force`` an existing file is never replaced, not even one that
    appeared in the meantime (on file systems with hard links). Temporary files that killed runs left in the folder are
    removed, once for each folder. ``flag``: the flag that named ``path``. Raises ``UsageError`` for a place that cannot be
    written, ``DiskFullError`` for a full disk, ``ResourceError`` for a file that is larger than may be.
    """
    path, handled = Path(os.path.realpath(path)), sys.exception()
    try:
        _clean_once(path.parent)
        with _temporary_file(path.parent) as (temporary, file):
            write(file)
            file.flush()
            os.fsync(file.fileno())
            _move(temporary, path, force, flag)
    except (OSError, RuntimeError) as error:
        if (interruption := find_interruption(error, handled)) is not None:
            raise interruption from None
        # torch reports a short write as RuntimeError, the cause behind it.
        cause = error if isinstance(error, OSError) else error.__context__
        is_short_write = isinstance(error, RuntimeError) and (isinstance(cause, OSError) or "write" in str(error))
        if isinstance(error, RuntimeError) and not is_short_write:
            raise
        code = getattr(cause, "errno", None)
        if code == errno.EFBIG:
            raise ResourceError(
                f"{path}: larger than a file may be in this place",
                f"choose another place with {flag}, or see: ulimit -f",
            ) from error
        if is_short_write or code in _DISK_FULL:
            raise DiskFullError(
                f"{path}: not enough disk space to write it", f"free some space, or choose another place with {flag}"
            ) from error
        reason = getattr(cause, "strerror", None) or cause
        raise UsageError(f"{path}: cannot be written: {reason}", f"name another file with {flag}") from error


@lru_cache(maxsize=1024)
def _clean_once(folder: Path) -> None:
    """Remove what killed runs left: when this process first writes here, as listing a full folder takes its time."""
    remove_abandoned_files(folder)


def remove_abandoned_files(folder: Path) -> None:
    """Remove the temporary files of ours in ``folder`` that no living process is writing."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            # Opening a pipe of that name would wait for ever, and a link may lead anywhere.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    # Writers hold a lock, which ends with their process, however it ended.
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def save_stream(stream: IO[bytes], folder: Path) -> Iterator[Path]:
    """Save what a pipe delivers to a file in ``folder``, which is gone afterwards. Raises ``ResourceError`` if the disk is
    full, ``UsageError`` if the file cannot be written."""
    with ExitStack() as made:
        try:
            _clean_once(folder)
            path, file = made.enter_context(_temporary_file(folder))
            shutil.copyfileobj(stream, file, 1 << 20)
            file.flush()
        except PermissionError as error:
            raise UsageError(f"{folder}: not writable: {error.strerror}", "name another folder with -o") from error
        except OSError as error:
            reason = f"standard input: cannot be saved in {folder}: {error.strerror}"
            kind = ResourceError if error.errno in _DISK_FULL else UsageError
            raise kind(reason, "name an output on a disk with room for the video with -o") from error
        yield path


@contextmanager
def _temporary_file(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new, locked file in ``folder``, which is gone afterwards unless it was moved."""
    while True:
        path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
        with path.open("xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists():
                continue  # another run took it for abandoned before it was locked
            try:
                yield path, file
            finally:
                path.unlink(missing_ok=True)
            return


def _move(temporary: Path, path: Path, force: bool, flag: str) -> None:
    if force:
        temporary.replace(path)
    else:
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise UsageError(
                f"{path}: already exists", f"name another file with {flag}, or use {_force(flag)}"
            ) from error
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot; the file is in its place all the same
            os.fsync(folder)
    finally:
        os.close(folder)
