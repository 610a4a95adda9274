"""Real encoded clips, made with PyAV, whose frames carry their own number.

Every frame is a 4 x 4 board of black and white squares: its number in binary, most significant bit top left. So a
test can read back which frame was delivered, after any codec, resize or rotation.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BOARD = 4
BLACK, WHITE = 40, 215
X264_B_FRAMES = {"bf": "3", "b-adapt": "0", "g": "24", "crf": "12", "preset": "veryfast", "threads": "1"}
X264_P_FRAMES = {"bf": "0", "g": "24", "crf": "12", "preset": "veryfast", "threads": "1"}


def has_encoder(name: str) -> bool:
    """Whether this build of FFmpeg can encode with ``name``."""
    try:
        av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def draw_index(index: int, width: int = 64, height: int = 64) -> np.ndarray:
    """RGB picture (height, width, 3) uint8 that shows ``index``."""
    bits = [(index >> shift) & 1 for shift in reversed(range(BOARD * BOARD))]
    board = np.where(np.array(bits).reshape(BOARD, BOARD) == 1, WHITE, BLACK).astype(np.uint8)
    rows = np.arange(height) * BOARD // height
    columns = np.arange(width) * BOARD // width
    return np.repeat(board[rows][:, columns][..., None], 3, axis=2)


def read_index(picture) -> int:
    """The number shown by a picture (height, width, 3) of any size. A square that is neither black nor white fails."""
    picture = np.asarray(picture, dtype=np.float64)
    height, width = picture.shape[0] // BOARD, picture.shape[1] // BOARD
    index = 0
    for row in range(BOARD):
        for column in range(BOARD):
            square = picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
            inside = square[height // 4 : height - height // 4, width // 4 : width - width // 4]
            grey = inside.mean()
            assert not 100 < grey < 156, f"square {row},{column} is grey: {grey:.0f}"
            index = index * 2 + (grey > 128)
    return int(index)


def read_indices(pixels) -> list[int]:
    return [read_index(picture) for picture in pixels]


def numbered(count: int, width: int = 64, height: int = 64, first: int = 0) -> Iterable[np.ndarray]:
    return (draw_index(first + i, width, height) for i in range(count))


def solid(count: int, rgb: tuple[int, int, int], width: int = 64, height: int = 64) -> Iterable[np.ndarray]:
    return (np.full((height, width, 3), rgb, dtype=np.uint8) for _ in range(count))


def _add_video(container, codec, fps, pix_fmt, size, options, time_base, tags):
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(100000), options=dict(options or {}))
    stream.width, stream.height = size
    stream.pix_fmt = pix_fmt
    stream.codec_context.time_base = time_base or 1 / Fraction(fps).limit_denominator(100000)
    for name, value in tags.items():
        setattr(stream.codec_context, name, value)
    return stream


def _encode_video(container, stream, pictures, pts: Sequence[int] | None, tags) -> None:
    for i, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format=stream.pix_fmt,
            dst_colorspace={1: "ITU709"}.get(tags.get("colorspace"), "ITU601"),
            dst_color_range=tags.get("color_range", 1),
        )
        frame.pict_type = 0
        frame.pts = i if pts is None else pts[i]
        frame.time_base = stream.codec_context.time_base
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _encode_silence(container, stream, seconds: float) -> None:
    for i in range(max(1, int(seconds * 44100 / 1024))):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, i * 1024, Fraction(1, 44100)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_clip(
    path: Path,
    count: int = 48,
    *,
    fps: float = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 64),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    time_base: Fraction | None = None,
    pts: Sequence[int] | None = None,
    pictures: Iterable[np.ndarray] | None = None,
    audio: str = "none",
    more_streams: Sequence[Iterable[np.ndarray]] = (),
    **tags: object,
) -> Path:
    """Encode ``count`` numbered frames (or ``pictures``) to ``path``. ``audio``: "none", "first" or "last" stream.

    ``pts`` are in ``time_base``; ``tags`` are attributes of the codec context (``sample_aspect_ratio``,
    ``color_range``, ``colorspace``). ``more_streams`` are the pictures of further video streams.
    """
    if options is None:
        options = X264_B_FRAMES if codec == "libx264" else {}
    width, height = size
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        sound = container.add_stream("aac", rate=44100, layout="mono") if audio == "first" else None
        streams = [_add_video(container, codec, fps, pix_fmt, size, options, time_base, tags)]
        for _ in more_streams:
            streams.append(_add_video(container, codec, fps, pix_fmt, size, options, time_base, tags))
        if audio == "last":
            sound = container.add_stream("aac", rate=44100, layout="mono")
        if sound is not None:
            _encode_silence(container, sound, count / fps)
        for stream, shown in zip(streams, [pictures or numbered(count, width, height), *more_streams], strict=True):
            _encode_video(container, stream, shown, pts, tags)
    return path


def write_audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        _encode_silence(container, container.add_stream("aac", rate=44100, layout="mono"), 1.0)
    return path


def write_audio_with_cover(path: Path) -> Path:
    """An audio file with a cover picture: its only "video" stream is an attached picture."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        cover = _add_video(container, "mjpeg", 1, "yuvj420p", (64, 64), {}, None, {})
        cover.disposition = av.stream.Disposition.attached_pic
        _encode_silence(container, sound, 1.0)
        _encode_video(container, cover, numbered(1), None, {"color_range": 2})
    return path


