"""The part ``lines`` of the benchmark: what ``line_levels`` brings and costs, against encoding every frame and fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from freres_cli.baselines.registry import ADAPTIVE
from freres_cli.bench.report import summarize_runs
from freres_cli.cli.benchmark.grids import ask_set
from freres_cli.cli.benchmark.inputs import write_video
from freres_cli.cli.benchmark.levers import MOST_TOKENS, NO_LEVER, SHARE, WARM_UP_S, compare_runs, time_once
from freres_cli.cli.benchmark.still import FPS
from freres_cli.cli.output import print_line
from freres_cli.devices import choose_device
from freres_cli.evaluation.cells import Cell, parse_budget
from freres_cli.evaluation.questions import read_questions
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models
from freres_cli.presets import load_settings

BUDGETS = ("0.25", "0.1")
GRID = "12x12"
EVERY_FRAME: dict[str, Any] = {"line_levels": 0}
LINES: dict[str, dict[str, Any]] = {
    "line_levels 16": {"line_levels": 16},
    "line_levels 48": {"line_levels": 48},
}
FEWER: dict[str, dict[str, Any]] = {
    # Of level 1, which has 8 frames a second, one in 2 and in 3; clips of other levels have several rates.
    f"{fps:.3g} frames a second": {"sample": "fps", "sample_fps": fps, **EVERY_FRAME}
    for fps in (4.0, 8 / 3)
}


def measure_lines(folder: Path, num_frames: int, questions: Sequence[Path], repeat: int = 3) -> dict[str, Any]:
    """Time file to first token with adaptive Fre-Res, and ask the questions of each file; answers are compared in pairs.

    ``folder``: where a clip is written. ``num_frames``: its frames. ``questions``: files of the world. ``repeat``: runs of
    each. A run that was stopped goes on from the results beside the questions.
    """
    models = Compressor(device="cpu").models
    moving = write_video(folder / "moving.mp4", num_frames, (1280, 720))
    return {
        "device": choose_device("cpu").description,
        "speed": _measure_speed(moving, num_frames, models, repeat),
        "sets": {path.parent.name: _measure_answers(path, models) for path in questions},
    }


def _measure_speed(moving: Path, num_frames: int, models: Models, repeat: int) -> dict[str, Any]:
    rows, cols = (int(side) for side in GRID.split("x"))
    budget = {"budget_tokens": min(MOST_TOKENS, num_frames * rows * cols // SHARE)}
    shared = {**NO_LEVER, "overlap": True, **budget, "grid": GRID}
    del shared["residual_grid"]  # a setting of the other method
    levers = {"every frame": EVERY_FRAME, **LINES}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in levers}
    time_once(moving, shared, models, WARM_UP_S, ADAPTIVE)
    for _ in range(repeat):
        for name, settings in levers.items():
            runs[name].append(time_once(moving, {**shared, **settings}, models, num_frames / FPS, ADAPTIVE))
    found = [compare_runs("moving", GRID, name, own, runs["every frame"]) for name, own in runs.items()]
    for row in found:
        print_line(f"{row['lever']}: {row['times_as_fast']['median']:.2f} times as fast")
    return {
        "clip": "1280x720, H.264, 30 fps, a drawn clip",
        "method": ADAPTIVE,
        "num_frames": num_frames,
        **budget,
        "measured": "compress, then ask: seconds from opening the file to the first token of the answer; and the seconds of "
        "CPU time of the process",
        "warmup": f"{WARM_UP_S:g} s of the clip",
        "runs": repeat,
        "rows": found,
    }


def _measure_answers(path: Path, models: Models) -> dict[str, Any]:
    options = replace(Compressor(models=models).options, settings=load_settings("bundled", {}))
    variants = {"every frame": EVERY_FRAME, **LINES, **FEWER}
    cells = tuple(
        Cell(ADAPTIVE, parse_budget(budget), label, tuple(settings.items()))
        for budget in BUDGETS
        for label, settings in variants.items()
    )
    questions = read_questions(path)
    videos = [asked[0].video for asked in questions.by_video().values()]
    return {
        **ask_set(questions, cells, options, models, "lines.jsonl"),
        "share_of_tokens_encoded": {name: _measure_share(videos, settings, models) for name, settings in LINES.items()},
    }


def _measure_share(videos: Sequence[Path], settings: dict[str, Any], models: Models) -> dict[str, float]:
    """Return the spread over the videos of the share of all tokens that pass the tower."""
    compressor = Compressor(models=models, budget_tokens=1, **settings)
    tokens = [compressor.compress(video).manifest["tokens"] for video in videos]
    return summarize_runs([own["encoded_tokens"] / own["full_tokens"] for own in tokens])
