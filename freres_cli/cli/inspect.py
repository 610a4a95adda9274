"""``freres inspect``: what is inside a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.output import (
    format_bytes,
    format_share,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
)
from freres_cli.errors import UsageError, count_of


def inspect(
    bundle: options.BundlePath,
    tokens: Annotated[bool, typer.Option("--tokens", help="Add one row for each visual token.")] = False,
    absorber: Annotated[
        Path | None,
        typer.Option("--absorber", metavar="FILE", help="Draw a PNG of what the absorber took from each cell."),
    ] = None,
    adapter: options.Adapter = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show what a bundle holds.

    Prints tokens, times, energy kept, the seconds that lost the most, and settings with their sources. Needs neither the
    video nor a model. Energy shares say how much motion was kept, not how well a model answers.

    The --absorber picture has a row for each GoP, labelled with its start. The left shows the energy of each cell's kept
    coefficients, the right how much the tokens took from that cell: attention weights times the norm of what each token
    received. The absorber normalizes coefficients first, so a faint one may count as much as a strong one. Each column
    has one colour scale, from 0 to the number below its bar.
    """
    for flag, value in (("--adapter", adapter), ("--force", force)):
        if value and absorber is None:
            raise UsageError(f"{flag}: expected --absorber as well, got none", "name the picture with --absorber FILE")
    from freres_cli.workflows.absorption import PictureRequest
    from freres_cli.workflows.inspect import inspect_bundle

    picture = None if absorber is None else PictureRequest(absorber, adapter, force)
    report = inspect_bundle(bundle, with_tokens=tokens, picture=picture)
    if picture is not None:
        print_notes(report["absorber"]["notes"])
    if json:
        from freres_cli.bench.report import describe_environment
        from freres_cli.devices import choose_device

        print_json("freres.inspect/1", {**report, "environment": describe_environment(choose_device("cpu"))})
        return
    _print_head(report)
    if report["stretches"] is not None:
        print_result("")
        _print_stretches(report["stretches"], report["visual_tokens"])
    if report["energy"] is not None:
        _print_energy(report["energy"])
        print_result("")
        _print_gops(report["gops"])
    print_result("")
    rows = [(key, str(setting["value"]), setting["source"]) for key, setting in report["settings"].items()]
    print_table(("setting", "value", "from"), rows)
    if tokens:
        print_result("")
        _print_tokens(report["tokens"])
    if picture is not None:
        print_result("")
        _print_picture(report["absorber"])


def _print_head(report: dict[str, Any]) -> None:
    source, model, sampling = report["source"], report["model"], report["sampling"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["tokens_by_kind"].items())
    lines = {
        "source": f"{source['file'] or 'frames'}, {source['codec'] or 'decoded'} "
        f"{source['width_px']}x{source['height_px']}, "
        f"{source['duration_s']:.2f} s, sha256 {source['sha256'][:12]}",
        "model": f"{model['model_id']} ({model['family']}, {model['dtype']}), revision {model.get('revision') or 'none'}",
        "channels": _describe_channels(report),
        "frames": f"{sampling['num_frames']} read ({sampling['mode']}), grid "
        f"{report['geometry']['grid'][1]}x{report['geometry']['grid'][2]}, {sampling['lost_s']:.2f} s lost to damage",
        "tokens": f"{report['visual_tokens']} of at most {report['budget_tokens']} ({kinds})",
        "full": f"{count_of(report['full_tokens'], 'token')} in {count_of(sampling['baseline_frames'], 'frame')}: "
        f"{report['compression']:.2f}x",
        "context": _describe_context(report),
        "size": f"{format_bytes(report['bundle_bytes'])}, {format_bytes(report['bytes_per_token'])} per token",
    }
    if report["cuts_found"] is not None:
        lines["cuts"] = f"{report['cuts_found']} found"
        if report["gops"] is not None:
            lines["cuts"] += f", {report['cuts_not_honoured']} without an anchor for lack of budget"
    for name, text in lines.items():
        print_line(f"{name:<8} {text}")
    for note in [*source["notes"], *sampling["notes"]]:
        print_line(f"{'note':<8} {note}")


