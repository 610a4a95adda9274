"""``freres eval``: how well questions are answered, by method and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.baselines.registry import METHODS, OWN_METHODS
from freres_cli.cli import options
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.cli.eval_tables import print_differences, print_rows, print_totals
from freres_cli.cli.given import gather_flags_at_budgets
from freres_cli.cli.output import print_json, print_notes, print_warning, progress_bar
from freres_cli.cli.values import read_shard
from freres_cli.devices import choose_storage
from freres_cli.errors import count_of
from freres_cli.evaluation.readers.registry import read_any_questions
from freres_cli.pipeline.choices import choose_cells

if TYPE_CHECKING:
    from freres_cli.workflows.eval_run import EvalRequest
    from freres_cli.workflows.evaluate import EvalResult

SHOWN_FAILURES = 10


def evaluate(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="QUESTIONS",
            readable=False,
            help="JSON lines: id, video, category, question, choices, answer; or the folder of a benchmark.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help=f"Any of {', '.join(OWN_METHODS)}.",
            autocompletion=options.complete_method,
        ),
    ] = "full,uniform,fre-res,adaptive",
    budgets: options.Budgets = "1.0,0.5,0.25,0.1",
    benchmark: options.Benchmark = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE|DIR", readable=False, help="Keep answers here, so a stopped run can resume."
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--csv", metavar="FILE", help="Write the rows as CSV, with intervals and categories."),
    ] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG of accuracy against tokens.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite --csv and --plot; start over if the output file holds something else."),
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Stop after this many questions.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="I/N", help="Ask only about every Nth video, from the Ith on: N runs share the work."
        ),
    ] = None,
    joined: Annotated[
        list[str] | None,
        typer.Option(
            "--join",
            metavar="FILE",
            help="Take over the answers of this results file, also compressed by gzip; use again for several files.",
        ),
    ] = None,
    adapter: options.Adapter = None,
    preset: options.PresetName = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    weight_dtype: options.WeightDtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure accuracy by method and budget.

    Each video is decoded and encoded once; every method makes its tokens from these latents, and answers all questions
    about the video from one prefill. Where the preset's track_density is above 1 (4 in most of them), adaptive and
    fre-res read that multiple of the frames that the other methods read (neither does if its budget holds every token):
    the file is decoded once more for these, and equal tokens are not equal frames. --set track_density=1 compares at
    equal frames. Options are scored as in freres ask --choices. Free answers are greedy, have at most 16 tokens, and
    are compared ignoring case, spacing and final punctuation. A video that cannot be used is a failed row, and its
    questions count for no method. A method that fails on a video at a budget, for want of memory or of context, loses
    that video in that row only; two rows are compared on the videos that both have.

    QUESTIONS holds one JSON object per line with the keys id, video (relative to that file), category, question, choices
    (2 to 26 options; none for a free answer) and answer (the text of the right option). Other keys are ignored.

    A folder is a local copy of a public benchmark, in its own layout: see freres-benchmarks(7). The model answers the
    benchmark's prompt greedily, and the option is read from its words by the benchmark's rule, not by probability.

    With --shard, runs on several machines or GPUs share the videos, each with its own -o; --join of all these files, in a
    run without --shard, then gives the whole. --join also takes files of other methods: then only what is added to
    a comparison is run. Questions, model, settings, kind of device and releases must be the same. Seconds that
    are taken over are those of the run that measured them.

    freres methods says what each method keeps. full and blind have one row each, whatever the budgets. fre-res uses at most
    the budget, the others exactly the budget. With deepstack: drop, only full keeps the DeepStack rows. cdpruner
    picks and prefills its tokens for each question, and the time to the first token includes this. For fastv and
    framefusion-prune the budget counts the visual tokens in the later layers; context_tokens counts all those of the first.
    """
    from freres_cli.evaluation.results import results_path

    cells, storage = choose_cells(methods, budgets, METHODS), choose_storage(kv_dtype, weight_dtype)
    flags = gather_flags_at_budgets(assignments)
    file = read_any_questions(questions, benchmark, limit)
    if shard is not None:
        file = file.take_shard(*read_shard(shard))
    path = None if output is None else results_path(output)
    made = [
        None if text is None else options.check_path(text, flag) for text, flag in ((table, "--csv"), (plot, "--plot"))
    ]
    made_options = make_options(flags, preset, model, revision, device=device, dtype=dtype, storage=storage)
    chosen = at_budgets(made_options, "eval", cells)
    from freres_cli.pipeline.adapters import give_adapters
    from freres_cli.workflows.eval_files import EvalFiles
    from freres_cli.workflows.eval_run import EvalRequest
    from freres_cli.workflows.evaluate import evaluate as run_evaluation

    cells = give_adapters(cells, adapter, chosen.model.name, chosen.settings.variant)
    others = tuple(options.check_path(text, "--join") for text in joined or ())
    request = EvalRequest(file, cells, chosen, path, force, files=EvalFiles(*made), joined=others)
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
    print_losses(result.summary["video_notes"])
    for row in result.summary["rows"]:
        if row["failed"]:
            first, missed = row["failed"][0], f"{len(row['failed'])} of {result.summary['num_videos']} videos"
            print_warning(f"failed on {missed}, which this row lacks: {first['message']} ({first['video']})")


def print_losses(noted: Sequence[Mapping[str, Any]]) -> None:
    """Warn about videos of which a part was lost. ``noted``: those that were read with notes."""
    from freres_cli.pipeline.notes import find_damaged

    if lost := find_damaged(noted):
        counted, them = ("1 video is", "it") if len(lost) == 1 else (f"{len(lost)} videos are", "them")
        first = f"{lost[0]['video']}, {lost[0]['lost_s']:.2f} s lost"
        print_warning(f"{counted} damaged or cut short, and what can be read of {them} counts: {first}")


def run_notes(result: EvalResult, request: EvalRequest) -> list[str]:
    """Return notes on how much of the run was already done."""
    notes = []
    if request.output is not None and result.num_resumed:
        were = "was" if result.num_resumed == 1 else "were"
        notes.append(f"{request.output}: {count_of(result.num_resumed, 'video')} {were} already answered")
    if request.joined:
        count = len(request.cells) * (result.summary["num_videos"] + len(result.summary["failed"]) - result.num_resumed)
        notes.append(
            f"--join: answers of {result.num_joined} of {count} rows (a video, method and budget) were taken over"
        )
    return notes


def describe_result(result: EvalResult, request: EvalRequest) -> dict[str, Any]:
    """Return the ``--json`` document of a run."""
    from freres_cli.bench.report import describe_environment

    return {
        **result.summary,
        "scoring": request.questions.describe_scoring(),
        "results_file": None if request.output is None else str(request.output),
        "csv": None if request.files.table is None else str(request.files.table),
        "plot": None if request.files.plot is None else str(request.files.plot),
        "num_videos_resumed": result.num_resumed,
        "joined_files": [str(file) for file in request.joined],
        "num_rows_joined": result.num_joined,
        "shard": None if request.questions.shard is None else "{}/{}".format(*request.questions.shard),
        "model": result.run["model"],
        "settings": {key: s for key, s in request.options.recorded_settings.record().items() if key != "budget_tokens"},
        "notes": list(result.notes),
        **result.storage,
        "environment": describe_environment(request.options.model.device, result.dtype),
    }
