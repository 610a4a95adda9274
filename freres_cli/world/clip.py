"""A short clip that is drawn and encoded on the spot, for profiling without a video, at the rate of real footage."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from freres_cli.world.encode import encode_frames

SIDE_PX = 288
FPS = 30
CUT_AT = 0.5  # share of the clip after which the scene changes
FLASH_FRAMES = 3


def make_clip(path: Path, seconds: float = 4.0) -> Path:
    """Write an H.264 file at 30 fps and return its ``path``, which must end in .mp4.

    A red square moves right; after a cut a green circle moves down, and a yellow patch appears for 3 frames. Raises
    ``ResourceError`` if PyAV was built without an H.264 encoder.
    """
    num_frames = max(2, round(seconds * FPS))
    frames = (draw_frame(index, num_frames) for index in range(num_frames))
    options = {"crf": "18", "threads": "1"}
    encode_frames(path, frames, SIDE_PX, FPS, "libx264", options, hint="name a video instead")
    return path


def draw_frame(index: int, num_frames: int) -> np.ndarray:
    """Return frame ``index`` of the clip: (288, 288, 3) uint8 RGB."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX].astype(np.float32)
    share = index / num_frames
    image = np.empty((SIDE_PX, SIDE_PX, 3), np.float32)
    if share < CUT_AT:
        image[...] = (70 + 60 * y / SIDE_PX)[..., None]
        centre = SIDE_PX * (0.15 + 0.7 * share / CUT_AT)
        image[(np.abs(x - centre) < 28) & (np.abs(y - SIDE_PX / 2) < 28)] = (220, 30, 30)
        return image.astype(np.uint8)
    image[...] = np.stack([30 + 0 * x, 50 + 60 * x / SIDE_PX, 150 + 0 * x], axis=-1)
    centre = SIDE_PX * (0.15 + 0.7 * (share - CUT_AT) / (1 - CUT_AT))
    image[(x - SIDE_PX / 2) ** 2 + (y - centre) ** 2 < 32**2] = (40, 200, 60)
    flash = round(num_frames * 0.8)
    if flash <= index < flash + FLASH_FRAMES:
        image[(x > SIDE_PX * 0.72) & (y < SIDE_PX * 0.28)] = (240, 220, 40)
    return image.astype(np.uint8)
