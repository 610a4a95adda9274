"""Adapter files -> trained modules that fit a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freres_cli.bundle.adapter import read_adapter
from freres_cli.errors import BackboneError
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.records import Tracks


def load_modules(path: Path | None, model_facts: Mapping[str, Any], tracks: Tracks) -> FreResModules | None:
    """Return the trained modules for a bundle, or ``None`` where none are named: tokens then stay as they are.

    ``model_facts``: what the bundle's manifest says of its model. Raises ``BackboneError`` where the file is missing,
    damaged, made for another model, or too small for the bundle.
    """
    if path is None:
        return None
    weights, header = read_adapter(path, model_facts)
    modules = _build_modules(path, weights, header)
    _check_modules(path, modules, tracks)
    return modules


def _build_modules(path: Path, weights: Mapping[str, Any], header: Mapping[str, Any]) -> FreResModules:
    try:
        modules = FreResModules(ModuleShape(**header["shape"]))
        modules.load_state_dict(dict(weights))
    except (TypeError, RuntimeError) as error:
        raise BackboneError(f"{path}: damaged adapter: {str(error).splitlines()[0]}") from error
    return modules.eval()


def _check_modules(path: Path, modules: FreResModules, tracks: Tracks) -> None:
    shape = modules.shape
    if shape.width != tracks.width:
        raise BackboneError(f"{path}: adapter width: expected {tracks.width}, got {shape.width}")
    bands = int(tracks.coefficient_band.max()) + 1 if tracks.coefficient_band.numel() else 0
    if bands > shape.num_bands:
        raise BackboneError(
            f"{path}: adapter bands: expected at least {bands}, got {shape.num_bands}",
            f"compress with --set max_coefficients={shape.num_bands}",
        )
