"""Draw what ``freres fidelity`` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freres_cli.evaluation.plotting import to_png

MAX_CURVES = 6  # videos whose seconds are drawn
MAX_TITLE = 60
PANEL_INCHES = (8.0, 3.6)


def draw_fidelity(rows: Sequence[dict[str, Any]], videos: Sequence[dict[str, Any]]) -> tuple[bytes, list[str]]:
    """Return a PNG, and notes on what it leaves out.

    The top panel has the share kept against the tokens, means over videos, for each method: by the linear reader as a
    solid line, by hold as a dotted one. Below, a panel for each video has the share of its energy that is lost in each
    second at each method's smallest budget, by the reader that keeps more. ``rows``, ``videos``: as in
    ``FidelityResult``.
    """
    from matplotlib.figure import Figure

    shown = videos[:MAX_CURVES]
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, height * (1 + len(shown))), layout="constrained")
    kept, *curves = figure.subplots(1 + len(shown), 1, squeeze=False)[:, 0]
    for colour, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["visual_tokens"])
        places = [100 * row["visual_tokens"] / row["full_tokens"] for row in own]
        for reader, style, label in (("linear", "o-", method), ("hold", "o:", None)):
            shares = [100 * row[f"kept_{reader}"] for row in own]
            kept.plot(places, shares, style, color=f"C{colour}", label=label, markersize=4)
        for axes, video in zip(curves, shown, strict=True):
            mine = (row for row in video["rows"] if row["method"] == method)
            row = min(mine, key=lambda row: row["visual_tokens"])
            reader = max(("linear", "hold"), key=lambda reader: row[f"kept_{reader}"])
            lost = [100 * share for share in row[f"lost_by_second_{reader}"]]
            label = f"{method}, {row['visual_tokens']} tokens, {reader}"
            axes.stairs(lost, baseline=None, color=f"C{colour}", label=label)
    kept.set(xscale="log", xlabel="tokens kept, %", ylabel="energy kept, %")
    kept.xaxis.set_major_formatter("{x:g}")
    kept.xaxis.set_minor_formatter("{x:g}")
    kept.set_title("solid: linear reader, dotted: hold")
    for axes, video in zip(curves, shown, strict=True):
        axes.set(xlabel="second", ylabel="energy lost, % of the clip's")
        # File names may hold dollar signs, which would start a formula.
        axes.set_title(_title(video["video"])).set_parse_math(False)
    for axes in (kept, *curves):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    left_out = len(videos) - len(shown)
    notes = [f"the plot shows the seconds of the first {MAX_CURVES} of {len(videos)} videos"] if left_out else []
    return to_png(figure), notes


def _title(name: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in name.encode("utf-8", "replace").decode())
    return text if len(text) <= MAX_TITLE else f"...{text[-MAX_TITLE:]}"
