"""The bundle format: what must be in the file, and the manifest. The specification is freres-bundle(5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from freres_cli.errors import BundleError, PresetError
from freres_cli.presets import KEYS, check_value
from freres_cli.records import Tracks

FORMAT = "freres.bundle"
SCHEMA_VERSION = 1
ALLOWED_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
}
MANIFEST_KEYS = ("freres_version", "model", "source", "sampling", "geometry", "settings", "tokens", "history")


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row order."""
    if not tensor.numel():
        return hashlib.sha256().hexdigest()
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and digest of each tensor, as the manifest holds them."""
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": tensor_digest(tensor),
        }
        for name, tensor in tensors.items()
    }


def encode_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as canonical JSON: the same content is always the same bytes."""
    return json.dumps(manifest, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check_content(content: Any, where: str) -> dict[str, Any]:
    """Return the manifest of a loaded file once its outer shape and its digests are right. Raises ``BundleError``."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{where}: not a freres bundle", "make one with: freres compress VIDEO")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: bundle schema: expected version {SCHEMA_VERSION}, got {version!r}",
            "use the freres release that wrote it, or compress the video again",
        )
    text, tensors = content.get("manifest"), content.get("tensors")
    if not isinstance(text, str) or not isinstance(tensors, dict):
        raise _damaged(where, "manifest or tensors are missing")
    if content.get("manifest_sha256") != hashlib.sha256(text.encode()).hexdigest():
        raise _damaged(where, "the manifest's checksum does not match")
    manifest = _decode_manifest(text, where)
    _check_tensors(tensors, manifest["tensors"], where)
    return manifest


def _decode_manifest(text: str, where: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _damaged(where, "the manifest is not JSON") from error
    if not isinstance(manifest, dict):
        raise _damaged(where, "the manifest is not an object")
    for key in (*MANIFEST_KEYS, "tensors"):
        expected = list if key == "history" else str if key == "freres_version" else dict
        if not isinstance(manifest.get(key), expected):
            raise _damaged(where, f"the manifest lacks {key!r}")
    return manifest


def _check_tensors(tensors: dict[Any, Any], described: dict[str, Any], where: str) -> None:
    if set(tensors) != set(described):
        odd = sorted(map(str, set(tensors) ^ set(described)))
        raise _damaged(where, f"tensors and manifest differ: {', '.join(odd[:3])}")
    for name, tensor in tensors.items():
        facts = described[name]
        if not isinstance(tensor, Tensor) or not isinstance(facts, dict) or tensor.layout != torch.strided:
            raise _damaged(where, f"{name}: expected a plain tensor")
        got = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        expected = [facts.get("shape"), facts.get("dtype")]
        if got != expected or tensor.dtype not in ALLOWED_DTYPES.values():
            raise _damaged(where, f"{name}: expected {expected[1]} {expected[0]}, got {got[1]} {got[0]}")
        # Strides are the writer's word: an expanded view could claim far more rows than the file holds.
        if not tensor.is_contiguous():
            raise _damaged(where, f"{name}: expected a contiguous tensor")
        if facts.get("sha256") != tensor_digest(tensor):
            raise _damaged(where, f"{name}: the checksum does not match")


def tracks_from(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], where: str) -> Tracks:
    """Return the tracks that the tensors hold. Raises ``BundleError`` where shapes or indices do not fit together."""
    geometry, settings = manifest["geometry"], manifest["settings"]
    try:
        for key in KEYS.keys() - {"description"}:
            check_value(key, settings[key]["value"], "settings")
        if min(_whole(settings["reference_budget_tokens"]["value"]), _whole(manifest["tokens"]["full_tokens"])) < 1:
            raise ValueError("reference_budget_tokens, full_tokens: expected at least 1")
        tracks = Tracks(
            width=_whole(geometry["width"]),
            grid=(_whole(geometry["grid"][0]), _whole(geometry["grid"][1]), _whole(geometry["grid"][2])),
            pooled_grid=(_whole(geometry["pooled_grid"][0]), _whole(geometry["pooled_grid"][1])),
            **tensors,
        )
        if settings["variant"]["value"] == "idct":
            _check_dense_bases(tracks)
        return tracks
    except PresetError as error:
        raise _damaged(where, error.message) from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(where, " ".join(str(error).split()) or type(error).__name__) from error


def _check_dense_bases(tracks: Tracks) -> None:
    """The idct variant rebuilds whole frames: a GoP with coefficients has the base of every cell."""
    cells = tracks.pooled_grid[0] * tracks.pooled_grid[1]
    counts = tracks.base_gop.bincount(minlength=tracks.gop_anchor_frame.shape[0])
    if bool((counts[tracks.coefficient_gop] != cells).any()):
        raise ValueError(f"base_latents: expected all {cells} cells of a GoP with variant idct")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"geometry: expected whole numbers, got {value!r}")
    return value


def _damaged(where: str, what: str) -> BundleError:
    return BundleError(f"{where}: damaged bundle: {what}", "compress the video again, or copy the bundle again")
