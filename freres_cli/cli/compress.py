"""``freres compress``: video -> bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    print_json,
    print_notes,
    print_result,
    progress_bar,
)
from freres_cli.errors import UsageError
from freres_cli.presets import METHODS, load_preset, merge_settings, parse_assignment

if TYPE_CHECKING:
    from freres_cli.workflows.compress import CompressPlan, CompressRequest, CompressResult


def compress(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="A video file.")],
    budget: options.Budget = None,
    preset: options.PresetName = None,
    model: options.Model = None,
    revision: options.Revision = None,
    method: Annotated[str, typer.Option("--method", help="Compression method.")] = "fre-res",
    variant: Annotated[
        str | None, typer.Option("--variant", help="Ablation: absorber, anchors, temporal, concat or idct.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle to write.")] = Path(
        "bundle.pt"
    ),
    force: options.Force = False,
    fps: Annotated[float | None, typer.Option("--fps", help="Read this many frames a second.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Read this many frames in all.")] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="ROWSxCOLS", help="Token grid of a frame, or auto (keep aspect).")
    ] = None,
    assignments: options.Assignments = None,
    start: Annotated[
        float | None,
        typer.Option("--start", min=0.0, metavar="SECONDS", help="Begin this many seconds into the video."),
    ] = None,
    end: Annotated[
        float | None, typer.Option("--end", min=0.0, metavar="SECONDS", help="End this many seconds into the video.")
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
    """Compress a video into a bundle.

    Decodes the video, encodes its frames with the model's frozen vision tower, keeps sparse full-detail anchor frames
    and a few temporal DCT coefficients of the rest, and writes at most --budget visual tokens. The video is not needed
    again. Prints the bundle's path.
    """
    named = {"budget_tokens": budget, "variant": variant, "sample_fps": fps, "sample_count": frames, "grid": grid}
    named |= {"deepstack": deepstack}
    flags = gather_flags(assignments, named)
    request = make_request(video, flags, preset, model, revision, method, start, end, strict, device, dtype, attn)
    from freres_cli.workflows.compress import compress_video, load_encoder, plan_compression

    if dry_run:
        _print_plan(plan_compression(request, load_encoder(request)), request, json)
        return
    with progress_bar("compress", quiet or json) as progress:
        result = compress_video(request, output, force=force, progress=progress)
    print_notes(result.notes, quiet)
    if json:
        print_json("freres.compress/1", _document(result, request))
        return
    tokens = result.manifest["tokens"]
    print_notes([_summary(tokens, result)], quiet)
    print_result(str(result.bundle))


def gather_flags(assignments: list[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    """Return the settings given: ``--set`` first, flags of their own over it."""
    given = {key: value for key, value in named.items() if value is not None}
    return dict(parse_assignment(text) for text in assignments or []) | given


def make_request(
    video: Path,
    flags: dict[str, Any],
    preset: str | None,
    model: str | None,
    revision: str | None = None,
    method: str = "fre-res",
    start: float | None = None,
    end: float | None = None,
    strict: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attn: str | None = None,
) -> CompressRequest:
    """Turn flags into a request. Raises ``UsageError`` or ``PresetError``."""
    if method not in METHODS:
        raise UsageError(f"--method: expected one of {', '.join(METHODS)}, got {method}")
    chosen = model or options.BUNDLED
    options.check_revision(chosen, revision)
    name = preset or ("bundled" if chosen == options.BUNDLED else "qwen2-vl-7b")
    settings = merge_settings(load_preset(name), flags)
    from freres_cli.devices import choose_device
    from freres_cli.workflows.compress import CompressRequest

    return CompressRequest(
        video=video,
        model=chosen,
        settings=settings,
        device=choose_device(options.device_name(device), attn),
        revision=revision,
        dtype=options.dtype_name(dtype),
        method=method,
        start_s=start,
        end_s=end,
        strict=strict,
    )


def _summary(tokens: dict[str, Any], result: CompressResult) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in tokens["tokens_by_kind"].items())
    return (
        f"{tokens['visual_tokens']} visual tokens ({kinds}) of {tokens['full_tokens']}, "
        f"{tokens['compression']:.2f}x; {tokens['num_gops']} GoPs; {format_bytes(result.bundle_bytes)}; "
        f"{format_seconds(result.timings_s['total'])}, peak {format_bytes(result.peak_memory_bytes)}"
    )


def _document(result: CompressResult, request: CompressRequest) -> dict[str, Any]:
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
        "environment": describe_environment(request.device, result.dtype),
    }


def _print_plan(plan: CompressPlan, request: CompressRequest, json: bool) -> None:
    budget = plan.budget
    by_kind = vars(budget.expected)
    document = {
        "visual_tokens": budget.expected.total,
        "budget_tokens": budget.budget_tokens,
        "full_tokens": plan.full_tokens,
        "compression": plan.full_tokens / budget.expected.total,
        "tokens_by_kind": by_kind,
        "frames": budget.num_frames,
        "baseline_frames": plan.baseline_frames,
        "grid": [budget.num_frames, *budget.grid],
        "num_gops": budget.num_anchors,
        "num_coefficients": budget.num_coefficients,
        "pooled_grid": list(budget.pooled_grid),
        "max_events": budget.max_events,
        "is_lossless": budget.is_lossless,
        "settings": {key: vars(setting) for key, setting in request.settings.items()},
    }
    if json:
        from freres_cli.bench.report import describe_environment

        print_json("freres.plan/1", {**document, "environment": describe_environment(request.device)})
        return
    print_result(f"frames read      {budget.num_frames} of {budget.grid[0]}x{budget.grid[1]} tokens")
    print_result(f"full tokens      {plan.full_tokens} ({plan.baseline_frames} frames)")
    print_result(f"visual tokens    {budget.expected.total} of at most {budget.budget_tokens}")
    for kind, count in by_kind.items():
        print_result(f"  {kind:<14} {count}")
    print_result(f"GoPs             {budget.num_anchors}, up to {budget.max_events} more for events")
    print_result(f"coefficients     {budget.num_coefficients} of {budget.pooled_grid[0]}x{budget.pooled_grid[1]} cells")
