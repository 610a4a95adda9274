"""Adapter files: trained weights as safetensors, with a header that says what they were trained for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from freres_cli.errors import BackboneError, explain_no_file
from freres_cli.files import write_atomically

HEADER = "freres.adapter/1"
MODEL_FACTS = ("config_sha256", "projector_sha256")
# Known where the model itself is at hand; a bundle's manifest has neither.
WEIGHT_FACTS = ("tower_sha256", "decoder_sha256")


def write_adapter(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, Any], *, force: bool = False) -> None:
    """Write trained ``weights`` to ``path`` atomically.

    ``header``: facts about the backbone under ``model``, the ``method`` they are for, module sizes under ``shape``, and
    facts about the training under ``training``. ``force``: as in ``write_atomically``. Raises ``UsageError`` or
    ``ResourceError``.
    """
    content = save(dict(weights), {HEADER: json.dumps(header, sort_keys=True)})
    write_atomically(path, lambda file: file.write(content), force=force)


def _name(model: Mapping[str, Any]) -> str:
    return str(model.get("model_id"))


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of an adapter. Raises ``BackboneError`` if the file is missing or damaged."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise BackboneError(f"{explain_no_file(path)}: expected an adapter")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path}: damaged adapter: {str(error).splitlines()[0]}") from error
    is_header = isinstance(header, dict) and all(isinstance(header.get(key), dict) for key in ("model", "shape"))
    if not is_header or not isinstance(header.get("training"), dict | None):
        raise BackboneError(f"{path}: not a freres adapter")
    return weights, header


def read_adapter(
    path: Path, model: Mapping[str, Any], name_model: Callable[[Mapping[str, Any]], str] = _name
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and header of an adapter for the backbone that ``model`` describes.

    ``model``: its config and projector are compared, and of the digests of ``WEIGHT_FACTS`` those that it has.
    ``name_model``: what the message calls a backbone with given facts, by default its id. Raises ``BackboneError`` if the
    file is missing, damaged, or made for another backbone.
    """
    weights, header = _read(path)
    compared = (*MODEL_FACTS, *(fact for fact in WEIGHT_FACTS if fact in model))
    differing = [fact for fact in compared if header["model"].get(fact) != model.get(fact)]
    if differing and all(fact in WEIGHT_FACTS and header["model"].get(fact) is None for fact in differing):
        raise BackboneError(
            f"{path}: does not record the weights that it was trained for",
            "train it again, or name --adapter none",
        )
    if differing:
        raise BackboneError(
            f"{path}: adapter for another model: expected {name_model(model)}, got {name_model(header['model'])} "
            f"(differs in {', '.join(differing)})",
            "name an adapter that was trained for this model, or --adapter none",
        )
    return weights, header
