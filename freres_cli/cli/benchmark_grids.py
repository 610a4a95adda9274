"""The part ``grids`` of the benchmark: what a smaller grid for residual frames costs in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freres_cli.baselines.registry import FRE_RES
from freres_cli.cli.output import print_line
from freres_cli.devices import choose_device
from freres_cli.evaluation.cells import Cell, parse_budget
from freres_cli.evaluation.questions import read_questions
from freres_cli.pipeline.compressor import Compressor
from freres_cli.presets import FULL, HALF
from freres_cli.workflows.evaluate import EvalRequest, evaluate

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
        request = EvalRequest(
            read_questions(path), cells, compressor.options, path.with_name("grids.jsonl"), remedy="remove grids.jsonl"
        )
        result = evaluate(request, lambda done, total: print_line(f"{done} of {total} videos"), compressor.models)
        name = f"{path.parent.name}/{path.name}"
        found[path.parent.name] = {
            "questions_sha256": request.questions.sha256,
            **result.summary,
            "questions_file": name,
        }
    return {"device": choose_device("cpu").description, "sets": found}
