"""``freres compress``: video -> bundle, one or many."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.given import Given, gather_flags
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    format_share,
    print_json,
    print_json_line,
    print_notes,
    print_path,
    print_result,
    progress_bar,
)
from freres_cli.cli.video_rows import VideoRows, count_statuses
from freres_cli.devices import AS_COMPUTED, Storage, use_one_heap
from freres_cli.errors import UsageError, count_of
from freres_cli.files import made_folder
from freres_cli.imports import quick_imports
from freres_cli.pipeline.choices import check_revision, choose_method, choose_preset, find_bundle_method
from freres_cli.presets import BUNDLED, load_settings

if TYPE_CHECKING:
    from freres_cli.evaluation.cells import Cell
    from freres_cli.pipeline.compressor import Compressor, Progress
    from freres_cli.pipeline.planning import CompressOptions, CompressPlan
    from freres_cli.workflows.compress import CompressResult, Row

BUNDLE, BUNDLES = Path("bundle.pt"), Path("bundles")
PIPE = "-"


def compress(
    videos: Annotated[
        list[str],
        typer.Argument(metavar="VIDEO", help="Video files, folders of videos, .txt lists of paths, or - (a pipe)."),
    ],
    budget: options.Budget = None,
    quality: options.Quality = None,
    preset: options.PresetName = None,
    model: options.Model = None,
    revision: options.Revision = None,
    method: options.BundleMethod = None,
    variant: options.Variant = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE|DIR", help="The bundle to write; for several videos, a folder."),
    ] = None,
    force: options.Force = False,
    fps: options.Fps = None,
    frames: options.Frames = None,
    grid: options.Grid = None,
    residual_grid: options.ResidualGrid = None,
    assignments: options.Assignments = None,
    start: options.Start = None,
    end: options.End = None,
    strict: options.Strict = False,
    decode: options.Decode = "cpu",
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    deepstack: options.DeepStack = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the token allocation; encode nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress a video into a bundle, or many into a folder of bundles.

    Decodes the video, encodes its frames with the model's frozen vision tower, and writes at most --budget visual tokens.
    Method adaptive, the default, cuts each cell's time line where it changes, and keeps the mean of each stretch; it also
    takes --quality in place of --budget. Method fre-res, the paper's, keeps sparse full-detail anchor frames and a few
    temporal DCT coefficients of the rest. The other choices of --method are baselines: see freres methods. The video is
    not needed again. Prints the bundle's path.

    The name - stands for a video on standard input, which is saved beside the bundle until it is compressed. If a file
    is still being written, what it held at the start is used, and a note says so. Work that takes more than five
    minutes keeps its state in a hidden file beside the bundle: the same command goes on from there if it was killed
    (not with the methods that need the whole clip at once), and the bundle is the same.

    With --decode gpu, an NVIDIA GPU decodes (NVDEC; the GPU of --device, else the first): H.264, HEVC, VP8 and VP9, as far
    as it takes them. The frames are the same; they are copied to the host and resized there. A video with film grain, which
    only the CPU adds, is read again on the CPU. A note says if the GPU did not take a video. Damage inside a picture is not
    always noticed, so it does not go with --strict. Where no GPU can decode, it is an error.

    For several videos, a folder (searched recursively; links to folders are not followed) or a .txt list (one path per
    line, relative to the list), the model is loaded only once. Bundles are named after their videos: talk.mp4 gives
    talk.pt, but where there is a talk.mkv as well, they are talk.mp4.pt and talk.mkv.pt. An existing bundle is skipped if
    it is intact and was made from the same video with the same model and settings, so a stopped run resumes when you start
    it again; --force replaces those that differ. A video that cannot be used is reported, and the others are still
    compressed; the exit status is then that of the first failure.
    """
    from freres_cli.video.listing import is_many, list_videos

    paths = [options.check_path(video, "VIDEO") for video in videos]
    place = None if output is None else options.check_path(output, "-o")
    named = {"budget_tokens": budget, "variant": variant, "sample_fps": fps, "sample_count": frames, "grid": grid}
    named |= {"deepstack": deepstack, "quality": quality, "residual_grid": residual_grid}
    is_pipe = PIPE in videos
    if is_pipe:
        _check_pipe(videos, output, dry_run)
    use_one_heap()
    many = is_many(paths) or (output is not None and options.is_folder(output))
    flags = gather_flags(assignments, named)
    print_notes([options.LOADING], quiet)
    # Shown before torch is imported, which takes seconds.
    unit = "videos" if many else "frames"
    with progress_bar("compress", quiet or json or dry_run, unit, "loading model") as progress:
        with quick_imports():
            chosen = make_options(
                flags, preset, model, revision, method, start, end, strict, device, dtype, attn, decode=decode
            )
            chosen.check_settings()
            from freres_cli.pipeline.compressor import Compressor
        compressor = Compressor.from_options(chosen)
        if many and not dry_run:
            listing = list_videos(paths)
            print_notes(listing.notes, quiet)
            _compress_many(compressor, listing.videos, place or BUNDLES, force, json, quiet, progress)
            return
        if not dry_run:
            video = None if is_pipe else paths[0]
            result = _compress_one(compressor, video, place or BUNDLE, force, quiet, progress)
    if dry_run:
        if is_many(paths):
            raise UsageError("--dry-run: expected one video file", "name one of them")
        from freres_cli.pipeline.notes import describe_repeats
        from freres_cli.pipeline.prompt_text import bound_text, describe_context

        plan = compressor.plan(paths[0])
        text = bound_text(plan, compressor.models, chosen.method)
        counted = text["context_tokens"]
        full = () if counted is None else describe_context(counted, compressor.models.prompt_counter, is_bound=True)
        print_notes([*describe_repeats(plan), *full], quiet)
        _print_plan(plan, {**plan_document(plan, chosen), **text}, chosen, json)
        return
    _print_one(result, chosen, json, quiet)


