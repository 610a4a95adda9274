"""Open a video file and find out what is in it by reading all its packets. Headers are not trusted.

Real files promise frames they do not contain, state rates that are off by a factor of six, start at 8.3 s, or have no
timestamps at all. The packets tell the truth, at the cost of reading the file once, without decoding.
"""

from __future__ import annotations

import hashlib
import stat
import statistics
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from freres_cli.errors import VideoError, count_of, explain_no_file
from freres_cli.records import VideoInfo

GUESSED_FPS = 25.0
# A file that ends this much earlier than its header says, or by this share of it, is cut; less is rounding.
CUT_S, CUT_SHARE = 0.5, 0.05
# A single damaged timestamp can put a frame years away; the timestamps of such a file are not used.
MOST_SECONDS_PER_FRAME = 600.0
# Formats of text: lists of other files, which would be opened with the rights of whoever runs freres, whatever they are;
# scripts; and plain text, which FFmpeg renders as a video of a terminal. A file name that is a pattern is image2.
REFUSED_FORMATS = frozenset(
    (
        *("avisynth", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtsp", "sdp", "svg_pipe", "tty"),
        *("vapoursynth", "vobsub", "webm_dash_manifest"),
    )
)
SNIFFED_BYTES = 4096


@dataclass(frozen=True)
class PacketTable:
    """When the frames of one video stream are shown, found without decoding. Times are in seconds on the file's clock.

    ``stamps_s``: one per packet, ascending. ``end_s``: when the last frame leaves the screen. ``gap_s``: the usual time
    between frames. ``is_order_blind``: the timestamps ascend in the file although the codec may reorder frames, so they
    do not say when a B-frame is shown. ``missing_s``: how much longer than its packets the header says the file is. It
    counts only if ``is_cut``, that is, if there is other evidence that the end of the file is missing.
    """

    stamps_s: array[float]
    end_s: float
    gap_s: float
    has_timestamps: bool
    is_order_blind: bool
    missing_s: float
    is_cut: bool


def hash_file(path: str | Path) -> str:
    """SHA-256 of the file's bytes, as 64 hexadecimal digits. Raises ``VideoError``."""
    _require_regular_file(str(path))
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_regular_file(path: str) -> None:
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise VideoError(explain_no_file(path), hint="name one video file")
        # Opening a pipe could block for ever, so the kind of file is checked first.
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(explain_no_file(path), hint="save the video to a file first: it is read more than once")
        with Path(path).open("rb"):
            pass
    except FileNotFoundError as error:
        raise VideoError(explain_no_file(path), hint="check the path") from error
    except PermissionError as error:
        raise VideoError(f"{path}: permission denied", hint="make the file readable by this user") from error
    except OSError as error:
        raise VideoError(f"{path}: cannot be opened: {error.strerror}") from error
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty", hint="the download or copy may have failed")


def open_video(path: str) -> InputContainer:
    """Open the file for reading; the caller closes it. Raises ``VideoError``."""
    _require_regular_file(path)
    # FFmpeg's log is turned off. Sent to Python's logging instead, it deadlocks with threaded decoding (PyAV 18.1).
    av.logging.set_level(None)
    try:
        # An absolute path cannot be mistaken for a URL. Formats are refused before FFmpeg opens what a playlist names.
        return av.open(
            str(Path(path).absolute()),
            metadata_errors="replace",
            options={"protocol_whitelist": "file", "format_whitelist": _allowed_formats()},
        )
    except FFmpegError as error:
        if isinstance(error, ArgumentError) and _is_text(path):
            raise VideoError(
                f"{path}: is text, such as a playlist, not a video",
                hint="name a video file; other files that it lists are not opened",
            ) from error
        raise VideoError(
            f"{path}: not a video that FFmpeg can read: {error.strerror}",
            hint="the file may be cut short, damaged, or not a video: try to play it, or download it again",
        ) from error


@cache
def _allowed_formats() -> str:
    return ",".join(sorted(av.formats_available - REFUSED_FORMATS))


def _is_text(path: str) -> bool:
    with Path(path).open("rb") as file:
        return b"\0" not in file.read(SNIFFED_BYTES)


def _real_video_streams(container: InputContainer) -> list[VideoStream]:
    """The video streams, without the cover pictures of songs."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _select_stream(path: str, container: InputContainer, number: int | None) -> VideoStream:
    streams = _real_video_streams(container)
    if not streams:
        kinds = sorted({"a cover picture" if s.type == "video" else s.type for s in container.streams})
        found = f"has no video stream, only {' and '.join(kinds)}" if kinds else "has no streams of any kind"
        raise VideoError(f"{path}: {found}", hint="name a file with video")
    if number is not None and not 0 <= number < len(streams):
        raise VideoError(f"{path}: video stream: expected 0 to {len(streams) - 1}, got {number}")
    stream = streams[number or 0]
    if stream.codec_context is None:
        raise VideoError(
            f"{path}: this build of FFmpeg has no decoder for its video", hint="convert the file to H.264 first"
        )
    return stream


def video_stream(container: InputContainer, index: int) -> VideoStream:
    """The stream at ``index`` among all streams of the file, known to be video."""
    return cast(VideoStream, container.streams[index])


def iterate_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame | None]:
    """Decoded frames in display order. ``None`` stands for a packet that cannot be read or decoded."""
    packets = container.demux(stream)
    while True:
        packet: Packet[VideoStream] | None
        try:
            packet = next(packets, None)
        except FFmpegError:
            yield None
            # An empty packet asks the decoder for the frames it still holds.
            packet = cast("Packet[VideoStream]", Packet())
            assert stream.time_base is not None
            packet.stream, packet.time_base = stream, stream.time_base
            packets = iter(())
        if packet is None:
            return
        try:
            frames = packet.decode()
        except FFmpegError:
            yield None
            continue
        yield from frames


def _first_frame(path: str, container: InputContainer, stream: VideoStream) -> av.VideoFrame:
    frame = next((f for f in iterate_frames(container, stream) if f is not None), None)
    if frame is None:
        raise VideoError(
            f"{path}: no frame can be decoded", hint="the file is damaged: try to play it, or download it again"
        )
    return frame


def read_packet_table(path: str, stream_index: int) -> PacketTable:
    """The packet table of one stream, cached until the file changes. Raises ``VideoError``."""
    _require_regular_file(path)
    status = Path(path).stat()
    return _read_packet_table(path, stream_index, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_packet_table(path: str, stream_index: int, _size: int, _mtime_ns: int) -> PacketTable:
    stamps: list[int | None] = []
    durations: list[int] = []
    file_start, file_end = float("inf"), 0.0
    num_discarded, is_cut = 0, False
    with open_video(path) as container:
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
                if packet.stream_index == stream_index and packet.is_discard:
                    num_discarded += 1
                elif packet.stream_index == stream_index:
                    stamps.append(stamp)
                    durations.append(packet.duration or 0)
        except FFmpegError:
            is_cut = True
        # The sample tables of mp4 and mov are exact, unlike the counts of other containers.
        if "mp4" in container.format.name and stream.frames > len(stamps) + num_discarded:
            is_cut = True
        # Some containers count time from the first packet, others from 0: take the reading with less missing.
        held = max(file_end, file_end - file_start) if file_start < float("inf") else float("inf")
        promised = _promised_s(container, stream)
        table = _build_table(path, stream, stamps, durations, max(0.0, promised - held), is_cut)
        return replace(table, is_cut=is_cut or table.missing_s > _tolerated_s(table, promised))


def _tolerated_s(table: PacketTable, promised_s: float) -> float:
    """How much earlier than ``promised_s`` a whole file may end. Many containers do not store how long the last frame is
    shown; it may be as long as any other."""
    longest = max((b - a for a, b in pairwise(table.stamps_s)), default=0.0)
    return max(2 * table.gap_s, longest, min(CUT_S, CUT_SHARE * promised_s))


def _promised_s(container: InputContainer, stream: VideoStream) -> float:
    """How long the file is, in seconds, according to its headers. AVI only states a number of frames."""
    by_frames = float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    return max((container.duration or 0) / av.time_base, by_frames)


def _build_table(
    path: str,
    stream: VideoStream,
    stamps: list[int | None],
    durations: list[int],
    missing_s: float,
    is_cut: bool,
) -> PacketTable:
    if not stamps:
        raise VideoError(f"{path}: holds no video packets", hint="the file may be cut short: download it again")
    filled: list[int] = []
    for stamp, duration in zip(stamps, durations, strict=True):
        filled.append(stamp if stamp is not None else filled[-1] + duration if filled else 0)
    ascending = sorted(filled)
    steps = [b - a for a, b in pairwise(ascending) if b > a]
    time_base = stream.time_base
    assert time_base is not None
    last_duration = durations[filled.index(ascending[-1])]
    span = float((ascending[-1] + last_duration - ascending[0]) * time_base)
    if all(stamp is None for stamp in stamps) or span > MOST_SECONDS_PER_FRAME * len(stamps):
        guesses = (statistics.median(durations) * time_base, 1 / Fraction(stream.guessed_rate or GUESSED_FPS))
        gap = next((float(guess) for guess in guesses if 0 < guess < MOST_SECONDS_PER_FRAME), 1 / GUESSED_FPS)
        seconds = array("d", (k * gap for k in range(len(stamps))))
        return PacketTable(seconds, len(stamps) * gap, gap, False, True, missing_s, is_cut)
    usual = statistics.median(steps) if steps else last_duration
    gap = float(usual * time_base) or 1 / GUESSED_FPS
    end = float(ascending[-1] * time_base) + (float(last_duration * time_base) or gap)
    seconds = array("d", (float(stamp * time_base) for stamp in ascending))
    is_order_blind = filled == ascending and bool(stream.codec_context.has_b_frames)
    return PacketTable(seconds, end, gap, True, is_order_blind, missing_s, is_cut)


def _describe_oddities(container: InputContainer, stream: VideoStream, table: PacketTable) -> Iterator[str]:
    held, rate = len(table.stamps_s), _measure_fps(table)
    if stream.frames and stream.frames != held:
        yield f"header promises {count_of(stream.frames, 'frame')}, the file holds {held}"
    promised = _promised_s(container, stream)
    if table.missing_s > _tolerated_s(table, promised):
        yield f"header promises {promised:.2f} s, the file ends {table.missing_s:.2f} s earlier"
    header_rate = stream.average_rate
    if table.has_timestamps and rate and header_rate and not 0.9 < float(header_rate) / rate < 1.1:
        yield f"header says {float(header_rate):.2f} frames per second, the timestamps say {rate:.2f}"
    if not table.has_timestamps:
        yield f"the file has no usable timestamps: times are guessed from {1 / table.gap_s:.2f} frames per second"
    steps = [b - a for a, b in pairwise(table.stamps_s)]
    if steps and max(steps) > 2 * min(steps) + 0.002:
        yield f"variable frame rate: frames are {min(steps) * 1e3:.0f} to {max(steps) * 1e3:.0f} ms apart"
    num_streams = len(_real_video_streams(container))
    if num_streams > 1:
        yield f"{num_streams} video streams: using stream {stream.index} of the file"


def _measure_fps(table: PacketTable) -> float | None:
    """Mean frame rate from the timestamps, or the guessed one; ``None`` for a single frame."""
    span = table.stamps_s[-1] - table.stamps_s[0]
    return (len(table.stamps_s) - 1) / span if span > 0 else None


def probe_video(path: str | Path, stream: int | None = None) -> VideoInfo:
    """What the file contains, going by its packets and its first decodable frame.

    ``stream`` picks the n-th video stream, counting from 0 and leaving out cover pictures; the default is the first. In
    the result, ``source_fps`` is the mean rate of the timestamps, and ``rotation_deg`` (0, 90, 180 or 270) is how far a
    player turns the picture counterclockwise. Raises ``VideoError``.
    """
    path = str(path)
    with open_video(path) as container:
        chosen = _select_stream(path, container, stream)
        table = read_packet_table(path, chosen.index)
        frame = _first_frame(path, container, chosen)
        notes = list(_describe_oddities(container, chosen, table))
        rotation = round(frame.rotation / 90) * 90 % 360
        if frame.rotation % 90:
            notes.append(f"the file asks for a rotation of {frame.rotation} degrees: using {rotation}")
        aspect = float(chosen.sample_aspect_ratio or 1) or 1.0
        shown = (max(1, round(frame.width * aspect)), frame.height)
        width, height = shown if rotation % 180 == 0 else shown[::-1]
        return VideoInfo(
            path=path,
            container=container.format.name,
            codec=chosen.codec_context.codec.canonical_name,
            width_px=width,
            height_px=height,
            coded_width_px=frame.width,
            coded_height_px=frame.height,
            rotation_deg=rotation,
            sample_aspect_ratio=aspect,
            source_fps=_measure_fps(table),
            num_packets=len(table.stamps_s),
            start_s=table.stamps_s[0],
            duration_s=table.end_s - table.stamps_s[0],
            stream_index=chosen.index,
            num_video_streams=len(_real_video_streams(container)),
            has_timestamps=table.has_timestamps,
            notes=tuple(notes),
        )
