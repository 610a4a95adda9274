"""Decoding on an NVIDIA GPU (NVDEC), by FFmpeg's own decoders of H.264, HEVC, VP8 and VP9.

The samples are those that the CPU decodes: these standards define every bit, which MPEG-1, 2 and 4 and JPEG do not, nor
film grain, which only the CPU's decoders add. They are copied to host memory, where they are resized as any others, so that
a bundle is the same. Ours, through PyAV: torchcodec converts colours in another way, times frames by itself, and stops at
the first packet that is damaged.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain

import av
from av.codec import Codec
from av.codec.hwaccel import HWAccel
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from freres_cli.errors import ResourceError

KIND = "cuda"  # FFmpeg's name, of the devices as of the frames in their memory
CODECS = frozenset(("h264", "hevc", "vp8", "vp9"))
# What NVDEC writes, and what the CPU's decoders write: the same samples, with those of colour in planes of their own.
PLANAR = {"nv12": "yuv420p", "nv16": "yuv422p", "p010le": "yuv420p10le", "p210le": "yuv422p10le", "yuv444p": "yuv444p"}
REFUSED = "decoded on the CPU: the GPU did not take the video"
DECODER = "nvcuvid.dll" if sys.platform == "win32" else "libnvcuvid.so.1"


def choose_gpu(ordinal: int) -> HWAccel:
    """Return what opens a file for decoding on a GPU. ``ordinal``: its number. Raises ``ResourceError`` if it cannot."""
    _try_gpu(ordinal)
    return HWAccel(KIND, str(ordinal), allow_software_fallback=True)


@cache
def _try_gpu(ordinal: int) -> None:
    """Raise ``ResourceError`` if a GPU cannot decode. FFmpeg would report that as it does a file that is no video."""
    try:
        HWAccel(KIND, str(ordinal)).create(Codec("h264", "r"))
        ctypes.CDLL(DECODER)  # FFmpeg loads it at the first picture, and would then decode on the CPU
    except (FFmpegError, NotImplementedError, OSError) as error:
        raise ResourceError(
            f"decode: FFmpeg cannot decode on GPU {ordinal}: {error}",
            "it needs an NVIDIA GPU and libnvcuvid, which comes with its driver (in a container, the capability video); or "
            "decode on the CPU",
        ) from error


def take_decoded(stream: VideoStream, frames: Iterator[av.VideoFrame | None]) -> Iterator[av.VideoFrame | None] | None:
    """Return frames as the CPU's decoder would have given them; ``None`` if the GPU does not give the first of them so.

    ``stream``: of a file opened with ``choose_gpu``. ``frames``: decoded from it; ``None`` for what cannot be decoded.
    """
    codec = stream.codec_context
    first = next(frames, None) if codec.is_hwaccel and codec.codec.canonical_name in CODECS else None
    # FFmpeg sets the format back if the GPU refuses the first picture. It does not crop hardware frames on the left and at
    # the top.
    is_taken = (
        first is not None
        and codec.format is not None
        and codec.format.name == KIND
        and first.format.name in PLANAR
        and (first.width, first.height) == (codec.width, codec.height)
        and not _lacks_grain(first)
    )
    return map(_with_planes, chain([first], frames)) if is_taken else None


def _lacks_grain(frame: av.VideoFrame) -> bool:
    return Type.FILM_GRAIN_PARAMS in frame.side_data


def _with_planes(frame: av.VideoFrame | None) -> av.VideoFrame | None:
    """The frame as the CPU's decoder would have given it; ``None``, as for one that is damaged, if the CPU has to decode."""
    if frame is not None and _lacks_grain(frame):
        return None
    planar = None if frame is None else PLANAR.get(frame.format.name)
    if frame is None or planar in (None, frame.format.name):
        return frame
    # With several threads, swscale moves some samples of odd sizes wrongly.
    moved = frame.reformat(format=planar, dst_color_range=frame.color_range, threads=1)
    moved.time_base = frame.time_base
    return moved
