"""Frames decoded elsewhere, treated as if they came from a file: resized in the same way, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from freres_cli.errors import VideoError
from freres_cli.records import Frames, FrameSize, VideoInfo
from freres_cli.video.reading import DecodeReport
from freres_cli.video.resizing import RESIZE
from freres_cli.video.sampling import TOLERANCE_S
from freres_cli.video.still import StillDetector, describe_still

MAX_SECONDS = 1e10  # three centuries


class FrameArray:
    """Decoded frames: ``pixels`` (n, h, w, 3) uint8 RGB, or a list of n such frames, and the time of each in seconds.

    Raises ``VideoError`` if the shape or type differs, if there are no frames, or unless there is one finite time for
    each frame and times never decrease.
    """

    def __init__(
        self,
        pixels: Tensor | np.ndarray | Sequence[Tensor | np.ndarray],
        seconds: Sequence[float] | Tensor | np.ndarray,
    ) -> None:
        array = _as_array(pixels)
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise VideoError(f"frames: expected (n, h, w, 3) uint8 RGB, got {array.shape} {array.dtype}")
        if min(array.shape) < 1:
            raise VideoError(f"frames: expected at least one frame of one pixel, got {array.shape}")
        times = _as_times(seconds)
        if times.shape != array.shape[:1]:
            raise VideoError(f"frames: expected a time for each of {len(array)} frames, got {times.shape}")
        if not (np.abs(times) < MAX_SECONDS).all() or (np.diff(times) < 0).any():
            raise VideoError("frames: expected finite times in seconds that never decrease")
        self.pixels = np.ascontiguousarray(array)
        self.seconds = tuple(times.tolist())

    @property
    def info(self) -> VideoInfo:
        """What probing a file with these frames would return. The last frame lasts as long as the one before it."""
        num_frames, height, width, _ = self.pixels.shape
        span = self.seconds[-1] - self.seconds[0]
        gap = self.seconds[-1] - self.seconds[-2] if num_frames > 1 else 0.0
        return VideoInfo(
            path="frames",
            container=None,
            codec=None,
            width_px=width,
            height_px=height,
            coded_width_px=width,
            coded_height_px=height,
            rotation_deg=0,
            is_mirrored=False,
            sample_aspect_ratio=1.0,
            source_fps=(num_frames - 1) / span if span > TOLERANCE_S else None,
            num_packets=num_frames,
            start_s=self.seconds[0],
            zero_s=0.0,
            duration_s=span + gap,
            stream_index=0,
            num_video_streams=1,
            has_timestamps=True,
            num_bytes=int(self.pixels.nbytes),
        )

    @property
    def sha256(self) -> str:
        """Digest of shape, pixels and times."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(self.pixels.data)
        digest.update(np.asarray(self.seconds).data)
        return digest.hexdigest()

    def open(self, size: FrameSize, batch_frames: int, still_levels: int = 0) -> FrameBatches:
        """Return the frames, resized, in batches.

        ``size``: of a frame. ``batch_frames``: most frames at a time. ``still_levels``: a frame that differs by no more
        from the last picture is that picture.
        """
        return FrameBatches(self, size, batch_frames, still_levels)


def _as_array(pixels: Tensor | np.ndarray | Sequence[Tensor | np.ndarray]) -> np.ndarray:
    """Frames as an array of whatever shape and type they have."""
    if isinstance(pixels, memoryview):  # it calls itself a sequence, but has no rows
        return np.asarray(pixels)
    if not isinstance(pixels, Sequence):
        return _as_numpy(pixels)
    frames = [_as_numpy(frame) for frame in pixels]
    shapes = list(dict.fromkeys(frame.shape for frame in frames))
    if len(shapes) > 1:
        hint = "resize them to one size"
        raise VideoError(f"frames: expected frames of one size, got {shapes[0]} and {shapes[1]}", hint)
    return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


def _as_numpy(pixels: Tensor | np.ndarray) -> np.ndarray:
    """Raises ``VideoError`` for what NumPy has no array for: other types and layouts, and rows of unequal length."""
    try:
        return pixels.numpy(force=True) if isinstance(pixels, Tensor) else np.asarray(pixels)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{pixels.dtype}, {pixels.layout}" if isinstance(pixels, Tensor) else str(error)
        raise VideoError(f"frames: expected uint8 RGB, (n, h, w, 3), got {got}") from error


def _as_times(seconds: Sequence[float] | Tensor | np.ndarray) -> np.ndarray:
    try:
        listed = np.asarray(seconds.numpy(force=True) if isinstance(seconds, Tensor) else seconds)
        if listed.dtype.kind not in "iufO":  # of numbers with a unit, NumPy would leave out the unit
            raise TypeError(f"values of type {listed.dtype}")
        return np.asarray(listed, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise VideoError(f"frames: expected times in seconds, got {type(seconds).__name__}: {error}") from error


class FrameBatches:
    """All frames of an array, resized. ``report`` is like that of ``decode.Decoder``.

    ``frames``: the array. ``size``, ``batch_frames``, ``still_levels``: as in ``FrameArray.open``.
    """

    def __init__(self, frames: FrameArray, size: FrameSize, batch_frames: int, still_levels: int) -> None:
        self._frames, self._size, self._batch_frames = frames, size, batch_frames
        detector = StillDetector(still_levels)
        is_new = [not detector.is_still([picture]) for picture in frames.pixels]
        self._picture_index = tuple(accumulate((i if new else 0 for i, new in enumerate(is_new)), max))
        num_frames = len(frames.seconds)
        notes = tuple(describe_still(still_levels, sum(is_new), num_frames))
        self.report = DecodeReport(num_frames, num_frames, sum(is_new), 0.0, notes)

    def __iter__(self) -> Iterator[Frames]:
        pixels, seconds = self._frames.pixels, self._frames.seconds
        reformatter = VideoReformatter()
        resized, last = np.empty(0), -1
        for start in range(0, len(seconds), self._batch_frames):
            stop = min(start + self._batch_frames, len(seconds))
            indices = self._picture_index[start:stop]
            pictures = []
            for index in indices:
                if index != last:
                    resized, last = self._resize(pixels[index], reformatter), index
                pictures.append(resized)
            yield Frames(torch.from_numpy(np.stack(pictures)), seconds[start:stop], tuple(range(start, stop)), indices)

    def _resize(self, picture: np.ndarray, reformatter: VideoReformatter) -> np.ndarray:
        height, width = self._size.height_px, self._size.width_px
        if picture.shape[:2] == (height, width):
            return picture
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        return reformatter.reformat(frame, width, height, "rgb24", interpolation=RESIZE, threads=1).to_ndarray()
