"""``freres profile``: what a clip costs, compressed and in full."""

from __future__ import annotations

import os
import tempfile
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.compress import gather_flags, make_options
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
)
from freres_cli.errors import UsageError, VideoError, explain_no_file
from freres_cli.presets import BUNDLED

if TYPE_CHECKING:
    from freres_cli.workflows.profile import ProfileRequest


def profile(
    target: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE|VIDEO", help="What to profile; by default, a generated 4 s clip.")
    ] = None,
    question: Annotated[str, typer.Option("--question", help="The question to ask.")] = "What happens in the video?",
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Measured runs.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before those, not measured.")] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens in the answer.")] = 16,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, max=1e6, metavar="SECONDS", help="Stop a row that takes longer.")
    ] = 1800.0,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG of time by stage, and of peak memory.")
    ] = None,
    force: options.Force = False,
    budget: options.Budget = None,
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
    """Measure time and memory, compared with the full-token run.

    Measures decode, encode, compress, load, prefill, time to first token, time per token and peak memory. Each row runs
    in its own process; a row that runs out of memory says so. TTFT is the time from the question's submission to the
    first token, with bundle and model loaded and the video not yet prefilled. A bundle does not hold the video, so its
    full-token row uses the same number of random latents.
    """
    from freres_cli.bench.report import describe_environment
    from freres_cli.evaluation.profile_plot import draw_profile
    from freres_cli.pipeline.models import find_device, find_dtype
    from freres_cli.pipeline.session import AskRequest
    from freres_cli.workflows.profile import ProfileRequest
    from freres_cli.workflows.profile import profile as run_profile
    from freres_cli.world.clip import make_clip

    picture = options.check_plot(plot, force)
    chosen = find_device(device, attn)
    if target is not None and not os.path.isfile(target):  # noqa: PTH113 (false for names too long, too)
        raise VideoError(explain_no_file(target), "name a video or a bundle")
    with tempfile.TemporaryDirectory() if target is None else nullcontext() as folder:
        subject = make_clip(Path(folder) / "clip.mp4") if folder else target
        assert subject is not None
        compress = video = bundle = None
        if zipfile.is_zipfile(subject):
            if budget is not None or preset is not None or assignments:
                raise UsageError(
                    "--budget, --preset, --set: a bundle is already compressed", "repack it, or name a video"
                )
            bundle = AskRequest(subject, chosen, model, revision, find_dtype(dtype))
        else:
            flags = gather_flags(assignments, {"budget_tokens": budget})
            compress = make_options(flags, preset, model, revision, device=device, dtype=dtype, attn=attn)
            compress.check_settings()
            video = subject
        request = ProfileRequest(
            chosen, question, repeat, warmup, max_new_tokens, timeout, video=video, options=compress, bundle=bundle
        )
        print_notes(
            [chosen.note, chosen.attention_note, f"{repeat} runs per row after {warmup} warm-up; please wait"],
            quiet or json,
        )
        rows = run_profile(request)
    if picture is not None:
        picture.write(draw_profile(rows))
    name = "made clip, 4 s" if target is None else str(target)
    if json:
        facts = {"target": name, "question": question, "repeat": repeat, "warmup": warmup}
        facts |= {"model": model or BUNDLED if bundle is None else None}
        facts |= {"plot": None if picture is None else str(picture.path)}
        print_json("freres.profile/1", {**facts, "rows": rows, "environment": describe_environment(chosen)})
        return
    _print_rows(rows, request)
    if picture is not None:
        print_line(f"plot: {picture.path}")


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
    print_result(f"medians of {request.repeat} runs; --json has the spread")
