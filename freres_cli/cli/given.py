"""The settings that a command line gives, and what each is called in messages: as it was written there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freres_cli.errors import UsageError
from freres_cli.presets import parse_assignment

# The flags of settings whose keys have another name.
FLAGS = {"budget_tokens": "--budget", "sample_fps": "--fps", "sample_count": "--frames"}


class Given(dict[str, Any]):
    """The settings that were given. ``names``: how each was written, for messages."""

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
        super().__init__(values)
        self.names = names


def gather_flags(assignments: list[str] | None, named: dict[str, Any]) -> Given:
    """Return the given settings. ``named``: settings that have a flag of their own, which overrides ``--set``."""
    assigned = dict(parse_assignment(text) for text in assignments or [])
    flags = {key: value for key, value in named.items() if value is not None}
    names = {key: f"--set: {key}" for key in assigned}
    return Given(assigned | flags, names | {key: FLAGS.get(key, f"--{key.replace('_', '-')}") for key in flags})


def gather_flags_at_budgets(assignments: list[str] | None) -> Given:
    """Return the settings given to a verb that names its budgets itself. Raises ``UsageError`` for a budget."""
    flags = gather_flags(assignments, {})
    if "budget_tokens" in flags:
        raise UsageError("--set: budget_tokens: budgets come from --budgets", "use --budgets")
    return flags
