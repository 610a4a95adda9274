"""The files of a benchmark's local copy: annotations whose bytes are hashed, entries that name their place, and videos."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from freres_cli.errors import UsageError
from freres_cli.evaluation.questions import MAX_CHOICES, Question, check_text

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov", ".gif")


@dataclass(frozen=True)
class Entry:
    """A question as the benchmark wrote it. ``place``: where it stands, for messages. Each method takes the key of a value,
    and raises a ``UsageError`` that names both."""

    place: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        """Return text that is not empty, without the spaces around it."""
        return self.written(key).strip()

    def written(self, key: str) -> str:
        """Return text that is not empty as it is written, which is how prompts have it."""
        value = self._value(key, "text")
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "text", value)
        check_text(value, f"{self.place}: {key}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of options as they are written: texts that may be empty, or equal, as in the published files."""
        value = self._value(key, "a list of texts")
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(key, "a list of texts", value)
        for text in value:
            check_text(text, f"{self.place}: {key}")
        if not 2 <= len(value) <= MAX_CHOICES:
            raise self.error(key, f"2 to {MAX_CHOICES} options", f"{len(value)} options")
        return tuple(value)

    def index(self, key: str, limit: int) -> int:
        """Return a whole number from 0 to ``limit`` - 1, written as a number or as text."""
        value = self._value(key, "a whole number")
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < limit:
            raise self.error(key, f"a whole number from 0 to {limit - 1}", value)
        return number

    def seconds(self, key: str) -> float:
        """Return a number of at least 0."""
        value = self._value(key, "seconds")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise self.error(key, "a number of seconds", value)
        return float(value)

    def error(self, key: str, expected: str, got: object) -> UsageError:
        """Return the error to raise for a value. ``expected``: in words. ``got``: the value."""
        shown = json.dumps(got, ensure_ascii=False, default=str)
        return UsageError(
            f"{self.place}: {key}: expected {expected}, got {shown[:60]}", "compare with the published file"
        )

    def _value(self, key: str, expected: str) -> Any:
        if key not in self.values:
            raise UsageError(
                f"{self.place}: {key!r} is missing: expected {expected}", "compare with the published file"
            )
        return self.values[key]


