"""The part ``choices`` of the benchmark: constants of adaptive Fre-Res against others, on clips of the validation split."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from freres_cli.baselines.registry import ADAPTIVE
from freres_cli.bench.clock import StageTimer
from freres_cli.cli.benchmark.pipeline import merge_in
from freres_cli.cli.benchmark.variants import Variant, ask_variants, merging_with
from freres_cli.cli.output import print_line
from freres_cli.devices import choose_device
from freres_cli.evaluation.cells import Cell, parse_budget
from freres_cli.evaluation.questions import read_questions
from freres_cli.method.adaptive import cut_stretches
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.world.make import CODECS, QUESTIONS_FILE, MadeClip, clip_seed, encode_scene, question_rows
from freres_cli.world.questions import questions_of
from freres_cli.world.scene import Scene
from freres_cli.world.script import make_scene

CONSTANTS: dict[str, dict[str, float]] = {
    "as it is": {},
    "exponent 0.3": {"COST_EXPONENT": 0.3},
    "exponent 1": {"COST_EXPONENT": 1.0},
    "latents alone": {"APART_S": 1e9},  # JSON has no infinity
}
BUDGETS = ("0.1", "0.05")
LEVELS = (1, 3)
CATEGORIES = ("Action", "Character")
# Of all categories, the one other choice that made a certain difference to these two.
OTHER = "exponent 1"
ALL_BUDGETS = ("0.25", *BUDGETS)
ALL_CLIPS = {1: 200, 3: 100}
ONE_AT_A_TIME = {"TREE_SHARE": 0.0}
ORDER_BUDGETS = (0.25, 0.1, 0.05)


def measure_choices(folder: Path, count: int = 76) -> dict[str, Any]:
    """Ask about what things do with every choice of ``CONSTANTS``, and about everything with ``OTHER``, and compare the
    answers in pairs; and compare the error of merges in rounds with that of one merge at a time.

    ``folder``: where clips and answers are; a run that was stopped goes on from there. ``count``: clips of each level.
    """
    questions = [_make_set(folder / f"level_{level}", level, count, CATEGORIES) for level in LEVELS]
    model = Compressor(device="cpu").models.language_model
    variants = {name: Variant(model, constants) for name, constants in CONSTANTS.items()}
    cells, all_cells = ([Cell(ADAPTIVE, parse_budget(each)) for each in budgets] for budgets in (BUDGETS, ALL_BUDGETS))
    whole = [_make_set(folder / f"whole_level_{level}", level, ALL_CLIPS[level]) for level in LEVELS]
    two = {name: variants[name] for name in ("as it is", OTHER)}
    return {
        "device": choose_device("cpu").description,
        "clips": f"of each level, the first {count} of the validation split with a question of these categories",
        "categories": CATEGORIES,
        "constants": {name: dict(constants) for name, constants in CONSTANTS.items()},
        "sets": {path.parent.name: ask_variants(path, variants, cells, "choices.jsonl") for path in questions},
        "whole_clips": ALL_CLIPS,
        "all_categories": {path.parent.name: ask_variants(path, two, all_cells, "whole.jsonl") for path in whole},
        "order": measure_order(questions),
    }


def _make_set(folder: Path, level: int, count: int, categories: Collection[str] | None = None) -> Path:
    """Write clips of a level and all their questions of some ``categories``, or of all, unless they are there. Return the
    questions file."""
    path = folder / QUESTIONS_FILE
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    clips = _clips_of(level, categories)
    for clip, scene in itertools.islice(clips, count):
        encode_scene(folder / clip.file, scene, *CODECS[0][1:])
        rows += question_rows(clip)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _clips_of(level: int, categories: Collection[str] | None) -> Iterator[tuple[MadeClip, Scene]]:
    for index in itertools.count():
        seed = clip_seed("validation", index)
        scene = make_scene(seed, level=level)
        asked = tuple(
            question for question in questions_of(seed, scene) if categories is None or question.category in categories
        )
        if asked:
            yield MadeClip(seed, f"{index:05d}.mp4", asked), scene


def measure_order(questions: Sequence[Path]) -> dict[str, Any]:
    """Return how much of a clip's energy is lost in rounds of merges and with one merge at a time: by budget, the means over
    all clips of the files. Every clip is merged as a whole."""
    compressor = Compressor(device="cpu")
    rows: list[dict[str, Any]] = []
    for path in questions:
        for video, asked in read_questions(path).by_video().items():
            source = VideoSource(asked[0].video)
            timer = StageTimer(torch.device("cpu"))
            clip = EncodedClip(source, compressor.options, compressor.models.encoder, timer)
            of_each = [_lost(clip, constants) for constants in ({}, ONE_AT_A_TIME)]
            rows += [
                {"clip": f"{path.parent.name}/{video}", "budget": budget, "rounds": rounds, "one_at_a_time": single}
                for budget, rounds, single in zip(ORDER_BUDGETS, *of_each, strict=True)
            ]
            print_line(f"order of merges: {len(rows) // len(ORDER_BUDGETS)} clips")
    means = [
        {"budget": budget, **_mean_of([row for row in rows if row["budget"] == budget])} for budget in ORDER_BUDGETS
    ]
    return {"measured": "share of the latents' energy that is lost", "means": means, "rows": rows}


def _mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in ("rounds", "one_at_a_time")}


def _lost(clip: EncodedClip, constants: Mapping[str, float]) -> list[float]:
    budgets = [max(1, int(share * clip.full_tokens)) for share in ORDER_BUDGETS]
    with merging_with(constants):
        merged = merge_in(clip, max(budgets), clip.full_tokens)
    return [1 - cut_stretches(merged, budget_tokens).quality for budget_tokens in budgets]
