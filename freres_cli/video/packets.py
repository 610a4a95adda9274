"""When the frames of a file are shown, and where decoding can begin: found by reading all packets, without decoding.

Headers are not trusted. Real files promise frames they do not contain, state rates that are off by a factor of six, start
at 8.3 s, or have no timestamps at all. The packets tell the truth, at the cost of reading the file once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from freres_cli.errors import VideoError
from freres_cli.video.ending import ends_inside, is_whole_avi
from freres_cli.video.opening import count_bytes, open_video, video_stream

GUESSED_FPS = 25.0
# A file that ends this much earlier than its header says, or by this share of it, is cut; less is rounding.
CUT_S, CUT_SHARE = 0.5, 0.05
# A single damaged timestamp can put a frame years away; the timestamps of such a file are not used. Frames that are further
# apart than this on average are those of a time lapse only if most of them are, and if it lasts 30 years at most.
MOST_SECONDS_PER_FRAME, MOST_SECONDS = 600.0, 1e9
NO_STAMP = -(2**63)  # as FFmpeg writes it
MOST_STAMP = 2**61  # differences of damaged stamps still fit 64 bits


@dataclass(frozen=True)
class PacketTable:
    """When the frames of one video stream are shown, found without decoding. Times are in seconds on the file's clock.

    ``stamps_s``: one per packet, ascending. ``end_s``: when the last frame leaves the screen. ``gap_s``: the usual time
    between frames. ``is_order_blind``: the timestamps ascend in the file although the codec may reorder frames, so they
    do not say when a B-frame is shown; or they begin again. ``missing_s``: how much longer than its packets the header says
    the file is; 0 if it does not say. It counts only if ``is_cut``, that is, if there is other evidence that the end of the
    file is missing.

    ``num_joints``: how often the timestamps of the file begin again; those here go on. ``num_headless``: packets before the
    first at which decoding can begin, in file order.

    ``key_pts``, ``key_dts``: stamps of the packets at which decoding can begin, in file order, in units of ``time_base``;
    empty where timestamps do not tell frames apart, so that the file can only be read from its beginning.
    """

    stamps_s: array[float]
    end_s: float
    gap_s: float
    has_timestamps: bool
    is_order_blind: bool
    missing_s: float
    is_cut: bool
    num_joints: int = 0
    num_headless: int = 0
    time_base: Fraction = Fraction(1)
    key_pts: array[int] = field(default_factory=lambda: array("q"))
    key_dts: array[int] = field(default_factory=lambda: array("q"))

    def seconds_of(self, stamp: int) -> float:
        """A stamp in units of the stream, in seconds."""
        return float(stamp * self.time_base)

    @property
    def steps_s(self) -> np.ndarray:
        """Seconds from each packet's timestamp to the next."""
        return np.diff(np.frombuffer(self.stamps_s))


@dataclass
class _Stamps:
    """Packets as they are read: 8 bytes for each number, as an hour has 108,000 of them at 30 fps."""

    pts: array[int] = field(default_factory=lambda: array("q"))
    dts: array[int] = field(default_factory=lambda: array("q"))
    durations: array[int] = field(default_factory=lambda: array("q"))
    key_pts: array[int] = field(default_factory=lambda: array("q"))
    key_dts: array[int] = field(default_factory=lambda: array("q"))
    num_discarded: int = 0
    num_bare: int = 0  # that do not say when they are shown
    num_headless: int | None = None  # before the first key frame, if there is one

    def add(self, packet: Packet[Any]) -> None:
        if packet.is_discard:
            self.num_discarded += 1
            return
        stamp = packet.pts if packet.pts is not None else packet.dts
        self.num_bare += packet.pts is None
        if packet.is_keyframe and self.num_headless is None:
            self.num_headless = len(self.pts)
        self.pts.append(NO_STAMP if stamp is None else _bound(stamp))
        self.dts.append(NO_STAMP if packet.dts is None else _bound(packet.dts))
        self.durations.append(_bound(packet.duration or 0))
        if packet.is_keyframe and packet.pts is not None:
            self.key_pts.append(_bound(packet.pts))
            # Matroska has no such stamps, and seeks by the time a frame is shown.
            self.key_dts.append(_bound(packet.pts if packet.dts is None else packet.dts))


def read_packet_table(path: str, stream_index: int, num_bytes: int | None = None) -> PacketTable:
    """The packet table of one stream, cached until the file changes.

    ``path``: the file; ``stream_index``: among all its streams; ``num_bytes``: as in ``open_video``. Raises ``VideoError``.
    """
    size = count_bytes(path)
    return _read_packet_table(
        path, stream_index, size if num_bytes is None else num_bytes, Path(path).stat().st_mtime_ns
    )


