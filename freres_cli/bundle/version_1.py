"""Schema version 1: Fre-Res tracks. Frozen: later additions to presets or tracks never change this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from freres_cli.bundle.checks import (
    Field,
    check_finite,
    check_names,
    check_times,
    damaged,
    errors_as_damage,
    later_settings,
    read_fields,
    read_settings,
)
from freres_cli.presets import Key
from freres_cli.tracks import Tracks, complete_columns

_TEXT_OR_NULL, _NUMBER_OR_NULL = Field("text", may_be_null=True), Field("number", may_be_null=True)
_TEXT, _WHOLE, _NUMBER, _FLAG = Field("text"), Field("whole"), Field("number"), Field("flag")
_NOTES = Field("texts")
MAX_DEEP_LAYERS = 64

# Releases added fields within this version. Their defaults are what earlier bundles mean.
FIELDS: dict[str, dict[str, Field]] = {
    "model": {
        "model_id": _TEXT,
        "revision": _TEXT_OR_NULL,
        "config_sha256": _TEXT_OR_NULL,
        "projector_sha256": _TEXT_OR_NULL,
        "folder": _TEXT_OR_NULL,
        "family": _TEXT,
        "width": _WHOLE,
        "num_deep_layers": Field("whole", high=MAX_DEEP_LAYERS),
        "dtype": _TEXT,
        "attention": Field("text", may_be_null=True, default=None),
    },
    "source": {
        "file": _TEXT,
        "bytes": _WHOLE,
        "sha256": _TEXT,
        "container": _TEXT,
        "codec": _TEXT,
        "width_px": _WHOLE,
        "height_px": _WHOLE,
        "source_fps": _NUMBER_OR_NULL,
        "start_s": _NUMBER,
        "duration_s": _NUMBER,
        "notes": _NOTES,
        "made_by_world": Field("flag", default=False),
    },
    "sampling": {
        "mode": _TEXT,
        "fps": _NUMBER_OR_NULL,
        "count": Field("whole", may_be_null=True),
        "start_s": _NUMBER_OR_NULL,
        "end_s": _NUMBER_OR_NULL,
        "num_frames": _WHOLE,
        "baseline_frames": _WHOLE,
        "lost_s": _NUMBER,
        "notes": _NOTES,
    },
    "geometry": {
        "width": _WHOLE,
        "grid": Field("wholes", length=3, low=1, high=2**31),
        "pooled_grid": Field("wholes", length=2, low=1, high=64),
        "frame_height_px": _WHOLE,
        "frame_width_px": _WHOLE,
        "fit": Field("text", may_be_null=True, default=None),
        "frame_aspect": Field("number", may_be_null=True, default=None),
        "source_aspect": Field("number", may_be_null=True, default=None),
    },
    "tokens": {
        "visual_tokens": _WHOLE,
        "budget_tokens": _WHOLE,
        "full_tokens": _WHOLE,
        "compression": _NUMBER,
        "retention": _NUMBER,
        "tokens_by_kind": Field("counts"),
        "encoded_tokens": _WHOLE,
        "num_gops": _WHOLE,
        "num_coefficients": _WHOLE,
        "cuts_found": _WHOLE,
        "cuts_not_honoured": _WHOLE,
    },
}

SETTINGS: dict[str, Key] = {
    "method": Key(str, "fre-res", "", choices=("fre-res",)),
    "reference_budget_tokens": Key(int, 1280, "", low=1),
    "budget_tokens": Key(int, 1280, "", low=1),
    "sample": Key(str, "native", "", choices=("native", "fps", "count")),
    "sample_fps": Key(float, None, "", low=1e-6, high=1000.0, optional=True),
    "sample_count": Key(int, None, "", low=1, optional=True),
    "track_density": Key(int, 1, "", low=1, high=64),
    "grid": Key(str, "auto", ""),
    "tokens_per_frame": Key(int, 576, "", low=1),
    "variant": Key(str, "absorber", "", choices=("absorber", "anchors", "temporal", "concat", "idct")),
    "anchors": Key(int, 8, "", low=1),
    "keep_per_block": Key(int, 8, "", low=1, high=9),
    "temporal_share": Key(float, 0.2, "", low=0.0, high=0.95),
    "static_per_gop": Key(int, 3, "", low=0, high=64),
    "pooled_side": Key(int, 4, "", low=1, high=64),
    "max_coefficients": Key(int, 4, "", low=1, high=64),
    "events": Key(bool, True, ""),
    "tau": Key(float, None, "", low=0.0, high=2.0, optional=True),
    "text_after": Key(str, "max", "", choices=("max", "hf")),
    "deepstack": Key(str, "keep", "", choices=("keep", "drop")),
}
# Before this setting existed, every bundle kept the rows.
DEFAULTS = {"deepstack": "keep"}

TENSORS = (
    *("frame_seconds", "gop_anchor_frame", "gop_num_residuals", "gop_num_bins", "gop_bin_frames", "gop_start"),
    *("gop_event_distance", "gop_residual_energy", "gop_pooled_energy", "gop_band_energy", "gop_segment_energy"),
    *("anchor_latents", "anchor_gop", "anchor_cell", "coefficient_values", "coefficient_gop", "coefficient_cell"),
    *("coefficient_band", "coefficient_energy", "coefficient_segments", "base_latents", "base_gop", "base_cell"),
    *("static_latents", "static_gop", "static_cell", "summary_base", "summary_spectrum", "summary_gop"),
)
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64")


def read_manifest(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the manifest in its current form: every field of its version, and all current settings.

    ``where``: the file. Raises ``BundleError``.
    """
    read = read_fields(manifest, FIELDS, where)
    if read["tokens"]["full_tokens"] < 1 or read["tokens"]["visual_tokens"] < 1:
        raise damaged(where, "tokens: expected at least 1 visual token of at least 1")
    later = {key: {"value": rule.default, "source": "default"} for key, rule in later_settings(SETTINGS).items()}
    read["settings"] = later | read_settings(read["settings"], SETTINGS, DEFAULTS, where)
    return read | {"content": "tracks"}


