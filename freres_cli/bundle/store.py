"""Reading and writing bundles: nothing half written, nothing executed, nothing overwritten by accident."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import secrets
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from freres_cli.bundle.format import (
    FORMAT,
    SCHEMA_VERSION,
    check_content,
    describe_tensors,
    encode_manifest,
    tracks_from,
)
from freres_cli.errors import BundleError, ResourceError
from freres_cli.records import Tracks

MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class Bundle:
    """A bundle read back: its manifest, its tracks, the file it came from and that file's size."""

    path: Path
    manifest: dict[str, Any]
    tracks: Tracks
    num_bytes: int


def check_destination(path: Path, force: bool, flag: str = "-o") -> None:
    """Refuse, before any work is done, a destination that cannot be written; ``flag`` named it.

    Raises ``BundleError``.
    """
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise BundleError(f"{path.name[:40]}...: name too long: expected at most {MAX_NAME_BYTES} bytes")
    if os.path.isdir(path):  # noqa: PTH112 (os.path takes names too long for the system)
        raise BundleError(f"{path}: is a folder: expected a file name", f"name a file with {flag}")
    if path.exists() and not path.is_file():
        raise BundleError(f"{path}: is no regular file: expected a file name", f"name a file with {flag}")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise BundleError(f"{path}: folder {path.parent} does not exist", "make the folder first")
    if path.exists() and not force:
        raise BundleError(f"{path}: already exists", f"name another file with {flag}, or overwrite it with --force")
    if not os.access(path.parent, os.W_OK):
        raise BundleError(f"{path}: folder {path.parent.resolve()} is not writable", f"name another file with {flag}")


def write_bundle(path: Path, tracks: Tracks, manifest: Mapping[str, Any], *, force: bool = False) -> int:
    """Write a bundle and return its size in bytes; the same tracks and manifest give the same bytes.

    The file appears whole or not at all: a temporary file in the same folder is synced, then renamed. Without ``force``
    an existing file is never replaced, not even one that appeared meanwhile (on file systems with hard links).
    Raises ``BundleError`` or ``ResourceError``.
    """
    check_destination(path, force)
    path = Path(os.path.realpath(path))  # a link keeps pointing where it points
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tracks.tensors().items()}
    # A view would drag its whole storage into the file.
    tensors = {n: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for n, t in tensors.items()}
    text = encode_manifest({**manifest, "tensors": describe_tensors(tensors)})
    content = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "manifest": text,
        "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tensors": tensors,
    }
    write_atomically(path, lambda file: torch.save(content, file), force=force)
    return path.stat().st_size


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, force: bool, flag: str = "-o") -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and move it into place; ``flag`` named ``path``.

    Raises ``BundleError`` or ``ResourceError``.
    """
    temporary = path.parent / f".freres-{secrets.token_hex(6)}.tmp"
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _move(temporary, path, force, flag)
    except (OSError, RuntimeError) as error:
        # torch reports a short write as RuntimeError, the cause behind it.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, RuntimeError) and not isinstance(cause, OSError) and "write" not in str(error):
            raise
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or isinstance(
            error, RuntimeError
        ):
            raise ResourceError(
                f"{path}: not enough disk space to write it", f"free some space, or name {flag} elsewhere"
            ) from error
        raise BundleError(f"{path}: cannot be written: {getattr(cause, 'strerror', cause)}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _move(temporary: Path, path: Path, force: bool, flag: str) -> None:
    if force:
        temporary.replace(path)
    else:
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise BundleError(f"{path}: already exists", f"name another file with {flag}, or use --force") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            temporary.rename(path)  # a file system without hard links
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_bundle(path: Path) -> Bundle:
    """Return a bundle, every byte of it checked and none of it executed. Raises ``BundleError``."""
    if not os.path.isfile(path):  # noqa: PTH113
        problem = "is a folder" if os.path.isdir(path) else "no such file"  # noqa: PTH112
        raise BundleError(f"{path}: {problem}: expected a bundle", "make one with: freres compress VIDEO")
    try:
        if not zipfile.is_zipfile(path):
            raise BundleError(f"{path}: not a freres bundle", "make one with: freres compress VIDEO")
        # mmap needs a name, and checks the archive itself.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise BundleError(f"{path}: refused: it holds a pickled object that is not a tensor", _PICKLE_HINT) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch lets damage surface as whatever it trips over, assertions included
        raise BundleError(f"{path}: damaged bundle: {_first_line(error)}", "compress the video again") from error
    manifest = check_content(content, str(path))
    tracks = tracks_from(content["tensors"], manifest, str(path))
    return Bundle(path, manifest, tracks, path.stat().st_size)


_PICKLE_HINT = "a bundle holds tensors and text only; do not trust where this file came from"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
