"""Open video files: regular files that FFmpeg can read, and nothing that they name."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import cast

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from freres_cli.errors import VideoError, explain_no_file

# Formats of text: lists of other files, which would be opened with the rights of whoever runs freres, whatever they are;
# scripts; and plain text, which FFmpeg renders as a video of a terminal. A file name that is a pattern is image2.
REFUSED_FORMATS = frozenset(
    (
        *("avisynth", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtsp", "sdp", "svg_pipe", "tty"),
        *("vapoursynth", "vobsub", "webm_dash_manifest"),
    )
)
SNIFFED_BYTES = 4096
BYTES_NOT_IN_TEXT = frozenset(range(32)) - frozenset(b"\t\n\f\r\x1b")


def hash_file(path: str | Path, num_bytes: int | None = None) -> str:
    """SHA-256 of the file, or of its first ``num_bytes``, as 64 hexadecimal digits. Raises ``VideoError``."""
    count_bytes(path)
    with Path(path).open("rb") as file:
        if num_bytes is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while num_bytes > 0 and (part := file.read(min(num_bytes, 1 << 20))):
            digest.update(part)
            num_bytes -= len(part)
        return digest.hexdigest()


def count_bytes(path: str | Path) -> int:
    """Return the size of a regular file that this user may read. Raises ``VideoError`` for anything else."""
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise VideoError(explain_no_file(path), hint="name one video file")
        # Opening a pipe could block for ever, so the kind of file is checked first.
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(
                explain_no_file(path),
                hint="save the video to a file first, or give it on standard input: freres compress - < PIPE",
            )
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
    return status.st_size


def open_video(path: str, num_bytes: int | None = None, accelerator: HWAccel | None = None) -> InputContainer:
    """Open the file for reading; the caller closes it.

    ``num_bytes``: only this much of it, as it may grow while it is read. ``accelerator``: what decodes, if not the CPU.
    Raises ``VideoError``, also if the file has become smaller than that.
    """
    held = count_bytes(path)
    if num_bytes is not None and held < num_bytes:
        raise VideoError(f"{path}: became smaller while it was read", hint="wait until nothing writes to the file")
    # FFmpeg's log is turned off. Sent to Python's logging instead, it deadlocks with threaded decoding (PyAV 18.1).
    av.logging.set_level(None)
    # An absolute path cannot be mistaken for a URL.
    place, protocols = str(Path(path).absolute()), "file"
    if num_bytes is not None:
        place, protocols = f"subfile,,start,0,end,{num_bytes},,:{place}", "file,subfile"
    try:
        # Formats are refused before FFmpeg opens what a playlist names.
        options = {"protocol_whitelist": protocols, "format_whitelist": _allowed_formats()}
        return av.open(place, metadata_errors="replace", options=options, hwaccel=accelerator)
    except FFmpegError as error:
        if _is_text(path):
            raise VideoError(
                f"{path}: is text, such as a playlist, not a video",
                hint="freres batch reads lists in .jsonl"
                if path.lower().endswith(".jsonl")
                else "name a video file; other files that it lists are not opened",
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
        return BYTES_NOT_IN_TEXT.isdisjoint(file.read(SNIFFED_BYTES))


def video_stream(container: InputContainer, index: int) -> VideoStream:
    """The stream at ``index`` among all streams of the file, known to be video."""
    return cast(VideoStream, container.streams[index])


def iterate_frames(
    container: InputContainer, stream: VideoStream, packets: Iterator[Packet[VideoStream]] | None = None
) -> Iterator[av.VideoFrame | None]:
    """Decoded frames in display order, of all packets or of ``packets``. ``None`` stands for a packet that cannot be read
    or decoded."""
    packets = container.demux(stream) if packets is None else packets
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
