"""Flags that take a number or a path. Typer's messages leave out what was typed; these name it, the flag and its limits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from freres_cli.cli.options import check_path
from freres_cli.errors import UsageError

Verb = TypeVar("Verb", bound=Callable[..., Any])

NAMES = ("--model", "--adapter", "--preset", "--revision", "--method", "--device", "--dtype", "--attn")
# Of a number that is none: which other flag may be meant, if the verb has it, and what to do.
MEANT = {"--budget": ("--quality", "a budget is a count of tokens; for a share of the energy, use --quality")}


def check_values(verb: Verb) -> Verb:
    """Return a verb that reads its flags of type ``int``, ``float`` and ``Path`` here, whose errors name what is wrong."""
    hints = get_type_hints(verb, include_extras=True)
    flags = {flag for hint in hints.values() for flag in _flags_of(hint)}
    # Typer reads the annotations from here.
    verb.__annotations__ = {name: _with_reader(hint, flags) for name, hint in hints.items()}
    return verb


def read_shard(text: str) -> tuple[int, int]:
    """Return the part and how many there are, of ``I/N``. Raises ``UsageError``."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= count:
        raise UsageError(f"--shard: expected I/N, such as 2/8, with I from 1 to N, got {text[:40]!r}")
    return part, count


def _with_reader(hint: Any, flags: set[str]) -> Any:
    """The annotation of a parameter; of a number or a path, with its reader. ``flags``: all of the verb."""
    if get_origin(hint) is not Annotated:
        return hint
    kind, option = get_args(hint)
    kinds, flag = (kind, *get_args(kind)), (_flags_of(hint) or [option.metavar])[0]
    number = next((one for one in (int, float) if one in kinds), None)
    reader: Callable[[Any], Any]
    if Path in kinds:
        reader = _TextReader("path", check_path, flag)
    elif flag in NAMES:
        reader = _TextReader("text", _check_name, flag)
    elif number is not None:
        other, meant = MEANT.get(flag, ("", None))
        reader = _Reader(number, flag, option.min, option.max, meant if other in flags else None)
    else:
        return hint
    option = copy(option)  # verbs share it, and may have other flags
    option.parser = reader
    return Annotated[kind, option]


def _flags_of(hint: Any) -> list[str]:
    """The flags of a parameter, the long one first. Typer takes the first for a default until it meets ``Annotated``."""
    if get_origin(hint) is not Annotated:
        return []
    option = get_args(hint)[1]
    return [flag for flag in (option.default, *(option.param_decls or ())) if isinstance(flag, str)]


def _check_name(text: str, flag: str) -> str:
    """Return what was typed. An empty text, as an unset variable leaves it, would be the default. Raises ``UsageError``."""
    if not text:
        raise UsageError(f"{flag}: expected a name, got an empty text", "leave it out for the default")
    return text


class _TextReader:
    """Reads the text of a flag or argument, which may not be empty. ``kind``: what it is. ``check``: gets it and ``name``."""

    def __init__(self, kind: str, check: Callable[[str, str], Any], name: str) -> None:
        self._check, self._name = check, name
        self.__name__ = kind  # for --help

    def __call__(self, typed: Any) -> Any:
        """What was typed, or the default. Raises ``UsageError``."""
        return self._check(str(typed), self._name)


class _Reader:
    """Reads the number of a flag. ``low``, ``high``: its limits, if it has any. ``hint``: if it is none."""

    def __init__(self, kind: type, flag: str, low: float | None, high: float | None, hint: str | None) -> None:
        self._kind, self._flag, self._low, self._high, self._hint = kind, flag, low, high, hint
        self.__name__ = kind.__name__ if low is None and high is None else f"{kind.__name__} range"  # for --help

    def __call__(self, typed: Any) -> Any:
        """The number that was typed, or the default. Raises ``UsageError``."""
        try:
            value = self._kind(typed)
        except ValueError:
            value = math.nan
        low, high = self._low, self._high
        is_number = isinstance(value, int) or math.isfinite(value)
        if not is_number or (low is not None and value < low) or (high is not None and value > high):
            what = "a whole number" if self._kind is int else "a number"
            raise UsageError(f"{self._flag}: expected {what}{self._limits()}, got {str(typed)[:40]!r}", self._hint)
        return value

    def _limits(self) -> str:
        if self._low is None:
            return ""
        low, high = (f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in (self._low, self._high))
        return f" of at least {low}" if self._high is None else f" from {low} to {high}"
