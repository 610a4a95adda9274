"""Checks shared by the readers of all schema versions: types of manifest fields, tensors, settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from freres_cli.errors import BundleError, PresetError
from freres_cli.presets import KEYS, Key, check_rule
from freres_cli.records import are_in_order
from freres_cli.tracks import LATENT_DTYPES, Column

REQUIRED = object()
MAX_WHOLE = 2**63 - 1
CLOCK_S = 1e-3


@dataclass(frozen=True)
class Field:
    """What a field of the manifest holds.

    ``kind``: text, flag, whole, number, texts, wholes, counts (whole numbers by name); all numbers are finite.
    ``may_be_null``: null means not known. ``default``: the value if a bundle lacks the field; a field without a default is
    required. ``length``: that of a list. ``low``, ``high``: limits of whole numbers.
    """

    kind: str
    may_be_null: bool = False
    default: Any = REQUIRED
    length: int | None = None
    low: int = 0
    high: int = MAX_WHOLE

    def fits(self, value: Any) -> bool:
        """Whether a value is of this kind."""
        if value is None:
            return self.may_be_null
        if self.kind in ("texts", "wholes"):
            is_list = isinstance(value, list) and (self.length is None or len(value) == self.length)
            return is_list and all(self._is_one(self.kind[:-1], item) for item in value)
        if self.kind == "counts":
            return isinstance(value, dict) and all(self._is_one("whole", item) for item in value.values())
        return self._is_one(self.kind, value)

    def _is_one(self, kind: str, value: Any) -> bool:
        if kind == "text":
            return isinstance(value, str)
        if kind == "flag":
            return isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if kind == "whole":
            return isinstance(value, int) and self.low <= value <= self.high
        return -MAX_WHOLE <= value <= MAX_WHOLE if isinstance(value, int) else math.isfinite(value)


Fields = Mapping[str, Mapping[str, Field]]


def read_fields(manifest: Mapping[str, Any], fields: Fields, where: str) -> dict[str, Any]:
    """Return the manifest with defaults for the fields that it lacks.

    ``fields``: by section, then by name; other fields are left unchanged. ``where``: the file. Raises ``BundleError`` for
    a field that is missing or of the wrong kind.
    """
    read = dict(manifest)
    for section, expected in fields.items():
        if not isinstance(manifest.get(section), dict):
            raise damaged(where, f"the manifest lacks {section!r}")
        values = dict(manifest[section])
        for name, field in expected.items():
            if name not in values:
                if field.default is REQUIRED:
                    raise damaged(where, f"the manifest lacks {section}.{name}")
                values[name] = field.default
            elif not field.fits(values[name]):
                got = repr(values[name])[:40]
                null = " or null" if field.may_be_null else ""
                raise damaged(where, f"{section}.{name}: expected {_describe(field)}{null}, got {got}")
        read[section] = values
    return read


def _describe(field: Field) -> str:
    names = {"whole": "a whole number", "number": "a number", "text": "text", "flag": "true or false"}
    names |= {"texts": "a list of strings", "wholes": "whole numbers", "counts": "whole numbers by name"}
    return names[field.kind] + ("" if field.length is None else f", {field.length} of them")


def read_settings(
    stored: Mapping[str, Any], rules: Mapping[str, Key], defaults: Mapping[str, Any], where: str
) -> dict[str, dict[str, Any]]:
    """Return the value and source of each setting.

    ``stored``: the settings in the manifest. ``rules``: the settings to read, with their legal values. ``defaults``:
    values for those that a bundle may lack. ``where``: the file. Raises ``BundleError`` for a setting that is missing or
    illegal.
    """
    read: dict[str, dict[str, Any]] = {}
    for key, rule in rules.items():
        setting = stored.get(key, {"value": defaults.get(key, REQUIRED), "source": "default"})
        if not isinstance(setting, dict) or "value" not in setting or not isinstance(setting.get("source"), str):
            raise damaged(where, f"settings.{key}: expected a value and its source")
        if setting["value"] is REQUIRED:
            raise damaged(where, f"the manifest lacks settings.{key}")
        try:
            value = check_rule(key, rule, setting["value"], f"settings: {key}")
        except PresetError as error:
            raise damaged(where, error.message) from error
        read[key] = {**setting, "value": value}
    return read


def later_settings(rules: Mapping[str, Key]) -> dict[str, Key]:
    """Return today's settings that a schema version with these ``rules`` does not have."""
    return {key: rule for key, rule in KEYS.items() if key not in rules and key != "description"}


def check_names(tensors: Mapping[str, Tensor], expected: Iterable[str], where: str) -> None:
    """Refuse missing and unknown tensors. ``where``: the file. Raises ``BundleError``."""
    odd = sorted(set(tensors) ^ set(expected))
    if odd:
        what = "is missing" if odd[0] not in tensors else "is unknown"
        raise damaged(where, f"tensor {odd[0]} {what}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that hold NaN or infinity. ``where``: the file. Raises ``BundleError``."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise damaged(where, f"{name}: expected finite numbers, got NaN or infinity")


def check_column(name: str, column: Column, tensor: Tensor, where: str) -> None:
    """Refuse a ``tensor`` that has not the dtype or the range of its ``column``. ``name``: the tensor's. ``where``: the file.
    Raises ``BundleError``."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    allowed = LATENT_DTYPES if column.is_latent else (column.dtype,)
    if dtype not in allowed:
        raise damaged(where, f"{name}: expected {' or '.join(allowed)}, got {dtype}")
    limit = int(column.limit or 0)
    if limit and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < limit:
        raise damaged(where, f"{name}: expected 0..{limit - 1}")


def check_times(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse times that run backwards, begin before the video does, or lie outside the frames'. ``where``: the file. Raises
    ``BundleError``."""
    frames, tokens = tensors["frame_seconds"], tensors.get("seconds")
    if not frames.numel():
        return
    if bool((frames.diff() < 0).any()):
        raise damaged(where, "frame_seconds: expected times that never decrease")
    # The clock of a few files starts below zero.
    first = min(0.0, float(manifest["source"]["start_s"]))
    if float(frames[0]) < first - CLOCK_S:
        raise damaged(where, f"frame_seconds: expected {first:g} s or more, got {float(frames[0]):g}")
    if tokens is not None and bool(((tokens < frames[0] - CLOCK_S) | (tokens > frames[-1] + CLOCK_S)).any()):
        raise damaged(where, "seconds: expected times within those of the frames")


def check_order(positions: Tensor, may_coincide: bool, where: str) -> None:
    """Refuse tokens that are not in the order of their ``positions``, or two at the same one.

    ``may_coincide``: the method merges tokens, and the middles of two groups may be the same place. ``where``: the file.
    Raises ``BundleError``.
    """
    if not are_in_order(positions, may_coincide):
        raise damaged(
            where, f"positions: expected {'' if may_coincide else 'each once, '}by time, then row, then column"
        )


@contextmanager
def errors_as_damage(where: str) -> Iterator[None]:
    """Turn what building content from bad tensors raises into the error for a damaged bundle. ``where``: the file."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise damaged(where, " ".join(str(error).split()) or type(error).__name__) from error


def damaged(where: str, what: str) -> BundleError:
    """Return the error for a bundle that breaks its schema.

    ``where``: the file. ``what``: what is wrong with it.
    """
    return BundleError(f"{where}: damaged bundle: {what}", "compress the video again, or copy the bundle again")
