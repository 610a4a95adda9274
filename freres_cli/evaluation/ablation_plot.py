"""Draw what ``freres ablate`` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freres_cli.evaluation.plots import COLOURS, MARKERS, encode_figure, new_figure

ROW_INCHES, MARGIN_INCHES = 0.34, 1.2


def draw_ablation(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG with a line for each setting: its accuracy and 95 % interval, with a marker for each budget.

    A dotted line marks the accuracy with every token. ``rows``: as in the document of ``freres ablate``.
    """
    names = list(dict.fromkeys(row["label"] or row["method"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    figure = new_figure(9.0, MARGIN_INCHES + ROW_INCHES * max(4, len(names)))
    axes = figure.subplots()
    for row in rows:
        if row["method"] == "full" and row["accuracy"] is not None:
            axes.axvline(100 * row["accuracy"], color="black", linestyle=":", linewidth=1)
    for place, budget in enumerate(budgets):
        own = [row for row in rows if row["budget"] == budget and row["accuracy"] is not None]
        middles = [100 * row["accuracy"] for row in own]
        known = [(row["accuracy"] if row[key] is None else row[key]) for row in own for key in ("ci_low", "ci_high")]
        low = [middle - 100 * bound for middle, bound in zip(middles, known[::2], strict=True)]
        high = [100 * bound - middle for middle, bound in zip(middles, known[1::2], strict=True)]
        shift = (place - (len(budgets) - 1) / 2) * 0.5 / max(1, len(budgets))
        heights = [names.index(row["label"] or row["method"]) + shift for row in own]
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "capsize": 3}
        label = "every token" if budget is None else f"budget {budget}"
        axes.errorbar(middles, heights, xerr=[low, high], linestyle="none", label=label, **style)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set(xlabel="accuracy, %, with 95 % intervals; dotted: every token")
    axes.legend(fontsize="small", ncols=min(5, len(budgets)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return encode_figure(figure)
