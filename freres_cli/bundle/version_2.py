"""Schema version 2: the tracks of Fre-Res, or the tokens of any other method.

Every bundle of this version has the fields and settings listed here. Later additions are not listed; a bundle without one
has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freres_cli.bundle.checks import (
    Field,
    Fields,
    check_column,
    check_finite,
    check_names,
    check_order,
    check_times,
    damaged,
    errors_as_damage,
    later_settings,
    read_fields,
    read_settings,
)
from freres_cli.bundle.version_1 import FIELDS as FIELDS_1
from freres_cli.bundle.version_1 import SETTINGS as SETTINGS_1
from freres_cli.bundle.version_1 import TENSORS as TENSORS_1
from freres_cli.bundle.version_1 import build_tracks
from freres_cli.presets import Key
from freres_cli.records import VideoTokens
from freres_cli.tracks import TOKEN_COLUMNS, Tracks

# Which methods make which content; every other method makes tokens.
CONTENT_OF_METHOD = {"fre-res": "tracks"}
# These never put two tokens at one place. Of a method that merges tokens, the middles of two groups may coincide.
PLACES_ONCE = ("full", "uniform", "lowres", "evs", "dtd")
_REQUIRED = {  # optional in version 1
    "model": {"attention": Field("text", may_be_null=True)},
    "source": {
        "made_by_world": Field("flag"),
        # Frames that were passed already decoded have no file.
        "file": Field("text", may_be_null=True),
        "container": Field("text", may_be_null=True),
        "codec": Field("text", may_be_null=True),
    },
    "geometry": {
        "fit": Field("text", may_be_null=True),
        "frame_aspect": Field("number", may_be_null=True),
        "source_aspect": Field("number", may_be_null=True),
        # Only tracks have cells, groups, coefficients and cuts.
        "pooled_grid": Field("wholes", may_be_null=True, length=2, low=1, high=64),
    },
    "tokens": {
        name: Field("whole", may_be_null=True)
        for name in ("num_gops", "num_coefficients", "cuts_found", "cuts_not_honoured")
    },
}
FIELDS: Fields = {section: {**fields, **_REQUIRED.get(section, {})} for section, fields in FIELDS_1.items()}
# ``budget_tokens`` and the like keep the ranges of version 1; the method may be any word.
SETTINGS: dict[str, Key] = {**SETTINGS_1, "method": Key(str, "fre-res", "")}

TENSORS = {
    "tracks": TENSORS_1,
    "tokens": ("frame_seconds", "latents", "positions", "seconds", "kind", "gop", "energy"),
}
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "uint8")


def read_manifest(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the manifest with every field and all current settings. ``where``: the file. Raises ``BundleError``."""
    return read_with(manifest, SETTINGS, CONTENT_OF_METHOD, where)


def read_with(
    manifest: Mapping[str, Any], rules: Mapping[str, Key], content_of_method: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Return the ``manifest`` of a bundle of any version that has the fields of this one.

    ``rules``: the settings of the version. ``content_of_method``: as ``CONTENT_OF_METHOD``. ``where``: the file. Raises
    ``BundleError``.
    """
    contents = (*content_of_method.values(), "tokens")
    if manifest.get("content") not in contents:
        raise damaged(where, f"content: expected {' or '.join(contents)}, got {manifest.get('content')!r}")
    read = read_fields(manifest, FIELDS, where)
    _check_counts(read, where)
    later = later_settings(rules)
    defaults = {key: rule.default for key, rule in later.items()}
    settings = read_settings(read["settings"], {**rules, **later}, defaults, where)
    method = settings["method"]["value"]
    if content_of_method.get(method, "tokens") != manifest["content"]:
        raise damaged(where, f"content: method {method} does not make {manifest['content']}")
    return read | {"settings": settings}


def _check_counts(manifest: Mapping[str, Any], where: str) -> None:
    """Refuse a clip without tokens, or tracks without cells. ``where``: the file. Raises ``BundleError``."""
    if manifest["content"] == "tracks" and manifest["geometry"]["pooled_grid"] is None:
        raise damaged(where, "geometry.pooled_grid: expected 2 whole numbers, got null")
    if manifest["tokens"]["full_tokens"] < 1 or manifest["tokens"]["visual_tokens"] < 1:
        raise damaged(where, "tokens: expected at least 1 visual token of at least 1")


def read_content(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Tracks | VideoTokens:
    """Return the tracks or the tokens that the tensors hold.

    ``manifest``: as ``read_manifest`` returns it. ``where``: the file. Raises ``BundleError`` if names, shapes or indices
    do not fit together, or a number is not finite.
    """
    check_names(tensors, TENSORS[manifest["content"]], where)
    check_finite(tensors, where)
    if manifest["content"] == "tracks":
        return build_tracks(manifest, tensors, where)
    return build_tokens(manifest, tensors, where)


def build_tokens(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> VideoTokens:
    """Return the tokens made of these tensors. ``where``: the file. Raises ``BundleError`` if they are not tokens."""
    for name, column in TOKEN_COLUMNS.items():
        check_column(name, column, tensors[name], where)
    geometry = manifest["geometry"]
    num_frames, grid_h, grid_w = geometry["grid"]
    with errors_as_damage(where):
        if min(num_frames, grid_h, grid_w, geometry["width"]) < 1:
            raise ValueError("grid and width: expected at least 1")
        tokens = VideoTokens(grid=(num_frames, grid_h, grid_w), width=geometry["width"], **tensors)
        last = tokens.positions.new_tensor([num_frames - 1, grid_h - 1, grid_w - 1])
        if bool(((tokens.positions < 0) | (tokens.positions > last)).any()):
            raise ValueError("positions: expected places on the grid")
        if bool((tokens.energy < 0).any()):
            raise ValueError("energy: expected 0 or more")
    check_order(tokens.positions, manifest["settings"]["method"]["value"] not in PLACES_ONCE, where)
    check_times(manifest, tensors, where)
    return tokens
