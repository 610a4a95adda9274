"""Schema version 3, which freres writes: as version 2, and the stretches of adaptive Fre-Res.

Every bundle of this version has the fields and settings listed here. Later additions are not listed; a bundle without one
has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freres_cli.bundle.checks import check_finite, check_names, damaged, later_settings, read_fields, read_settings
from freres_cli.bundle.stretch_checks import check_stretches
from freres_cli.bundle.version_1 import build_tracks
from freres_cli.bundle.version_2 import DTYPES as DTYPES
from freres_cli.bundle.version_2 import FIELDS, build_tokens, check_counts
from freres_cli.bundle.version_2 import SETTINGS as SETTINGS_2
from freres_cli.bundle.version_2 import TENSORS as TENSORS_2
from freres_cli.content import CONTENTS, Content
from freres_cli.presets import Key
from freres_cli.records import VideoTokens
from freres_cli.stretches import STRETCH_COLUMNS, Stretches
from freres_cli.tracks import LATENT_DTYPES, Tracks

VARIANTS = ("absorber", "iquery", "sparse-idct", "anchors", "temporal", "concat", "idct")
SETTINGS: dict[str, Key] = {
    **SETTINGS_2,
    "variant": Key(str, "absorber", "", choices=VARIANTS),
    "quality": Key(float, None, "", low=0.0, high=1.0, optional=True),
}
TENSORS = {**TENSORS_2, "tracks": (*TENSORS_2["tracks"], "gop_recipe"), "stretches": tuple(STRETCH_COLUMNS)}
# Which methods make which content; every other method makes tokens.
CONTENT_OF_METHOD = {"fre-res": "tracks", "adaptive": "stretches"}


def read_manifest(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the manifest with every field and all current settings. ``where``: the file. Raises ``BundleError``."""
    if manifest.get("content") not in CONTENTS:
        raise damaged(where, f"content: expected {' or '.join(CONTENTS)}, got {manifest.get('content')!r}")
    read = read_fields(manifest, FIELDS, where)
    check_counts(read, where)
    later = later_settings(SETTINGS)
    defaults = {key: rule.default for key, rule in later.items()}
    settings = read_settings(read["settings"], {**SETTINGS, **later}, defaults, where)
    method = settings["method"]["value"]
    if CONTENT_OF_METHOD.get(method, "tokens") != manifest["content"]:
        raise damaged(where, f"content: method {method} does not make {manifest['content']}")
    return read | {"settings": settings}


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
        return _build_stretches(manifest, tensors, where)
    return build_tokens(manifest, tensors, where)


def _build_stretches(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Stretches:
    for name, column in STRETCH_COLUMNS.items():
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        allowed = LATENT_DTYPES if column.is_latent else (column.dtype,)
        if dtype not in allowed:
            raise damaged(where, f"{name}: expected {' or '.join(allowed)}, got {dtype}")
    geometry = manifest["geometry"]
    num_frames, grid_h, grid_w = geometry["grid"]
    try:
        made = Stretches(width=geometry["width"], grid=(num_frames, grid_h, grid_w), **tensors)
        check_stretches(made)
    except (ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise damaged(where, " ".join(str(error).split()) or type(error).__name__) from error
    return made


def tensors_of(content: Content) -> dict[str, Tensor]:
    """Return the tensors that a bundle with this content holds, by name, in order."""
    if isinstance(content, Tracks):
        return content.tensors()
    names = TENSORS["tokens" if isinstance(content, VideoTokens) else "stretches"]
    return {name: getattr(content, name) for name in names}
