"""Whether a file ends inside a packet, for containers of which FFmpeg reads what is whole and says nothing of the rest."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

ENDS_INSIDE = "the file ends inside a packet: it was longer, and does not say by how much"
SKIPPED = "packets skipped because they cannot be decoded"
DAMAGED = "damaged frames"
UNNOTICED = "decoded on the GPU, which does not notice all damage inside a picture"
LOOK_BYTES = 1 << 16  # an Ogg page has at most 65,307 bytes
TS_SYNC, TS_SIZES, TS_RUN = 0x47, (188, 192, 204), 5
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_BROADCAST = 1
MOST_BOXES = 1 << 20  # a day of fragments of a second has 172,800; a file of empty boxes would take minutes


def ends_inside(path: str, container: str, num_bytes: int) -> bool:
    """Whether the first ``num_bytes`` of the file end inside a packet, fragment or page, or lack the mark of the end that
    the format asks for. ``container``: FFmpeg's name of the format; others than those known here give ``False``."""
    with Path(path).open("rb") as file:
        first = file.read(min(num_bytes, LOOK_BYTES))
        file.seek(max(0, num_bytes - LOOK_BYTES))
        last = file.read(min(num_bytes, LOOK_BYTES))
        if container == "mpegts":
            return _ends_inside_ts(first, num_bytes)
        if container == "asf":
            return _is_shorter_asf(first, num_bytes)
        if container == "ogg":
            return _lacks_last_ogg_page(last)
        if container == "gif":
            # The end of a picture, then that of the file. Some programs add a line feed.
            return not last.rstrip(b"\0\r\n").endswith(b"\0;")
        if "mp4" in container:
            return _ends_inside_fragment(path, num_bytes)
    return False


def is_whole_avi(path: str, num_bytes: int) -> bool:
    """Whether the RIFF chunks of an AVI file end where the file ends. Then a header that promises more frames is wrong, and
    nothing is missing."""
    at = 0
    with Path(path).open("rb") as file:
        for _ in range(MOST_BOXES):
            file.seek(at)
            header = file.read(8)
            if at + 8 > num_bytes or header[:4] != b"RIFF":
                break
            (size,) = struct.unpack_from("<I", header, 4)
            at += 8 + size + size % 2
    return at == num_bytes


def _ends_inside_ts(first: bytes, num_bytes: int) -> bool:
    """Packets of a transport stream have one size; before each there may be four bytes of time."""
    for size in TS_SIZES:
        for start in range(min(size, max(0, len(first) - size))):
            if all(byte == TS_SYNC for byte in first[start::size][:TS_RUN]):
                return (num_bytes - start + (4 if size == 192 else 0)) % size != 0
    return False


def _is_shorter_asf(first: bytes, num_bytes: int) -> bool:
    """The header holds the size of the file, unless it was broadcast."""
    at = first.find(ASF_PROPERTIES)
    if at < 0 or len(first) < at + 92:
        return False
    (size,) = struct.unpack_from("<Q", first, at + 40)
    (flags,) = struct.unpack_from("<I", first, at + 88)
    return not flags & ASF_BROADCAST and num_bytes < size


def _lacks_last_ogg_page(last: bytes) -> bool:
    """The last page of a stream says so, and each page says how long it is."""
    at = last.rfind(b"OggS")
    if at < 0 or len(last) < at + 27:
        return True
    num_segments = last[at + 26]
    lengths = last[at + 27 : at + 27 + num_segments]
    is_last = bool(last[at + 5] & 4)
    return not is_last or len(last) < at + 27 + num_segments + sum(lengths)


def _ends_inside_fragment(path: str, num_bytes: int) -> bool:
    """An mp4 in fragments is a row of boxes, each with its size. Without fragments, the index at its front or end tells."""
    at, has_fragments = 0, False
    with Path(path).open("rb") as file:
        for _ in range(MOST_BOXES):
            file.seek(at)
            header = file.read(16)
            if at + 8 > num_bytes or len(header) < 8:
                return has_fragments and at < num_bytes
            size, kind = struct.unpack_from(">I4s", header)
            if size == 1 and len(header) == 16:
                (size,) = struct.unpack_from(">Q", header, 8)
            has_fragments |= kind == b"moof"
            if size < 8:  # up to the end of the file, or damaged
                return False
            at += size
            if at > num_bytes:
                return has_fragments and kind in (b"moof", b"mdat")
    return False


def tells_damage(notes: Iterable[str]) -> bool:
    """Whether the notes on a decoded video name damage that --strict would refuse, or may have left out some."""
    return any(note.startswith((ENDS_INSIDE, SKIPPED, DAMAGED, UNNOTICED)) for note in notes)
