"""Text for groff: escapes, paragraphs and examples in a manual page."""

from __future__ import annotations

import re


def escape(text: str) -> str:
    """Return text escaped so that groff shows it unchanged, including hyphens, quotes and backslashes."""
    for char, code in {"\\": "\\e", "-": "\\-", "'": "\\(aq", '"': "\\(dq", "^": "\\(ha", "~": "\\(ti"}.items():
        text = text.replace(char, code)
    return "".join(char if ord(char) < 128 else f"\\[u{ord(char):04X}]" for char in text)


def line(text: str) -> str:
    """Return one input line of prose. `Words` in backticks are bold, and the line cannot be taken for a request."""
    parts = re.split(r"`([^`]*)`", " ".join(text.split()))
    out = "".join(f"\\fB{escape(part)}\\fR" if i % 2 else escape(part) for i, part in enumerate(parts))
    return f"\\&{out}\n" if out.startswith(".") else f"{out}\n"


def tagged(tag: str, text: str) -> str:
    """Return a tagged paragraph. ``tag``: roff. ``text``: plain prose."""
    return f".TP\n{tag}\n{line(text)}"


def code(text: str) -> str:
    """Return an example, shown line by line as given."""
    rows = (f"\\&{escape(row)}\n" for row in text.splitlines())
    return f".PP\n.RS 4\n.nf\n{''.join(rows)}.fi\n.RE\n"