def _check_pipe(videos: list[str], output: str | None, dry_run: bool) -> None:
    """Refuse what cannot be done with a video on standard input. Raises ``UsageError``."""
    if len(videos) > 1:
        raise UsageError("-: standard input is one video: expected no other beside it", "compress the others apart")
    if dry_run:
        raise UsageError("--dry-run: expected a video file, got standard input", "save it to a file first")
    if output is not None and options.is_folder(output):
        raise UsageError(
            f"-o {output}: is a folder: standard input has no name for a bundle in it", "name a file with -o"
        )


def _compress_one(
    compressor: Compressor, video: Path | None, output: Path, force: bool, quiet: bool, progress: Progress | None
) -> CompressResult:
    """Compress one video; ``None`` for the one on standard input."""
    from freres_cli.workflows.compress import compress_file, compress_stream

    def tell(note: str) -> None:
        print_notes([note], quiet)

    if video is not None:
        return compress_file(compressor, video, output, force=force, progress=progress, tell=tell)
    if sys.stdin is None:
        raise UsageError("-: standard input is closed: expected a video", "pipe one in: freres compress - < VIDEO")
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.isatty():
        raise UsageError("-: standard input is a terminal: expected a video", "pipe one in: freres compress - < VIDEO")
    tell("standard input is saved beside the bundle first: a video is read more than once")
    return compress_stream(compressor, stream, output, force=force, progress=progress, tell=tell)


def _print_one(result: CompressResult, chosen: CompressOptions, json: bool, quiet: bool) -> None:
    print_notes(result.notes, quiet)
    if json:
        print_json("freres.compress/1", _document(result, chosen))
        return
    print_notes([_summary(result)], quiet)
    print_path(result.bundle)


def _compress_many(
    compressor: Compressor,
    videos: Sequence[tuple[Path, Path]],
    folder: Path,
    force: bool,
    json: bool,
    quiet: bool,
    progress: Progress | None,
) -> None:
    """Print a line for each video. Raises the first failure after the last video."""
    from freres_cli.workflows.compress import compress_many

    def print_line(row: Row) -> None:
        print_json_line("freres.compress_many/1", _row_document(row, compressor.options))

    shown = VideoRows(print_line if json else None, quiet)

    def on_row(row: Row) -> None:
        said = _summary(row.result) if row.result is not None else f"skipped, {row.bundle} already exists"
        notes = () if row.result is None else row.result.notes
        shown.show(row, said, notes)

    with made_folder(folder):
        rows = compress_many(
            compressor,
            videos,
            folder,
            force=force,
            on_row=on_row,
            progress=progress,
            tell=lambda note: print_notes([note], quiet),
        )
    shown.finish(rows)
    counts = count_statuses(rows)
    if not json:
        print_notes([f"{counts['done']} compressed, {counts['skipped']} skipped"], quiet)


