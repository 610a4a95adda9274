"""The only module that prints: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any, TextIO

from freres_cli.errors import ExitStatus, FreresError, ResourceError, size_of

# They reverse or embed what stands around them.
BIDI_CONTROLS = frozenset("\u200e\u200f\u061c\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

SCREEN_COLUMNS = 100


def print_result(text: str, end: str = "\n") -> None:
    """Write a result line to stdout and flush it."""
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does.
        discard(sys.stdout)
        raise SystemExit(ExitStatus.DONE) from None
    except OSError as error:
        discard(sys.stdout)
        raise ResourceError(f"standard output: cannot be written: {error.strerror}") from error


def discard(stream: TextIO) -> None:
    """Send the rest of a stream nowhere: neither later lines nor the flush at shutdown may fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_path(path: Path | str) -> None:
    """Write the path or URL of a result to stdout: unchanged for other programs, without control characters on a terminal."""
    print_result(_plain(str(path)) if sys.stdout.isatty() else str(path))


def print_text(text: str, end: str = "\n") -> None:
    """Write text from a model or a file to stdout. Line breaks and tabs stay; other control characters become spaces."""
    print_result("".join(" " if _is_control(c) and c not in "\n\t" else c for c in text), end)


def _is_control(character: str) -> bool:
    """Whether a terminal would obey it. Joiners, which emoji are made with, are harmless."""
    return unicodedata.category(character) == "Cc" or character in BIDI_CONTROLS


def print_line(text: str) -> None:
    """Write a result that contains names from files to stdout, as one line without control characters."""
    print_result(_plain(text))


def print_json(schema: str, document: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout; numbers that are not finite become null."""
    print_result(_encode_json(schema, document, indent=2))


def print_json_line(schema: str, document: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout, on a single line."""
    print_result(_encode_json(schema, document, indent=None))


def _encode_json(schema: str, document: Mapping[str, Any], indent: int | None) -> str:
    text = json.dumps({"schema": schema, **_finite(document)}, indent=indent, ensure_ascii=False, allow_nan=False)
    # JSON allows these unescaped, but a terminal would obey them; bytes of a name that are not UTF-8 are not JSON.
    return re.sub(
        r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_notes(notes: Iterable[str], quiet: bool = False) -> None:
    """Write notes to stderr, one per line."""
    if not quiet:
        for note in notes:
            _tell(f"note: {_plain(note)}")


def print_warning(text: str) -> None:
    """Write a warning to stderr; ``--quiet`` does not hide it."""
    _tell(f"warning: {_plain(text)}")


def print_error(error: FreresError) -> None:
    """Write what went wrong and what to do about it, one line each."""
    _tell(f"error: {_plain(' '.join(error.message.split()))}")
    if error.hint:
        _tell(f"hint: {_plain(error.hint)}")


def print_prompt() -> None:
    """Write to stderr that the next question can be typed."""
    _tell("> ", end="")


def _tell(line: str, end: str = "\n") -> None:
    """Write a line to stderr. If nobody can read it there, the work goes on, and its exit status stays what it is."""
    try:
        print(line, end=end, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def _plain(text: str) -> str:
    """Return one line without control characters. Names and categories come from files that anyone may have written."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else " " for c in text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write an aligned plain-text table to stdout: numbers to the right, text and the first column to the left."""
    cells = [[_plain(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    is_number = [
        all(not row[i] or row[i] in ("-", "yes", "no") or row[i].removeprefix("-")[0].isdigit() for row in cells[1:])
        for i in range(len(columns))
    ]
    for row in cells:
        aligned = (
            cell.rjust(width) if number and i else cell.ljust(width)
            for i, (cell, width, number) in enumerate(zip(row, widths, is_number, strict=True))
        )
        print_result("  ".join(aligned).rstrip())


@contextmanager
def progress_bar(
    label: str, quiet: bool, unit: str = "frames", waiting: str | None = None
) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function (done, total) that draws a bar with the time left on stderr, or ``None`` if stderr is not a terminal
    or ``quiet`` is set. ``label``: text before the bar. ``unit``: what is counted. ``waiting``: the text before the first
    call."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    # While a bar is drawn, rich redirects stdout to its console, stderr. Allow that only if both are terminals.
    shares_terminal = sys.stdout.isatty()
    # The terminal wraps long lines by itself: a break that is written into a path would be copied with it.
    console = Console(stderr=True, soft_wrap=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=shares_terminal) as progress:
        task = progress.add_task(waiting or label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total, description=label)


BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def format_sparkline(values: Sequence[float]) -> str:
    """Return a line of blocks, one for each value, from 0 to the largest.

    Where standard output's encoding has no blocks, plain characters stand in for them: ``_`` is the lowest, ``#`` the
    highest.
    """
    try:
        BLOCKS.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        blocks = BLOCKS
    except (UnicodeEncodeError, LookupError):
        blocks = PLAIN_BLOCKS
    top = max(values, default=0.0)
    steps = len(blocks) - 1
    return "".join(blocks[round(steps * value / top) if top > 0 else 0] for value in values)


def print_wrapped(label: str, text: str) -> None:
    """Write text that may hold names from files to stdout, after a label of up to 8 letters, at most 100 columns wide, but
    for a word that is longer: a path can be copied whole."""
    parts = wrap(_plain(text), SCREEN_COLUMNS - 9, break_on_hyphens=False, break_long_words=False)
    for place, part in enumerate(parts or [""]):
        print_result(f"{'' if place else label:<8} {part}")


def format_bytes(count: float | None) -> str:
    """Return bytes in binary units: ``1.5 GiB``."""
    return "-" if count is None else size_of(count)


def format_seconds(seconds: float | None) -> str:
    """Return seconds as text; below one second, in milliseconds."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_share(share: float | None) -> str:
    """Return a share, 0 to 1, in percent."""
    return "-" if share is None else f"{100 * share:z.1f} %"
