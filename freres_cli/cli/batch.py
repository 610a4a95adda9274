"""``freres batch``: many videos, many workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.compress import make_options
from freres_cli.cli.given import Given, gather_flags
from freres_cli.cli.output import format_bytes, format_seconds, print_json_line, print_notes, progress_bar
from freres_cli.cli.video_rows import VideoRows, count_statuses
from freres_cli.errors import UsageError, count_of
from freres_cli.presets import BUNDLED, environment_value

if TYPE_CHECKING:
    from freres_cli.pipeline.planning import CompressOptions
    from freres_cli.workflows.batch_worker import BatchRow

ROWS_FILE = "rows.jsonl"


def batch(
    lists: Annotated[
        list[str],
        typer.Argument(
            metavar="LIST",
            help="Videos, patterns, folders, .txt lists of paths, .jsonl lists with settings; paths or URLs.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR|URL", help="Folder for the bundles.", show_default=False)
    ],
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="Where the workers run: this machine, or Ray.")
    ] = "local",
    actors: Annotated[
        int | None, typer.Option("--actors", min=1, metavar="N", help="Workers, each with a model of its own.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="A Ray cluster, or auto for the one here.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="FILE|URL", help="Write one JSON line for each video here at the end."),
    ] = None,
    force: options.Force = False,
    budget: options.Budget = None,
    quality: options.Quality = None,
    preset: options.PresetName = None,
    model: options.Model = None,
    revision: options.Revision = None,
    method: options.BundleMethod = None,
    variant: options.Variant = None,
    fps: options.Fps = None,
    frames: options.Frames = None,
    grid: options.Grid = None,
    assignments: options.Assignments = None,
    start: options.Start = None,
    end: options.End = None,
    strict: options.Strict = False,
    decode: options.Decode = "cpu",
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    deepstack: options.DeepStack = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress many videos with several workers, on this machine or on a Ray cluster.

    Each worker is a process that loads the model once and has one video at a time. A video that fails is a failed row. A
    worker that breaks, killed or out of memory, is replaced, and its video is tried once more. The run goes on in both cases,
    and the exit status is then that of the first failed video in the list.

    Run the command again after a stop, of whatever kind: a bundle that is there already, made from the same video with the
    same model and settings, is skipped. One that differs is a failed row, unless --force replaces it.

    A line of a .jsonl list is an object with video, perhaps name (of the bundle), start_s, end_s and strict, and any key of
    freres-preset(5), which counts for that video only. Videos, lists and the output may be on an object store that fsspec can
    open, such as s3://bucket/clips. freres-batch(7) has the rest, with a plan for a million hours.
    """
    from freres_cli.pipeline.models import name_model
    from freres_cli.workflows.batch import RAY, BatchRequest, check_engine, run_batch
    from freres_cli.workflows.batch_list import is_list, list_jobs, with_own
    from freres_cli.workflows.batch_store import as_place, is_among, is_url, join_url
    from freres_cli.workflows.batch_worker import WorkerSetup

    check_engine(engine, address)
    options.check_path(output, "-o")
    # Workers on other machines, or with another working folder, must find the same place.
    place = as_place(output) if engine != RAY or is_url(as_place(output)) else str(Path(as_place(output)).absolute())
    named = {"budget_tokens": budget, "variant": variant, "sample_fps": fps, "sample_count": frames, "grid": grid}
    flags = gather_flags(assignments, {**named, "deepstack": deepstack, "quality": quality})
    # The workers choose their devices; with Ray, those are on other machines.
    here: dict[str, Any] = {"device": "cpu" if engine == RAY else device, "attn": None if engine == RAY else attn}

    def make_own(own: Mapping[str, Any]) -> CompressOptions:
        window = (own.get("start_s", start), own.get("end_s", end), own.get("strict", strict))
        names = {**flags.names, **{key: key for key in own}}
        given = (Given(with_own(flags, own), names), preset, model, revision, own.get("method", method))
        made = make_options(*given, *window, dtype=dtype, decode=decode, **here)
        made.check_settings()
        return made

    rows_place = as_place(rows or join_url(place, ROWS_FILE))
    if is_among(rows_place, filter(is_list, lists)):
        raise UsageError(
            f"{rows_place}: is one of the lists, and would be replaced by the rows", "name another with --rows"
        )
    jobs, notes = list_jobs(lists, make_own)
    print_notes(notes, quiet)
    device, dtype = device or environment_value("device"), dtype or environment_value("dtype")
    setup = WorkerSetup(place, force, name_model(model or BUNDLED), device, dtype, revision, attn)
    request = BatchRequest(jobs, setup, engine, actors, address, rows_place)
    shown = VideoRows(_print_line if json else None, quiet)

    def on_row(row: BatchRow) -> None:
        shown.show(row, "" if row.error is not None else _summarize(row), row.notes)

    with progress_bar("batch", quiet or json, "videos") as progress:
        made = run_batch(request, on_row, progress)
    counts = count_statuses(made)
    if not json:
        parts = f"{counts['done']} compressed, {counts['skipped']} skipped, {counts['failed']} failed"
        print_notes([f"{parts}; rows in {request.rows_file}"], quiet)
    shown.finish(made)


def _print_line(row: BatchRow) -> None:
    print_json_line("freres.batch/1", row.describe())


def _summarize(row: BatchRow) -> str:
    facts = row.facts
    tokens = f"{count_of(facts['visual_tokens'], 'visual token')} of {facts['full_tokens']}"
    size = f"{tokens}; {format_bytes(facts['bundle_bytes'])}"
    if row.status == "skipped":
        return f"skipped, {row.bundle} already exists: {size}"
    again = ", at the second try" if row.tries > 1 else ""
    return f"{size}; {format_seconds(row.total_s)}{again}"
