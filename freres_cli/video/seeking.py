"""Decoding from the middle of a file: exactly the frames that decoding from its beginning gives, or not at all. Ours."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from freres_cli.video.opening import iterate_frames
from freres_cli.video.packets import PacketTable


@dataclass(frozen=True)
class Entry:
    """Where to begin. ``pts``, ``dts``: stamps of the packet that is decoded first. ``first_pts``: of the first frame that
    is used, a key frame later; ``first_index``: its number in the file, in display order."""

    pts: int
    dts: int
    first_pts: int
    first_index: int


def find_entry(table: PacketTable, first_s: float) -> Entry | None:
    """Return where to begin for the frames on screen from ``first_s`` on; ``None`` to begin at the beginning.

    Frames before a key frame in display order may lean on what came before it, as in an open GoP, and some encoders
    refresh the picture bit by bit from one key frame to the next. So decoding begins one key frame earlier than needed.
    """
    keys = table.key_pts
    if (np.diff(np.frombuffer(keys, dtype=np.int64)) <= 0).any():
        return None
    used = bisect_right(keys, first_s, key=table.seconds_of) - 1
    if used < 2:
        return None
    index = bisect_left(table.stamps_s, table.seconds_of(keys[used]))
    return Entry(keys[used - 1], table.key_dts[used - 1], keys[used], index)


def frames_from(container: InputContainer, stream: VideoStream, entry: Entry) -> Iterator[av.VideoFrame | None] | None:
    """Return what ``iterate_frames`` would, from the first used frame on; ``None`` if the file does not lead there.

    Some files mark every packet as a key frame. Where the decoder knows better, decoding cannot begin there.
    """
    packets = _packets_from(container, stream, entry)
    if packets is None:
        return None
    frames, codec = iterate_frames(container, stream, packets), stream.codec_context.codec
    # H.264 has entries without a key frame, where the picture is refreshed bit by bit, and says what is not whole.
    is_sure = codec.intra_only or codec.canonical_name == "h264"
    for frame in frames:
        if frame is None or frame.pts is None:
            continue
        if frame.pts in (entry.pts, entry.first_pts) and not (frame.key_frame or is_sure):
            return None
        if frame.pts < entry.first_pts:
            continue
        return chain([frame], frames) if frame.pts == entry.first_pts and not frame.is_corrupt else None
    return None


def _packets_from(container: InputContainer, stream: VideoStream, entry: Entry) -> Iterator[Packet[VideoStream]] | None:
    """Return the packets from the entry on; ``None`` if seeking leads elsewhere, as in files without an index it may."""
    try:
        container.seek(entry.dts, stream=stream)
        packets = container.demux(stream)
        for packet in packets:
            if packet.pts == entry.pts:
                return chain([packet], packets) if packet.is_keyframe else None
            if packet.is_keyframe and (packet.pts is None or packet.pts > entry.pts):
                return None
    except FFmpegError:
        return None
    return None