def make_options(
    flags: Mapping[str, Any],
    preset: str | None,
    model: str | None,
    revision: str | None = None,
    method: str | None = None,
    start: float | None = None,
    end: float | None = None,
    strict: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attn: str | None = None,
    storage: Storage = AS_COMPUTED,
    decode: str = "cpu",
) -> CompressOptions:
    """Turn flags into options.

    ``flags``: settings that were given, with their names if it is a ``Given``. ``preset``, ``model``, ``revision``,
    ``method``, ``start``, ``end``, ``strict``, ``device``, ``dtype``, ``attn``: the flags with these names. ``storage``: of
    the language half, from ``devices.choose_storage``. ``decode``: the flag. Raises ``UsageError`` or ``PresetError``.
    """
    chosen = model or BUNDLED
    names = flags.names if isinstance(flags, Given) else {}
    if method is not None:
        find_bundle_method(method, names.get("method", "--method"))
    check_revision(chosen, revision)
    settings = load_settings(preset or choose_preset(chosen), flags, names=names)
    if method is not None:
        settings = settings.with_values("flag", method=method)
    used = choose_method(settings)
    from freres_cli.pipeline.models import make_source
    from freres_cli.pipeline.planning import CompressOptions
    from freres_cli.video.sampling import check_window

    check_window(start, end, (names.get("start_s", "--start"), names.get("end_s", "--end")))
    source = make_source(chosen, device, dtype, revision, attn, storage)
    return CompressOptions(source, settings, used, start, end, strict, decode)


def at_budgets(
    chosen: CompressOptions, verb: str, cells: Sequence[Cell] = (), *, trains: tuple[str, ...] = ()
) -> CompressOptions:
    """Return the options of a verb that names its budgets itself.

    ``chosen``: the options. ``verb``: its name. ``cells``: what it compares, if it does. ``trains``: the methods that it
    trains adapters of; the first is trained unless another is named. Raises ``UsageError`` if the settings name a quality,
    a method that is not among these, or where ``verb`` compares methods any, or a setting of Fre-Res that changes nothing.
    """
    from freres_cli.pipeline.planning import refuse_lost_settings

    settings = chosen.settings
    if settings.quality is not None:
        raise UsageError(f"{settings.name_of('quality')}: {verb} works at budgets: expected no quality", "leave it out")
    if not trains:
        if settings.is_named("method"):
            raise UsageError(f"{settings.name_of('method')}: {verb} takes its methods from --methods", "name it there")
        methods = dict.fromkeys(cell.method for cell in cells)
        refuse_lost_settings(settings, methods, "add it to --methods, or leave the setting out")
        return chosen
    if not settings.is_named("method"):
        return replace(chosen, method=trains[0])
    if chosen.method not in trains:
        able = " or ".join(trains)
        raise UsageError(
            f"{settings.name_of('method')}: {verb} trains adapters of {able}, got {chosen.method}", "leave it out"
        )
    refuse_lost_settings(settings, (chosen.method,), "leave one of the two out")
    return chosen


def _summary(result: CompressResult) -> str:
    tokens = result.manifest["tokens"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in tokens["tokens_by_kind"].items())
    context = "" if tokens["context_tokens"] is None else f"{count_of(tokens['context_tokens'], 'token')} in context; "
    groups = "" if tokens["num_gops"] is None else f"{count_of(tokens['num_gops'], 'GoP')}; "
    quality = "" if tokens["quality"] is None else f"{format_share(tokens['quality'])} of the energy; "
    return (
        f"{count_of(tokens['visual_tokens'], 'visual token')} ({kinds}) of {tokens['full_tokens']}, "
        f"{tokens['compression']:.2f}x; {quality}{context}{groups}{format_bytes(result.bundle_bytes)}; "
        f"{format_seconds(result.timings_s['total'])}, peak {format_bytes(result.peak_memory_bytes)}"
    )


