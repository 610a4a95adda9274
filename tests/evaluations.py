"""Small evaluations: clips, questions about them, and the request that ``freres eval`` makes from its flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freres_cli.baselines.registry import METHODS
from freres_cli.cli.compress import make_options
from freres_cli.evaluation.cells import parse_cells
from freres_cli.evaluation.questions import read_questions
from freres_cli.evaluation.results import results_path
from freres_cli.pipeline.adapters import give_adapters
from freres_cli.pipeline.models import Models
from freres_cli.workflows.eval_run import EvalRequest
from freres_cli.workflows.evaluate import EvalResult, evaluate
from tests.clips import write_clip
from tests.loaded_models import loaded_models

FRAMES = 4
HAS_BUDGET = {name: method.has_budget for name, method in METHODS.items()}
GOOD_ROW = {"id": "1", "video": "clip0.mp4", "category": "c", "question": "q?", "choices": ["a", "b"], "answer": "a"}


def write_clips(folder: Path) -> Path:
    """Three clips, clip0.mp4 to clip2.mp4, each a frame longer than the one before."""
    for i in range(3):
        write_clip(folder / f"clip{i}.mp4", FRAMES + i, fps=10)
    return folder


def rows_for(videos, per_video=2):
    """Questions with two options and free ones, in turn."""
    rows = []
    for i, video in enumerate(videos):
        for j in range(per_video):
            row = {"id": f"q{i}.{j}", "video": str(video), "category": ["Action", "Count"][j % 2], "extra": 1}
            row |= {"question": "Which way?", "choices": ["left", "right"], "answer": ["left", "right"][i % 2]}
            if j % 2:
                row |= {"question": "How many?", "choices": [], "answer": "two"}
            rows.append(row)
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_questions(folder):
    """Two questions on each of the clips."""
    return write_rows(folder / "questions.jsonl", rows_for(["clip0.mp4", "clip1.mp4", "clip2.mp4"]))


def make_request(
    questions: Path,
    methods: str,
    budgets: str = "1.0,0.5,0.25,0.1",
    *,
    output: Path | None = None,
    force: bool = False,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    joined: Sequence[Path] = (),
    adapter: str | None = None,
    settings: dict[str, Any] | None = None,
    model: str | None = None,
    max_answer_tokens: int = 2,
) -> EvalRequest:
    """The request that ``freres eval`` makes of these flags, but with short free answers."""
    options = make_options(settings or {}, None, model, device="cpu")
    cells = parse_cells(methods, budgets, HAS_BUDGET)
    cells = give_adapters(cells, adapter, options.model.name, options.settings.variant)
    path = None if output is None else results_path(output)
    file = read_questions(questions, limit)
    file = file if shard is None else file.take_shard(*shard)
    return EvalRequest(file, cells, options, path, force, max_answer_tokens=max_answer_tokens, joined=tuple(joined))


def run_eval(questions: Path, methods: str, *args: Any, models: Models | None = None, **flags: Any) -> EvalResult:
    """Evaluate with ``models``, by default the bundled one. The other arguments are those of ``make_request``."""
    return evaluate(make_request(questions, methods, *args, **flags), models=models or loaded_models())


def figures(summary):
    """Everything in a summary except times and facts about the run itself."""
    drop = ("compress_s", "prefill_s", "ttft_s", "next_ttft_s")
    rows = [{key: value for key, value in row.items() if key not in drop} for row in summary["rows"]]
    return rows, summary["num_questions"], summary["failed"], summary["full_tokens"]
