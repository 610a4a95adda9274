"""Choices that can be checked before anything heavy is imported: the preset of a model, its revision, the method."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable
from numbers import Complex, Real
from pathlib import Path

from freres_cli.baselines.declaration import Method
from freres_cli.baselines.registry import BLIND, BUNDLE_METHODS, METHODS, PLUGINS
from freres_cli.baselines.unavailable import UNAVAILABLE
from freres_cli.errors import UsageError
from freres_cli.evaluation.cells import Budget, Cell, parse_cells
from freres_cli.files import can_be_name
from freres_cli.presets import BUNDLED, MODEL_INFO_FILE, Settings

MAX_NEW_TOKENS = 128  # of a free answer, where nothing else is asked for: `ask`, `compare` and a session agree


def as_whole(value: object, name: str) -> int:
    """Return a whole number of any library as Python's own. ``name``: of the argument. Raises ``UsageError``."""
    try:
        if isinstance(value, bool):
            raise TypeError("Python would count it as 0 or 1")
        return operator.index(value)  # type: ignore[arg-type]  # what has no index is what this refuses
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: expected a whole number, got {value!r}") from error


def as_number(value: object, name: str) -> float | None:
    """Return a number of any library as Python's own, ``None`` as it is. ``name``: of the argument. Raises
    ``UsageError``."""
    try:
        if isinstance(value, Complex) and not isinstance(value, Real):
            raise TypeError("NumPy would leave out a part of it")
        if isinstance(value, bool | str | bytes | bytearray):
            raise TypeError("Python would read a number from it")
        return None if value is None else float(value)  # type: ignore[arg-type]  # as above
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
        raise UsageError(f"{name}: expected a number, got {value!r}") from error


def as_path(value: object, name: str) -> Path:
    """Return a path. ``name``: of the argument. Raises ``UsageError`` for what is none, or cannot be the name of a file."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text and can_be_name(text):
            return Path(text)
    raise UsageError(f"{name}: expected a path, got {value!r:.80}")


def choose_preset(model: str) -> str:
    """Return the preset to use with a model if none is named: that of the bundled model for those of its kind, in folders
    that ``freres world train`` wrote."""
    try:
        info = json.loads((Path(model).expanduser() / MODEL_INFO_FILE).read_bytes())
    except (OSError, ValueError):  # no such folder or file; what is wrong with a model is said where it is opened
        info = {}
    is_drawn = model == BUNDLED or (isinstance(info, dict) and info.get("freres_trained") is True)
    return BUNDLED if is_drawn else "long-video"


def check_revision(model: str | None, revision: str | None) -> None:
    """Refuse a revision for a model that is not from the hub. Raises ``UsageError``."""
    if revision is not None and (model == BUNDLED or (model is not None and Path(model).expanduser().is_dir())):
        raise UsageError(
            f"--revision: {model} is not a hub model: expected no revision, got {revision}", "leave --revision out"
        )


def choose_method(settings: Settings) -> str:
    """Return the method of the settings. Raises ``UsageError``."""
    return find_bundle_method(settings.method, settings.name_of("method")).name


def find_bundle_method(name: str, where: str = "--method") -> Method:
    """Return a method that can make bundles. ``where``: what named it. Raises ``UsageError``."""
    refuse_unavailable(name, where)
    if name not in BUNDLE_METHODS:
        hint = f"{name} is for freres eval and compare" if name in METHODS else "see: freres methods"
        raise UsageError(f"{where}: expected one of {', '.join(BUNDLE_METHODS)}, got {name}", hint)
    return METHODS[name]


def choose_cells(methods: str, budgets: str, names: Iterable[str]) -> tuple[Cell, ...]:
    """Return what a verb compares, from its --methods and --budgets. ``names``: the methods it takes. Raises
    ``UsageError``."""
    for name in methods.split(","):
        refuse_unavailable(name.strip(), "--methods")
    return parse_cells(methods, budgets, {name: METHODS[name].has_budget for name in names})


def count_budget(method: str, budget: Budget | None, full_tokens: int) -> int:
    """Return how many visual tokens a method may keep of a clip of ``full_tokens``. ``budget``: what it is asked for; a
    method that takes none keeps every token, or none if it is blind."""
    if METHODS[method].has_budget:
        assert budget is not None
        return budget.tokens(full_tokens)
    return 0 if method == BLIND else full_tokens


def refuse_unavailable(name: str, where: str) -> None:
    """Refuse a published system that is not here, or a method of a package that cannot be used, and say why. ``where``:
    what named it. Raises ``UsageError``."""
    if (fault := PLUGINS.faults.get(name)) is not None and name not in METHODS:
        raise UsageError(f"{where}: {fault}", "mend that package, or remove it")
    if (system := UNAVAILABLE.get(name.lower())) is not None:
        raise UsageError(f"{where}: {name} is not here: {system.reason}", f"it would take {system.needs}")
