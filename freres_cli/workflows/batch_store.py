"""Files on object stores and other remote places, by URL, through fsspec: fetched whole, stored whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from freres_cli.errors import DiskFullError, FreresError, ResourceError, UsageError, VideoError

# s3://bucket/key, memory://file, or a chain such as zip://clip.mp4::s3://bucket/clips.zip or simplecache::s3://bucket/key.
# Two colons alone may stand in the name of a file.
_URL = re.compile(r"([a-z][a-z0-9+.-]*)(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
# The parameters by which S3, Google Cloud and Azure sign a URL.
_SIGNED = re.compile(r"https?://[^?]*\?(.*&)?(X-Amz-|X-Goog-|sig=|Signature=)", re.IGNORECASE)
_LOCAL = "file://"
MOST_NAME_BYTES, SUFFIX_CHARACTERS = 200, 16
PART_SUFFIX = ".part"


def is_url(text: str) -> bool:
    """Return whether a text names a place on a store rather than a path."""
    return _URL.match(text) is not None


def as_place(text: str) -> str:
    """Return a place as batch has it: a URL, or a path; ``file://`` names a path."""
    return text.removeprefix(_LOCAL)


def is_among(place: str, others: Iterable[str]) -> bool:
    """Whether a path or URL is one of others, or fits a pattern among them."""
    places = map(as_place, others)
    if is_url(place):
        return place in places
    return is_one_of(place, (own for other in places for own in (other, *glob.glob(other, recursive=True))))  # noqa: PTH207


def is_one_of(place: str, others: Iterable[str]) -> bool:
    """Whether a path or URL is one of others, by whatever names; a path that is not there is none of them."""
    if is_url(place):
        return place in others
    if not os.path.exists(place):  # noqa: PTH110 (it takes any text)
        return False
    return any(os.path.exists(own) and Path(place).samefile(own) for own in others)  # noqa: PTH110


def join_url(folder: str, name: str) -> str:
    """Return the path or URL of ``name`` in a folder; the rest of a chain stays behind it. Raises ``UsageError`` for a name
    that would be read as a chain."""
    if not is_url(folder):
        return str(Path(folder) / name)
    if "::" in name:
        raise UsageError(f"{name}: cannot be a name on {folder}: it has two colons", "rename the file")
    head, separator, rest = folder.partition("::")
    if "://" not in head:  # such as simplecache::s3://bucket
        return f"{head}::{join_url(rest, name)}"
    return f"{head.rstrip('/')}/{name}{separator}{rest}"


