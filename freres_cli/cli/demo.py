"""``freres demo``: the main job on a clip made on the spot."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.compress import make_options
from freres_cli.cli.output import format_bytes, format_seconds, print_json, print_notes, print_result, print_table
from freres_cli.errors import UsageError
from freres_cli.files import make_folder

DEMO_BUDGETS = (1152, 576, 288)  # the first is every token of the bundled model: what it answers by itself


def demo(
    folder: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help="Keep the clip and the bundles here.")
    ] = None,
    model: options.Model = None,
    device: options.DeviceName = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the whole job on a generated clip.

    Makes an H.264 clip of the bundled model's world, compresses it at two budgets, asks three questions about it, and
    profiles it. A third budget is for comparison: with the bundled model it keeps every token. Answers are printed next to
    the correct ones. One question is about an object that is on screen for only one to three frames.
    """
    kept = None if folder is None else options.check_path(folder, "-o")
    if kept is not None:
        make_folder(kept)
        names = ("clip.mp4", *[f"bundle-{budget}.pt" for budget in DEMO_BUDGETS])
        taken = [name for name in names if (kept / name).exists()]
        if taken:
            raise UsageError(f"{kept}: already holds {', '.join(taken)}", "name an empty folder")
    with tempfile.TemporaryDirectory() if kept is None else nullcontext(str(kept)) as place:
        document = _run(Path(place), model, device, quiet or json)
    if json:
        print_json("freres.demo/1", document)
        return
    _print(document)


def _run(place: Path, model: str | None, device: str | None, quiet: bool) -> dict[str, Any]:
    from freres_cli.bench.report import describe_environment
    from freres_cli.pipeline.compressor import Compressor
    from freres_cli.pipeline.models import Models
    from freres_cli.pipeline.session import AskRequest, open_session
    from freres_cli.workflows.compress import compress_file
    from freres_cli.workflows.profile import ProfileRequest
    from freres_cli.workflows.profile import profile as run_profile
    from freres_cli.world.make import make_demo_clip

    clip = place / "clip.mp4"
    questions = make_demo_clip(clip).questions
    bundles, answers = [], []
    models: Models | None = None
    for budget in DEMO_BUDGETS:
        chosen = make_options({"budget_tokens": budget}, None, model, device=device)
        models = models or Models(chosen.model)
        result = compress_file(Compressor.from_options(chosen, models), clip, place / f"bundle-{budget}.pt")
        bundles.append({"bundle": str(result.bundle), **result.manifest["tokens"], "timings_s": result.timings_s})
        bundles[-1]["peak_memory_bytes"] = result.peak_memory_bytes
        session = open_session(AskRequest(result.bundle, chosen.model.device, model), models)
        for item in questions:
            answer = session.ask(item.question, choices=item.choices)
            assert answer.choices is not None
            answers.append(
                {
                    "question": item.question,
                    "is_transient": item.category == "Transient",
                    "visual_tokens": answer.num_visual_tokens,
                    "answer": answer.text,
                    "probability": answer.choices[answer.text],
                    "truth": item.answer,
                    "ttft_s": answer.ttft_s,
                }
            )
    print_notes([f"profiling: one process per row, on {chosen.model.device.description}"], quiet)
    question = questions[0].question
    rows = run_profile(ProfileRequest(chosen.model.device, question, 1, 1, 8, 600.0, clip, chosen))
    facts = {"clip": str(clip), "bundles": bundles, "answers": answers, "profile": rows}
    return {**facts, "environment": describe_environment(chosen.model.device)}


def _print(document: dict[str, Any]) -> None:
    print_table(
        ("budget", "visual tokens", "full tokens", "compression", "time", "peak memory"),
        [
            (
                str(b["budget_tokens"]),
                str(b["visual_tokens"]),
                str(b["full_tokens"]),
                f"{b['compression']:.1f}x",
                format_seconds(b["timings_s"]["total"]),
                format_bytes(b["peak_memory_bytes"]),
            )
            for b in document["bundles"]
        ],
    )
    print_result("")
    print_table(
        ("tokens", "question", "answer", "truth", "TTFT"),
        [
            (
                str(a["visual_tokens"]),
                a["question"],
                f"{a['answer']} ({a['probability']:.0%})",
                a["truth"],
                format_seconds(a["ttft_s"]),
            )
            for a in document["answers"]
        ],
    )
    print_result("")
    print_table(
        ("run", "visual tokens", "TTFT", "peak memory"),
        [
            (
                row["method"] if row["status"] == "ok" else f"{row['method']} ({row['status']})",
                str(row["visual_tokens"] or "-"),
                format_seconds(row["ttft_s"]),
                format_bytes(row["peak_memory_bytes"]),
            )
            for row in document["profile"]
        ],
    )
