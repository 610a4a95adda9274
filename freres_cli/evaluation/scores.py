"""Rows by video -> accuracy with intervals, by method, budget and category."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.intervals import LEVEL, NUM_RESAMPLES, SEED, Estimate, estimate_shares
from freres_cli.evaluation.questions import Question, QuestionFile

Row = Mapping[str, Any]


def summarize(file: QuestionFile, rows: Sequence[Row], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the document of ``freres eval``, from one row for each video in the order of the file.

    Overall accuracy gives every question the same weight; ``mean_over_categories`` gives every category the same weight.
    Only questions about videos that could be used count, the same ones for all methods.
    """
    by_video = file.by_video()
    used = [row for row in rows if row["status"] == "ok"]
    asked = {row["video"]: by_video[row["video"]] for row in used}
    return {
        "questions_file": str(file.path),
        "questions_sha256": file.sha256,
        "num_questions": sum(map(len, asked.values())),
        "num_videos": len(used),
        "failed": [
            {"video": row["video"], "message": row["message"], "num_questions": len(by_video[row["video"]])}
            for row in rows
            if row["status"] == "failed"
        ],
        "full_tokens": _mean([row["full_tokens"] for row in used]),
        "full_tokens_max": max(row["full_tokens"] for row in used),
        "decode_s": _median([row["decode_s"] for row in used]),
        "encode_s": _median([row["encode_s"] for row in used]),
        "intervals": {
            "level": LEVEL,
            "resamples": NUM_RESAMPLES,
            "seed": SEED,
            "method": "percentile bootstrap, videos resampled with replacement",
        },
        "rows": _add_retention([_summarize_cell(i, cell, used, asked) for i, cell in enumerate(cells)]),
        "differences": _compare_cells(cells, used, asked),
    }


def _compare_cells(
    cells: Sequence[Cell], used: Sequence[Row], asked: Mapping[str, Sequence[Question]]
) -> list[dict[str, Any]]:
    """Return how far each row is ahead of each earlier row with the same budget, and of ``full``.

    Both answered the same questions, so the difficulty of a video cancels in their difference. Its interval can separate
    rows whose own intervals overlap (ours; the paper compares single numbers).
    """
    listed = list(asked.values())
    categories = _categories(listed)
    counts = [count_answers([row["cells"][i] for row in used], listed, categories) for i in range(len(cells))]
    differences = []
    # Full comes first, so that every other row is compared with it.
    order = sorted(range(len(cells)), key=lambda i: cells[i].method != "full")
    for i, j in combinations(order, 2):
        base, cell = cells[i], cells[j]
        if base.budget == cell.budget or base.method == "full":
            estimates = estimate_shares(counts[j][0] - counts[i][0], counts[j][1])
            differences.append(
                {
                    "method": cell.label or cell.method,
                    "minus": base.label or base.method,
                    "budget": None if cell.budget is None else cell.budget.number,
                    **_describe_difference(estimates.overall),
                    "mean_over_categories": _describe_difference(estimates.mean_over_groups),
                }
            )
    return differences


def _categories(asked: Sequence[Sequence[Question]]) -> list[str]:
    """The categories, in the order of the file."""
    return list(dict.fromkeys(question.category for questions in asked for question in questions))


def _summarize_cell(
    index: int, cell: Cell, used: Sequence[Row], asked: Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    parts = [row["cells"][index] for row in used]
    questions = [question for listed in asked.values() for question in listed]
    categories = _categories(list(asked.values()))
    correct, total = count_answers(parts, list(asked.values()), categories)
    estimates = estimate_shares(correct, total)
    first, later = _ttft_seconds(parts, list(asked.values()))
    budgets, visual = ([part[key] for part in parts] for key in ("budget_tokens", "visual_tokens"))
    return {
        "method": cell.method,
        "label": cell.label or None,
        "settings": dict(cell.settings),
        "adapter": None if cell.adapter is None else cell.adapter.name,
        "adapter_sha256": cell.adapter_sha256,
        "budget": None if cell.budget is None else cell.budget.number,
        "budget_tokens": _mean(budgets),
        "budget_tokens_max": max(budgets),
        "visual_tokens": _mean(visual),
        "visual_tokens_max": max(visual),
        "context_tokens": _mean([part["context_tokens"] for part in parts]),
        "num_questions": len(questions),
        **_describe(estimates.overall),
        "chance": _chance(questions),
        "mean_over_categories": _describe(estimates.mean_over_groups),
        "by_category": {
            category: {
                "num_questions": int(total[:, k].sum()),
                **_describe(estimates.groups[k]),
                "chance": _chance([q for q in questions if q.category == category]),
            }
            for k, category in enumerate(categories)
        },
        "compress_s": _median([part["compress_s"] for part in parts]),
        "prefill_s": _median([part["prefill_s"] for part in parts]),
        "ttft_s": _median(first),
        "next_ttft_s": _median(later),
    }


def count_answers(
    parts: Sequence[Row], asked: Sequence[Sequence[Question]], categories: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the right answers and the questions of each video in each category: two arrays of (V, K) int64."""
    column = {category: k for k, category in enumerate(categories)}
    correct = np.zeros((len(parts), len(categories)), dtype=np.int64)
    total = np.zeros_like(correct)
    for v, (part, questions) in enumerate(zip(parts, asked, strict=True)):
        for question in questions:
            correct[v, column[question.category]] += part["answers"][question.id][1]
            total[v, column[question.category]] += 1
    return correct, total


def _ttft_seconds(parts: Sequence[Row], asked: Sequence[Sequence[Question]]) -> tuple[list[float], list[float]]:
    """Return seconds to the first token: for the first question about each video, with prefill, and for the others."""
    listed = [[part["answers"][q.id][2] for q in questions] for part, questions in zip(parts, asked, strict=True)]
    return [seconds[0] for seconds in listed], [s for seconds in listed for s in seconds[1:]]


def _add_retention(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to every accuracy its share of the full-token run's; ``None`` if that was not run, or is 0."""
    full = next((row for row in rows if row["method"] == "full"), None)
    for row in rows:
        row["retention"] = _ratio(row, full)
        row["mean_over_categories"]["retention"] = _ratio(
            row["mean_over_categories"], full and full["mean_over_categories"]
        )
        for category, part in row["by_category"].items():
            part["retention"] = _ratio(part, full and full["by_category"][category])
    return rows


def _ratio(part: Row, full: Row | None) -> float | None:
    return part["accuracy"] / full["accuracy"] if full and full["accuracy"] else None


def _describe(estimate: Estimate) -> dict[str, float | None]:
    return {"accuracy": estimate.value, "ci_low": estimate.low, "ci_high": estimate.high}


def _describe_difference(estimate: Estimate) -> dict[str, float | None]:
    return {"difference": estimate.value, "ci_low": estimate.low, "ci_high": estimate.high}


def _chance(questions: Sequence[Question]) -> float:
    """Accuracy of guessing: one over the number of options, or 0 for a free answer."""
    return _mean([1 / len(question.choices) if question.choices else 0.0 for question in questions])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
