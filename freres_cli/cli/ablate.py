"""``freres ablate``: the paper's ablations on any questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from freres_cli.baselines.registry import FRE_RES
from freres_cli.cli import options
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.cli.eval import describe_result, print_failures, run_notes
from freres_cli.cli.eval_tables import print_rows, print_totals
from freres_cli.cli.given import gather_flags
from freres_cli.cli.output import print_json, print_line, print_notes, print_warning, progress_bar
from freres_cli.errors import UsageError
from freres_cli.evaluation.readers.registry import read_any_questions
from freres_cli.files import make_folder

REMEDY = "remove it, or name another folder with -o"


def ablate(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="QUESTIONS", readable=False, help="JSON lines, or the folder of a benchmark, as for freres eval."
        ),
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for adapters and answers; reused by later runs."),
    ],
    data: Annotated[
        Path | None,
        typer.Option("--train", metavar="DATA", readable=False, help="Training data, as for freres train."),
    ] = None,
    tables: Annotated[
        str, typer.Option("--tables", metavar="NAME,...", help="Any of components, coefficients, frames, anchors.")
    ] = "components,coefficients,frames,anchors",
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="SIZE,...", help="Shares of the full tokens, or counts.")
    ] = "0.25",
    train_budgets: Annotated[
        str, typer.Option("--train-budgets", metavar="SIZE,...", help="Budgets to train the adapters for.")
    ] = "0.5,0.25,0.1",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps of each adapter.")] = 500,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed for training.")] = 0,
    benchmark: options.Benchmark = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG of the accuracy of every setting.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the picture of --plot.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Stop after this many questions.")] = None,
    preset: options.PresetName = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what each part of Fre-Res contributes, at equal tokens.

    Every row has the same budget, and every trained row the same data, steps and seed. Tables: components (anchors
    only, temporal only, concatenation, inverse DCT, absorber: the paper's Tables 4 and 6; and the two parts of our
    absorber: attention with I-token queries, and the sparse inverse DCT), coefficients kept per trajectory, frames read
    (4 or 2 a second) and anchors (Table 5).

    QUESTIONS is as for freres eval: a file, or a benchmark with its own scoring.

    A stopped run resumes when you start it again: finished adapters and answers in DIR are reused. Adapters trained on
    different data, with different settings or by a different recipe are refused.
    """
    from freres_cli.evaluation.ablation_plot import draw_ablation
    from freres_cli.evaluation.cells import parse_budgets
    from freres_cli.evaluation.questions import read_questions
    from freres_cli.training.workers import count_processes
    from freres_cli.workflows.ablate import make_cells, parse_tables, train_variants

    if count_processes() > 1:
        raise UsageError(
            "ablate runs in one process", "train with torchrun freres train, and evaluate with freres eval"
        )
    picture = options.check_plot(plot, force)
    names = parse_tables(tables)
    sizes, trained_sizes = parse_budgets(budgets), parse_budgets(train_budgets, "--train-budgets")
    flags = gather_flags(assignments, {})
    if fixed := sorted({"budget_tokens", "variant"} & set(flags)):
        raise UsageError(f"--set {fixed[0]}: the tables set it", "leave it out")
    file = read_any_questions(questions, benchmark, limit)
    known = None if data is None else read_questions(data, is_named=False)
    made = make_options(flags, preset, model, revision, device=device, dtype=dtype)
    chosen = at_budgets(made, "ablate", trains=(FRE_RES,))
    options.refuse_inputs(picture, [*file.inputs(), *(known.inputs("data") if known else ()), *chosen.files])
    from freres_cli.pipeline.models import Models
    from freres_cli.workflows.eval_run import EvalRequest
    from freres_cli.workflows.evaluate import evaluate as run_evaluation
    from freres_cli.workflows.training_loop import Recipe

    make_folder(folder := options.check_path(output, "-o"))
    models = Models(chosen.model)
    adapters: dict[str, Path] = {}
    if known is not None:
        recipe = Recipe(trained_sizes, steps, seed=seed)
        adapters = train_variants(
            known, chosen, recipe, names, folder, lambda line: print_notes([line], quiet or json), print_warning, models
        )
    else:
        print_notes(["nothing is trained without --train"], quiet)
    cells = make_cells(names, sizes, adapters)
    request = EvalRequest(file, cells, chosen, folder / "answers.jsonl", remedy=REMEDY)
    with progress_bar("ablate", quiet or json, "videos") as progress:
        result = run_evaluation(request, progress, models)
    if picture is not None:
        picture.write(draw_ablation(result.summary["rows"]))
    print_failures(result)
    print_notes([*result.notes, *run_notes(result, request)], quiet)
    drawn = None if picture is None else str(picture.path)
    if json:
        print_json("freres.ablate/1", {**describe_result(result, request), "tables": list(names), "plot": drawn})
    else:
        _print_tables(result.summary, drawn)


def _print_tables(summary: dict[str, Any], drawn: str | None) -> None:
    print_rows(summary)
    print_totals(summary)
    if drawn is not None:
        print_line(f"plot: {drawn}")
