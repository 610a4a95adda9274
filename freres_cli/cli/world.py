"""``freres world``: clips with known answers, and the model trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from freres_cli.cli import options
from freres_cli.cli.output import print_json, print_notes, print_result, progress_bar
from freres_cli.cli.values import check_values
from freres_cli.errors import UsageError, count_of
from freres_cli.files import make_folder
from freres_cli.presets import BUNDLED

world = typer.Typer(
    help="Clips with known answers, and the model trained on them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@world.command("make")
@check_values
def make(
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new or empty folder.")],
    split: Annotated[str, typer.Option("--split", help="train, validation or test; they share no clips.")] = "test",
    count: Annotated[int, typer.Option("--count", min=1, max=10**6, help="Number of clips.")] = 500,
    seed: Annotated[int, typer.Option("--seed", min=0, max=998, help="Picks another set of the same split.")] = 0,
    level: Annotated[
        int,
        typer.Option(
            "--level",
            min=1,
            max=3,
            help="1: 4 or 5 s, 8 fps. 2: 6 to 60 s, 12 to 30 fps. 3: 4 to 20 s, as footage.",
        ),
    ] = 1,
    questions: Annotated[
        int, typer.Option("--questions-per-clip", min=1, max=11, help="Maximum questions per clip, one per category.")
    ] = 4,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write encoded clips and questions.jsonl, for freres eval or any other tool.

    The same arguments always give the same clips and questions. Each row holds id, video, category, question, four
    choices and the answer.
    """
    from freres_cli.world.make import QUESTIONS_FILE, SPLITS, make_set

    if split not in SPLITS:
        raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, got {split}")
    folder = options.check_path(output, "-o")
    make_folder(folder)
    if any(folder.iterdir()):
        raise UsageError(
            f"{folder}: expected a new or empty folder", "name another with -o, or remove what a stopped run left"
        )

    with progress_bar("clips", quiet or json) as advance:
        made = make_set(folder, split, count, seed, level, questions, advance)
    num_questions = sum(len(clip.questions) for clip in made)
    path = folder / QUESTIONS_FILE
    if json:
        by_category: dict[str, int] = {}
        for question in (question for clip in made for question in clip.questions):
            by_category[question.category] = by_category.get(question.category, 0) + 1
        facts = {"split": split, "seed": seed, "level": level, "num_clips": len(made), "num_questions": num_questions}
        print_json("freres.world_make/1", {"questions": str(path), **facts, "by_category": by_category})
        return
    print_result(str(path))
    print_notes([f"{count_of(len(made), 'clip')}, {count_of(num_questions, 'question')}"], quiet)


@world.command("train")
@check_values
def train(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the model; a stopped run resumes from it.")
    ],
    start: Annotated[
        str | None,
        typer.Option("--start", metavar="DIR|bundled", help="Start from this model's weights, not random ones."),
    ] = None,
    tower_steps: Annotated[
        int, typer.Option("--tower-steps", min=0, help="Training steps for the vision tower.")
    ] = 940,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps for the language half.")] = 2150,
    seed: Annotated[int, typer.Option("--seed", min=0, max=98, help="Seed for the initial weights and the clips.")] = 0,
    device: options.DeviceName = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a bundled model from scratch, to use with --model.

    Takes hours on two CPU cores. A stopped run resumes from its last state, in DIR/training, when you start it again
    with the same arguments.
    """
    if start not in (None, BUNDLED) and not Path(start).is_dir():
        raise UsageError(f"--start: {start}: no such folder", "name the folder of a model, or bundled")
    from freres_cli.training.workers import count_processes

    if (count := count_processes()) > 1:
        raise UsageError(f"world train: runs in one process, got {count}", "start it without torchrun")
    folder = options.check_path(output, "-o")
    make_folder(folder)
    from freres_cli.pipeline.models import find_device
    from freres_cli.workflows.train_world import TrainRequest, train_world
    from freres_cli.world.bundled_model import bundled_model_dir

    place = find_device(device)
    first = bundled_model_dir() if start == BUNDLED else None if start is None else Path(start)
    request = TrainRequest(folder, place, tower_steps, steps, seed, first)
    done = train_world(request, lambda line: print_notes([line], quiet or json))
    if json:
        print_json("freres.world_train/1", done)
    else:
        print_result(done["model"])
