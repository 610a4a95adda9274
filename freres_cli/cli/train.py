"""``freres train``: questions with answers -> adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from freres_cli.baselines.registry import ADAPTIVE, FRE_RES
from freres_cli.cli import options
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.cli.given import gather_flags
from freres_cli.cli.output import print_json, print_notes, print_result, print_warning, progress_bar
from freres_cli.errors import UsageError
from freres_cli.files import check_destination
from freres_cli.presets import environment_value


def train(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", readable=False, help="JSON lines: video, question, choices, answer.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", readable=False, help="The adapter to write.")
    ] = Path("adapter.safetensors"),
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets", metavar="SIZE,...", help="Budgets to train for: shares of the full tokens, or counts."
        ),
    ] = "0.5,0.25,0.1",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Maximum training steps.")] = 500,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Videos per step.")] = 8,
    questions: Annotated[
        int, typer.Option("--questions", min=1, help="Maximum questions about each video per step.")
    ] = 4,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=0.0, max=1.0, help="Peak learning rate.")
    ] = 1e-3,
    rank: Annotated[int | None, typer.Option("--rank", min=1, max=4096, help="Width of the bottlenecks.")] = None,
    validation: Annotated[
        float, typer.Option("--validation", metavar="SHARE", help="Share of the videos held out to choose the weights.")
    ] = 0.1,
    validate_every: Annotated[
        int, typer.Option("--validate-every", min=1, metavar="STEPS", help="Steps between validations.")
    ] = 50,
    patience: Annotated[
        int, typer.Option("--patience", min=1, help="Stop after this many validations without improvement.")
    ] = 5,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed for weights, order and held-out videos.")
    ] = 0,
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="DIR", help="Folder of compressed videos; later runs reuse it.")
    ] = None,
    preset: options.PresetName = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a Fre-Res adapter for a frozen model, to use with freres ask --adapter.

    The adapter is for method fre-res, or with --set method=adaptive for that one; it works with no other.

    Each video is compressed once at every budget, into the cache; the vision tower and the language model do not change.
    Training fits the token adapters, the absorber, the type embeddings and the gates to the answers and to the scores
    that the same model gives the options when it sees every token. Each video in a step uses one of the budgets, so one
    adapter serves them all. The weights with the lowest loss on the held-out videos are written.

    DATA holds one JSON object per line with the keys video (relative to that file), question, choices (2 to 26 options;
    none for a free answer) and answer. Other keys are ignored.

    A stopped run resumes from FILE.state when you start it again with the same arguments: on a CPU bit for bit, on a GPU that
    is not tested. For several GPUs, start it with torchrun or accelerate launch.
    """
    from freres_cli.evaluation.cells import parse_budgets
    from freres_cli.evaluation.questions import read_questions
    from freres_cli.training.workers import count_processes, is_first_process

    if not 0 < validation < 1:
        raise UsageError(f"--validation: expected a share between 0 and 1, got {validation}")
    if not math.isfinite(learning_rate):
        raise UsageError(f"--learning-rate: expected a number, got {learning_rate}")
    place = device or environment_value("device") or ""
    if count_processes() > 1 and ":" in place:
        name = f"--device {place}" if device else f"FRERES_DEVICE={place}"
        raise UsageError(f"{name}: every process would use this one", "use --device cuda")
    # The state and the cache next to it are named after it.
    check_destination(output, True)
    flags = gather_flags(assignments, {})
    if "budget_tokens" in flags:
        raise UsageError("--set: budget_tokens: the adapter is trained for the sizes in --budgets", "use --budgets")
    sizes = parse_budgets(budgets)
    file = read_questions(data, is_named=False)
    made = make_options(flags, preset, model, revision, device=device, dtype=dtype)
    chosen = at_budgets(made, "train", trains=(FRE_RES, ADAPTIVE))
    from freres_cli.workflows.train_adapter import TrainRequest, train_adapter
    from freres_cli.workflows.training_loop import Recipe

    recipe = Recipe(sizes, steps, batch, questions, learning_rate, rank, validation, validate_every, patience, seed)
    folder = output.with_name(output.name + ".cache") if cache is None else options.check_path(cache, "--cache")
    request = TrainRequest(file, chosen, recipe, output, folder, force)
    silent = quiet or not is_first_process()
    if chosen.method != made.method:
        note = f"this adapter is for --method {chosen.method}; compress uses {made.method} unless a method is named"
        print_notes([f"{note}: to train for {made.method}, add --set method={made.method}"], silent)
    with progress_bar("cache", silent or json, "videos") as progress:
        done = train_adapter(request, lambda line: print_notes([line], silent or json), progress)
    if not is_first_process():
        return
    from freres_cli.workflows.eval_run import describe_oddities

    print_training_warnings(done)
    print_notes(describe_oddities(done["video_notes"]), quiet)
    share = f"{100 * done['share_of_model']:.2f} % of the model's"
    print_notes([f"{done['num_parameters']} trained parameters, {share}"], quiet)
    if json:
        from freres_cli.bench.report import describe_environment

        print_json("freres.train/1", {**done, "environment": describe_environment(chosen.model.device)})
        return
    print_result(done["adapter"])


def print_training_warnings(done: Mapping[str, Any]) -> None:
    """Warn about data that training left out, and about training that gained nothing."""
    from freres_cli.workflows.train_adapter import describe_left_out

    for line in describe_left_out(done):
        print_warning(line)
    if not done["best_step"]:
        print_warning("no step lowered the loss on the held-out videos: the adapter changes nothing")
