"""Frames as a video file, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np

from freres_cli.errors import ResourceError


def encode_frames(
    path: Path,
    frames: Iterable[np.ndarray],
    side_px: int,
    fps: int,
    codec: str,
    options: dict[str, str],
    *,
    comment: str = "",
    hint: str = "look at 'freres doctor'",
) -> None:
    """Write frames, each (side_px, side_px, 3) uint8 RGB, as a video file; they are never all in memory.

    ``comment`` goes into the file's metadata. Raises ``ResourceError`` with ``hint`` where this PyAV lacks the encoder,
    or the file cannot be written; then there is no file.
    """
    try:
        # Bit-exact: else a webm holds random numbers of its own.
        with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
            if comment:
                container.metadata["comment"] = comment
            stream = container.add_stream(codec, rate=fps, options=options)
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
        raise ResourceError(f"{path}: the clip cannot be encoded: {error}", hint) from error
