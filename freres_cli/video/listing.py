"""Find the videos that a command line names: files, folders, and lists of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from freres_cli.errors import UsageError, count_of, explain_no_file
from freres_cli.files import URL

T = TypeVar("T")

LIST_SUFFIX = ".txt"
# In a folder, videos are recognized by suffix; a file named on the command line is tried whatever its name.
VIDEO_SUFFIXES = frozenset(
    (
        *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg"),
        *(".mpg", ".mts", ".mxf", ".nut", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    )
)


@dataclass(frozen=True)
class Listing:
    """The videos found, and what the user should know about the search.

    ``videos``: each video with the name of its output, which has no suffix, is relative to the output folder, and is
    unique.
    """

    videos: tuple[tuple[Path, Path], ...]
    notes: tuple[str, ...] = ()


def is_many(arguments: Sequence[Path]) -> bool:
    """Whether the arguments name a set of videos rather than one file. Raises ``UsageError`` for a list that is not there."""
    return len(arguments) != 1 or os.path.isdir(arguments[0]) or _is_list(arguments[0])  # noqa: PTH112


def list_videos(arguments: Sequence[Path]) -> Listing:
    """The videos named by files, folders (searched recursively) and ``.txt`` lists, in order, each once.

    A list has one path per line, relative to the list itself; empty lines and lines that begin with ``#`` are skipped. In a
    folder, hidden files and files without a video suffix are skipped, and links to folders are not followed. An output is
    named after its video; videos that would share a name keep their suffix in it. Raises ``UsageError`` if a list or a
    folder cannot be read, if there is no video at all, or if two outputs would still have the same name.
    """
    by_place: dict[str, tuple[Path, Path]] = {}  # each video with the name of its output, still with the suffix
    notes: list[str] = []
    for argument in arguments:
        for video, name in expand(argument, notes):
            by_place.setdefault(os.path.abspath(video), (video, name))  # noqa: PTH100 (links stay links)
    found = dict(by_place.values())
    if not found:
        named = ", ".join(map(str, arguments[:3]))
        raise UsageError(f"{named}: no video found", "name video files, a folder of them, or a .txt list of paths")
    outputs = name_outputs(list(found.items()))
    refuse_same_outputs(outputs)
    return Listing(tuple(outputs), tuple(notes))


def name_outputs(found: Sequence[tuple[T, Path]]) -> list[tuple[T, Path]]:
    """Return each video with the name of its output, given with that of its file: without the suffix, unless several videos
    would then share it."""
    shared = Counter(name.with_suffix("") for _, name in found)
    return [(v, name if shared[name.with_suffix("")] > 1 else name.with_suffix("")) for v, name in found]


def _is_list(path: Path) -> bool:
    if path.suffix.lower() != LIST_SUFFIX:
        return False
    if not os.path.exists(path):  # noqa: PTH110 (as above)
        raise no_such_list(path)
    return os.path.isfile(path)  # noqa: PTH113


def no_such_list(path: str | Path) -> UsageError:
    """Return the error for a list that is not there. It is told before any work: as a video it would be a failed row."""
    return UsageError(explain_no_file(path, "list"), "check the path")


def expand(argument: Path, notes: list[str]) -> Iterator[tuple[Path, Path]]:
    """Yield the videos that a file, a folder or a ``.txt`` list names, each with the name of its output, still with the
    suffix. ``notes``: receives what the user should know. Raises ``UsageError``."""
    if os.path.isdir(argument):  # noqa: PTH112 (os.path accepts names too long for the system)
        files = _list_files(argument, notes)
        videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
        if len(videos) < len(files):
            notes.append(f"{argument}: skipped {count_of(len(files) - len(videos), 'file')} without a video suffix")
        for path in videos:
            yield path, path.relative_to(argument)
    elif _is_list(argument):
        for number, line in read_lines(argument):
            path = Path(line) if URL.match(line) else argument.parent / line  # a URL is refused by name
            yield path, _name_of(path, f"{argument}:{number}: {line}")
    else:
        yield argument, _name_of(argument, str(argument))


def _name_of(video: Path, where: str) -> Path:
    if video.name in ("", ".."):
        raise UsageError(f"{where}: expected a video file, got a folder", "name a file")
    return Path(video.name)


def _list_files(folder: Path, notes: list[str]) -> list[Path]:
    """The files below a folder but hidden ones, in order.

    ``notes``: gets how many links to folders were not followed, as they may lead round in a circle. Raises ``UsageError`` if
    a folder cannot be read: its videos would be missed in silence.
    """
    files, num_linked = [], 0
    for place, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        num_linked += sum(os.path.islink(os.path.join(place, name)) for name in folders)  # noqa: PTH114, PTH118
        paths = (Path(place, name) for name in names if not name.startswith("."))
        files += [path for path in paths if is_meant(path)]
    if num_linked:
        notes.append(f"{folder}: did not follow {count_of(num_linked, 'link')} to folders; name them to search them")
    return sorted(files)


def is_meant(found: Path) -> bool:
    """Return whether something in a folder counts as a file: also a link to one that is gone, which is to be a failed row
    rather than missed in silence."""
    return found.is_file() or not found.exists()


def _refuse_unreadable(error: OSError) -> None:
    raise UsageError(f"{error.filename}: cannot be read: {error.strerror}", "make it readable, or name other folders")


def read_lines(path: Path, data: bytes | None = None) -> list[tuple[int, str]]:
    """Return the lines of a list that name a file, with their numbers. ``data``: its bytes, if they are not at the path.
    Raises ``UsageError``."""
    try:
        text = (path.read_bytes() if data is None else data).removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "name a list of paths, one per line") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text", "save the list as UTF-8") from error
    # Only these end a line: other separators may stand in a name.
    lines = list(enumerate((line.strip(" \t\r") for line in text.split("\n")), start=1))
    for number, line in lines:
        if "\0" in line:
            raise UsageError(f"{path}:{number}: expected a path, got a zero byte", "name one file per line")
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def refuse_same_outputs(
    outputs: Iterable[tuple[T, Path]],
    hint: str = "compress them into separate folders, or name a folder that contains both",
) -> None:
    """Raise ``UsageError`` if two videos have one name for their output."""
    first: dict[Path, T] = {}
    for video, name in outputs:
        if name in first:
            raise UsageError(f"{first[name]} and {video}: their bundles would have the same name, {name}.pt", hint)
        first[name] = video
