"""``freres compare``: what each method makes of one clip, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.baselines.registry import METHODS, OWN_METHODS
from freres_cli.cli import options
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.cli.eval_tables import name_row
from freres_cli.cli.given import gather_flags_at_budgets
from freres_cli.cli.output import (
    format_seconds,
    format_share,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
    print_warning,
)
from freres_cli.cli.questions import check_question, check_text
from freres_cli.errors import UsageError, count_of
from freres_cli.pipeline.choices import MAX_NEW_TOKENS, choose_cells

if TYPE_CHECKING:
    from freres_cli.workflows.compare import CompareRequest, CompareResult


def compare(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="The video.")],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help=f"Any of {', '.join(OWN_METHODS)}.",
            autocompletion=options.complete_method,
        ),
    ] = "full,uniform,fre-res,adaptive",
    budgets: options.Budgets = "0.25",
    question: Annotated[
        list[str] | None, typer.Option("--question", help="A question for every method; use again to ask more.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option("--choices", metavar="A|B|...", help="Every answer is one of these.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens in an answer.")
    ] = MAX_NEW_TOKENS,
    adapter: options.Adapter = None,
    preset: options.PresetName = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare methods on one video: tokens, fidelity, time and answers.

    The video is decoded and encoded once. Without --question only the vision tower is loaded: the table has tokens, the
    share of the latents' energy that can be rebuilt from them (hold and linear, as in freres fidelity), and the time from
    latents to tokens. With --question the language model answers from each method's tokens, in the same words as freres
    ask: then the table also has how many tokens the longest prompt had in all, text included, and the time from the first
    question to its first token, with the prefill. A method that needs the question picks its tokens in that time, which is
    then in both columns. A method that fails is a warning, and a row with what was known by then.
    """
    from freres_cli.evaluation.questions import check_choices, check_length

    path = options.check_path(video, "VIDEO")
    cells = choose_cells(methods, budgets, METHODS)
    asked = [check_question(text) for text in question or []]
    listed = [] if choices is None else [check_text(choice.strip(), "--choices") for choice in choices.split("|")]
    if choices is not None:
        check_choices(listed, "--choices", "|")
        if not asked:
            raise UsageError("--choices: expected --question as well, got none", "ask one with --question")
    for text in asked:
        check_length((text, *listed), "--question")
    flags = gather_flags_at_budgets(assignments)
    chosen = at_budgets(
        make_options(flags, preset, model, revision, device=device, dtype=dtype, attn=attn), "compare", cells
    )
    from freres_cli.pipeline.adapters import give_adapters
    from freres_cli.pipeline.query import Query
    from freres_cli.workflows.compare import CompareRequest
    from freres_cli.workflows.compare import compare as run_comparison

    cells = give_adapters(cells, adapter, chosen.model.name, chosen.settings.variant)
    queries = tuple(Query(text, listed) for text in asked)
    request = CompareRequest(path, cells, chosen, queries, max_new_tokens)
    result = run_comparison(request)
    for row in result.rows:
        if row["status"] == "failed":
            print_warning(f"failed: {row['message']}")
    print_notes([*result.notes, *_row_notes(result)], quiet)
    if json:
        print_json("freres.compare/1", _describe(result, request))
        return
    _print_costs(result, request)
    for place, query in enumerate(queries):
        _print_answers(result.rows, place, query.question)


def _row_notes(result: CompareResult) -> list[str]:
    return [f"{' '.join(name_row(row))}: {note}" for row in result.rows for note in row["notes"]]


def _describe(result: CompareResult, request: CompareRequest) -> dict[str, Any]:
    from freres_cli.bench.report import describe_environment

    return {
        "video": str(request.video),
        "num_frames": result.num_frames,
        "full_tokens": result.full_tokens,
        "decode_s": result.decode_s,
        "encode_s": result.encode_s,
        "questions": [query.question for query in request.queries],
        "rows": result.rows,
        "model": result.model,
        "settings": {key: s for key, s in request.options.settings.record().items() if key != "budget_tokens"},
        "notes": list(result.notes),
        "environment": describe_environment(request.options.model.device, result.dtype),
    }


def _print_costs(result: CompareResult, request: CompareRequest) -> None:
    is_asked = bool(request.queries)
    print_table(
        (
            *("method", "budget", "tokens", *(("context",) * is_asked)),
            *("hold", "linear", "compress", *(("prefill", "TTFT") * is_asked)),
        ),
        [
            (
                *name_row(row),
                *[
                    "-" if row[key] is None else str(row[key])
                    for key in ("visual_tokens", "context_tokens")[: 1 + is_asked]
                ],
                *[format_share(row[f"kept_{reader}"]) for reader in ("hold", "linear")],
                *[format_seconds(row[f"{stage}_s"]) for stage in ("compress", "prefill", "ttft")[: 1 + 2 * is_asked]],
            )
            for row in result.rows
        ],
    )
    from freres_cli.workflows.eval_run import reads_other_frames

    print_result("")
    scope = "for the frames of all methods" if reads_other_frames(result.rows) else "once for all methods"
    print_result(
        f"{count_of(result.full_tokens, 'full token')} of {count_of(result.num_frames, 'frame')}; decode "
        f"{format_seconds(result.decode_s)}, encode {format_seconds(result.encode_s)}, {scope}"
    )
    print_result("hold and linear: energy kept of the clip's latents, by reader")


def _print_answers(rows: list[dict[str, Any]], place: int, question: str) -> None:
    """Print what each method's tokens led to: the answer, and how likely the chosen option was."""
    print_result("")
    print_line(" ".join(question.split()))
    answered = [(row, row["answers"][place]) for row in rows if row["answers"]]
    has_choices = any(answer["choices"] for _, answer in answered)
    print_table(
        ("method", "budget", *(("probability",) * has_choices), "answer"),
        [
            (
                *name_row(row),
                *((format_share((answer["choices"] or {}).get(answer["answer"])),) * has_choices),
                " ".join(answer["answer"].split()) + (" ..." if answer["finish_reason"] == "length" else ""),
            )
            for row, answer in answered
        ],
    )
