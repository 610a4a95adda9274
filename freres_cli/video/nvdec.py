"""Decoding on an NVIDIA GPU (NVDEC), by FFmpeg's own decoders of H.264, HEVC, VP8, VP9 and others.

The samples are those that the CPU decodes, as these standards define every bit. They are copied to host memory, where they
are resized as any others, so that a bundle is the same. Ours, through PyAV: torchcodec converts colours in another way, times
frames by itself, and stops at the first packet that is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import av
from av.codec import Codec
from av.codec.hwaccel import HWAccel
from av.error import FFmpegError
from av.video.stream import VideoStream

from freres_cli.errors import ResourceError

KIND = "cuda"  # FFmpeg's name, of the devices as of the frames in their memory
# What NVDEC writes, and what the CPU's decoders write: the same samples, with those of colour in planes of their own.
PLANAR = {"nv12": "yuv420p", "nv16": "yuv422p", "p010le": "yuv420p10le", "p210le": "yuv422p10le"}
UNNOTICED = "decoded on the GPU, which does not notice all damage inside a picture"
REFUSED = "decoded on the CPU: the GPU does not take this video"


def choose_gpu(ordinal: int) -> HWAccel:
    """Return what opens a file for decoding on a GPU. ``ordinal``: its number. Raises ``ResourceError`` if it cannot."""
    accelerator = HWAccel(KIND, str(ordinal), allow_software_fallback=True)
    try:
        # Of itself, FFmpeg would report this as it does a file that is no video.
        accelerator.create(Codec("h264", "r"))
    except (FFmpegError, NotImplementedError) as error:
        raise ResourceError(
            f"decode: FFmpeg cannot decode on GPU {ordinal}: {error}",
            "it needs an NVIDIA GPU and libnvcuvid, which comes with its driver (in a container, the capability video); or "
            "decode on the CPU",
        ) from error
    return accelerator


def take_decoded(stream: VideoStream, frames: Iterator[av.VideoFrame | None]) -> Iterator[av.VideoFrame | None] | None:
    """Return frames as the CPU's decoder would have given them; ``None`` if the GPU does not take the video.

    ``stream``: of a file opened with ``choose_gpu``. ``frames``: decoded from it; ``None`` for what cannot be decoded.
    """
    first = next(frames, None)
    taken = stream.codec_context.format  # FFmpeg sets it back if the GPU refuses the first picture
    if first is None or taken is None or taken.name != KIND or not stream.codec_context.is_hwaccel:
        return None
    return map(_with_planes, chain([first], frames))


def _with_planes(frame: av.VideoFrame | None) -> av.VideoFrame | None:
    if frame is None or frame.format.name not in PLANAR:
        return frame
    planar = frame.reformat(format=PLANAR[frame.format.name], dst_color_range=frame.color_range, threads=1)
    planar.time_base = frame.time_base
    return planar
