"""The part ``still`` of the benchmark: what it saves not to encode frames in which nothing moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from freres_cli.cli.benchmark_inputs import METHOD
from freres_cli.pipeline.compressor import Compressor

SIDE = (640, 360)
FPS = 30
LEVELS = (0, 2, 8)
SLIDE_S, NUM_SLIDES = 5, 6
NOISE = 2.0  # grey levels, standard deviation
BUDGET_TOKENS = 1000


def draw_slides(seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the frames of a talk's slides: coloured blocks on white, each slide for 5 s."""
    rng = np.random.default_rng(seed)
    for _ in range(NUM_SLIDES):
        slide = np.full((SIDE[1], SIDE[0], 3), 255, np.uint8)
        for _ in range(40):
            top, left, length = rng.integers(0, SIDE[1] - 12), rng.integers(0, SIDE[0] - 80), rng.integers(5, 80)
            slide[top : top + 12, left : left + length] = rng.integers(0, 200, 3)
        for _ in range(SLIDE_S * FPS):
            yield slide


def draw_still_camera(seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the frames of a camera that looks at a wall: a gradient with sensor noise."""
    rng = np.random.default_rng(seed)
    wall = np.broadcast_to(np.linspace(50, 200, SIDE[0])[None, :, None], (SIDE[1], SIDE[0], 3))
    for _ in range(NUM_SLIDES * SLIDE_S * FPS):
        yield (wall + rng.normal(0, NOISE, wall.shape)).clip(0, 255).astype(np.uint8)


def measure_still(folder: Path) -> dict[str, Any]:
    """Compress two made clips with the bundled model at three bounds; count the pictures and time the stages."""
    clips = {"slides": draw_slides(), "still camera": draw_still_camera()}
    rows = []
    for name, frames in clips.items():
        path = write_clip(folder / f"{name}.mp4", frames)
        Compressor(method=METHOD, budget_tokens=BUDGET_TOKENS).compress(path)  # warm-up
        for levels in LEVELS:
            bundle = Compressor(method=METHOD, budget_tokens=BUDGET_TOKENS, still_levels=levels).compress(path)
            facts = bundle.manifest
            tokens, num_frames = facts["tokens"], facts["sampling"]["num_frames"]
            num_encoded = tokens["encoded_tokens"] * num_frames // tokens["full_tokens"]
            rows.append(
                {
                    "clip": name,
                    "still_levels": levels,
                    "num_frames": num_frames,
                    "num_encoded": num_encoded,
                    "share_skipped": 1 - num_encoded / num_frames,
                    "timings_s": dict(bundle.timings_s),
                }
            )
    return {
        "clips": f"{SIDE[0]}x{SIDE[1]}, {FPS} fps, {NUM_SLIDES * SLIDE_S} s, H.264 at its defaults: slides of {SLIDE_S} s, "
        f"and a wall with noise of {NOISE:g} grey levels",
        "warmup": 1,
        "runs": 1,
        "rows": rows,
    }


def write_clip(path: Path, frames: Iterator[np.ndarray]) -> Path:
    """Write an H.264 file of these frames, (h, w, 3) uint8 RGB, and return its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