def read_content(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Tracks:
    """Return the tracks that the tensors hold.

    ``manifest``: as ``read_manifest`` returns it. ``where``: the file. Raises ``BundleError`` if names, shapes or indices
    do not fit together, or a number is not finite.
    """
    check_names(tensors, TENSORS, where)
    check_finite(tensors, where)
    return build_tracks(manifest, tensors, where)


def build_tracks(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Tracks:
    """Return tracks made of these tensors. ``where``: the file. Raises ``BundleError`` if they contradict each other."""
    geometry = manifest["geometry"]
    rows, columns = geometry["pooled_grid"]
    num_frames, grid_h, grid_w = geometry["grid"]
    with errors_as_damage(where):
        complete = complete_columns(tensors)
        tracks = Tracks(
            width=geometry["width"], grid=(num_frames, grid_h, grid_w), pooled_grid=(rows, columns), **complete
        )
        _check_places(tracks)
        if manifest["settings"]["variant"]["value"] == "idct":
            _check_dense_bases(tracks)
    check_times(manifest, tensors, where)
    return tracks


def _check_places(tracks: Tracks) -> None:
    """Refuse two tokens of one kind at the same place. (Coefficients: see ``Tracks``.)"""
    places = {
        "anchor_cell": torch.stack([tracks.anchor_gop, tracks.anchor_cell]),
        "static_cell": torch.stack([tracks.static_gop, tracks.static_cell]),
        "summary_gop": tracks.summary_gop[None],
    }
    for name, place in places.items():
        if place.unique(dim=1).shape != place.shape:
            raise ValueError(f"{name}: expected each place once in a GoP")


def _check_dense_bases(tracks: Tracks) -> None:
    """Refuse missing bases. The idct variant rebuilds whole frames, so a GoP with coefficients needs every cell's base."""
    counts = tracks.base_gop.bincount(minlength=tracks.gop_anchor_frame.shape[0])
    if bool((counts[tracks.coefficient_gop] != tracks.num_cells).any()):
        raise ValueError(f"base_latents: expected all {tracks.num_cells} cells of a GoP with variant idct")
