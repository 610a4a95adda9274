"""Trained modules: which adapter to use, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freres_cli.bundle.adapter import read_adapter
from freres_cli.errors import BackboneError
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.pipeline.models import describe_model
from freres_cli.presets import BUNDLED
from freres_cli.world.bundled_model import bundled_adapter, bundled_model_info, name_weights

NO_ADAPTER = "none"


@dataclass(frozen=True)
class Adapter:
    """Trained modules. ``training``: what their file records about how they were trained, if anything."""

    path: Path
    modules: FreResModules
    training: Mapping[str, Any]


def choose_adapter(named: str | None, model_id: str | None, variant: str) -> Path | None:
    """Return the adapter file to use: ``named``, or ``None`` if that is ``none``. By default it is the one that ships with
    the bundled model, if ``variant`` is the one it was trained for."""
    if named is not None:
        return None if named == NO_ADAPTER else Path(named)
    path = bundled_adapter()
    return path if model_id == BUNDLED and variant == "absorber" and path.exists() else None


def choose_adapter_for(named: str | None, model: Mapping[str, Any], variant: str) -> Path | None:
    """Return the adapter file to use for a bundle, as ``choose_adapter`` does. ``model``: the manifest's facts about its
    backbone. The adapter that ships fits only the weights that are embedded today."""
    return choose_adapter(named, None if has_other_weights(model) else model["model_id"], variant)


def has_other_weights(model: Mapping[str, Any]) -> bool:
    """Whether the ``model`` of a manifest has embedded weights other than today's."""
    if model["model_id"] != BUNDLED:
        return False
    return name_weights(model["projector_sha256"]) != bundled_model_info()["weights"]


def load_adapter(path: Path, model: Mapping[str, Any]) -> Adapter:
    """Read an adapter for the backbone that ``model`` describes. Raises ``BackboneError``."""
    weights, header = read_adapter(path, model, describe_model)
    try:
        modules = FreResModules(ModuleShape.from_dict(header["shape"]))
        modules.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(f"{path}: damaged adapter: {str(error).splitlines()[0]}") from error
    return Adapter(path, modules.eval().requires_grad_(False), header.get("training") or {})


def load_modules(path: Path, model: Mapping[str, Any], variant: str, width: int, num_bands: int) -> FreResModules:
    """Return modules that fit what they are used for.

    ``path``: the adapter. ``model``: facts about the backbone, from a manifest or the loaded one. ``variant``: that of
    the tracks. ``width``, ``num_bands``: D, and how many bands the tracks have, or may have. Raises ``BackboneError`` for
    an adapter that does not fit.
    """
    adapter = load_adapter(path, model)
    check_variant(adapter, variant)
    check_shape(adapter, width, num_bands)
    return adapter.modules


def check_shape(adapter: Adapter, width: int, num_bands: int) -> None:
    """Refuse modules of a width other than ``width`` (D), or with fewer bands. Raises ``BackboneError``."""
    shape = adapter.modules.shape
    if shape.width != width:
        raise BackboneError(f"{adapter.path}: adapter width: expected {width}, got {shape.width}")
    if shape.num_bands < num_bands:
        raise BackboneError(
            f"{adapter.path}: adapter bands: expected at least {num_bands}, got {shape.num_bands}",
            f"compress with --set max_coefficients={shape.num_bands}",
        )


def check_variant(adapter: Adapter, variant: str) -> None:
    """Refuse modules that were trained for another variant. Raises ``BackboneError``."""
    trained = adapter.training.get("variant", variant)
    if trained != variant:
        raise BackboneError(
            f"{adapter.path}: adapter for another variant: expected {variant}, got {trained}",
            "compress with --variant, or train an adapter with --set variant=",
        )
