"""Questions as they come in: typed, from a file, or through a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from freres_cli.errors import UsageError

if TYPE_CHECKING:
    from freres_cli.workflows.ask import AskedRow

STDIN = "-"


def read_question(question: str | None, json: bool) -> str | None:
    """Return the question, read from stdin if it is ``-``. ``None`` means the prompt loop."""
    if question is None:
        if json:
            raise UsageError("--json: expected a question", "give the question, or - to read it from stdin")
        return None
    text = check_text((read_stdin() if question == STDIN else question).strip(), "question")
    if not text:
        raise UsageError("question: is empty", 'for example: freres ask bundle.pt "what moves first?"')
    return text


def check_text(text: str, name: str) -> str:
    """Return the text if it is valid Unicode. Raises ``UsageError`` if it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: expected UTF-8 text, got other bytes") from error
    return text


def check_question(text: str, name: str = "--question") -> str:
    """Return a question without the spaces around it. ``name``: its flag. Raises ``UsageError`` for an empty one, or one that
    is too long or no valid Unicode."""
    from freres_cli.evaluation.questions import check_length

    question = check_text(text.strip(), name)
    if not question:
        raise UsageError(f"{name}: is empty", f'for example: {name} "what moves first?"')
    check_length((question,), name)
    return question


def read_rows(questions: Path) -> list[AskedRow]:
    """Return the questions of a file, or of standard input. Raises ``UsageError``."""
    from freres_cli.workflows.ask import read_queries

    if str(questions) != STDIN:
        return read_queries(questions)
    hint = "pipe them in: freres ask BUNDLE --questions - < FILE"
    if sys.stdin is None:
        raise UsageError("--questions -: standard input is closed", hint)
    if sys.stdin.isatty():
        raise UsageError("--questions -: standard input is a terminal: expected a file of questions", hint)
    return read_queries(questions, sys.stdin.buffer.read())


def read_stdin(line: bool = False) -> str:
    """Return all of standard input, or a line of it, but no more than shows that it is too long. Bytes that are not UTF-8
    become what ``check_text`` refuses, so that the lines after them can still be read."""
    from freres_cli.evaluation.questions import MAX_TEXT_BYTES

    if sys.stdin is None:
        raise UsageError("question: standard input is closed", "give the question as an argument")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if not line:
        return sys.stdin.read(MAX_TEXT_BYTES + 1)
    text = part = sys.stdin.readline(MAX_TEXT_BYTES + 1)
    while len(part) > MAX_TEXT_BYTES and not part.endswith("\n"):
        part = sys.stdin.readline(MAX_TEXT_BYTES + 1)
    return text
