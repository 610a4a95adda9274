"""``freres eval``: how well questions are answered, by method and budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.baselines.registry import FRE_RES, METHODS
from freres_cli.cli import options
from freres_cli.cli.compress import at_budgets, gather_flags_at_budgets, make_options
from freres_cli.cli.output import (
    format_seconds,
    print_json,
    print_notes,
    print_result,
    print_table,
    print_warning,
    progress_bar,
)
from freres_cli.errors import count_of
from freres_cli.evaluation.readers.registry import BENCHMARKS, read_any_questions

if TYPE_CHECKING:
    from freres_cli.workflows.evaluate import EvalRequest, EvalResult

SHOWN_FAILURES = 10


def evaluate(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="QUESTIONS",
            help="JSON lines: id, video, category, question, choices, answer; or the folder of a benchmark.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help=f"Any of {', '.join(METHODS)}.",
            autocompletion=options.complete_method,
        ),
    ] = "full,uniform,fre-res,adaptive",
    budgets: options.Budgets = "1.0,0.5,0.25,0.1",
    benchmark: Annotated[
        str | None,
        typer.Option(
            "--benchmark",
            metavar="NAME[:PART]",
            help=f"What the folder holds: {', '.join(BENCHMARKS)}. PART is a task, split or length.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE|DIR", help="Keep answers here, so a stopped run can resume."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over if the output file holds something else.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Stop after this many questions.")] = None,
    adapter: options.Adapter = None,
    preset: options.PresetName = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure accuracy by method and budget.

    Each video is decoded and encoded once; every method makes its tokens from these latents, and answers all questions
    about the video from one prefill. Options are scored as in freres ask --choices. Free answers are greedy, have at most
    16 tokens, and are compared ignoring case, spacing and final punctuation. A video that cannot be used is a failed row,
    and its questions count for no method.

    QUESTIONS holds one JSON object per line with the keys id, video (relative to that file), category, question, choices
    (2 to 26 options; none for a free answer) and answer (the text of the right option). Other keys are ignored.

    A folder is a local copy of a public benchmark, in its own layout: see freres-benchmarks(7). The model answers the
    benchmark's prompt greedily, and the option is read from its words by the benchmark's rule, not by probability.

    freres methods says what each method keeps. full and blind have one row each, whatever the budgets. fre-res uses at most
    the budget, the others exactly the budget. With deepstack: drop, only full keeps the DeepStack rows. cdpruner
    picks and prefills its tokens for each question, and the time to the first token includes this. For fastv and
    framefusion-prune the budget counts the visual tokens in the later layers; context_tokens counts all those of the first.
    """
    from freres_cli.evaluation.cells import parse_cells
    from freres_cli.evaluation.results import results_path

    cells = parse_cells(methods, budgets, {name: method.has_budget for name, method in METHODS.items()})
    flags = gather_flags_at_budgets(assignments)
    file = read_any_questions(questions, benchmark, limit)
    path = None if output is None else results_path(output, questions)
    chosen = at_budgets(make_options(flags, preset, model, revision, device=device, dtype=dtype), "eval")
    from freres_cli.pipeline.adapters import choose_adapter
    from freres_cli.workflows.evaluate import EvalRequest
    from freres_cli.workflows.evaluate import evaluate as run_evaluation

    own = choose_adapter(adapter, chosen.model.name, chosen.settings.variant)
    cells = tuple(replace(cell, adapter=own) if cell.method == FRE_RES else cell for cell in cells)
    request = EvalRequest(file, cells, chosen, path, force)
    with progress_bar("eval", quiet or json, "videos") as progress:
        result = run_evaluation(request, progress)
    print_failures(result)
    print_notes([*result.notes, *run_notes(result, request)], quiet)
    if json:
        print_json("freres.eval/1", describe_result(result, request))
        return
    print_rows(result.summary)
    print_differences(result.summary)
    print_totals(result.summary)


