"""What is compared: methods, and budgets as shares or counts. No torch here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from freres_cli.errors import UsageError

MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Budget:
    """A budget as requested: a share of the full tokens, kept exact, or a count."""

    share: Fraction | None = None
    count: int | None = None

    def tokens(self, full_tokens: int) -> int:
        """Return the budget in tokens for a clip of ``full_tokens``. A share is rounded down, but never below 1."""
        if self.count is not None:
            return self.count
        assert self.share is not None
        return max(1, int(self.share * full_tokens))

    @property
    def number(self) -> float | int:
        """The budget as written to JSON: a share in (0, 1] or a whole number of tokens."""
        return self.count if self.count is not None else float(self.share or 0)


@dataclass(frozen=True)
class Cell:
    """One row of the results: a method at a budget, ``None`` if the method has no budget.

    Fre-Res may have several rows: ``label`` tells them apart, and ``settings`` are the (key, value) pairs that differ from
    the run's. ``adapter``: a file of trained modules for this method.
    """

    method: str
    budget: Budget | None
    label: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    adapter: Path | None = None

    @property
    def name(self) -> str:
        name = self.label or self.method
        return name if self.budget is None else f"{name} {self.budget.number}"

    @property
    def adapter_sha256(self) -> str | None:
        """SHA-256 of the adapter: it identifies the adapter whatever the file is called."""
        return None if self.adapter is None else hashlib.sha256(self.adapter.read_bytes()).hexdigest()


def parse_budget(text: str, flag: str = "--budgets") -> Budget:
    """Return a budget: with a decimal point a share in (0, 1], without one a count of at least 2.

    ``1`` could be either, so it is refused. ``flag``: the flag it came from. Raises ``UsageError``.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,10}", text) and 2 <= int(text) <= MAX_COUNT:
        return Budget(count=int(text))
    if re.fullmatch(r"[0-9]{0,9}\.[0-9]{1,18}|[0-9]{1,9}\.", text) and 0 < (share := Fraction(text)) <= 1:
        return Budget(share=share)
    raise UsageError(
        f"{flag}: expected a share such as 0.25 (above 0, at most 1.0) or a count such as 640, got {text!r}",
        "a decimal point makes a share: 1.0 is every token; separate budgets with commas",
    )


def parse_budgets(text: str, flag: str = "--budgets") -> tuple[Budget, ...]:
    """Return the comma-separated budgets, all different. Raises ``UsageError``."""
    sizes = tuple(parse_budget(part, flag) for part in text.split(","))
    _refuse_twice(flag, [size.number for size in sizes])
    return sizes


def parse_cells(methods: str, budgets: str, known: Mapping[str, bool]) -> tuple[Cell, ...]:
    """Return what is compared, in the order given.

    ``methods``, ``budgets``: separated by commas. ``known``: all methods, and whether each takes a budget (keeping every
    token, or none, does not). Raises ``UsageError``.
    """
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--methods: expected any of {', '.join(known)}, got {name!r}", "see: freres methods")
    sizes = parse_budgets(budgets)
    _refuse_twice("--methods", names)
    cells: list[Cell] = []
    for name in names:
        cells += [Cell(name, size) for size in sizes] if known[name] else [Cell(name, None)]
    return tuple(cells)


def _refuse_twice(flag: str, values: Sequence[object]) -> None:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise UsageError(f"{flag}: {twice[0]} is given twice", "list each one once")
