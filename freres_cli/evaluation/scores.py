"""Rows by video -> accuracy with intervals, by method, budget and category."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.intervals import LEVEL, NUM_RESAMPLES, SEED, Estimate, estimate_shares
from freres_cli.evaluation.questions import Question, QuestionFile

Row = Mapping[str, Any]
Counts = tuple[np.ndarray, np.ndarray]  # right answers and questions, (V, K) each


def summarize(file: QuestionFile, rows: Sequence[Row], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the document of ``freres eval``, from one row for each video in the order of the file.

    Overall accuracy gives every question the same weight; ``mean_over_categories`` gives every category the same weight.
    Only questions about videos that could be used count, the same ones for all methods. A row whose method failed on some
    of these videos has figures of the others: ``num_videos`` and ``num_questions`` say of how many, and ``failed`` why.
    Retention and differences compare two rows on the videos that both have.
    """
    by_video = file.by_video()
    used = [row for row in rows if row["status"] == "ok"]
    asked = {row["video"]: by_video[row["video"]] for row in used}
    summarized = [_summarize_cell(i, cell, used, asked) for i, cell in enumerate(cells)]
    _add_retention(summarized, cells, used, asked)
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
        "video_notes": describe_reading(used),
        "full_tokens": _mean([row["full_tokens"] for row in used]),
        "full_tokens_max": max(row["full_tokens"] for row in used),
        "decode_s": _median([row["decode_s"] for row in used]),
        "encode_s": _median([row["encode_s"] for row in used]),
        "intervals": {
            "level": LEVEL,
            "resamples": NUM_RESAMPLES,
            "seed": SEED,
            "method": "percentile bootstrap, videos resampled with replacement, each with all its parts; where all videos "
            "agree, the exact one-sided bound by their number (Clopper-Pearson)",
        },
        "rows": summarized,
        "differences": _compare_cells(cells, used, asked),
    }


