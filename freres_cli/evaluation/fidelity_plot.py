"""Draw what ``freres fidelity`` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from freres_cli.evaluation.plots import NUM_COLOURS, draw_legend, encode_figure, new_figure, short_name

MAX_CURVES = 6  # videos whose seconds are drawn
PANEL_INCHES = (9.0, 3.6)
MARKERS, DASHES = "os^D", ("-", "--", "-.", ":")  # tell methods apart where the colours repeat


def draw_fidelity(rows: Sequence[dict[str, Any]], videos: Sequence[dict[str, Any]]) -> tuple[bytes, list[str]]:
    """Return a PNG, and notes on what it leaves out.

    The top panel has the share kept against the share of tokens, both means over videos, for each method: by the linear
    reader as a solid line, by hold as a dotted one. Below, a panel for each video has the share of its energy that is lost
    in each second at each method's smallest budget, by the reader that keeps more. ``rows``, ``videos``: as in
    ``FidelityResult``.
    """
    shown = videos[:MAX_CURVES]
    width, height = PANEL_INCHES
    figure = new_figure(width, height * (1 + len(shown)))
    kept, *curves = figure.subplots(1 + len(shown), 1, squeeze=False)[:, 0]
    names = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(names):
        colour, group = f"C{number % NUM_COLOURS}", number // NUM_COLOURS % len(MARKERS)
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["visual_tokens"])
        places = [100 * _share_of_tokens(row, videos) for row in own]
        for reader, style, label in (("linear", "-", method), ("hold", ":", None)):
            shares = [100 * row[f"kept_{reader}"] for row in own]
            kept.plot(places, shares, MARKERS[group] + style, color=colour, label=label, markersize=4)
        for axes, video in zip(curves, shown, strict=True):
            mine = (row for row in video["rows"] if row["method"] == method)
            row = min(mine, key=lambda row: row["visual_tokens"])
            reader = max(("linear", "hold"), key=lambda reader: row[f"kept_{reader}"])
            lost = [100 * share for share in row[f"lost_by_second_{reader}"]]
            axes.stairs(lost, baseline=None, color=colour, linestyle=DASHES[group])
    kept.set(xscale="log", xlabel="tokens kept, %", ylabel="energy kept, %")
    kept.xaxis.set_major_formatter("{x:g}")
    kept.xaxis.set_minor_formatter("{x:g}")
    kept.set_title("solid: linear reader, dotted: hold")
    for axes, video in zip(curves, shown, strict=True):
        axes.set(xlabel="second", ylabel="energy lost, % of the clip's")
        axes.set_title(f"{short_name(video['video'])}: fewest tokens, the better reader").set_parse_math(False)
    for axes in (kept, *curves):
        axes.grid(alpha=0.3)
    draw_legend(figure, len(names))
    left_out = len(videos) - len(shown)
    notes = [f"the plot shows the seconds of the first {MAX_CURVES} of {len(videos)} videos"] if left_out else []
    return encode_figure(figure), notes


def _share_of_tokens(mean: Mapping[str, Any], videos: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of its tokens that a row keeps, a mean over videos as the shares of energy are."""
    own = [
        row for video in videos for row in video["rows"] if all(row[key] == mean[key] for key in ("method", "budget"))
    ]
    return fmean(row["visual_tokens"] / row["full_tokens"] for row in own)
