"""Draw what ``freres eval`` measured: accuracy against tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freres_cli.errors import count_of
from freres_cli.evaluation.plots import NUM_COLOURS, draw_legend, encode_figure, new_figure

INCHES = (9.0, 6.0)
STYLES = ("o-", "s--", "^:", "D-.")  # the colours repeat after ten methods; with these, 40 can be told apart


def draw_accuracy(summary: Mapping[str, Any]) -> bytes:
    """Return a PNG of accuracy over visual tokens, both means over the videos: a line for each method, with the intervals
    of its points.

    Methods without a budget are levels: full (every token), and blind (none, which has no place on this axis). Rows that
    answered nothing are left out. ``summary``: of ``scores.summarize``.
    """
    figure = new_figure(*INCHES)
    axes = figure.subplots()
    rows = [row for row in summary["rows"] if row["accuracy"] is not None]
    names = list(dict.fromkeys(row["label"] or row["method"] for row in rows))
    for place, name in enumerate(names):
        colour, style = f"C{place % NUM_COLOURS}", STYLES[place // NUM_COLOURS % len(STYLES)]
        own = [row for row in rows if (row["label"] or row["method"]) == name]
        if own[0]["budget"] is None:
            axes.axhline(100 * own[0]["accuracy"], color=colour, linestyle="--", linewidth=1, label=name)
            continue
        own.sort(key=lambda row: row["visual_tokens"])
        heights = [100 * row["accuracy"] for row in own]
        below, above = (
            [
                abs(100 * (row["accuracy"] if row[key] is None else row[key]) - height)
                for row, height in zip(own, heights, strict=True)
            ]
            for key in ("ci_low", "ci_high")
        )
        places = [row["visual_tokens"] for row in own]
        axes.errorbar(
            places, heights, [below, above], fmt=style, color=colour, label=name, markersize=4, linewidth=1, capsize=2
        )
    axes.set(xlabel="visual tokens, mean over videos", ylabel="accuracy, %")
    if any(row["budget"] is not None for row in rows):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_title(
        f"{count_of(summary['num_questions'], 'question')} on {count_of(summary['num_videos'], 'video')}; "
        "bars: 95 % intervals",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    draw_legend(figure, len(names))
    return encode_figure(figure)