def describe_reading(videos: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the seconds that were lost of each video, and the notes on how it was read, for those that have any."""
    return [{key: row[key] for key in ("video", "lost_s", "notes")} for row in videos if row["lost_s"] or row["notes"]]


def _compare_cells(
    cells: Sequence[Cell], used: Sequence[Row], asked: Mapping[str, Sequence[Question]]
) -> list[dict[str, Any]]:
    """Return how far each row is ahead of each earlier row with the same budget, and of ``full``.

    Both answered the same questions, so the difficulty of a video cancels in their difference. Its interval can separate
    rows whose own intervals overlap (ours; the paper compares single numbers).
    """
    counts = [_count_cell(i, used, asked) for i in range(len(cells))]
    files = [asked[row["video"]][0].video for row in used]
    differences = []
    # Full comes first, so that every other row is compared with it.
    order = sorted(range(len(cells)), key=lambda i: cells[i].method != "full")
    for i, j in combinations(order, 2):
        base, cell = cells[i], cells[j]
        if base.budget != cell.budget and base.method != "full":
            continue
        shared = _keep_shared(counts[j], counts[i])
        (correct, total), (base_correct, _) = (_add_parts(part, files) for part in shared)
        is_asked = total.any(0)
        ahead = (correct - base_correct)[:, is_asked]
        estimates = estimate_shares(ahead, total[:, is_asked], lowest=-1) if len(total) else None
        differences.append(
            {
                "method": cell.label or cell.method,
                "minus": base.label or base.method,
                "budget": None if cell.budget is None else cell.budget.number,
                "num_questions": int(total.sum()),
                **_describe_difference(estimates.overall if estimates else None),
                "mean_over_categories": _describe_difference(estimates.mean_over_groups if estimates else None),
            }
        )
    return differences


def _count_cell(index: int, used: Sequence[Row], asked: Mapping[str, Sequence[Question]]) -> Counts:
    """Return ``count_answers`` of a cell over all videos. One that it failed on has no questions."""
    listed = [asked[row["video"]] if row["cells"][index]["status"] == "ok" else [] for row in used]
    return count_answers([row["cells"][index] for row in used], listed, _categories(list(asked.values())))


def _keep_shared(*cells: Counts) -> list[Counts]:
    """Return the counts of some cells without those of videos that one of them did not answer."""
    rows = np.logical_and.reduce([total.any(1) for _, total in cells])
    return [(correct * rows[:, None], total * rows[:, None]) for correct, total in cells]


def _add_parts(counts: Counts, files: Sequence[Path]) -> Counts:
    """Return the counts of each file that has any: questions about two parts of one depend on each other as well. ``files``:
    where each row's video is."""
    places = {file: place for place, file in enumerate(dict.fromkeys(files))}
    index = np.array([places[file] for file in files], dtype=np.int64)
    added = [np.zeros((len(places), part.shape[1]), dtype=part.dtype) for part in counts]
    for sums, part in zip(added, counts, strict=True):
        np.add.at(sums, index, part)
    is_asked = added[1].any(1)
    return added[0][is_asked], added[1][is_asked]


def _categories(asked: Sequence[Sequence[Question]]) -> list[str]:
    """The categories, in the order of the file."""
    return list(dict.fromkeys(question.category for questions in asked for question in questions))


def _summarize_cell(
    index: int, cell: Cell, used: Sequence[Row], asked: Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    own = [row for row in used if row["cells"][index]["status"] == "ok"]
    parts, listed = [row["cells"][index] for row in own], [asked[row["video"]] for row in own]
    questions = [question for questions in listed for question in questions]
    files = [questions[0].video for questions in listed]
    correct, total = _add_parts(count_answers(parts, listed, _categories(listed)), files)
    estimates = estimate_shares(correct, total) if parts else None
    groups = dict(zip(_categories(listed), estimates.groups, strict=True)) if estimates else {}
    first, later = _ttft_seconds(parts, listed)
    budgets, visual = ([part[key] for part in parts] for key in ("budget_tokens", "visual_tokens"))
    # A part has the mean over its own questions.
    context = [part["context_tokens"] for part, asked_of in zip(parts, listed, strict=True) for _ in asked_of]
    return {
        "method": cell.method,
        "label": cell.label or None,
        "settings": dict(cell.settings),
        "adapter": None if cell.adapter is None else cell.adapter.name,
        "adapter_sha256": cell.adapter_sha256,
        "budget": None if cell.budget is None else cell.budget.number,
        "budget_tokens": _mean(budgets),
        "budget_tokens_max": _max(budgets),
        "visual_tokens": _mean(visual),
        "visual_tokens_max": _max(visual),
        "context_tokens": _mean(context),
        "num_frames": _mean([part["num_frames"] for part in parts]),
        "encoded_tokens": _mean([part["encoded_tokens"] for part in parts]),
        "num_videos": len(parts),
        "failed": [
            {"video": row["video"], "message": row["cells"][index]["message"]}
            for row in used
            if row["cells"][index]["status"] == "failed"
        ],
        "num_questions": len(questions),
        **_describe(estimates.overall if estimates else None),
        "chance": _chance(questions),
        "mean_over_categories": _describe(estimates.mean_over_groups if estimates else None),
        "by_category": {
            category: _describe_category(groups.get(category), [q for q in questions if q.category == category])
            for category in _categories(list(asked.values()))
        },
        "compress_s": _median([part["compress_s"] for part in parts]),
        "prefill_s": _median([part["prefill_s"] for part in parts]),
        "ttft_s": _median(first),
        "next_ttft_s": _median(later),
        **{key: _max([part[key] for part in parts]) for key in ("kv_cache_bytes", "peak_memory_bytes")},
    }


def _describe_category(estimate: Estimate | None, questions: Sequence[Question]) -> dict[str, Any]:
    return {"num_questions": len(questions), **_describe(estimate), "chance": _chance(questions)}


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


def _add_retention(
    rows: Sequence[dict[str, Any]], cells: Sequence[Cell], used: Sequence[Row], asked: Mapping[str, Sequence[Question]]
) -> None:
    """Add to every accuracy of ``rows`` its share of the full-token run's; ``None`` if that was not run, or is 0."""
    full = next((i for i, cell in enumerate(cells) if cell.method == "full"), None)
    base = None if full is None else _count_cell(full, used, asked)
    for index, row in enumerate(rows):
        parts = [row, row["mean_over_categories"], *row["by_category"].values()]
        shares: list[list[float | None]] = [[None] * len(parts)] * 2
        if base is not None:
            shares = [_shares_right(*counts) for counts in _keep_shared(_count_cell(index, used, asked), base)]
        for part, own, of_full in zip(parts, *shares, strict=True):
            part["retention"] = own / of_full if own is not None and of_full else None


def _shares_right(correct: np.ndarray, total: np.ndarray) -> list[float | None]:
    """Return the shares of right answers: of all, the mean of categories, and each category; ``None`` without
    questions."""
    by_category = [float(c / t) if t else None for c, t in zip(correct.sum(0), total.sum(0), strict=True)]
    known = np.array([share for share in by_category if share is not None])
    if not len(known):
        return [None, None, *by_category]
    return [float(correct.sum() / total.sum()), float(known.mean()), *by_category]


def _describe(estimate: Estimate | None) -> dict[str, float | None]:
    return dict(zip(("accuracy", "ci_low", "ci_high"), _figures(estimate), strict=True))


def _describe_difference(estimate: Estimate | None) -> dict[str, float | None]:
    return dict(zip(("difference", "ci_low", "ci_high"), _figures(estimate), strict=True))


def _figures(estimate: Estimate | None) -> tuple[float | None, ...]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _chance(questions: Sequence[Question]) -> float | None:
    """Accuracy of guessing: one over the number of options, or 0 for a free answer. ``None`` without questions."""
    return _mean([1 / len(question.choices) if question.choices else 0.0 for question in questions])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _max(values: Sequence[float | None]) -> float | None:
    """The largest of the values that are known."""
    return max((value for value in values if value is not None), default=None)
