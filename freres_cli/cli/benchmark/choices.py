"""The part ``choices`` of the benchmark: constants of adaptive Fre-Res against others, on clips that are in no test split."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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

CONSTANTS: dict[str, dict[str, float]] = {
    "as it is": {},
    "exponent 0.3": {"COST_EXPONENT": 0.3},
    "exponent 1": {"COST_EXPONENT": 1.0},
    "latents alone": {"APART_S": math.inf},
}
BUDGETS = ("0.1", "0.05")
ONE_AT_A_TIME = {"TREE_SHARE": 0.0}
ORDER_BUDGETS = (0.25, 0.1, 0.05)


def measure_choices(questions: Sequence[Path]) -> dict[str, Any]:
    """Ask the questions of each file with every choice of ``CONSTANTS``, and compare the answers in pairs; and compare the
    error of merges in rounds with that of one merge at a time.

    ``questions``: files of the world, such as ``freres world make --split validation`` writes. A run that was stopped goes
    on from the answers beside the questions.
    """
    model = Compressor(device="cpu").models.language_model
    variants = {name: Variant(model, constants) for name, constants in CONSTANTS.items()}
    cells = [Cell(ADAPTIVE, parse_budget(budget)) for budget in BUDGETS]
    return {
        "device": choose_device("cpu").description,
        "constants": {name: dict(constants) for name, constants in CONSTANTS.items()},
        "sets": {path.parent.name: ask_variants(path, variants, cells, "choices.jsonl") for path in questions},
        "order": measure_order(questions),
    }


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
