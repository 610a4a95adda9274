"""The bundle format: what every file must hold, whatever its version, and the reader for each version.

The specification is freres-bundle(5). A new version is a file ``version_N.py``, a line in ``READERS`` and its number in
``SCHEMA_VERSION``; earlier readers never change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from freres_cli.bundle import version_1, version_2, version_3, version_4
from freres_cli.bundle.checks import Field, Fields, damaged, read_fields
from freres_cli.content import Content, count_by_kind, count_from, kind_of, latents_of
from freres_cli.errors import BundleError
from freres_cli.stretches import Stretches

FORMAT = "freres.bundle"
READERS = {1: version_1, 2: version_2, 3: version_3, 4: version_4}
MAX_DEPTH = 16
SCHEMA_VERSION = 4  # that freres writes
# Fields added since the versions were fixed. A bundle without one has null in it: not known.
LATER_FIELDS: Fields = {
    "model": {"pixels_sha256": Field("text", may_be_null=True, default=None)},
    "source": {"zero_s": Field("number", may_be_null=True, default=None)},
    "geometry": {
        "residual_grid": Field("wholes", may_be_null=True, default=None, length=2, low=1, high=256),
        "text_per_frame": Field("wholes", may_be_null=True, default=None, high=2**31),
        **dict.fromkeys(("text_in_video", "text_around_video"), Field("whole", may_be_null=True, default=None)),
    },
    "tokens": {
        **dict.fromkeys(
            ("text_overhead_tokens", "context_tokens", "moved_tokens", "moved_outside"),
            Field("whole", may_be_null=True, default=None),
        ),
        "quality": Field("number", may_be_null=True, default=None),
        **dict.fromkeys(("mean_shift_s", "max_shift_s"), Field("number", may_be_null=True, default=None)),
    },
}
SECTIONS = {
    "freres_version": str,
    **dict.fromkeys(("model", "source", "sampling", "geometry", "settings", "tokens", "tensors"), dict),
    "history": list,
}


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row order."""
    if not tensor.numel():
        return hashlib.sha256().hexdigest()
    flat = _pack(tensor).view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _pack(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, in row order. torch calls a single element contiguous whatever its strides are."""
    tensor = tensor.detach().cpu().contiguous()
    is_packed = tensor.numel() != 1 or tensor.stride() == (1,) * tensor.ndim
    return tensor if is_packed else tensor.clone(memory_format=torch.contiguous_format)


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and digest of each tensor, for the manifest."""
    return {
        name: {"shape": list(tensor.shape), "dtype": _dtype_name(tensor), "sha256": tensor_digest(tensor)}
        for name, tensor in tensors.items()
    }


def encode_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as canonical JSON: the same content always gives the same bytes."""
    return json.dumps(manifest, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def make_content(content: Content, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to pass to ``torch.save``: everything on the CPU, each tensor stored alone."""
    tensors = {name: _pack(tensor) for name, tensor in READERS[SCHEMA_VERSION].tensors_of(content).items()}
    # A view would drag its whole storage into the file.
    tensors = {n: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for n, t in tensors.items()}
    text = encode_manifest({**manifest, "content": kind_of(content), "tensors": describe_tensors(tensors)})
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "manifest": text,
        "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tensors": tensors,
    }


def read_content(loaded: Any, where: str) -> tuple[int, dict[str, Any], Content]:
    """Return the schema version, manifest and content of what ``torch.load`` gave, and check every byte of it.

    ``where``: the file. Raises ``BundleError``.
    """
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
        raise BundleError(f"{where}: not a freres bundle", "make one with: freres compress VIDEO")
    version = loaded.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version not in READERS:
        raise BundleError(
            f"{where}: bundle schema: expected version {' or '.join(map(str, READERS))}, got {_shown(version)}",
            "use the freres release that wrote it, or compress the video again",
        )
    text, tensors = loaded.get("manifest"), loaded.get("tensors")
    if not isinstance(text, str) or not isinstance(tensors, dict):
        raise damaged(where, "manifest or tensors are missing")
    if not all(isinstance(name, str) for name in tensors):
        raise damaged(where, "tensors: expected names")
    # Text that is not valid Unicode cannot match any checksum.
    if loaded.get("manifest_sha256") != hashlib.sha256(text.encode(errors="replace")).hexdigest():
        raise damaged(where, "the manifest's checksum does not match")
    reader = READERS[version]
    stored = _decode_manifest(text, where)
    _check_tensors(tensors, stored["tensors"], reader.DTYPES, where)
    manifest = read_fields(reader.read_manifest(stored, where), LATER_FIELDS, where)
    content = reader.read_content(manifest, tensors, where)
    _check_facts(manifest, content, where)
    return version, *_settle_times(manifest, content)


