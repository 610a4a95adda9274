"""Schema version 4, which freres writes: as version 3, and the trends of the stretches of adaptive Fre-Res.

Every bundle of this version has the fields and settings listed here. Later additions are not listed; a bundle without one
has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freres_cli.bundle import version_3
from freres_cli.bundle.checks import check_finite, check_names
from freres_cli.bundle.version_2 import read_with
from freres_cli.bundle.version_3 import CONTENT_OF_METHOD, build_stretches
from freres_cli.bundle.version_3 import DTYPES as DTYPES
from freres_cli.bundle.version_3 import FIELDS as FIELDS
from freres_cli.content import Content
from freres_cli.presets import Key
from freres_cli.records import VideoTokens
from freres_cli.stretches import STRETCH_COLUMNS
from freres_cli.tracks import Tracks

SETTINGS: dict[str, Key] = {
    **version_3.SETTINGS,
    "trends": Key(str, "drop", "", choices=("drop", "keep")),
}
TENSORS = {**version_3.TENSORS, "stretches": tuple(STRETCH_COLUMNS)}


def read_manifest(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the manifest with every field and all current settings. ``where``: the file. Raises ``BundleError``."""
    return read_with(manifest, SETTINGS, CONTENT_OF_METHOD, where)


def read_content(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Content:
    """Return the content that the tensors hold.

    ``manifest``: as ``read_manifest`` returns it. ``where``: the file. Raises ``BundleError`` if names, shapes or indices
    do not fit together, or a number is not finite.
    """
    if manifest["content"] != "stretches":
        return version_3.read_content(manifest, tensors, where)
    check_names(tensors, TENSORS["stretches"], where)
    check_finite(tensors, where)
    return build_stretches(manifest, tensors, where)


def tensors_of(content: Content) -> dict[str, Tensor]:
    """Return the tensors that a bundle with this content holds, by name, in order."""
    if isinstance(content, Tracks):
        return content.tensors()
    names = TENSORS["tokens" if isinstance(content, VideoTokens) else "stretches"]
    return {name: getattr(content, name) for name in names}
