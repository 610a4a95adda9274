"""``freres profile``: what a clip costs, compressed and in full."""

from __future__ import annotations

import os
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.compress import make_options
from freres_cli.cli.given import gather_flags
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
)
from freres_cli.cli.profile_table import find_table, print_cost_table, require_figures, weights_of
from freres_cli.cli.questions import check_question
from freres_cli.devices import choose_storage
from freres_cli.errors import UsageError, VideoError, count_of, explain_no_file
from freres_cli.evaluation.plots import PLOT_FLAG, PlotFile
from freres_cli.presets import BUNDLED

if TYPE_CHECKING:
    from freres_cli.workflows.profile import ProfileRequest


def profile(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE|VIDEO", readable=False, help="What to profile; by default, a generated 4 s clip."
        ),
    ] = None,
    question: Annotated[str, typer.Option("--question", help="The question to ask.")] = "What happens in the video?",
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Measured runs.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before those, not measured.")] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens in the answer.")] = 16,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=1.0,
            max=1e6,
            metavar="SECONDS",
            help="Stop a row that takes longer.",
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", metavar="NAME", help="Measure the paper's cost table in place of a clip: dense-30fps."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="stored|random",
            help="random: random weights; --model is then a folder with a config, or a name such as Qwen3-VL-8B. No network.",
        ),
    ] = "stored",
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG of time by stage, and of peak memory.")
    ] = None,
    force: options.Force = False,
    budget: options.Budget = None,
    preset: options.PresetName = None,
    method: options.BundleMethod = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    kv_dtype: options.KvDtype = None,
    weight_dtype: options.WeightDtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure time and memory, compared with the full-token run.

    Measures decode, encode, compress, load, prefill, time to first token, time per token and peak memory. Each row runs
    in its own process; a row that runs out of memory says so. TTFT is the time from the question's submission to the
    first token, with bundle and model loaded and the video not yet prefilled. A bundle does not hold the video, so its
    full-token row uses the same number of random latents.

    --table dense-30fps measures the language model alone, with prompts of the paper's Table 3 (a minute at 30 fps): all
    frames, one a second, Fourier, Fre-Res and adaptive. Tokens have the places that each method gives them, and random
    latents. Each row stands beside the paper's figures, and beside the least that it could cost on this device.
    """
    from freres_cli.pipeline.models import find_device, find_dtype, make_source
    from freres_cli.pipeline.session import AskRequest
    from freres_cli.workflows.profile import ProfileRequest
    from freres_cli.workflows.profile import profile as run_profile
    from freres_cli.workflows.profile_table import TableRequest
    from freres_cli.world.clip import make_clip

    if table is not None:
        others: dict[str, Any] = {"BUNDLE|VIDEO": target, "--budget": budget, "--preset": preset, "--method": method}
        others |= {"--set": assignments, PLOT_FLAG: plot}
        _refuse_with_table([name for name, value in others.items() if value])
    picture, storage = options.check_plot(plot, force), choose_storage(kv_dtype, weight_dtype)
    chosen = find_device(device, attn)
    if target is not None and not os.path.isfile(target):  # noqa: PTH113 (false for names too long, too)
        raise VideoError(explain_no_file(target), "name a video or a bundle")
    asked, is_random = (chosen, check_question(question), repeat, warmup, max_new_tokens), weights == "random"
    with ExitStack() as stack:
        place, about = stack.enter_context(weights_of(model, weights))
        told = [*about, chosen.note, chosen.attention_note, *storage.notes]
        waiting = [*told, f"{count_of(repeat, 'run')} per row after {warmup} warm-up; please wait"]
        if table is not None:
            source = make_source(place or BUNDLED, chosen, dtype, revision, storage=storage)
            source = replace(source, is_random=is_random)
            costs = TableRequest(*asked, timeout or 110.0, model=source, table=find_table(table))
            print_notes(waiting, quiet or json)
            print_cost_table(costs, {"model": model or BUNDLED, "weights": weights, "notes": told}, json=json)
            return
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if target is None else None
        subject = target if folder is None else make_clip(Path(folder) / "clip.mp4")
        assert subject is not None
        compress = video = bundle = None
        if zipfile.is_zipfile(subject):
            if any(given is not None for given in (budget, preset, method)) or assignments or is_random:
                flags = "--budget, --preset, --method, --set, --weights"
                raise UsageError(f"{flags}: a bundle is already compressed", "repack it, or name a video")
            bundle = AskRequest(subject, chosen, model, revision, find_dtype(dtype), storage=storage)
        else:
            named = gather_flags(assignments, {"budget_tokens": budget})
            compress = make_options(named, preset, place, revision, method, device=device, dtype=dtype, attn=attn)
            compress = replace(compress, model=replace(compress.model, is_random=is_random, storage=storage))
            compress.check_settings()
            video = subject
        request = ProfileRequest(*asked, timeout or 1800.0, video=video, options=compress, bundle=bundle)
        options.refuse_inputs(picture, request.inputs)
        print_notes(waiting, quiet or json)
        rows = run_profile(request)
    told += _note_video(rows, subject, quiet)
    facts = {"target": "made clip, 4 s" if target is None else str(target), "weights": weights, "notes": told}
    _show(rows, request, facts | {"model": model or (BUNDLED if bundle is None else None)}, picture, json=json)


def _note_video(rows: list[dict[str, Any]], video: str | Path, quiet: bool) -> list[str]:
    """Print what is odd about the video, and return it."""
    found = [f"{video}: {note}" for note in dict.fromkeys(note for row in rows for note in row["notes"])]
    print_notes(found, quiet)
    return found


def _show(
    rows: list[dict[str, Any]], request: ProfileRequest, facts: dict[str, Any], picture: PlotFile | None, *, json: bool
) -> None:
    """Print the rows, and draw them. Raises ``ResourceError`` if the compressed clip has no figures."""
    from freres_cli.bench.report import describe_environment
    from freres_cli.evaluation.profile_plot import draw_profile

    if picture is not None:
        picture.write(draw_profile(rows))
    if json:
        asked = {"question": request.question, "repeat": request.repeat, "warmup": request.warmup}
        facts = {**facts, **asked, "plot": None if picture is None else str(picture.path)}
        print_json("freres.profile/1", {**facts, "rows": rows, "environment": describe_environment(request.device)})
    else:
        _print_rows(rows, request)
        if picture is not None:
            print_line(f"plot: {picture.path}")
    require_figures(rows[:1])  # that the full-token run does not fit is a finding


def _refuse_with_table(others: list[str]) -> None:
    if others:
        raise UsageError(f"--table: expected no {others[0]} with it", "the table has its own clip, methods and budgets")


def _print_rows(rows: list[dict[str, Any]], request: ProfileRequest) -> None:
    columns = ("method", "visual", "context", "decode", "encode", "compress", "load", "prefill", "TTFT", "next TTFT")
    print_table(
        (*columns, "TPOT", "peak memory"),
        [
            (
                row["method"] if row["status"] == "ok" else f"{row['method']} ({row['status']})",
                *["-" if row[key] is None else str(row[key]) for key in ("visual_tokens", "context_tokens")],
                *[
                    format_seconds(row[f"{stage}_s"])
                    for stage in ("decode", "encode", "compress", "load", "prefill", "ttft", "next_ttft", "tpot")
                ],
                format_bytes(row["peak_memory_bytes"]),
            )
            for row in rows
        ],
    )
    for row in rows:
        if row["message"]:
            print_line(f"{row['method']}: {row['message']}")
    print_result(f"medians of {count_of(request.repeat, 'run')}; --json has the spread")