def _settle_times(manifest: dict[str, Any], content: Content) -> tuple[dict[str, Any], Content]:
    """Manifest and content with times that count from the first frame. Without ``zero_s`` they are on the file's own clock;
    those of frames passed already decoded stay as they were given."""
    source = manifest["source"]
    if source["zero_s"] is not None:
        return manifest, content
    zero_s = 0.0 if source["container"] is None else float(source["start_s"])
    return {**manifest, "source": {**source, "zero_s": zero_s}}, count_from(content, zero_s)


def _shown(version: Any) -> str:
    return repr(version)[:40] if isinstance(version, int | float | str) else type(version).__name__


def _check_facts(manifest: Mapping[str, Any], content: Content, where: str) -> None:
    """What the manifest says of the tensors is true of them."""
    told, by_kind = manifest["tokens"], count_by_kind(content)
    if told["tokens_by_kind"] != by_kind or told["visual_tokens"] != sum(by_kind.values()):
        raise damaged(where, f"tokens: expected {dict(by_kind)}, got {told['tokens_by_kind']}"[:200])
    _, grid_h, grid_w = content.grid
    full_tokens = manifest["sampling"]["baseline_frames"] * grid_h * grid_w
    if told["full_tokens"] != full_tokens:
        raise damaged(where, f"tokens.full_tokens: expected {full_tokens}, got {told['full_tokens']}")
    quality = content.quality if isinstance(content, Stretches) else None
    if told["quality"] != quality:
        raise damaged(where, f"tokens.quality: expected {quality}, got {told['quality']}")
    wanted = manifest["settings"]["trends"]["value"]
    if isinstance(content, Stretches) and content.has_trends != (wanted == "keep"):
        channels = content.width if wanted == "keep" else 0
        raise damaged(where, f"trends: expected {channels} channels, as settings.trends is {wanted}")
    runs = manifest["geometry"]["text_per_frame"]
    if runs is not None and (len(runs) % 2 or sum(runs[::2]) != content.grid[0]):
        raise damaged(where, f"geometry.text_per_frame: expected {content.grid[0]} frames in runs")
    model, latents = manifest["model"], latents_of(content)
    num_rows = 1 if manifest["settings"]["deepstack"]["value"] == "drop" else 1 + model["num_deep_layers"]
    if model["width"] != content.width or latents.shape[1] != content.width * num_rows:
        expected = f"{num_rows} rows of {model['width']} channels"
        raise damaged(where, f"model: expected {expected} a token, got {latents.shape[1]} channels")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _refuse_depth(value: Any) -> None:
    """Nothing in a manifest is nested deeply, and what walks through it may be recursive."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for part in level
            for item in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def _decode_manifest(text: str, where: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_finite)
        _refuse_depth(manifest)
        json.dumps(manifest, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise damaged(where, "the manifest is not JSON in UTF-8 with finite numbers") from error
    if not isinstance(manifest, dict):
        raise damaged(where, "the manifest is not an object")
    for key, kind in SECTIONS.items():
        if not isinstance(manifest.get(key), kind):
            raise damaged(where, f"the manifest lacks {key!r}")
    if not all(isinstance(step, dict) and isinstance(step.get("verb"), str) for step in manifest["history"]):
        raise damaged(where, "history: expected a list of objects, each with its verb")
    return manifest


def _check_tensors(tensors: dict[Any, Any], described: dict[str, Any], dtypes: tuple[str, ...], where: str) -> None:
    if set(tensors) != set(described):
        odd = sorted(map(str, set(tensors) ^ set(described)))
        raise damaged(where, f"tensors and manifest differ: {', '.join(odd[:3])}")
    for name, tensor in tensors.items():
        facts = described[name]
        if not isinstance(tensor, Tensor) or not isinstance(facts, dict) or not _is_plain(tensor):
            raise damaged(where, f"{name}: expected a plain tensor")
        got = [list(tensor.shape), _dtype_name(tensor)]
        expected = [facts.get("shape"), facts.get("dtype")]
        if got != expected or got[1] not in dtypes:
            raise damaged(where, f"{name}: expected {expected[1]} {expected[0]}, got {got[1]} {got[0]}")
        # Do not trust the writer's strides: an expanded view could claim far more rows than the file holds.
        if not tensor.is_contiguous():
            raise damaged(where, f"{name}: expected a contiguous tensor")
        if facts.get("sha256") != tensor_digest(tensor):
            raise damaged(where, f"{name}: the checksum does not match")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and no view that computes them."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return not (tensor.is_neg() or tensor.is_conj() or tensor.requires_grad)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
