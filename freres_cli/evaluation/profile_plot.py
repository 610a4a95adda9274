"""Draw what ``freres profile`` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freres_cli.evaluation.plots import COLOURS, HATCHES, encode_figure, new_figure

STAGES = ("decode", "encode", "compress", "prefill", "first token")
BAR_INCHES, MARGIN_INCHES = 0.55, 1.7


def stage_seconds(row: dict[str, Any]) -> list[float]:
    """Return the seconds of each of ``STAGES``, from the video, or the bundle, to the first token. Stages may overlap, and
    then add up to more than that took.

    The time to first token holds the prefill, so the last stage is what is left of it. A stage that was not measured
    takes no time. ``row``: of ``workflows.profile.profile``.
    """
    known = {name: row[name] or 0.0 for name in ("decode_s", "encode_s", "compress_s", "prefill_s", "ttft_s")}
    return [*list(known.values())[:4], max(0.0, known["ttft_s"] - known["prefill_s"])]


def draw_profile(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG with the time of each row by stage, and its peak memory. A row without figures has its status."""
    figure = new_figure(9.0, 2 * (MARGIN_INCHES + BAR_INCHES * len(rows)))
    times, memory = figure.subplots(2, 1)
    names = [row["method"] for row in rows]
    starts = [0.0] * len(rows)
    for place, stage in enumerate(STAGES):
        seconds = [stage_seconds(row)[place] for row in rows]
        style = {"color": COLOURS[place], "hatch": HATCHES[place], "edgecolor": "white", "linewidth": 0}
        times.barh(range(len(rows)), seconds, left=starts, label=stage, **style)
        starts = [start + part for start, part in zip(starts, seconds, strict=True)]
    peaks = [(row["peak_memory_bytes"] or 0) / 2**30 for row in rows]
    memory.barh(range(len(rows)), peaks, color=COLOURS[0])
    for axes, ends, unit in ((times, starts, "s"), (memory, peaks, "GiB")):
        for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
            axes.text(end, place, f" {end:.2f} {unit}" if row["status"] == "ok" else f" {row['status']}", va="center")
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
    times.set(xlabel="seconds of each stage to the answer's first token, models loaded; decoding and encoding overlap")
    memory.set(xlabel="peak memory, GiB")
    times.legend(fontsize="small", ncols=len(STAGES), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return encode_figure(figure)
