"""Schema version 3: as version 2, and the stretches of adaptive Fre-Res.

Every bundle of this version has the fields and settings listed here. Later additions are not listed; a bundle without one
has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freres_cli.bundle.checks import check_column, check_finite, check_names, check_times, errors_as_damage
from freres_cli.bundle.stretch_checks import check_stretches
from freres_cli.bundle.version_1 import build_tracks
from freres_cli.bundle.version_2 import DTYPES as DTYPES
from freres_cli.bundle.version_2 import FIELDS as FIELDS
from freres_cli.bundle.version_2 import SETTINGS as SETTINGS_2
from freres_cli.bundle.version_2 import TENSORS as TENSORS_2
from freres_cli.bundle.version_2 import build_tokens, read_with
from freres_cli.content import Content
from freres_cli.presets import Key
from freres_cli.stretches import STRETCH_COLUMNS, Stretches

VARIANTS = ("absorber", "iquery", "sparse-idct", "anchors", "temporal", "concat", "idct")
SETTINGS: dict[str, Key] = {
    **SETTINGS_2,
    "variant": Key(str, "absorber", "", choices=VARIANTS),
    "quality": Key(float, None, "", low=0.0, high=1.0, optional=True),
}
_STRETCHES = tuple(name for name in STRETCH_COLUMNS if name != "trends")
TENSORS = {**TENSORS_2, "tracks": (*TENSORS_2["tracks"], "gop_recipe"), "stretches": _STRETCHES}
CONTENT_OF_METHOD = {"fre-res": "tracks", "adaptive": "stretches"}


def read_manifest(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the manifest with every field and all current settings. ``where``: the file. Raises ``BundleError``."""
    return read_with(manifest, SETTINGS, CONTENT_OF_METHOD, where)


def read_content(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Content:
    """Return the content that the tensors hold.

    ``manifest``: as ``read_manifest`` returns it. ``where``: the file. Raises ``BundleError`` if names, shapes or indices
    do not fit together, or a number is not finite.
    """
    check_names(tensors, TENSORS[manifest["content"]], where)
    check_finite(tensors, where)
    if manifest["content"] == "tracks":
        return build_tracks(manifest, tensors, where)
    if manifest["content"] == "stretches":
        latents = tensors["latents"]
        return build_stretches(manifest, {**tensors, "trends": latents.new_zeros(*latents.shape[:1], 0)}, where)
    return build_tokens(manifest, tensors, where)


def build_stretches(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Stretches:
    """Return the stretches made of these tensors. ``where``: the file. Raises ``BundleError`` if they are not those of a
    clip."""
    for name, column in STRETCH_COLUMNS.items():
        check_column(name, column, tensors[name], where)
    geometry = manifest["geometry"]
    num_frames, grid_h, grid_w = geometry["grid"]
    with errors_as_damage(where):
        made = Stretches(width=geometry["width"], grid=(num_frames, grid_h, grid_w), **tensors)
        check_stretches(made)
    check_times(manifest, tensors, where)
    return made
