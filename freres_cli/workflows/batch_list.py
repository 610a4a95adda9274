"""What a batch is to compress: paths, patterns, folders, lists, URLs of them, and JSON lines with settings of their own."""

from __future__ import annotations

import difflib
import glob
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from freres_cli.errors import FreresError, UsageError, count_of
from freres_cli.files import can_be_name
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.presets import KEYS, check_value
from freres_cli.video.listing import (
    LIST_SUFFIX,
    VIDEO_SUFFIXES,
    expand,
    is_meant,
    name_outputs,
    no_such_list,
    read_lines,
    refuse_same_outputs,
)
from freres_cli.video.sampling import check_window
from freres_cli.workflows.batch_store import Store, as_place, fixed_part, has_wildcard, is_url, join_url, short_name
from freres_cli.workflows.batch_worker import Job

ROWS_SUFFIX = ".jsonl"
SETTINGS = tuple(key for key in KEYS if key != "description")
# Keys of a JSON line that are no settings of a preset, and the type of their values.
PLACES: dict[str, type | tuple[type, ...]] = {"video": str, "name": str}
WINDOW: dict[str, type | tuple[type, ...]] = {"start_s": (int, float), "end_s": (int, float), "strict": bool}
TOP_KEYS = {**PLACES, **WINDOW}

MakeOptions = Callable[[Mapping[str, Any]], CompressOptions]


@dataclass(frozen=True)
class Listed:
    """A video that was found. ``video``: its path or URL. ``file``: what its bundle is named after, with a suffix. ``place``:
    where it is listed. ``changes``: settings of its own. ``name``: its bundle's, if it was named."""

    video: str
    file: Path
    place: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    def __str__(self) -> str:
        return self.place if self.video in self.place else f"{self.place}: {self.video}"


def list_jobs(arguments: Sequence[str], make_options: MakeOptions) -> tuple[list[Job], list[str]]:
    """Return the jobs that a command line names, each once and in order, and notes for the user.

    ``make_options``: (settings of its own) -> how to compress a video; called once for equal settings. Raises
    ``UsageError`` or ``PresetError`` for a list that cannot be used, if there is no video, and if two bundles would have
    one name.
    """
    notes: list[str] = []
    by_job: dict[tuple[str, str | None, str], Listed] = {}
    for argument in arguments:
        for found in _expand(as_place(argument), notes):
            by_job.setdefault((_absolute(found.video), found.name, json.dumps(found.changes, sort_keys=True)), found)
    unique = list(by_job.values())
    if not unique:
        raise UsageError(f"{', '.join(arguments[:3])}: no video found", "name videos, folders, patterns or lists")
    unnamed = [found for found in unique if found.name is None]
    names = dict(zip(map(id, unnamed), (name for _, name in name_outputs([(f, f.file) for f in unnamed])), strict=True))
    outputs = [(found, names.get(id(found)) or Path(str(found.name))) for found in unique]
    hint = "name a folder or pattern that contains both, or list them as JSON lines with a name each"
    refuse_same_outputs(outputs, hint)
    known: dict[str, CompressOptions] = {}
    jobs = []
    for found, name in outputs:
        key = json.dumps(found.changes, sort_keys=True)
        if key not in known:
            known[key] = _make_options(found, make_options)
        jobs.append(Job(_absolute(found.video), name.as_posix(), known[key]))
    return jobs, notes


