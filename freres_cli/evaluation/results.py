"""The results file of an evaluation: a header and one line per video, so that an interrupted run can resume."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from freres_cli.errors import ResourceError, UsageError
from freres_cli.files import check_destination

SCHEMA = "freres.eval.log/1"
DEFAULT_NAME = "eval.jsonl"
GZIP_MAGIC = b"\x1f\x8b"
REMEDY = "name another file with -o, or start over with --force"


def results_path(output: Path) -> Path:
    """Return the file to write: ``output``, or ``eval.jsonl`` inside it if it is a folder. Raises ``UsageError``."""
    path = output / DEFAULT_NAME if output.is_dir() else output
    check_destination(path, force=True)  # the file of an earlier run is continued
    return path


class ResultsFile:
    """The rows of a run, one per video, also kept on disk if there is a ``path``. A later row replaces an earlier one, but
    of rows that are read, a failed one does not replace answers: the video may have been away for a while.

    ``run``: everything that decides the answers. A file from the same run is continued. Any other file is refused with
    the hint ``remedy``, or overwritten with ``force``. A last line that was cut short by a crash is dropped. Until it is
    left, no other run may write the file. Raises ``UsageError``.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any], force: bool = False, remedy: str = REMEDY) -> None:
        self.path = path
        self._remedy = remedy
        self.rows: dict[str, dict[str, Any]] = {}
        self._header: dict[str, Any] = {"schema": SCHEMA, "run_sha256": digest_run(run), "run": run}
        if path is None:
            return
        self._file = _open_alone(path)
        try:
            self._begin(path, force)
        except BaseException:
            with suppress(OSError):  # of what could not be written
                self._file.close()
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            with suppress(OSError):  # of a row whose writing has failed before
                self._file.close()

    def _begin(self, path: Path, force: bool) -> None:
        try:
            kept = self._read(path)
        except UsageError:
            if not force:
                raise
            kept = 0
        with _writing(path):
            self._file.truncate(kept)
        if not kept:
            self._write(self._header)

    def append(self, row: dict[str, Any]) -> None:
        """Add the row of a video. It is on disk when this returns."""
        self.rows[row["video"]] = row
        if self.path is not None:
            self._write(row)

    def _read(self, path: Path) -> int:
        """Take over the rows of an earlier run. Return the number of bytes in undamaged lines."""
        log = read_log(path, self._remedy)
        if log is None:
            return 0
        if log.run_sha256 != self._header["run_sha256"]:
            differing = find_differing(log.run, self._header["run"])
            raise UsageError(
                f"{path}: holds the results of another run: {', '.join(differing) or 'header'} differs",
                self._remedy,
            )
        for row in log.rows:
            if row["status"] == "ok" or row["video"] not in self.rows:
                self.rows[row["video"]] = row
        return log.num_bytes

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self.path is not None
        text = json.dumps(row, allow_nan=False) + "\n"
        with _writing(self.path):
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())


@dataclass(frozen=True)
class ResultsLog:
    """What a results file holds: what decided its answers, ``run``, with its digest, the rows, and the number of bytes in
    undamaged lines."""

    run: dict[str, Any]
    run_sha256: object
    rows: list[dict[str, Any]]
    num_bytes: int


def read_log(path: Path, remedy: str, *, packed: bool = False) -> ResultsLog | None:
    """Read a results file; ``None`` if it ends before its first row begins. A last line that was cut short is left out.

    ``remedy``: the hint of the ``UsageError`` for a file that cannot be read, holds something else or is damaged.
    ``packed``: whether the file may be one that gzip has compressed; one that is continued may not.
    """
    data = _read_bytes(path, remedy)
    if packed and data.startswith(GZIP_MAGIC):
        data = _unpack(data, path, remedy)
    lines = data.splitlines(keepends=True)
    if not lines or (len(lines) == 1 and _is_cut_header(data)):
        return None
    header = _parse(lines[0])
    if header is None or header.get("schema") != SCHEMA:
        raise UsageError(f"{path}: holds no results of freres eval", remedy)
    rows, kept = [], len(lines[0])
    for number, line in enumerate(lines[1:], start=2):
        row = _parse(line) if line.endswith(b"\n") else None
        if row is None or not _is_whole(row):
            if number < len(lines):
                raise UsageError(f"{path}:{number}: damaged results", remedy)
            break
        rows.append(row)
        kept += len(line)
    run = header.get("run")
    return ResultsLog(run if isinstance(run, dict) else {}, header.get("run_sha256"), rows, kept)


def find_differing(held: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Return the keys in which a run that was read differs from ``run``, sorted."""
    new = json.loads(json.dumps(run))
    return sorted(key for key in {*held, *new} if held.get(key) != new.get(key))


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row has everything that ``freres eval`` writes. A damaged answer must not count as an answer."""
    if not isinstance(row.get("video"), str):
        return False
    if row.get("status") == "failed":
        return isinstance(row.get("message"), str)
    numbers = ("full_tokens", "decode_s", "encode_s", "lost_s")
    cells, notes = row.get("cells"), row.get("notes")
    return (
        row.get("status") == "ok"
        and isinstance(row.get("video_sha256"), str)
        and all(map(_is_number, map(row.get, numbers)))
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and isinstance(cells, list)
        and all(isinstance(cell, dict) and _is_whole_cell(cell) for cell in cells)
    )


def _is_whole_cell(cell: Mapping[str, Any]) -> bool:
    budget, answers = cell.get("budget"), cell.get("answers")
    if not isinstance(cell.get("method"), str) or not (budget is None or _is_number(budget)):
        return False
    if cell.get("status") == "failed":
        return isinstance(cell.get("message"), str) and answers == {}
    tokens = ("budget_tokens", "visual_tokens", "context_tokens", "encoded_tokens")
    numbers = (*tokens, "num_frames", "compress_s", "prefill_s")
    notes = cell.get("notes", [])
    return (
        cell.get("status") == "ok"
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and all(map(_is_number, map(cell.get, numbers)))
        and all(cell.get(key) is None or _is_number(cell[key]) for key in ("kv_cache_bytes", "peak_memory_bytes"))
        and isinstance(answers, dict)
        and all(
            isinstance(answer, list)
            and len(answer) == 3
            and isinstance(answer[0], str)
            and isinstance(answer[1], bool)
            and _is_number(answer[2])
            for answer in answers.values()
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def digest_run(run: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a run's settings as canonical JSON."""
    text = json.dumps(run, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", remedy) from error


def _unpack(data: bytes, path: Path, remedy: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: damaged results: {error}", remedy) from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_cut_header(data: bytes) -> bool:
    start = f'{{"schema": "{SCHEMA}"'.encode()
    return not data.endswith(b"\n") and data[: len(start)] == start[: len(data)]


def _open_alone(path: Path) -> IO[bytes]:
    """Open a file to append to, which no other run may then open. Raises ``UsageError``."""
    with _writing(path):
        file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(
            f"{path}: another run is writing it", "wait until it ends, or name another file with -o"
        ) from error
    except OSError:
        pass  # a file system without locks
    return file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror}", "free some space, or name another file with -o"
        ) from error
