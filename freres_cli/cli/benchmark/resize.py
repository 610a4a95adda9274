"""The part ``resize`` of the benchmark: what one thread needs to make a decoded frame into the pixels of a tower."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import av
import numpy as np

from freres_cli.bench.report import summarize_runs
from freres_cli.records import FrameSize
from freres_cli.video.resizing import Resizer
from freres_cli.video.turn import Turn

SIZES = {"720p": (1280, 720), "1080p": (1920, 1080), "4k": (3840, 2160)}
TO = FrameSize(672, 672, 24, 24)  # 24x24 tokens of Qwen2-VL


def measure_resize(repeat: int = 20) -> dict[str, Any]:
    """Time random frames of 8 bits in CPU seconds; the first of each size is not counted."""
    drawn = np.random.default_rng(0)
    rows = {}
    for name, (width, height) in SIZES.items():
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(drawn.integers(0, 256, plane.buffer_size, dtype=np.uint8).tobytes())
        frame.time_base, seconds = Fraction(1, 30), []
        with Resizer(name, TO, Turn()) as resizer:
            for _ in range(repeat + 1):
                start = time.thread_time()
                resizer.convert(frame)
                seconds.append(time.thread_time() - start)
        rows[name] = summarize_runs(seconds[1:])
    return {"to_px": [TO.width_px, TO.height_px], "warmup": 1, "runs": repeat, "cpu_s_per_frame": rows}
