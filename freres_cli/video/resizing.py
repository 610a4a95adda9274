"""Resize decoded frames on several threads at once, each frame by one thread."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from freres_cli.errors import VideoError
from freres_cli.records import FrameSize
from freres_cli.video.oddities import screen_colours
from freres_cli.video.turn import Turn

# Without FULL_CHR_H_INT, swscale takes a shortcut that turns white into 253 and makes mid-grey two levels too dark.
RESIZE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
# Resizing a frame takes up to five times as long as decoding it, and decoding has threads of its own.
MOST_RESIZE_THREADS = 4
# Black is 16 in limited range, and white 235.
_FULL_RANGE = ((np.arange(256) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)
# Reformatters that no thread uses. One keeps what it has built for frames of one kind, which for HDR takes 3 s.
_SPARE: list[VideoReformatter] = []


class Resizer:
    """A few threads that make frames into pixels. Leaving its block ends them.

    ``path``: of the video, for messages. ``size``: of the upright frame. ``turn``: what makes a frame upright.
    ``most_waiting``: frames that may be held while others are resized; more of them would only take memory.
    """

    def __init__(self, path: str, size: FrameSize, turn: Turn) -> None:
        self._path, self._size, self._turn = path, size, turn
        num_threads = min(MOST_RESIZE_THREADS, os.cpu_count() or 1)
        self.most_waiting = 2 * num_threads
        self._pool = ThreadPoolExecutor(num_threads, "resize")
        self._local = threading.local()  # each thread has its own reformatter
        self._taken: list[VideoReformatter] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        _SPARE.extend(self._taken)

    def submit(self, frame: av.VideoFrame) -> Future[np.ndarray]:
        """Return what ``convert`` will return of a frame."""
        return self._pool.submit(self.convert, frame)

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """Return the frame as (height, width, 3) uint8 RGB: resized and converted in one pass, then turned upright.

        Raises ``VideoError`` if that fails.
        """
        height, width = self._size.height_px, self._size.width_px
        if self._turn.rotation_deg % 180:
            height, width = width, height
        try:
            if not hasattr(self._local, "reformatter"):
                self._local.reformatter = self._take_reformatter()
            resized = self._local.reformatter.reformat(
                frame, width, height, "rgb24", interpolation=RESIZE, threads=1, **screen_colours(frame)
            )
        except FFmpegError as error:
            raise VideoError(f"{self._path}: a frame cannot be converted to RGB: {error.strerror}") from error
        plane = resized.planes[0]
        # Rows are padded to a multiple of the vector width.
        rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)[:height, : width * 3]
        pixels = rows.reshape(height, width, 3)
        # swscale takes gray for full range, whatever the frame says.
        if frame.format.name.startswith(("gray", "ya")) and int(frame.color_range) == ColorRange.MPEG:
            pixels = _FULL_RANGE[pixels]
        return self._turn.apply(pixels)

    def _take_reformatter(self) -> VideoReformatter:
        try:
            taken = _SPARE.pop()
        except IndexError:
            taken = VideoReformatter()
        self._taken.append(taken)
        return taken
