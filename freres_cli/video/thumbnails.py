"""Small pictures of a video at given times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from freres_cli.records import FrameSize, VideoInfo
from freres_cli.video.decode import decode_frames
from freres_cli.video.picture import encode_jpeg
from freres_cli.video.sampling import TOLERANCE_S, Sampling

WIDTH_PX = 160
MAX_HEIGHT_PX = 240


def make_thumbnails(
    path: Path, info: VideoInfo, seconds: Sequence[float], progress: Callable[[int, int], None] | None = None
) -> list[bytes]:
    """Return a JPEG of the frame on screen at each time, upright, ``WIDTH_PX`` wide at most.

    The video is decoded once, from the first of these times to the last. ``path``, ``info``: of the video. ``seconds``:
    after its first frame, not decreasing. ``progress``: called with the number of pictures made and of all. Raises
    ``VideoError``.
    """
    scale = min(WIDTH_PX / info.width_px, MAX_HEIGHT_PX / info.height_px, 1.0)
    height, width = (max(2, round(side * scale / 2) * 2) for side in (info.height_px, info.width_px))
    pictures: list[bytes] = []
    held = None
    # Of a shorter video, the last frame stays on screen.
    first_s = max(0.0, min(seconds[0], info.duration_s - 2 * TOLERANCE_S))
    sampling = Sampling("native", start_s=first_s or None)
    for batch in decode_frames(path, info, sampling, FrameSize(height, width, 1, 1)):
        for pixels, shown_s in zip(batch.pixels, batch.pts_seconds, strict=True):
            held = pixels if held is None else held
            while len(pictures) < len(seconds) and shown_s > seconds[len(pictures)] + TOLERANCE_S:
                pictures.append(encode_jpeg(held))
            held = pixels
        if progress is not None:
            progress(len(pictures), len(seconds))
        if len(pictures) == len(seconds):
            return pictures
    assert held is not None
    return pictures + [encode_jpeg(held)] * (len(seconds) - len(pictures))
