"""Charts as inline SVG. Each has a title and a description for those who do not see it; colours come from ``style``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from freres_cli.page.elements import Html, tag

WIDTH, HEIGHT = 760, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 40
NUM_TICKS = 5


@dataclass(frozen=True)
class Series:
    """One set of values. ``style``: a class of the style sheet, which decides its colour, dash and marker."""

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Axes:
    """What the axes of a chart show: ``x`` and ``y`` from ``low`` to ``high`` each, and what they are called."""

    x_label: str
    y_label: str
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the picture where a value is."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.0
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, count: int = NUM_TICKS) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    raw = (high - low) / count
    if not raw > sys.float_info.min:
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * place for place in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(title: str, description: str, axes: Axes, *marks: Html) -> Html:
    """Return a chart: grid, axes, labels, and the marks in them."""
    grid = []
    for value in ticks(*axes.y):
        _, y = axes.at(axes.x[0], value)
        grid.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_n(y), y2=_n(y), class_="grid"))
        grid.append(tag("text", f"{value:.6g}", x=LEFT - 6, y=_n(y + 4), text_anchor="end"))
    for value in ticks(*axes.x, 8):
        x, _ = axes.at(value, axes.y[0])
        grid.append(tag("line", x1=_n(x), x2=_n(x), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        grid.append(tag("text", f"{value:.6g}", x=_n(x), y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    grid.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    grid.append(tag("text", axes.x_label, x=_n(middle), y=HEIGHT - 5, text_anchor="middle"))
    turn = (TOP + HEIGHT - BOTTOM) / 2
    grid.append(tag("text", axes.y_label, transform=f"translate(13 {_n(turn)}) rotate(-90)", text_anchor="middle"))
    return frame(title, description, HEIGHT, *grid, *marks)


def frame(title: str, description: str, height: int, *marks: Html) -> Html:
    """Return an SVG picture as wide as the page, with its text alternative."""
    drawn = tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *marks,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=f"{title}. {description}",
    )
    return tag("div", drawn, class_="wide", tabindex=0, role="region", aria_label=title)


def stacks(axes: Axes, edges: Sequence[float], series: Sequence[Series]) -> list[Html]:
    """Return bars from each edge to the next, one series on top of the other."""
    below = [0.0] * (len(edges) - 1)
    marks = []
    for one in series:
        steps = []
        above = [low + value for low, value in zip(below, one.values, strict=True)]
        for place, (low, high) in enumerate(zip(below, above, strict=True)):
            if high > low:
                (x0, y0), (x1, y1) = axes.at(edges[place], low), axes.at(edges[place + 1], high)
                steps.append(f"M{_n(x0)} {_n(y0)}V{_n(y1)}H{_n(x1)}V{_n(y0)}Z")
        if steps:
            marks.append(tag("path", d="".join(steps), class_=f"fill {one.style}"))
        below = above
    return marks


def curves(axes: Axes, places: Sequence[float], series: Sequence[Series]) -> list[Html]:
    """Return a line through the values of each series, with a marker at each."""
    marks = []
    for one in series:
        points = [axes.at(x, y) for x, y in zip(places, one.values, strict=True)]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        marks.append(tag("polyline", points=path, class_=f"curve {one.style}"))
        marks += [tag("circle", cx=_n(x), cy=_n(y), r=4, class_=f"dot {one.style}") for x, y in points]
    return marks


def legend(series: Sequence[tuple[str, str]]) -> Html:
    """Return the names of styles, (name, style) each, next to what they look like."""
    swatch = (
        tag(
            "li",
            tag(
                "svg",
                tag("rect", x=1, y=1, width=14, height=14, class_=f"fill {style}"),
                viewBox="0 0 16 16",
                class_="swatch",
                aria_hidden="true",
            ),
            " ",
            name,
        )
        for name, style in series
    )
    return tag("ul", *swatch, class_="legend")


def time_line(
    title: str,
    description: str,
    span: tuple[float, float],
    parts: Sequence[tuple[float, float]],
    ticks_s: Sequence[float],
    events_s: Sequence[float],
) -> Html:
    """Return a line of time with its parts, a tick for each anchor and a triangle for each event.

    ``title``, ``description``: for those who do not see it. ``span``: first and last second. ``parts``: start and end of
    each, in seconds. ``ticks_s``, ``events_s``: seconds. What would lie on the same half pixel is drawn once.
    """
    axes = Axes("seconds", "", span, (0.0, 1.0))
    marks, seen = [], set()
    for place, (start, end) in enumerate(parts):
        x0, x1 = axes.at(start, 0)[0], axes.at(end, 0)[0]
        if (key := round(2 * x0)) not in seen:
            seen.add(key)
            style = "part odd" if place % 2 else "part"
            marks.append(tag("rect", x=_n(x0), y=30, width=_n(max(0.5, x1 - x0)), height=28, class_=style))
    for x in sorted({round(2 * axes.at(second, 0)[0]) / 2 for second in ticks_s}):
        marks.append(tag("line", x1=_n(x), x2=_n(x), y1=26, y2=62, class_="anchor-tick"))
    for x in sorted({round(2 * axes.at(second, 0)[0]) / 2 for second in events_s}):
        marks.append(tag("path", d=f"M{_n(x)} 26l-6 -13h12Z", class_="event"))
    for value in ticks(*span, 8):
        x = axes.at(value, 0)[0]
        marks.append(tag("text", f"{value:.6g}", x=_n(x), y=78, text_anchor="middle"))
    marks.append(tag("text", "seconds", x=WIDTH / 2, y=95, text_anchor="middle"))
    return frame(title, description, 100, *marks)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
