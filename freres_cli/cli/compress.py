"""``freres compress``: video -> bundle, one or many."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.baselines.registry import BUNDLE_METHODS, FRE_RES
from freres_cli.cli import options
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    format_share,
    print_json,
    print_json_line,
    print_notes,
    print_path,
    print_result,
    print_warning,
    progress_bar,
)
from freres_cli.errors import UsageError, count_of
from freres_cli.pipeline.choices import check_revision, choose_method, choose_preset, find_bundle_method
from freres_cli.presets import BUNDLED, load_settings, parse_assignment

if TYPE_CHECKING:
    from freres_cli.pipeline.compressor import Compressor
    from freres_cli.pipeline.planning import CompressOptions, CompressPlan
    from freres_cli.workflows.compress import CompressResult, Row

BUNDLE, BUNDLES = Path("bundle.pt"), Path("bundles")


def compress(
    videos: Annotated[
        list[str], typer.Argument(metavar="VIDEO", help="Video files, folders of videos, or .txt lists of paths.")
    ],
    budget: options.Budget = None,
    quality: options.Quality = None,
    preset: options.PresetName = None,
    model: options.Model = None,
    revision: options.Revision = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help=f"Compression method: {', '.join(BUNDLE_METHODS)}.",
            autocompletion=options.complete_bundle_method,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option("--variant", help="Ablation: absorber, anchors, temporal, concat, idct, iquery or sparse-idct."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE|DIR", help="The bundle to write; for several videos, a folder."),
    ] = None,
    force: options.Force = False,
    fps: Annotated[float | None, typer.Option("--fps", help="Read this many frames per second.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Read this many frames in total.")] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="ROWSxCOLS", help="Token grid of a frame, or auto (keep aspect).")
    ] = None,
    assignments: options.Assignments = None,
    start: Annotated[
        float | None,
        typer.Option("--start", min=0.0, metavar="SECONDS", help="Start this many seconds into the video."),
    ] = None,
    end: Annotated[
        float | None, typer.Option("--end", min=0.0, metavar="SECONDS", help="Stop this many seconds into the video.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a video that is damaged anywhere.")] = False,
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
    Method fre-res keeps sparse full-detail anchor frames and a few temporal DCT coefficients of the rest. Method adaptive
    cuts each cell's time line where it changes, and keeps the mean of each stretch; it also takes --quality in place of
    --budget. The other choices of --method are baselines: see freres methods. The video is not needed again. Prints the
    bundle's path.

    For several videos, a folder (searched recursively) or a .txt list (one path per line, relative to the list), the
    model is loaded only once. Bundles are named after their videos. An existing bundle is skipped if it is intact and was
    made from the same video with the same model and settings, so a stopped run resumes when you start it again; --force
    replaces those that differ. A video that cannot be used is reported, and the others are still compressed; the exit
    status is then that of the first failure.
    """
    from freres_cli.video.listing import is_many, list_videos

    paths = [options.check_path(video, "VIDEO") for video in videos]
    place = None if output is None else options.check_path(output, "-o")
    named = {"budget_tokens": budget, "variant": variant, "sample_fps": fps, "sample_count": frames, "grid": grid}
    named |= {"deepstack": deepstack, "quality": quality}
    chosen = make_options(
        gather_flags(assignments, named), preset, model, revision, method, start, end, strict, device, dtype, attn
    )
    chosen.check_settings()
    from freres_cli.pipeline.compressor import Compressor

    compressor = Compressor.from_options(chosen)
    if dry_run:
        if is_many(paths):
            raise UsageError("--dry-run: expected one video file", "name one of them")
        from freres_cli.pipeline.prompt_text import bound_text

        plan = compressor.plan(paths[0])
        _print_plan(plan, {**plan_document(plan, chosen), **bound_text(plan, compressor.models)}, chosen, json)
    elif is_many(paths) or (output is not None and options.is_folder(output)):
        listing = list_videos(paths)
        print_notes(listing.notes, quiet)
        _compress_many(compressor, listing.videos, place or BUNDLES, force, json, quiet)
    else:
        _compress_one(compressor, paths[0], place or BUNDLE, force, json, quiet)


def _compress_one(compressor: Compressor, video: Path, output: Path, force: bool, json: bool, quiet: bool) -> None:
    from freres_cli.workflows.compress import compress_file

    with progress_bar("compress", quiet or json) as progress:
        result = compress_file(compressor, video, output, force=force, progress=progress)
    print_notes(result.notes, quiet)
    if json:
        print_json("freres.compress/1", _document(result, compressor.options))
        return
    print_notes([_summary(result)], quiet)
    print_path(result.bundle)


