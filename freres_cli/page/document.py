"""The whole page: its sections in order, each with a figure, what the figure shows, and the same as a table."""

from __future__ import annotations

from collections.abc import Sequence

from freres_cli.page.elements import Html, Part, join, tag, text
from freres_cli.page.facts import PageFacts
from freres_cli.page.sections import (
    show_absorber,
    show_energy,
    show_pieces,
    show_places,
    show_quality,
    show_settings,
    show_spectrum,
    show_summary,
    show_time_line,
    show_tokens,
)
from freres_cli.page.style import STYLE

SECTIONS = (
    ("summary", "Summary", show_summary),
    ("time", "Time line", show_time_line),
    ("tokens", "Tokens over time", show_tokens),
    ("places", "Where the tokens went, frame by frame", show_places),
    ("pieces", "A closer look", show_pieces),
    ("energy", "Energy lost per second", show_energy),
    ("spectrum", "Spectrum of the residuals, beside its null", show_spectrum),
    ("quality", "Quality over budget", show_quality),
    ("absorber", "What the absorber took", show_absorber),
    ("settings", "Settings, and where each came from", show_settings),
)
# Nothing may be loaded from anywhere, and nothing run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def make_page(facts: PageFacts, version: str) -> str:
    """Return the HTML file. ``version``: of freres."""
    title = f"{facts.name}: what freres kept"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    links = tag("ul", *(tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in SECTIONS))
    sections = [_section(key, name, show(facts)) for key, name, show in SECTIONS]
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#main", class_="skip"),
        tag("header", tag("h1", title), tag("nav", links, aria_label="Sections")),
        tag("main", *sections, id="main"),
        tag("footer", f"Made by freres {version}. This page needs no network, no script and no other file."),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(key: str, name: str, parts: Sequence[Part]) -> Html:
    return tag("section", tag("h2", name), join(parts), id=key, aria_label=text(name))
