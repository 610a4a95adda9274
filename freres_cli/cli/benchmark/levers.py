"""The part ``levers`` of the benchmark: what each way to encode faster brings, alone and together, within one run."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from freres_cli.bench.report import summarize_runs
from freres_cli.cli.benchmark.inputs import GRID, METHOD, TOWER, make_tower
from freres_cli.cli.benchmark.still import FPS, NUM_SLIDES, SLIDE_S, draw_slides, write_clip
from freres_cli.cli.output import print_line
from freres_cli.pipeline import encoding
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models
from freres_cli.presets import FULL, HALF
from freres_cli.video import resizing

SHARE, MOST_TOKENS = 10, 6600  # one token in ten is kept, and at most the budget of the paper's presets
WARM_UP_S = 1.0
SLIDE_FRAMES = NUM_SLIDES * SLIDE_S * FPS
QUESTION = "What moves first?"
NO_LEVER: dict[str, Any] = {"overlap": False, "still_levels": 0, "residual_grid": FULL}
LEVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "overlap": {"overlap": True},
    "still_levels 2": {"still_levels": 2},
    "residual_grid half": {"residual_grid": HALF},
    "all": {"overlap": True, "still_levels": 2, "residual_grid": HALF},
}
# The tower of Qwen2-VL with fewer of its equal layers, so that a frame takes seconds on a CPU and not half a minute.
DEPTH = 4


def measure_levers(moving: Path, folder: Path, num_frames: int, repeat: int = 3) -> dict[str, Any]:
    """Time file to first token with each lever, in turn, on a clip in which things move and on slides.

    ``moving``: a file of 1280x720 at 30 fps. ``folder``: where the slides are written. ``num_frames``: frames that are read.
    ``repeat``: runs of each.
    """
    slides = write_clip(folder / "slides.mp4", draw_slides())
    models = Compressor(device="cpu").models
    rows = []
    cases = (
        ("moving", "6x6", moving, num_frames, tuple(LEVERS)),
        ("slides", "6x6", slides, min(num_frames, SLIDE_FRAMES), tuple(LEVERS)),
        ("moving", "12x12", moving, num_frames, ("none", "residual_grid half", "all")),
    )
    for clip, grid, path, count, levers in cases:
        grid_h, grid_w = (int(side) for side in grid.split("x"))
        budget = {"budget_tokens": min(MOST_TOKENS, count * grid_h * grid_w // SHARE)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in levers}
        time_once(path, {**NO_LEVER, **budget, "grid": grid}, models, WARM_UP_S)
        for _ in range(repeat):
            for name in levers:
                settings = {**NO_LEVER, **LEVERS[name], **budget, "grid": grid}
                runs[name].append(time_once(path, settings, models, count / FPS))
        found = [compare_runs(clip, grid, name, of, runs["none"]) for name, of in runs.items()]
        rows += [{"num_frames": count, **budget, **row} for row in found]
        for row in found:
            print_line(f"{clip}, {grid}, {row['lever']}: {row['times_as_fast']['median']:.2f} times as fast")
    return {
        "clips": "moving: 1280x720, H.264, a drawn clip; slides: 640x360, H.264; 30 fps",
        "model": "bundled, both halves loaded before",
        "method": METHOD,
        "kept": f"one token in {SHARE}, at most {MOST_TOKENS}",
        "measured": "compress, then ask: seconds from opening the file to the first token of the answer; and the seconds of "
        "CPU time of the process",
        "warmup": f"{WARM_UP_S:g} s of the clip",
        "runs": repeat,
        "rows": rows,
        "tower": _measure_tower(),
    }


def time_once(
    path: Path, settings: dict[str, Any], models: Models, end_s: float, method: str = METHOD
) -> dict[str, float]:
    """Time one compression and a first token. ``path``: of the video. ``settings``: of the compression, and ``overlap``.
    ``models``: loaded. ``end_s``: seconds of the video that are read. ``method``: its name."""
    values = dict(settings)
    with nullcontext() if values.pop("overlap") else without_overlap():
        compressor = Compressor(method=method, models=models, **values)
        wall, cpu = time.perf_counter(), time.process_time()
        bundle = compressor.compress(path, end_s=end_s)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    session = bundle.open(models=models)
    start = time.process_time()
    answer = session.ask(QUESTION, max_new_tokens=1)
    assert answer.ttft_s is not None
    return {
        "seconds": wall + answer.ttft_s,
        "cpu_seconds": cpu + time.process_time() - start,
        **{f"{stage}_s": bundle.timings_s[stage] for stage in ("decode", "encode", "compress")},
        "encoded_tokens": bundle.manifest["tokens"]["encoded_tokens"],
    }


def compare_runs(
    clip: str, grid: str, lever: str, runs: list[dict[str, float]], without: list[dict[str, float]]
) -> dict[str, Any]:
    """Return a row of the results. ``clip``, ``grid``, ``lever``: its names. ``runs``: of the lever. ``without``: of none."""
    ratios = {
        name: summarize_runs([b[key] / a[key] for a, b in zip(runs, without, strict=True)])
        for name, key in (("times_as_fast", "seconds"), ("times_as_fast_in_cpu_time", "cpu_seconds"))
    }
    spread = {key: summarize_runs([run[key] for run in runs]) for key in runs[0]}
    return {"clip": clip, "grid": grid, "lever": lever, **ratios, **spread}


@contextmanager
def without_overlap() -> Iterator[None]:
    """Read, resize and encode one after the other, as before there was an overlap."""

    def one_by_one(items: Iterable[Any], most: int) -> Generator[Any, None, None]:
        yield from items

    with patch.object(encoding, "read_ahead", one_by_one), patch.object(resizing, "MOST_RESIZE_THREADS", 1):
        yield


def _measure_tower(repeat: int = 3) -> dict[str, Any]:
    """Time the tower of Qwen2-VL on a frame of 24x24 tokens, and on one of half each side, in turn."""
    encoder = make_tower(DEPTH)
    sizes = [encoder.frame_size(1280, 720, grid) for grid in (GRID, (GRID[0] // 2, GRID[1] // 2))]
    frames = [torch.randint(0, 256, (1, size.height_px, size.width_px, 3), dtype=torch.uint8) for size in sizes]
    runs = []
    for _ in range(repeat + 1):
        seconds = []
        for frame in frames:
            start = time.process_time()
            encoder.encode(frame)
            seconds.append(time.process_time() - start)
        runs.append(seconds)
    return {
        "widths": {**TOWER, "depth": DEPTH},
        "dtype": "float32",
        "warmup": 1,
        "runs": repeat,
        "cpu_s_per_frame": {
            f"{size.grid_h}x{size.grid_w}": summarize_runs([seconds[i] for seconds in runs[1:]])
            for i, size in enumerate(sizes)
        },
        "full_over_half": summarize_runs([full / half for full, half in runs[1:]]),
    }