class Store:
    """The file system that a URL leads to, and the path there.

    Raises ``UsageError`` for a kind of store that is unknown, or whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, self._scheme = url, _URL.match(url)[1]  # type: ignore[index]  # it is a URL
        try:
            self.files, self.path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: {_reason(error)}", "install the package that fsspec needs for it") from error
        except Exception as error:  # some connect, or open an archive, at once
            raise UsageError(
                f"{url}: cannot be opened: {_reason(error)}", "check the URL, and your rights there"
            ) from error

    def url_of(self, path: str) -> str:
        """Return the URL of another path of this file system."""
        start = f"{self._scheme}://"
        head, separator, rest = self.url.partition("::")
        if not path.startswith(start):
            # Of FTP and SFTP, paths begin after the host.
            place, own = head.removeprefix(start).rstrip("/"), str(self.path).rstrip("/")
            path = start + (place.removesuffix(own) if place.endswith(own) else "") + path
        return path + separator + rest

    def exists(self) -> bool:
        """Return whether there is a file. Raises ``UsageError`` if the store does not say."""
        with _failures_as(UsageError, self.url, "cannot be read"):
            try:  # ``isfile`` takes any failure, such as missing rights, for no file
                return _is_file(self.files.info(self.path))
            except FileNotFoundError:
                return False
            except PermissionError as error:  # of S3 also where nothing is, to those who may not list
                hint = "with --force it is replaced, whatever is there"
                raise UsageError(f"{self.url}: whether it exists cannot be read: {_reason(error)}", hint) from error

    def is_folder(self) -> bool:
        """Return whether there is a folder. Raises ``UsageError``."""
        with _failures_as(UsageError, self.url, "cannot be read"):
            return bool(self.files.isdir(self.path))

    def find(self) -> list[tuple[str, PurePosixPath]]:
        """Return the URL of every file in this folder, or that this pattern fits, and its path relative to the folder, or to
        the part of the pattern without wildcards. Raises ``UsageError``."""
        with _failures_as(UsageError, self.url, "cannot be listed"):
            if not has_wildcard(self.url):
                root, found = self.path, self.files.find(self.path)
            else:
                root = fixed_part(self.path)
                found = [path for path, facts in self.files.glob(self.path, detail=True).items() if _is_file(facts)]
            return [(self.url_of(path), PurePosixPath(path).relative_to(PurePosixPath(root))) for path in sorted(found)]

    def read(self) -> bytes:
        """Return the bytes of a small file. Raises ``UsageError``."""
        with _failures_as(UsageError, self.url, "cannot be read"):
            return bytes(self.files.cat_file(self.path))

    def fetch(self, folder: Path) -> Path:
        """Copy the file into a local folder, and return its path there. Raises ``VideoError``, or ``ResourceError`` for a
        full disk."""
        target = folder / short_name(self.url)
        with _failures_as(VideoError, self.url, "cannot be fetched"):
            self.files.get_file(self.path, str(target))
        return target

    def put(self, file: Path) -> None:
        """Store a local file here, whole or not at all: under another name first, then moved. What a killed run left there
        is overwritten. Raises ``UsageError``, or ``DiskFullError`` where there is no room."""
        place = PurePosixPath(self.path)
        part = str(place.with_name(f".{place.name}{PART_SUFFIX}"))
        hint = "free some space, or choose another place with -o"
        is_full = DiskFullError(f"{self.url}: not enough disk space to write it", hint)
        with _failures_as(UsageError, self.url, "cannot be written", is_full):
            self.files.makedirs(str(place.parent), exist_ok=True)
            try:
                self.files.put_file(str(file), part)
                self._move(part)
            except BaseException:
                with contextlib.suppress(Exception):
                    self.files.rm_file(part)
                raise

    def _move(self, part: str) -> None:
        """Give a stored file its own name."""
        import fsspec

        if type(self.files).mv is not fsspec.AbstractFileSystem.mv:
            self.files.mv(part, self.path)
            return
        # fsspec's own way takes names with brackets, stars and question marks for patterns.
        self.files.cp_file(part, self.path)
        self.files.rm_file(part)


def short_name(url: str) -> str:
    """Return the last part of a URL as the name of a local file, no longer than systems allow. Of a signed URL, without the
    query, which holds the signature; any other query may be what tells two videos apart."""
    head = next((part for part in url.split("::") if "://" in part), url)
    name = PurePosixPath(head.partition("?")[0] if _SIGNED.match(head) else head).name
    if len(name.encode()) > MOST_NAME_BYTES:
        suffix = PurePosixPath(name).suffix[:SUFFIX_CHARACTERS]
        name = name.encode()[: MOST_NAME_BYTES - len(suffix.encode())].decode(errors="ignore") + suffix
    return name


def has_wildcard(path: str) -> bool:
    """Return whether a path or URL is a pattern. A question mark in a URL begins its query."""
    return re.search(r"[*\[]" if is_url(path) else r"[*?\[]", path) is not None


def fixed_part(pattern: str) -> str:
    """Return the folder of a pattern above its first wildcard."""
    parts = PurePosixPath(pattern).parts
    return str(PurePosixPath(*parts[: next(i for i, part in enumerate(parts) if has_wildcard(part))]))


def _is_file(facts: dict[str, Any]) -> bool:
    return facts.get("type") == "file"


@contextmanager
def _failures_as(
    kind: type[UsageError | VideoError], url: str, what: str, is_full: ResourceError | None = None
) -> Iterator[None]:
    """Turn the error of a store into one of ours. Every store's package has errors of its own. ``is_full``: the one of a full
    disk, by default that of the copies."""
    try:
        yield
    except FreresError:
        raise
    except FileNotFoundError as error:
        raise kind(f"{url}: {what}: no such file", "check the URL") from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            is_full = is_full or ResourceError(
                f"{url}: {what}: not enough disk space for a copy", "set TMPDIR to a larger disk"
            )
            raise is_full from error
        raise kind(f"{url}: {what}: {_reason(error)}", "check the URL, and your rights there") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