def with_own(flags: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one video: those of a JSON line in place of those given for all. A rate or a count of its own
    replaces the other one of them, too."""
    samples = ("sample", "sample_fps", "sample_count")
    kept = {key: value for key, value in flags.items() if key not in samples or not set(samples) & set(own)}
    return {**kept, **{key: value for key, value in own.items() if key not in WINDOW and key != "method"}}


def _absolute(video: str) -> str:
    """A place that means the same in every process; links stay links."""
    return video if is_url(video) else os.path.abspath(video)  # noqa: PTH100


def _make_options(found: Listed, make_options: MakeOptions) -> CompressOptions:
    if not found.changes:
        return make_options({})
    try:
        return make_options(found.changes)
    except FreresError as error:
        raise type(error)(f"{found.place}: {error.message}", error.hint) from error


def _expand(argument: str, notes: list[str]) -> Iterator[Listed]:
    """The videos that one argument names."""
    if not argument:
        raise UsageError("LIST: expected a path or URL, got an empty text")
    if is_list(argument) and (is_url(argument) or Path(argument).is_file()):
        yield from _read_list(argument)
    elif is_list(argument) and not has_wildcard(argument) and not Path(argument).exists():
        raise no_such_list(argument)
    elif is_url(argument):
        yield from _expand_url(argument, notes)
    elif has_wildcard(argument) and not os.path.lexists(argument):
        # A name that holds a bracket is a name if there is such a file.
        found = sorted(path for path in glob.glob(argument, recursive=True) if is_meant(Path(path)))  # noqa: PTH207
        if not found:
            raise UsageError(f"{argument}: no file fits the pattern", "put the pattern in quotes, and check its folder")
        for path in found:
            if is_list(argument):  # a pattern of lists, not of whatever lies there
                yield from _read_list(path)
            else:
                yield Listed(path, Path(path).relative_to(fixed_part(argument)), path)
    else:
        for video, name in expand(Path(argument), notes):
            yield Listed(str(video), name, str(video))


def is_list(argument: str, suffixes: str | tuple[str, ...] = (ROWS_SUFFIX, LIST_SUFFIX)) -> bool:
    """Whether a path, or the first part of a chain of URLs, ends like a list."""
    head = argument.partition("::")[0] if is_url(argument) else argument
    return head.lower().endswith(suffixes)


def _expand_url(url: str, notes: list[str]) -> Iterator[Listed]:
    store = Store(url)
    # A name that holds a bracket is a name if there is such a file.
    is_pattern = has_wildcard(url) and not _is_there(store)
    if not is_pattern and not store.is_folder():
        yield Listed(url, Path(short_name(url)), url)  # the worker says what is wrong with it
        return
    files = store.find()
    if is_pattern and not files:
        raise UsageError(f"{url}: no file fits the pattern", "check the pattern and its folder")
    if not is_pattern:
        kept = [found for found in files if found[1].suffix.lower() in VIDEO_SUFFIXES]
        if len(kept) < len(files):
            notes.append(f"{url}: skipped {count_of(len(files) - len(kept), 'file')} without a video suffix")
        files = kept
    for found, name in files:
        yield Listed(found, Path(name), found)


def _is_there(store: Store) -> bool:
    """Whether a file has this very name; not, if the store refuses such names."""
    try:
        return store.exists()
    except UsageError:
        return False


def _read_list(argument: str) -> Iterator[Listed]:
    """The videos of a list: a path or URL a line, or a JSON object a line. Paths are relative to the list."""
    data = Store(argument).read() if is_url(argument) else None
    for number, line in read_lines(Path(argument), data):
        place = f"{argument}:{number}"
        row = _read_row(line, place) if is_list(argument, ROWS_SUFFIX) else {"video": line}
        video = _beside(argument, as_place(row.pop("video")))
        file = Path(short_name(video) if is_url(video) else PurePosixPath(video).name)
        if file.name in ("", ".."):
            raise UsageError(f"{place}: {video}: expected a video file, got a folder", "name a file")
        yield Listed(video, file, f"{place}: {video}", name=row.pop("name", None), changes=row)


def _beside(listing: str, video: str) -> str:
    """What a line of a list names: a path is relative to the list."""
    if is_url(video) or os.path.isabs(video):  # noqa: PTH117
        return video
    if not is_url(listing):
        return str(Path(listing).parent / video)
    head, separator, rest = listing.partition("::")
    folder = head.rpartition("/")[0]
    if {".", ".."} & set(video.split("/")):  # stores take them for names
        video = posixpath.normpath(video)
        while video.startswith("../") and not folder.endswith(":/"):
            folder, video = folder.rpartition("/")[0], video.removeprefix("../")
    return join_url(folder + separator + rest, video)


def _read_row(line: str, place: str) -> dict[str, Any]:
    """The keys of a JSON line, checked. Raises ``UsageError`` or ``PresetError`` that names the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UsageError(f"{place}: not valid JSON ({reason})", "write one object a line") from error
    if not isinstance(row, dict):
        raise UsageError(f"{place}: expected a JSON object, got {type(row).__name__}", "write one object a line")
    for key, value in row.items():
        if key not in TOP_KEYS and key not in SETTINGS:
            keys = [*TOP_KEYS, *SETTINGS]
            near = difflib.get_close_matches(key, keys, n=1)
            raise UsageError(
                f"{place}: unknown key {key[:40]!r}",
                f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(keys)}",
            )
        if key in SETTINGS:
            row[key] = check_value(key, value, place)
        elif not isinstance(value, TOP_KEYS[key]) or (isinstance(value, bool) and key != "strict"):
            raise UsageError(f"{place}: {key}: expected {_kind_of(key)}, got {json.dumps(value)[:40]}")
    return _check_places(row, place)


def _kind_of(key: str) -> str:
    return "text" if key in PLACES else "true or false" if key == "strict" else "a number of seconds"


def _check_places(row: dict[str, Any], place: str) -> dict[str, Any]:
    if not row.get("video") or not can_be_name(row["video"]):
        raise UsageError(f"{place}: video: expected a path or URL", 'write {"video": "clip.mp4"}')
    check_window(row.get("start_s"), row.get("end_s"), (f"{place}: start_s", f"{place}: end_s"))
    name = row.get("name")
    if name is not None:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or not can_be_name(name):
            raise UsageError(f"{place}: name: expected a relative path without .., got {name[:40]!r}")
    return row
