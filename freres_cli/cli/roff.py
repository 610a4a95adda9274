"""Text as groff reads it: escapes, paragraphs and examples of a manual page."""

from __future__ import annotations

import re


def escape(text: str) -> str:
    """Return text that groff shows as it stands: hyphens, quotes and backslashes are what they were."""
    for char, code in {"\\": "\\e", "-": "\\-", "'": "\\(aq", '"': "\\(dq", "^": "\\(ha", "~": "\\(ti"}.items():
        text = text.replace(char, code)
    return "".join(char if ord(char) < 128 else f"\\[u{ord(char):04X}]" for char in text)


def line(text: str) -> str:
    """Return one input line of prose; `words` in backticks are bold, and none begins with a control character."""
    parts = re.split(r"`([^`]*)`", " ".join(text.split()))
    out = "".join(f"\\fB{escape(part)}\\fR" if i % 2 else escape(part) for i, part in enumerate(parts))
    return f"\\&{out}\n" if out.startswith(".") else f"{out}\n"


def tagged(tag: str, text: str) -> str:
    """Return a tagged paragraph; the tag is roff."""
    return f".TP\n{tag}\n{line(text)}"


def code(text: str) -> str:
    """Return lines shown as they stand."""
    rows = (f"\\&{escape(row)}\n" for row in text.splitlines())
    return f".PP\n.RS 4\n.nf\n{''.join(rows)}.fi\n.RE\n"
