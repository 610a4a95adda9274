"""Reading and writing bundles: nothing half written, nothing executed, nothing overwritten by accident."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freres_cli.bundle.archive import HINT, check_archive
from freres_cli.bundle.schema import make_content, read_content
from freres_cli.content import Content, kind_of
from freres_cli.errors import BundleError, ResourceError, explain_no_file, is_out_of_memory
from freres_cli.files import check_destination, write_atomically
from freres_cli.tracks import Tracks

ZIP_START = b"PK\x03\x04"


@dataclass(frozen=True)
class StoredBundle:
    """A bundle read from a file: schema version, manifest in its current form, content, and size of the file."""

    path: Path
    schema_version: int
    manifest: dict[str, Any]
    content: Content
    num_bytes: int

    @property
    def tracks(self) -> Tracks:
        """The tracks of a Fre-Res bundle. Raises ``BundleError`` for a bundle of another method."""
        if not isinstance(self.content, Tracks):
            method = self.manifest["settings"]["method"]["value"]
            raise BundleError(
                f"{self.path}: made by method {method}: it holds {kind_of(self.content)}, not tracks",
                "compress the video with --method fre-res",
            )
        return self.content


def write_bundle(
    path: Path, content: Content, manifest: Mapping[str, Any], *, force: bool = False, flag: str = "-o"
) -> int:
    """Write a bundle and return its size in bytes. The same content and manifest give the same bytes.

    ``path``: the file, written atomically. ``content``, ``manifest``: what it holds. ``force``: replace an existing file.
    ``flag``: the flag, or the argument, that named ``path``. Raises ``UsageError`` or ``ResourceError``, and
    ``BundleError`` for numbers that its reader would refuse.
    """
    check_destination(path, force, flag)
    made = make_content(content, manifest)
    for name, tensor in made["tensors"].items():
        if not bool(tensor.isfinite().all()):
            hint = "the numbers it was made from are too large for their type: compress the video again"
            raise BundleError(f"{path}: not written: {name}: expected finite numbers, got NaN or infinity", hint)
    write_atomically(path, lambda file: torch.save(made, file), force=force, flag=flag)
    return path.stat().st_size


def read_bundle(path: Path) -> StoredBundle:
    """Read a bundle. Every byte is checked, and nothing in the file is executed. Raises ``BundleError``."""
    if not os.path.isfile(path):  # noqa: PTH113 (os.path takes names too long for the system)
        raise BundleError(f"{explain_no_file(path)}: expected a bundle", "make one with: freres compress VIDEO")
    try:
        with path.open("rb") as file:  # by its path, one that may not be read would be no archive
            begins_as_archive = file.read(len(ZIP_START)) == ZIP_START
            is_archive = zipfile.is_zipfile(file)  # by the list of what it holds, at its end
        if begins_as_archive and not is_archive:
            hint = "copy it again, or compress the video again"
            raise BundleError(f"{path}: damaged bundle: its end is missing", hint)
        if not is_archive:
            raise BundleError(f"{path}: not a freres bundle", "make one with: freres compress VIDEO")
        check_archive(path)
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        raise BundleError(f"{path}: refused: it holds a pickled object that is not a tensor", HINT) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except BundleError:
        raise
    except Exception as error:  # damage makes torch raise almost anything, even AssertionError
        if is_out_of_memory(error):
            raise ResourceError(f"{path}: not enough memory to read it", "use a larger machine") from error
        raise BundleError(f"{path}: damaged bundle: {_first_line(error)}", "compress the video again") from error
    version, manifest, content = read_content(loaded, str(path))
    return StoredBundle(path, version, manifest, content, path.stat().st_size)


def _load(path: Path) -> Any:
    # Not mapped: what was checked must not change with the file, nor the process end where the file gets shorter.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
