"""``freres inspect``: what is inside a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    format_share,
    format_sparkline,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
    print_wrapped,
)
from freres_cli.errors import UsageError, count_of, round_count


def inspect(
    bundle: options.BundlePath,
    tokens: Annotated[bool, typer.Option("--tokens", help="Add one row for each visual token.")] = False,
    absorber: Annotated[
        Path | None,
        typer.Option(
            "--absorber", metavar="FILE", readable=False, help="Draw a PNG of what the absorber took from each cell."
        ),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every GoP, setting and note.")] = False,
    adapter: options.Adapter = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show what a bundle holds.

    Prints tokens, times, energy kept, the settings that are not the preset's and, for method fre-res, the seconds that lost
    the most. Needs neither the video nor a model. Energy shares say how much motion was kept, not how well a model answers.

    That fits one screen: of the GoPs it shows those that lost the most and those with the most tokens, and of the
    settings those that are not the preset's. --all shows the rest, and where each setting came from. Each column of
    blocks is a part of the clip, from none to the most: how many tokens stand for it, each spread evenly over its time,
    and how much energy was lost in it.

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
    print_report(report, show_all)


def print_report(report: dict[str, Any], show_all: bool) -> None:
    """Print what ``inspect_bundle`` returns: on one screen, or all of it."""
    _print_head(report, show_all)
    _print_time(report["over_time"])
    if report["stretches"] is not None:
        _print_stretches(report["stretches"], report["visual_tokens"])
    if report["energy"] is not None:
        _print_energy(report["energy"])
        _print_gops(report["gops"], show_all)
    _print_settings(report["settings"], show_all)
    if report["tokens"] is not None:
        print_result("")
        _print_tokens(report["tokens"])
    if report["absorber"] is not None:
        print_result("")
        _print_picture(report["absorber"])


SHOWN_NOTES, SHOWN_GOPS, SHOWN_SETTINGS, SHOWN_LETTERS = 2, 6, 6, 60


def _print_head(report: dict[str, Any], show_all: bool) -> None:
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
        print_wrapped(name, text)
    notes = [*source["notes"], *sampling["notes"]]
    shown = notes if show_all else notes[:SHOWN_NOTES]
    for note in shown:
        print_wrapped("note", note)
    if len(shown) < len(notes):
        print_wrapped("note", f"{len(notes) - len(shown)} more: --all")


def _print_time(over_time: dict[str, Any]) -> None:
    """Print how tokens and loss are spread over the clip."""
    edges, tokens, lost = over_time["edges_s"], over_time["tokens"], over_time["lost_energy"]
    each = format_seconds((edges[-1] - edges[0]) / len(tokens))
    print_result("")
    print_wrapped("time", f"{edges[0]:.2f} to {edges[-1]:.2f} s, {each} a column")
    print_result(f"{'tokens':<8} {format_sparkline(tokens)} at most {round_count(max(tokens))}")
    if over_time["note"] is not None:
        print_wrapped("note", over_time["note"])
    if lost is None:
        print_wrapped("lost", over_time["why_no_loss"])
    else:
        print_result(f"{'lost':<8} {format_sparkline(lost)} at most {max(lost):.3g}")


def _describe_context(report: dict[str, Any]) -> str:
    """Return what the prompt holds besides visual tokens, and what moved to keep that small."""
    if report["context_tokens"] is None:
        return "not counted"
    text = (
        f"{count_of(report['context_tokens'], 'token')} without a question, "
        f"{report['text_overhead_tokens']} of them text in the video"
    )
    if not report["moved_tokens"] or None in (report["mean_shift_s"], report["max_shift_s"]):
        return text  # each may be unknown by itself
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
    held = "1 stretch" if num_tokens == 1 else f"{num_tokens} stretches"
    print_result("")
    print_wrapped(
        "quality",
        f"{format_share(stretches['quality'])} of the latents' energy in {held}, on average "
        f"{stretches['frames_mean']:.1f} frames of {stretches['cells_mean']:.1f} cells; the largest: "
        f"{count_of(stretches['frames_max'], 'frame')}, {count_of(stretches['cells_max'], 'cell')}; "
        f"{count_of(stretches['num_single'], 'single latent')}",
    )
    wanted = [share * curve[0]["visual_tokens"] for share in CURVE_SHARES]
    points = [min(curve, key=lambda point: abs(point["visual_tokens"] - count)) for count in wanted]
    points = list({point["visual_tokens"]: point for point in (curve[0], *points)}.values())
    print_result("         quality at other budgets (all of them: --json):")
    print_table(
        ("         tokens", *[str(point["visual_tokens"]) for point in points]),
        [("         quality", *[format_share(point["quality"]) for point in points])],
    )
    print_result("")
    rows = [
        (
            f"{row['start_s']:.2f}-{row['end_s']:.2f} s",
            str(row["frames"]),
            *[f"{low}-{high - 1}" for low, high in (row["rows"], row["columns"])],
        )
        for row in stretches["largest"]
    ]
    print_table(("largest stretches", "frames", "rows", "columns"), rows)


def _print_energy(energy: dict[str, Any]) -> None:
    print_result("")
    if energy["clip_kept"] is None:
        print_result("energy   no residual energy: every frame is an anchor, or nothing moves")
        return
    print_wrapped(
        "energy",
        f"{format_share(energy['clip_kept'])} of the pooled residual kept; pooling to cells kept "
        f"{format_share(energy['pooling_kept'])} of the total",
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
    print_wrapped("", f"lost the most, worst first: {', '.join(spans)}")


def _print_gops(gops: list[dict[str, Any]], show_all: bool) -> None:
    from freres_cli.workflows.inspect import choose_gops

    shown = list(range(len(gops))) if show_all else choose_gops(gops, SHOWN_GOPS)
    rows = [
        (
            f"{gop['start_s']:.2f} s",
            gop["start"],
            str(gop["num_residual_frames"]),
            format_share(gop["energy_kept"]),
            *[str(count) for count in gop["tokens_by_kind"].values()],
        )
        for gop in (gops[place] for place in shown)
    ]
    print_result("")
    print_table(("GoP at", "start", "residuals", "kept", *gops[0]["tokens_by_kind"]), rows)
    if len(shown) < len(gops):
        print_result(
            f"{len(shown)} of {len(gops)} GoPs: those that kept least, and those with most tokens; --all for all"
        )


def _print_settings(settings: dict[str, Any], show_all: bool) -> None:
    """Print the settings that somebody chose, and what the others come from."""
    print_result("")
    if show_all:
        rows = [(key, str(setting["value"]), setting["source"]) for key, setting in settings.items()]
        print_table(("setting", "value", "from"), rows)
        return
    chosen = [key for key, s in settings.items() if not s["source"].startswith(("preset", "default"))][:SHOWN_SETTINGS]
    shown = [
        f"{key} {str(settings[key]['value'])[:SHOWN_LETTERS]} ({settings[key]['source'][:SHOWN_LETTERS]})"
        for key in chosen
    ]
    others = dict.fromkeys(setting["source"] for key, setting in settings.items() if key not in chosen)
    rest = f"{len(settings) - len(chosen)} others, from {', '.join(others)}; --all for all"
    print_wrapped("settings", "; ".join((*shown, rest)))


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