def _document(result: CompressResult, chosen: CompressOptions) -> dict[str, Any]:
    from freres_cli.bench.report import describe_environment

    return {
        "bundle": str(result.bundle),
        "bundle_bytes": result.bundle_bytes,
        **result.manifest["tokens"],
        "grid": result.manifest["geometry"]["grid"],
        "timings_s": result.timings_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "model": result.manifest["model"],
        "source": result.manifest["source"],
        "sampling": result.manifest["sampling"],
        "settings": result.manifest["settings"],
        "resumed_frames": result.resumed_frames,
        "notes": list(result.notes),
        "environment": describe_environment(chosen.model.device, result.dtype),
    }


def _row_document(row: Row, chosen: CompressOptions) -> dict[str, Any]:
    facts = {"video": str(row.video), "status": row.status, "bundle": str(row.bundle)}
    if row.error is not None:
        return {**facts, "message": row.error.message, "exit_status": int(row.error.exit_status)}
    if row.result is None:
        return {**facts, **row.manifest["tokens"]}
    return {**facts, **_document(row.result, chosen)}


def _print_plan(plan: CompressPlan, facts: dict[str, Any], chosen: CompressOptions, json: bool) -> None:
    if json:
        from freres_cli.bench.report import describe_environment

        print_json("freres.plan/1", {**facts, "environment": describe_environment(chosen.model.device)})
        return
    print_result(f"frames read      {plan.num_frames} of {plan.size.grid_h}x{plan.size.grid_w} tokens")
    print_result(f"full tokens      {plan.full_tokens} ({count_of(plan.baseline_frames, 'frame')})")
    if plan.quality is None:
        print_result(f"visual tokens    {facts['visual_tokens']} of at most {facts['budget_tokens']}")
    else:
        print_result(
            f"visual tokens    at most {facts['budget_tokens']}, as few as keep {plan.quality:g} of the "
            "energy: known only once the frames are encoded"
        )
    if facts["context_tokens"] is not None:
        print_result(
            f"context tokens   at most {facts['context_tokens']}, {facts['text_overhead_tokens']} of them text in the video"
        )
    if plan.budget is None:
        return
    for kind, count in facts["tokens_by_kind"].items():
        print_result(f"  {kind:<14} {count}")
    budget = plan.budget
    more = f", up to {budget.max_events} more at cuts, and some without an anchor at further cuts"
    print_result(f"GoPs             {budget.num_anchors}{more if budget.max_events else ''}")
    print_result(f"coefficients     {budget.num_coefficients} in {budget.pooled_grid[0]}x{budget.pooled_grid[1]} cells")


def plan_document(plan: CompressPlan, chosen: CompressOptions) -> dict[str, Any]:
    """Return the JSON keys of a plan: frames, tokens and their allocation, and the settings."""
    budget = plan.budget
    most = plan.most_tokens
    visual = None if plan.quality is not None else most if budget is None else budget.expected.total
    return {
        "method": chosen.method,
        "quality": plan.quality,
        "visual_tokens": visual,
        "budget_tokens": plan.budget_tokens if chosen.has_budget and plan.quality is None else most,
        "full_tokens": plan.full_tokens,
        "compression": None if visual is None else plan.full_tokens / visual,
        "tokens_by_kind": None if budget is None else vars(budget.expected),
        "frames": plan.num_frames,
        "baseline_frames": plan.baseline_frames,
        "grid": [plan.num_frames, plan.size.grid_h, plan.size.grid_w],
        "num_gops": None if budget is None else budget.num_anchors,
        "num_coefficients": None if budget is None else budget.num_coefficients,
        "pooled_grid": None if budget is None else list(budget.pooled_grid),
        "max_events": None if budget is None else budget.max_events,
        "is_lossless": plan.is_lossless,
        "settings": chosen.recorded_settings.record(),
    }
