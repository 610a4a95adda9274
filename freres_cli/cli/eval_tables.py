"""The tables of ``freres eval``, narrow enough for a terminal where names allow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from freres_cli.cli.output import format_bytes, format_seconds, print_result, print_table
from freres_cli.errors import count_of

TABLE_WIDTH = 100  # columns of a terminal that categories are spread over
MOST_DIFFERENCES = 40  # rows; beyond, only the differences from the first method are shown


def print_rows(summary: dict[str, Any]) -> None:
    """Print accuracy and costs of methods and budgets, and accuracy by category."""
    rows = summary["rows"]
    # Only of interest where a method failed on some videos.
    counts = [str(row["num_questions"]) for row in rows] if any(row["failed"] for row in rows) else None
    print_table(
        (
            *("method", "budget", "tokens", "context", "accuracy", "95 % interval", "by category", "retention"),
            *(() if counts is None else ("questions",)),
        ),
        [
            (
                *name_row(row),
                *[_count(row[key]) for key in ("visual_tokens", "context_tokens")],
                _percent(row["accuracy"]),
                _interval(row),
                _percent(row["mean_over_categories"]["accuracy"]),
                _percent(row["retention"]),
                *(() if counts is None else (counts[place],)),
            )
            for place, row in enumerate(rows)
        ],
    )
    print_result("")
    is_measured = any(row["peak_memory_bytes"] is not None for row in rows)
    print_table(
        ("method", "budget", "compress", "prefill", "TTFT", "next TTFT", "KV cache", *(("memory",) * is_measured)),
        [
            (
                *name_row(row),
                *[format_seconds(row[f"{stage}_s"]) for stage in ("compress", "prefill", "ttft", "next_ttft")],
                format_bytes(row["kv_cache_bytes"]),
                *((format_bytes(row["peak_memory_bytes"]),) * is_measured),
            )
            for row in rows
        ],
    )
    print_result("")
    _print_categories(rows)


def print_totals(summary: dict[str, Any]) -> None:
    """Print what the tables are based on."""
    asked, videos = count_of(summary["num_questions"], "question"), count_of(summary["num_videos"], "video")
    print_result("")
    print_result(
        f"{asked} on {videos}, {len(summary['failed'])} failed; {summary['full_tokens']:.0f} full tokens per video"
    )
    print_result(
        "in percent: accuracy over questions, and by category the mean over categories; 95 % intervals\n"
        f"from {summary['intervals']['resamples']} resamples of the videos"
    )
    print_result("tokens are means over videos; context is the whole prompt, with its text and the question")
    print_result("times are medians; bytes are those of the largest video")
    from freres_cli.workflows.eval_run import reads_other_frames

    scope = "for the frames of all methods" if reads_other_frames(summary["rows"]) else "once for all methods"
    print_result(
        f"per video: decode {format_seconds(summary['decode_s'])}, encode {format_seconds(summary['encode_s'])}, {scope}"
    )


def print_differences(summary: dict[str, Any]) -> None:
    """Print the paired differences between methods at equal budgets: all of them, or if there are too many to read, those
    from the first method that has a budget."""
    rows = [row for row in summary["differences"] if row["budget"] is not None and row["minus"] != "full"]
    if not rows:
        return
    every = len(rows)
    if every > MOST_DIFFERENCES:
        first = rows[0]["minus"]
        rows = [row for row in rows if row["minus"] == first]
    print_result("")
    print_table(
        ("at equal tokens", "budget", "points", "95 % interval", "by category", "95 % interval"),
        [
            (
                f"{row['method']} - {row['minus']}",
                _size(row["budget"]),
                *[
                    text
                    for part in (row, row["mean_over_categories"])
                    for text in (_percent(part["difference"]), _interval(part))
                ],
            )
            for row in rows
        ],
    )
    if len(rows) < every:
        print_result(f"differences from {rows[0]['minus']}, the first method with a budget; --json has all {every}")


def _print_categories(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row for each method and budget, and as many tables as the categories need."""
    # Where a method failed on some videos, a row with all the questions has the chance of all.
    whole = {
        category: max((row["by_category"][category] for row in rows), key=lambda part: part["num_questions"])
        for category in rows[0]["by_category"]
    }
    columns = [
        (
            category,
            str(part["num_questions"]),
            _percent(part["chance"]),
            *[_percent(row["by_category"][category]["accuracy"]) for row in rows],
        )
        for category, part in whole.items()
    ]
    names = [("accuracy", "budget"), ("questions", ""), ("chance", ""), *[name_row(row) for row in rows]]
    room = TABLE_WIDTH - sum(2 + max(map(len, part)) for part in zip(*names, strict=True))
    for place, part in enumerate(_split_columns(columns, room)):
        if place:
            print_result("")
        print_table(
            (*names[0], *[column[0] for column in part]),
            [(*name, *[column[line] for column in part]) for line, name in enumerate(names[1:], start=1)],
        )


def _split_columns(columns: Sequence[Sequence[str]], room: int) -> Iterator[list[Sequence[str]]]:
    """Yield the columns in runs that are at most ``room`` characters wide, or have one column."""
    part: list[Sequence[str]] = []
    width = 0
    for column in columns:
        own = 2 + max(map(len, column))
        if part and width + own > room:
            yield part
            part, width = [], 0
        part.append(column)
        width += own
    if part:
        yield part


def name_row(row: dict[str, Any]) -> tuple[str, str]:
    """Return what the first two columns of any table call a row."""
    return row.get("label") or row["method"], _size(row["budget"])


def _size(budget: float | None) -> str:
    return "-" if budget is None else str(budget)


def _count(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:z.1f}"


def _interval(part: dict[str, Any]) -> str:
    return "-" if part["ci_low"] is None else f"{_percent(part['ci_low'])} to {_percent(part['ci_high'])}"
