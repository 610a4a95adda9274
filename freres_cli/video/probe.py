"""Find out what is in a video file, going by its packets and its first frame. Headers are not trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from freres_cli.errors import VideoError, count_of
from freres_cli.records import VideoInfo
from freres_cli.video.opening import count_bytes, iterate_frames, open_video
from freres_cli.video.packets import PacketTable, promised_s, read_packet_table, tolerated_s
from freres_cli.video.turn import read_turn

# Rows of pictures that hold no times, to which FFmpeg gives those of a rate of its own.
UNTIMED_FORMATS = ("mjpeg", "dnxhd")


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
    if number is None and stream.frames == 1:
        # An animated AVIF or HEIC has a still picture ahead of it.
        stream = next((other for other in streams if other.frames > 1), stream)
    if stream.codec_context is None:
        raise VideoError(
            f"{path}: this build of FFmpeg has no decoder for its video", hint="convert the file to H.264 first"
        )
    return stream


def _first_frame(path: str, container: InputContainer, stream: VideoStream) -> av.VideoFrame:
    frame = next((f for f in iterate_frames(container, stream) if f is not None), None)
    if frame is None:
        raise VideoError(
            f"{path}: no frame can be decoded",
            hint="the file is damaged, or of a kind that this FFmpeg cannot decode, such as animated WebP: try to play it, "
            "and convert it if it plays",
        )
    return frame


def _describe_oddities(container: InputContainer, stream: VideoStream, table: PacketTable) -> Iterator[str]:
    held, rate = len(table.stamps_s), _measure_fps(table)
    # That of an mp4 counts frames that its edit list leaves out.
    if stream.frames and stream.frames != held and (table.is_cut or "mp4" not in container.format.name):
        yield f"header promises {count_of(stream.frames, 'frame')}, the file holds {held}"
    promised = promised_s(container, stream)
    if table.missing_s > tolerated_s(table, promised):
        yield f"header promises {promised:.2f} s, the file ends {table.missing_s:.2f} s earlier"
    header_rate = stream.average_rate
    if table.has_timestamps and rate and header_rate and not 0.9 < float(header_rate) / rate < 1.1:
        yield f"header says {float(header_rate):.4g} frames per second, the timestamps say {rate:.4g}"
    if table.num_joints:
        yield f"timestamps begin again {count_of(table.num_joints, 'time')}: the parts are taken one after the other"
    if not table.has_timestamps:
        yield f"the file has no usable timestamps: times are guessed from {1 / table.gap_s:.2f} frames per second"
    if container.format.name in UNTIMED_FORMATS and len(table.stamps_s) > 1:
        yield f"the file is a bare row of pictures, which holds no times: FFmpeg takes {rate or 0:.4g} frames per second"
    steps = table.steps_s
    if len(steps) and steps.max() > 2 * steps.min() + 0.002:
        yield f"variable frame rate: frames are {steps.min() * 1e3:.0f} to {steps.max() * 1e3:.0f} ms apart"
    num_streams = len(_real_video_streams(container))
    if num_streams > 1:
        yield f"{num_streams} video streams: using stream {stream.index} of the file"


def _measure_fps(table: PacketTable) -> float | None:
    """Mean frame rate from the timestamps, or the guessed one; ``None`` for a single frame."""
    span = table.stamps_s[-1] - table.stamps_s[0]
    return (len(table.stamps_s) - 1) / span if span > 0 else None


def check_video(path: str | Path) -> None:
    """Raise ``VideoError`` for a file that cannot be opened or has no video. Nothing is decoded, so it is cheap, and damage
    further inside is not found."""
    with open_video(str(path)) as container:
        _select_stream(str(path), container, None)


def probe_video(path: str | Path, stream: int | None = None) -> VideoInfo:
    """What the file contains, going by its packets and its first decodable frame.

    ``stream`` picks the n-th video stream, counting from 0 and leaving out cover pictures; the default is the first, or the
    next one if the first is a still picture. In the result, ``source_fps`` is the mean rate of the timestamps. Of a file
    that grows, only what it holds now counts. Raises ``VideoError``.
    """
    path = str(path)
    num_bytes = count_bytes(path)
    with open_video(path, num_bytes) as container:
        chosen = _select_stream(path, container, stream)
        table = read_packet_table(path, chosen.index, num_bytes)
        frame = _first_frame(path, container, chosen)
        notes = list(_describe_oddities(container, chosen, table))
        turn = read_turn(frame)
        if not turn.is_exact:
            notes.append(
                f"the file asks for a turn of the picture that is no quarter turn: using {turn.rotation_deg} degrees"
            )
        aspect = float(chosen.sample_aspect_ratio or 1) or 1.0
        shown = (max(1, round(frame.width * aspect)), frame.height)
        width, height = shown if turn.rotation_deg % 180 == 0 else shown[::-1]
        return VideoInfo(
            path=path,
            container=container.format.name,
            codec=chosen.codec_context.codec.canonical_name,
            width_px=width,
            height_px=height,
            coded_width_px=frame.width,
            coded_height_px=frame.height,
            rotation_deg=turn.rotation_deg,
            is_mirrored=turn.is_mirrored,
            sample_aspect_ratio=aspect,
            source_fps=_measure_fps(table),
            num_packets=len(table.stamps_s),
            start_s=table.stamps_s[0],
            zero_s=table.stamps_s[0],
            duration_s=table.end_s - table.stamps_s[0],
            stream_index=chosen.index,
            num_video_streams=len(_real_video_streams(container)),
            has_timestamps=table.has_timestamps,
            num_bytes=num_bytes,
            notes=tuple(notes),
        )
