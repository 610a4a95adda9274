"""HTML and SVG elements. Text is escaped here and nowhere else: only ``Html``, which this module makes, is not."""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Iterable

# They reverse or hide what stands around them.
_BIDI = frozenset("\u200e\u200f\u061c\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_EMPTY = frozenset(("img", "meta", "rect", "line", "path", "circle", "polyline", "use"))


class Html(str):
    """Markup that is safe to write. Any other text is escaped where it is used."""

    __slots__ = ()


Part = Html | str | int | float


def text(value: object) -> Html:
    """Return any value as escaped text: no markup, no control or direction characters, valid Unicode."""
    shown = str(value).encode("utf-8", "replace").decode()
    shown = "".join(
        "\ufffd" if c in _BIDI or (unicodedata.category(c) in ("Cc", "Cn", "Co") and c != "\n") else c for c in shown
    )
    return Html(html.escape(shown, quote=True))


def tag(name: str, /, *parts: Part | None, **attributes: object) -> Html:
    """Return an element. ``parts``: what is in it, text or markup; ``None`` is left out.

    ``attributes``: by name, with ``_`` for ``-`` and a trailing ``_`` dropped, as in ``class_``; ``None`` is left out.
    """
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    opening = f"<{name}" + "".join(f' {key}="{text(value)}"' for key, value in pairs)
    if name in _EMPTY:
        return Html(f"{opening}/>" if name not in ("img", "meta") else f"{opening}>")
    return Html(f"{opening}>{join(part for part in parts if part is not None)}</{name}>")


def join(parts: Iterable[Part]) -> Html:
    """Return parts one after the other, text among them escaped."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


def data_uri(data: bytes, kind: str) -> str:
    """Return a picture as an address that holds it. ``kind``: png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[Part]]) -> Html:
    """Return a table that scrolls sideways if it is wide, by keyboard too. The first cell of a row names the row."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = []
    for row in rows:
        first, *others = row
        body.append(tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others)))
    made = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", made, class_="wide", tabindex=0, role="region", aria_label=caption)


def fold(summary: str, *parts: Part) -> Html:
    """Return parts that a reader may unfold."""
    return tag("details", tag("summary", summary), *parts)