class LocalCopy:
    """A folder that holds a benchmark. It remembers which annotations were read. Raises ``UsageError`` if it is none."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UsageError(f"{root}: is not a folder", "name the folder of the benchmark")
        self.root = root
        self.notes: list[str] = []
        self._read: dict[str, str] = {}

    @property
    def sha256(self) -> str:
        """Digest of the names and bytes of all annotations read so far."""
        return hashlib.sha256(json.dumps(sorted(self._read.items())).encode()).hexdigest()

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The files of annotations read so far."""
        return tuple(self.root / name for name in self._read)

    def has(self, pattern: str) -> bool:
        """Return whether a file or folder matches a pattern."""
        return next(self.root.glob(pattern), None) is not None

    def find(self, names: Sequence[str], hint: str) -> str:
        """Return the first of ``names`` that exists. Raises ``UsageError`` with a hint."""
        found = next((name for name in names if (self.root / name).is_file()), None)
        if found is None:
            more = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise UsageError(f"{self.root / names[0]}: is missing{more}", hint)
        return found

    def read_json(self, name: str) -> Any:
        """Return what a JSON file holds. Raises ``UsageError`` as FILE:LINE."""
        try:
            return json.loads(self._text(name))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{self.root / name}:{error.lineno}: not valid JSON: {error.msg}", "download it again"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.root / name}: not valid JSON: {str(error)[:60]}", "download it again") from error

    def json_entries(self, name: str) -> list[Entry]:
        """Return the entries of a JSON file that holds a list of objects."""
        listed = self.read_json(name)
        if not isinstance(listed, list) or not listed:
            raise UsageError(
                f"{self.root / name}: expected a list of questions, got {_kind(listed)}", "download it again"
            )
        return self.number(name, listed)

    def number(self, name: str, listed: Sequence[Any]) -> list[Entry]:
        """Return the entries of a list, with their numbers, from 1. ``name``: of the file that holds it."""
        for place, values in enumerate(listed, start=1):
            if not isinstance(values, dict):
                raise UsageError(f"{self.root / name}: entry {place}: expected an object, got {_kind(values)}")
        return [Entry(f"{self.root / name}: entry {place}", values) for place, values in enumerate(listed, start=1)]

    def csv_entries(self, name: str, columns: Sequence[str]) -> list[Entry]:
        """Return the rows of a CSV file with a header, as FILE:LINE. ``columns``: those that it must have."""
        reader = csv.DictReader(io.StringIO(self._text(name), newline=""))
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(f"{self.root / name}:1: no column {', '.join(missing)}", f"columns: {', '.join(columns)}")
        entries = []
        try:
            for values in reader:
                place = f"{self.root / name}:{reader.line_num}"
                if None in values or None in values.values():
                    raise UsageError(f"{place}: expected {len(reader.fieldnames or ())} columns", "download it again")
                entries.append(Entry(place, values))
        except csv.Error as error:
            raise UsageError(
                f"{self.root / name}:{reader.line_num}: not valid CSV: {error}", "download it again"
            ) from error
        return entries

    def parquet_entries(self, name: str) -> list[Entry]:
        """Return the rows of a Parquet file. Raises ``UsageError`` if pyarrow is not installed."""
        if find_spec("pyarrow") is None:
            raise UsageError(
                f"{self.root / name}: needs pyarrow, which is not installed", "run: pip install 'freres[benchmarks]'"
            )
        import pyarrow.parquet

        content = io.BytesIO(self._bytes(name))
        try:
            rows = pyarrow.parquet.read_table(content).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # damage gives any of them
            reason = " ".join(str(error).split())[:60]
            raise UsageError(f"{self.root / name}: not a whole Parquet file: {reason}", "download it again") from error
        return self.number(name, rows)

    def find_video(self, folders: Iterable[str], name: str) -> str:
        """Return the first path in the copy that exists: ``name`` in one of ``folders``, else the first that was tried.

        A name without the ending of a video is tried with each of them first. ``.`` is the copy itself. Raises
        ``UsageError`` for a name that leads out of the copy.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UsageError(f"{self.root}: video {name!r}: expected a name inside the copy")
        is_whole = Path(name).suffix in VIDEO_SUFFIXES
        names = [name] if is_whole else [*(name + suffix for suffix in VIDEO_SUFFIXES), name]
        tried = [(Path(folder) / own).as_posix() for folder in folders for own in names]
        return next((path for path in tried if (self.root / path).exists()), tried[0])

    def ask(
        self,
        entry: Entry,
        own_id: str,
        video: str,
        category: str,
        choices: Sequence[str],
        right: int,
        prompt: str,
        **more: Any,
    ) -> Question:
        """Return a question.

        ``entry``: where it comes from; its ``question`` is asked. ``own_id``, ``category``: as reported. ``video``: path in
        the copy. ``choices``: the options; ``right``: the place of the right one. ``prompt``: the whole text. ``more``: other
        fields of ``Question``.
        """
        start_s, end_s = more.get("start_s"), more.get("end_s")
        part = "" if start_s is None else f" [{start_s:g} s, {end_s:g} s)"
        return Question(
            id=own_id,
            video_name=video + part,
            video=self.root / video,
            category=category,
            question=entry.text("question"),
            choices=tuple(choice.strip() for choice in choices),
            answer=chr(ord("A") + right),
            line=0,
            prompt=prompt,
            place=entry.place,
            **more,
        )

    def _bytes(self, name: str) -> bytes:
        path = self.root / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be read: {error.strerror}", "compare with freres-benchmarks(7)"
            ) from error
        self._read[name] = hashlib.sha256(data).hexdigest()
        return data

    def _text(self, name: str) -> str:
        try:
            return self._bytes(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.root / name}: expected UTF-8 text, got other bytes", "download it again"
            ) from error


def list_options(options: Sequence[str], style: str = "{letter}. {option}") -> str:
    """Return the options, one a line, each with its letter."""
    return "\n".join(style.format(letter=chr(ord("A") + i), option=option) for i, option in enumerate(options))


def _kind(value: object) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), type(value).__name__)
