"""The part ``still`` of the benchmark: what it saves not to encode frames in which nothing moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from freres_cli.baselines.registry import ADAPTIVE, FRE_RES
from freres_cli.bench.clock import StageTimer
from freres_cli.evaluation.fidelity import measure_energy, measure_loss, share_kept
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.workflows.fidelity import rebuild_clip

SIDE = (640, 360)
FPS = 30
NO_LIMIT: dict[str, Any] = {}
WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    FRE_RES: (NO_LIMIT, {"still_levels": 2}, {"still_levels": 8}),
    ADAPTIVE: (NO_LIMIT, {"still_levels": 2}, {"line_levels": 16}, {"line_levels": 48}),
}
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
    """Compress two made clips with the bundled model, leaving out frames in the ways of ``WAYS``: how many frames pass the
    tower, the time of each stage, and how much of the latents of every frame a reader can rebuild from the tokens."""
    clips = {"slides": draw_slides(), "still camera": draw_still_camera()}
    shared = Compressor(device="cpu", budget_tokens=BUDGET_TOKENS)
    rows = []
    for name, frames in clips.items():
        path = write_clip(folder / f"{name}.mp4", frames)
        every_frame = _encode(path, shared).latents
        for method, ways in WAYS.items():
            Compressor(models=shared.models, method=method, budget_tokens=BUDGET_TOKENS).compress(path)  # warm-up
            for settings in ways:
                own = Compressor(models=shared.models, method=method, budget_tokens=BUDGET_TOKENS, **settings)
                bundle = own.compress(path)
                tokens, num_frames = bundle.manifest["tokens"], bundle.manifest["sampling"]["num_frames"]
                num_encoded = tokens["encoded_tokens"] * num_frames // tokens["full_tokens"]
                rows.append(
                    {
                        "clip": name,
                        "method": method,
                        "settings": settings,
                        "num_frames": num_frames,
                        "num_encoded": num_encoded,
                        "share_skipped": 1 - num_encoded / num_frames,
                        "kept_hold": _measure_kept(path, own, method, every_frame),
                        "timings_s": dict(bundle.timings_s),
                    }
                )
    return {
        "clips": f"{SIDE[0]}x{SIDE[1]}, {FPS} fps, {NUM_SLIDES * SLIDE_S} s, H.264 at its defaults: slides of {SLIDE_S} s, "
        f"and a wall with noise of {NOISE:g} grey levels",
        "budget_tokens": BUDGET_TOKENS,
        "kept_hold": "the share of the energy of every frame's latents, around their mean, that a reader can rebuild from "
        "the tokens, holding each over its stretch, as in freres fidelity",
        "warmup": 1,
        "runs": 1,
        "rows": rows,
    }


def _encode(path: Path, own: Compressor) -> EncodedClip:
    return EncodedClip(VideoSource(path), own.options, own.models.encoder, StageTimer(torch.device("cpu")))


def _measure_kept(path: Path, own: Compressor, method: str, every_frame: Tensor) -> float:
    """Return the share of the energy of ``every_frame``, (T, H, W, D), that can be rebuilt from the tokens of ``own``."""
    width = own.models.encoder.width
    rebuild = rebuild_clip(_encode(path, own), method, BUDGET_TOKENS)[1]["hold"]
    lost = measure_loss(every_frame, rebuild, width)
    return share_kept(float(lost.sum()), measure_energy(every_frame, width))


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
