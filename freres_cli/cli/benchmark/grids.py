"""The part ``grids`` of the benchmark: what a smaller grid for residual frames costs in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freres_cli.baselines.registry import FRE_RES
from freres_cli.cli.output import print_line
from freres_cli.devices import choose_device
from freres_cli.evaluation.cells import Cell, parse_budget
from freres_cli.evaluation.questions import QuestionFile, read_questions
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.presets import FULL, HALF
from freres_cli.workflows.eval_run import EvalRequest
from freres_cli.workflows.evaluate import evaluate

BUDGETS = ("0.25", "0.1")
GRIDS = (FULL, HALF, "4x4")


def measure_grids(questions: Sequence[Path]) -> dict[str, Any]:
    """Ask the questions of each file with Fre-Res at every grid of ``GRIDS``, and compare the answers in pairs.

    ``questions``: files of the world, such as ``freres world make`` writes. A run that was stopped goes on from the results
    beside the questions.
    """
    compressor = Compressor(device="cpu")
    found = {}
    for path in questions:
        cells = tuple(
            Cell(FRE_RES, parse_budget(budget), f"residual_grid {grid}", (("residual_grid", grid),))
            for budget in BUDGETS
            for grid in GRIDS
        )
        asked = read_questions(path)
        found[path.parent.name] = ask_set(asked, cells, compressor.options, compressor.models, "grids.jsonl")
    return {"device": choose_device("cpu").description, "sets": found}


def ask_set(
    questions: QuestionFile, cells: tuple[Cell, ...], options: CompressOptions, models: Models, results: str
) -> dict[str, Any]:
    """Return the summary of the answers to one file.

    ``questions``: the file. ``cells``: what is compared. ``options``, ``models``: how clips are read, and by what.
    ``results``: name of the answers beside the questions, from which a run that was stopped goes on.
    """
    path = questions.path
    request = EvalRequest(questions, cells, options, path.with_name(results), remedy=f"remove {results}")
    result = evaluate(request, lambda done, total: print_line(f"{done} of {total} videos"), models)
    name = f"{path.parent.name}/{path.name}"
    return {"questions_sha256": questions.sha256, **result.summary, "questions_file": name}