def _copy_packets(source: Path, target: Path, restamp: Callable[[int, av.Packet], None]) -> Path:
    """Copy the video packets of ``source``; ``restamp(number, packet)`` may change their times."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in reader.demux(stream) if p.size):
            restamp(number, packet)
            packet.stream = copy
            writer.mux(packet)
    return target


def write_pts_equal_dts(path: Path, count: int = 48, fps: int = 24) -> Path:
    """B-frames in a container that wrote pts = dts: the decoder puts out frames whose pts run backwards."""
    source = write_clip(path.with_name("source_" + path.name), count, fps=fps)

    def restamp(number, packet):
        packet.pts = packet.dts = int(number / fps / packet.time_base)

    return _copy_packets(source, path, restamp)


def write_shifted(path: Path, seconds: float, count: int = 48, fps: int = 24) -> Path:
    """A clip whose first frame is shown at ``seconds`` of the file's own clock (MPEG-TS, with B-frames)."""
    source = write_clip(path.with_name("source_" + path.name).with_suffix(".mp4"), count, fps=fps)

    def restamp(number, packet):
        shift = round(seconds / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift

    return _copy_packets(source, path, restamp)


def rotate_mp4(path: Path, degrees_ccw: int) -> Path:
    """Write a rotation into the track header of an mp4 made here: players turn the picture counterclockwise."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees_ccw % 360]
    one = 1 << 16
    matrix = struct.pack(">9i", cos * one, -sin * one, 0, sin * one, cos * one, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 4 + 20 + 8 + 8  # version and flags, times and track number, reserved, layer/group/volume
    data[at : at + len(matrix)] = matrix
    path.write_bytes(data)
    return path


def lie_in_header(path: Path, frames: int) -> Path:
    """Make the headers of an AVI promise ``frames`` frames."""
    data = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        at = data.index(tag) + offset
        data[at : at + 4] = struct.pack("<I", frames)
    path.write_bytes(data)
    return path


def cut(path: Path, fraction: float) -> Path:
    """Keep the first ``fraction`` of the bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def rot(path: Path, first_fraction: float = 0.4, flips: int = 40, seed: int = 0) -> Path:
    """Flip bytes after ``first_fraction`` of the file."""
    data, dice = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(flips):
        data[dice.randrange(int(len(data) * first_fraction), len(data))] ^= 0xFF
    path.write_bytes(data)
    return path


def blank_payloads(path: Path, numbers: slice = slice(None)) -> Path:
    """Overwrite packets of an mp4, or of an AVI, with zeros and leave the container as it is."""
    header = 8 if path.suffix == ".avi" else 0
    with av.open(str(path)) as container:
        places = [(packet.pos + header, packet.size) for packet in container.demux() if packet.size]
    data = bytearray(path.read_bytes())
    for at, size in places[numbers]:
        data[at : at + size] = bytes(size)
    path.write_bytes(data)
    return path


def write_size_change(path: Path) -> Path:
    """Raw H.264 whose picture size changes half-way: two streams, one after the other."""
    parts = []
    for number, size in enumerate([(64, 64), (96, 48)]):
        part = path.with_name(f"part{number}.h264")
        pictures = numbered(12, *size, first=12 * number)
        parts.append(write_clip(part, 12, size=size, pictures=pictures, options=X264_P_FRAMES).read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def write_short_clips(folder: Path, count: int) -> Path:
    """Write clips of 4, 5 and so on frames, called clip0.mp4 and so on, and return the folder."""
    for i in range(count):
        write_clip(folder / f"clip{i}.mp4", 4 + i, fps=4)
    return folder
