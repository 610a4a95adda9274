"""Frames as a video file, one at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import torch

from freres_cli.errors import ResourceError, UsageError


def encode_frames(
    path: Path,
    frames: Iterable[np.ndarray],
    side_px: int,
    fps: int,
    codec: str,
    options: dict[str, str],
    *,
    comment: str = "",
    hint: str = "run: freres doctor",
) -> None:
    """Write ``frames``, each (side_px, side_px, 3) uint8 RGB, to the video file ``path``, one at a time.

    ``side_px``: width and height. ``fps``: frames per second. ``codec``, ``options``: the encoder and its options, as
    FFmpeg names them. ``comment``: stored in the file's metadata. Raises ``ResourceError`` with ``hint`` if this PyAV
    lacks the encoder, or if the disk is full, and ``UsageError`` for a place that may not be written to; no file is left
    behind.
    """
    if codec == "libx264" and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        # x264's AVX-512 code gives other bytes from run to run; its AVX2 code gives the bytes of other machines.
        options = {**options, "x264-params": "asm=avx2"}
    try:
        # Bit-exact: otherwise a WebM file contains random numbers.
        with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
            if comment:
                container.metadata["comment"] = comment
            stream = container.add_stream(codec, rate=fps, options=options)
            assert isinstance(stream, av.VideoStream)
            stream.pix_fmt = "yuv420p"
            stream.height = stream.width = side_px
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if not isinstance(error, av.FFmpegError | ValueError | OSError):
            raise
        reason = getattr(error, "errno", None)
        if reason in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"{path}: cannot be written: {error}", "name another folder") from error
        if reason in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: cannot be written: {error}", "free some space") from error
        raise ResourceError(f"{path}: the clip cannot be encoded: {error}", hint) from error