def _describe_context(report: dict[str, Any]) -> str:
    """Return what the prompt holds besides visual tokens, and what moved to keep that small."""
    if report["context_tokens"] is None:
        return "not counted"
    text = (
        f"{count_of(report['context_tokens'], 'token')} without a question, "
        f"{report['text_overhead_tokens']} of them text in the video"
    )
    if not report["moved_tokens"]:
        return text
    outside = f", {report['moved_outside']} out of the time they stand for" if report["moved_outside"] else ""
    return (
        f"{text}; {report['moved_tokens']} tokens move{outside}: {report['mean_shift_s']:.2f} s on average, "
        f"{report['max_shift_s']:.2f} s at most"
    )


def _describe_channels(report: dict[str, Any]) -> str:
    """Return what a stored token consists of."""
    channels, model = report["channels"], report["model"]
    text = f"{channels} per token, {report['latents_dtype']}"
    num_deep = model.get("num_deep_layers")
    if not num_deep:
        return text
    if report["settings"]["deepstack"]["value"] == "drop":
        return f"{text}; the rows of {num_deep} DeepStack layers were dropped, so answers change"
    return f"{text}: {model['width']} and the rows of {num_deep} DeepStack layers"


# Budgets at which the curve is printed, as shares of the largest one on it.
CURVE_SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)


def _print_stretches(stretches: dict[str, Any], num_tokens: int) -> None:
    curve = stretches["curve"]
    print_result(
        f"quality  {format_share(stretches['quality'])} of the latents' energy in {num_tokens} stretches, on average "
        f"{stretches['frames_mean']:.1f} frames of {stretches['cells_mean']:.1f} cells; the largest "
        f"{stretches['frames_max']} frames, {stretches['cells_max']} cells; {stretches['num_single']} single latents"
    )
    wanted = [share * curve[0]["visual_tokens"] for share in CURVE_SHARES]
    points = [min(curve, key=lambda point: abs(point["visual_tokens"] - count)) for count in wanted]
    points = list({point["visual_tokens"]: point for point in (curve[0], *points)}.values())
    print_result("         quality at other budgets (all of them: --json):")
    print_table(
        ("         tokens", *[str(point["visual_tokens"]) for point in points]),
        [("         quality", *[format_share(point["quality"]) for point in points])],
    )


def _print_energy(energy: dict[str, Any]) -> None:
    print_result("")
    if energy["clip_kept"] is None:
        print_result("energy   no residual energy: every frame is an anchor, or nothing moves")
        return
    print_result(
        f"energy   {format_share(energy['clip_kept'])} of the pooled residual kept; pooling to cells kept "
        f"{format_share(energy['pooling_kept'])} of the total"
    )
    print_result("         share in the first coefficients, and for independent noise frames (null):")
    print_table(
        ("         first", *[str(k + 1) for k in range(len(energy["spectrum"]))]),
        [
            ("         clip", *[format_share(share) for share in energy["spectrum"]]),
            ("         null", *[format_share(share) for share in energy["null_spectrum"]]),
        ],
    )
    spans = [f"{loss['start_s']:.2f}-{loss['end_s']:.2f} s" for loss in energy["worst_seconds"]]
    print_result(f"lost the most, worst first: {', '.join(spans)}")


def _print_gops(gops: list[dict[str, Any]]) -> None:
    rows = [
        (
            f"{gop['start_s']:.2f} s",
            gop["start"],
            str(gop["num_residual_frames"]),
            format_share(gop["energy_kept"]),
            *[str(count) for count in gop["tokens_by_kind"].values()],
        )
        for gop in gops
    ]
    print_table(("GoP at", "start", "residuals", "kept", *gops[0]["tokens_by_kind"]), rows)


def _print_picture(drawn: dict[str, Any]) -> None:
    print_line(
        f"absorber {drawn['picture']}, {drawn['width_px']}x{drawn['height_px']} px: {len(drawn['gops_shown'])} of "
        f"{len(drawn['gops'])} GoPs, gamma {drawn['gamma']:.4g}"
    )


def _print_tokens(tokens: list[dict[str, Any]]) -> None:
    rows = [
        (t["kind"], *[f"{t[k]:g}" for k in ("gop", "t", "h", "w")], f"{t['seconds']:.3f}", f"{t['energy']:.4g}")
        for t in tokens
    ]
    print_table(("token", "gop", "t", "h", "w", "seconds", "energy"), rows)