def _compress_many(
    compressor: Compressor, videos: Sequence[tuple[Path, Path]], folder: Path, force: bool, json: bool, quiet: bool
) -> None:
    """Print a line for each video. Raises the first failure after the last video."""
    from freres_cli.workflows.compress import compress_many

    told: set[str] = set()

    def on_row(row: Row) -> None:
        # A reader that closed the pipe has seen enough; the other videos are still to be compressed.
        with contextlib.suppress(SystemExit):
            show_row(row)

    def show_row(row: Row) -> None:
        if row.error is not None:
            print_warning(f"failed: {row.error.message}")
        if json:
            print_json_line("freres.compress_many/1", _row_document(row, compressor.options))
            return
        if row.result is not None:
            fresh = [note for note in row.result.notes if note not in told]
            told.update(fresh)
            print_notes([*fresh, f"{row.video}: {_summary(row.result)}"], quiet)
        elif row.status == "skipped":
            print_notes([f"{row.video}: skipped, {row.bundle} already exists"], quiet)
        if row.error is None:
            print_path(row.bundle)

    with progress_bar("compress", quiet or json, "videos") as progress:
        rows = compress_many(compressor, videos, folder, force=force, on_row=on_row, progress=progress)
    counts = {status: sum(row.status == status for row in rows) for status in ("done", "skipped", "failed")}
    failed = next((row.error for row in rows if row.error is not None), None)
    if failed is not None:
        raise type(failed)(
            f"{counts['failed']} of {count_of(len(rows), 'video')} failed: {failed.message}", failed.hint
        )
    if not json:
        print_notes([f"{counts['done']} compressed, {counts['skipped']} skipped"], quiet)


def gather_flags(assignments: list[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    """Return the given settings. ``named``: settings that have a flag of their own, which overrides ``--set``."""
    given = {key: value for key, value in named.items() if value is not None}
    return dict(parse_assignment(text) for text in assignments or []) | given


def gather_flags_at_budgets(assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings given to a verb that names its budgets itself. Raises ``UsageError`` for a budget."""
    flags = gather_flags(assignments, {})
    if "budget_tokens" in flags:
        raise UsageError("--set budget_tokens: budgets come from --budgets", "use --budgets")
    return flags


def make_options(
    flags: dict[str, Any],
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
) -> CompressOptions:
    """Turn flags into options.

    ``flags``: settings that were given. ``preset``, ``model``, ``revision``, ``method``, ``start``, ``end``, ``strict``,
    ``device``, ``dtype``, ``attn``: the flags with these names. Raises ``UsageError`` or ``PresetError``.
    """
    chosen = model or BUNDLED
    if method is not None:
        find_bundle_method(method)
    check_revision(chosen, revision)
    settings = load_settings(preset or choose_preset(chosen), flags)
    method = choose_method(method, settings)
    from freres_cli.pipeline.models import make_source
    from freres_cli.pipeline.planning import CompressOptions

    source = make_source(chosen, device, dtype, revision, attn)
    return CompressOptions(source, settings, method, start, end, strict)


def at_budgets(chosen: CompressOptions, verb: str, *, trains: bool = False) -> CompressOptions:
    """Return the options of a verb that names its budgets itself.

    ``chosen``: the options. ``verb``: its name. ``trains``: it makes an adapter. Raises ``UsageError`` if the settings
    name a quality, or a method that has no adapter.
    """
    settings = chosen.settings
    if settings.quality is not None:
        raise UsageError(f"{settings.name_of('quality')}: {verb} works at budgets: expected no quality", "leave it out")
    if not trains:
        return chosen
    if settings.is_named("method") and chosen.method != FRE_RES:
        raise UsageError(f"method: {verb} trains adapters of {FRE_RES}, got {chosen.method}", "leave it out")
    return replace(chosen, method=FRE_RES)


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
    print_result(f"GoPs             {budget.num_anchors}, up to {budget.max_events} more for events")
    print_result(f"coefficients     {budget.num_coefficients} in {budget.pooled_grid[0]}x{budget.pooled_grid[1]} cells")


def plan_document(plan: CompressPlan, chosen: CompressOptions) -> dict[str, Any]:
    """Return the JSON keys of a plan: frames, tokens and their allocation, and the settings."""
    budget = plan.budget
    most = min(plan.budget_tokens, plan.full_tokens)
    visual = None if plan.quality is not None else most if budget is None else budget.expected.total
    return {
        "method": chosen.method,
        "quality": plan.quality,
        "visual_tokens": visual,
        "budget_tokens": most if budget is None else plan.budget_tokens,
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
