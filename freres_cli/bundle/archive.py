"""What the zip archive of a bundle may hold, checked by its sizes and its pickle's instructions before torch reads it.

torch trusts what an archive says of itself: a small file may inflate to gigabytes, and a few instructions of a pickle may
allocate as much, or hash nested tuples for ever. A bundle needs neither.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from freres_cli.errors import BundleError

MAX_DIRECTORY_BYTES = 64 * 1024  # thirty tensors take 2 KiB
MAX_PICKLE_BYTES = 4 * 2**20  # the manifest, in which only the text of each frame grows with the clip
MAX_INSTRUCTIONS = 5000  # thirty tensors take 1,000
PICKLE = "data.pkl"
HINT = "a bundle holds tensors and text only; do not trust where this file came from"

# An archive ends with three records: the zip64 end, its locator, and the end.
_ENDING = struct.Struct("<4s36xQQ 4s4xQ4x 4s18x")
_SIGNATURES = (b"PK\6\6", b"PK\6\7", b"PK\5\6")
_GLOBALS = frozenset(
    (
        "torch._utils _rebuild_tensor_v2",
        "collections OrderedDict",
        *(f"torch {kind}Storage" for kind in ("Double", "Float", "BFloat16", "Half", "Long", "Byte")),
    )
)
_MAKERS = frozenset(("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "REDUCE"))
_OTHERS = frozenset(
    (
        *(
            "PROTO",
            "STOP",
            "MARK",
            "BINUNICODE",
            "BININT",
            "BININT1",
            "BININT2",
            "LONG1",
            "BINFLOAT",
            "NONE",
            "NEWTRUE",
        ),
        *("NEWFALSE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID", "SETITEM", "SETITEMS"),
    )
)


def check_archive(path: Path) -> None:
    """Refuse an archive that torch would need much time or memory to read, or that holds anything but tensors and text.

    Nothing is read but the directory, whose size is checked first, and the pickle, likewise. Raises ``BundleError``,
    ``OSError``, or what ``zipfile`` raises for a damaged archive.
    """
    with path.open("rb") as file:
        _check_directory(file, str(path))
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise BundleError(f"{path}: refused: it is compressed, and bundles are not", HINT)
            pickles = [member for member in members if member.filename.rpartition("/")[2] == PICKLE]
            if len(pickles) != 1:
                raise BundleError(f"{path}: not a freres bundle", "make one with: freres compress VIDEO")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                limit = f"expected at most {MAX_PICKLE_BYTES} bytes, got {pickles[0].file_size}"
                raise BundleError(f"{path}: refused: {PICKLE}: {limit}", HINT)
            _check_pickle(archive.read(pickles[0]), str(path))


def _check_directory(file: BinaryIO, where: str) -> None:
    """The directory is small, and stands where every reader of archives looks for it."""
    end = file.seek(0, 2) - _ENDING.size
    if end < 0:
        raise BundleError(f"{where}: damaged bundle: it is cut short", "compress the video again")
    file.seek(end)
    zip64, size, start, locator, zip64_start, last = _ENDING.unpack(file.read(_ENDING.size))
    if (zip64, locator, last) != _SIGNATURES or zip64_start != end or start + size != end:
        raise BundleError(f"{where}: damaged bundle: its directory is not at its end", "copy the bundle again")
    if size > MAX_DIRECTORY_BYTES:
        raise BundleError(f"{where}: refused: it holds more files than a bundle has tensors", HINT)


def _check_pickle(data: bytes, where: str) -> None:
    """Every instruction is one that a dictionary of tensors and text needs, and nothing made of parts is used twice."""
    refusal = BundleError(f"{where}: refused: it holds a pickled object that is not a tensor", HINT)
    made: set[object] = set()
    before = ""
    for number, (code, argument, _) in enumerate(pickletools.genops(data)):
        is_known = code.name in _OTHERS or code.name in _MAKERS
        if number > MAX_INSTRUCTIONS or not is_known or (code.name == "GLOBAL" and argument not in _GLOBALS):
            raise refusal
        if code.name.endswith("BINPUT") and before in _MAKERS:
            made.add(argument)
        if code.name.endswith("BINGET") and argument in made:
            raise refusal
        before = code.name