def print_failures(result: EvalResult) -> None:
    """Warn about videos that could not be used."""
    failed = result.summary["failed"]
    for item in failed[:SHOWN_FAILURES]:
        print_warning(f"failed: {item['message']}")
    if failed:
        more = f" ({len(failed) - SHOWN_FAILURES} not shown)" if len(failed) > SHOWN_FAILURES else ""
        lost = sum(item["num_questions"] for item in failed)
        videos = result.summary["num_videos"] + len(failed)
        print_warning(f"{len(failed)} of {videos} videos failed{more}; questions that count for no method: {lost}")


def run_notes(result: EvalResult, request: EvalRequest) -> list[str]:
    """Return a note on how much of the run was already done."""
    if request.output is None:
        return []
    return [f"{request.output}: {result.num_resumed} videos were already answered"] if result.num_resumed else []


def describe_result(result: EvalResult, request: EvalRequest) -> dict[str, Any]:
    """Return the ``--json`` document of a run."""
    from freres_cli.bench.report import describe_environment

    return {
        **result.summary,
        "scoring": request.questions.describe_scoring(),
        "results_file": None if request.output is None else str(request.output),
        "num_videos_resumed": result.num_resumed,
        "model": result.run["model"],
        "settings": {key: s for key, s in request.options.settings.record().items() if key != "budget_tokens"},
        "notes": list(result.notes),
        "environment": describe_environment(request.options.model.device, result.dtype),
    }


def print_rows(summary: dict[str, Any]) -> None:
    """Print the table of methods and budgets, and accuracy by category."""
    columns = ("method", "budget", "tokens", "max", "accuracy", "95 % interval", "by category", "retention")
    print_table(
        (*columns, "compress", "prefill", "TTFT", "next TTFT"),
        [
            (
                row["label"] or row["method"],
                _size(row["budget"]),
                f"{row['visual_tokens']:.0f}",
                str(row["visual_tokens_max"]),
                _percent(row["accuracy"]),
                _interval(row),
                _percent(row["mean_over_categories"]["accuracy"]),
                _percent(row["retention"]),
                *[format_seconds(row[f"{stage}_s"]) for stage in ("compress", "prefill", "ttft", "next_ttft")],
            )
            for row in summary["rows"]
        ],
    )
    print_result("")
    _print_categories(summary["rows"])


def print_totals(summary: dict[str, Any]) -> None:
    """Print what the tables are based on."""
    print_result("")
    print_result(
        f"{count_of(summary['num_questions'], 'question')} on {count_of(summary['num_videos'], 'video')}, "
        f"{len(summary['failed'])} failed; "
        f"{summary['full_tokens']:.0f} full tokens per video"
    )
    print_result(
        "in percent: accuracy over questions, and by category the mean over categories; intervals from "
        f"{summary['intervals']['resamples']} resamples of the videos"
    )
    print_result(
        f"per video: decode {format_seconds(summary['decode_s'])}, encode {format_seconds(summary['encode_s'])}, once for "
        "all methods; tokens are means, times are medians"
    )


def print_differences(summary: dict[str, Any]) -> None:
    """Print the paired differences between methods at equal budgets."""
    rows = [row for row in summary["differences"] if row["budget"] is not None and row["minus"] != "full"]
    if not rows:
        return
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


def _print_categories(rows: list[dict[str, Any]]) -> None:
    called = [row["label"] or row["method"] for row in rows]
    names = [
        name if row["budget"] is None else f"{name} {_size(row['budget'])}"
        for name, row in zip(called, rows, strict=True)
    ]
    first = rows[0]["by_category"]
    print_table(
        ("category", "questions", "chance", *names),
        [
            (
                category,
                str(part["num_questions"]),
                _percent(part["chance"]),
                *[_percent(row["by_category"][category]["accuracy"]) for row in rows],
            )
            for category, part in first.items()
        ],
    )


def _size(budget: float | None) -> str:
    return "-" if budget is None else str(budget)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _interval(part: dict[str, Any]) -> str:
    return "-" if part["ci_low"] is None else f"{_percent(part['ci_low'])} to {_percent(part['ci_high'])}"