@lru_cache(maxsize=8)
def _read_packet_table(path: str, stream_index: int, num_bytes: int, _mtime_ns: int) -> PacketTable:
    stamps = _Stamps()
    file_start, file_end = float("inf"), 0.0
    is_cut, was_corrupt = False, (False, False)
    with open_video(path, num_bytes) as container:
        stream = video_stream(container, stream_index)
        try:
            for packet in container.demux():
                if packet.size == 0:
                    continue
                is_cut = packet.is_corrupt
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is not None:
                    file_start = min(file_start, float(stamp * packet.time_base))
                    file_end = max(file_end, float((stamp + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index == stream_index:
                    stamps.add(packet)
                    was_corrupt = (was_corrupt[1], packet.is_corrupt)
        except FFmpegError:
            is_cut = True
        # Of a corrupt packet that FFmpeg's parser splits, it does not mark the last piece.
        is_cut |= any(was_corrupt) or ends_inside(path, container.format.name, num_bytes)
        # The index of mp4 and mov is exact, unlike the counts of other containers. It lacks what an edit list leaves out.
        if "mp4" in container.format.name and len(stream.index_entries) > len(stamps.pts) + stamps.num_discarded:
            is_cut = True
        # Some containers count time from the first packet, others from 0: take the reading with less missing.
        held = max(file_end, file_end - file_start) if file_start < float("inf") else float("inf")
        promised = promised_s(container, stream)
        if container.format.name == "avi" and is_whole_avi(path, num_bytes):
            promised = 0.0
        table = _build_table(path, stream, stamps, max(0.0, promised - held), is_cut)
        return replace(table, is_cut=is_cut or table.missing_s > tolerated_s(table, promised))


def tolerated_s(table: PacketTable, header_s: float) -> float:
    """How much earlier than its header says, ``header_s``, a whole file may end. Many containers do not store how long the
    last frame is shown; it may be as long as any other."""
    longest = float(table.steps_s.max(initial=0.0))
    return max(2 * table.gap_s, longest, min(CUT_S, CUT_SHARE * header_s))


def promised_s(container: InputContainer, stream: VideoStream) -> float:
    """How long the file is, in seconds, according to its headers. AVI only states a number of frames."""
    # Those of an mp4 count frames that its edit list leaves out.
    rate = None if "mp4" in container.format.name else stream.average_rate
    by_frames = float(stream.frames / rate) if rate else 0.0
    return max((container.duration or 0) / av.time_base, by_frames)


def _build_table(path: str, stream: VideoStream, stamps: _Stamps, missing_s: float, is_cut: bool) -> PacketTable:
    if not stamps.pts:
        raise VideoError(f"{path}: holds no video packets", hint="the file may be cut short: download it again")
    time_base = stream.time_base
    assert time_base is not None
    num_joints = _join_parts(stamps)
    num_headless = stamps.num_headless or 0
    filled = np.frombuffer(array("q", _fill(stamps)), dtype=np.int64)
    ascending = np.sort(filled)
    steps = np.diff(ascending)
    durations = stamps.durations
    last_duration = durations[int(filled.argmax())]
    span = float((int(ascending[-1]) + last_duration - int(ascending[0])) * time_base)
    count = len(filled)
    if all(stamp == NO_STAMP for stamp in stamps.pts) or _is_spoilt(steps, span, time_base):
        usual = Fraction(float(np.median(np.frombuffer(durations, dtype=np.int64))))
        guesses = (usual * time_base, 1 / Fraction(stream.guessed_rate or GUESSED_FPS))
        gap = next((float(guess) for guess in guesses if 0 < guess < MOST_SECONDS_PER_FRAME), 1 / GUESSED_FPS)
        seconds = array("d", (k * gap for k in range(count)))
        return PacketTable(seconds, count * gap, gap, False, True, missing_s, is_cut, num_headless=num_headless)
    usual = Fraction(float(np.median(steps[steps > 0]))) if steps.any() else Fraction(last_duration)
    gap = float(usual * time_base) or 1 / GUESSED_FPS
    end = float(int(ascending[-1]) * time_base) + (float(last_duration * time_base) or gap)
    seconds = array("d", (float(stamp * time_base) for stamp in array("q", ascending.tobytes())))
    ascends = bool((np.diff(filled) >= 0).all())
    is_order_blind = num_joints > 0 or (ascends and bool(stream.codec_context.has_b_frames))
    table = PacketTable(seconds, end, gap, True, is_order_blind, missing_s, is_cut, num_joints, num_headless)
    if is_order_blind or stamps.num_bare or stamps.num_discarded or not steps.all():
        return table
    return replace(table, time_base=time_base, key_pts=stamps.key_pts, key_dts=stamps.key_dts)


def _join_parts(stamps: _Stamps) -> int:
    """Where the times of decoding fall back, as in files that were joined byte by byte, let the stamps after go on from
    those before. Return how often that was. A single stamp that is damaged does not count."""
    dts = np.frombuffer(stamps.dts, dtype=np.int64)
    if len(dts) < 4 or bool((dts == NO_STAMP).any()):
        return 0
    is_joint = np.maximum(dts[2:-1], dts[3:]) < np.minimum(dts[1:-2], dts[:-3])
    joints = [int(place) + 2 for place in np.flatnonzero(is_joint)]
    usual = int(np.median(np.abs(np.diff(dts))))
    offset = 0
    for start, stop in pairwise([*joints, len(dts)]):
        offset = _bound(offset + int(dts[start - 1]) + (stamps.durations[start - 1] or usual) - int(dts[start]))
        for place in range(start, stop):
            if stamps.pts[place] != NO_STAMP:
                stamps.pts[place] = _bound(stamps.pts[place] + offset)
    return len(joints)


def _is_spoilt(steps: np.ndarray, span_s: float, time_base: Fraction) -> bool:
    """Whether a damaged timestamp stretches the clip. ``steps``: from each to the next, in units of ``time_base``.
    ``span_s``: of the clip."""
    if span_s <= MOST_SECONDS_PER_FRAME * (len(steps) + 1):
        return False
    if len(steps) < 2 or span_s > MOST_SECONDS:
        return True
    middle = (len(steps) - 1) // 2  # of three frames, of which one is spoilt, the smaller step counts
    return float(int(np.partition(steps, middle)[middle]) * time_base) <= MOST_SECONDS_PER_FRAME


def _fill(stamps: _Stamps) -> Iterator[int]:
    """Yield the stamp of each packet; one without follows the packet before it directly."""
    following = 0
    for stamp, duration in zip(stamps.pts, stamps.durations, strict=True):
        here = following if stamp == NO_STAMP else stamp
        yield here
        following = _bound(here + duration)


def _bound(stamp: int) -> int:
    return max(-MOST_STAMP, min(MOST_STAMP, stamp))
