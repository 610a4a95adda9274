"""Bundles for vLLM: a file's bytes as the payload of a request, and the checked rows of the prompt that it stands for.

Imports nothing of vLLM. A payload is read where the served model is known, so that any way into the engine, of any client,
passes the same checks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from freres_cli.backbones.placement import PlacedVideo
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import BundleError, explain_no_file
from freres_cli.pipeline.models import Models, check_identity, make_source
from freres_cli.pipeline.placing import place_bundle
from freres_cli.workflows.export import HEADER

CONTENT, NUM_BYTES = "freres_bundle", "freres_bundle_bytes"
VLLM_FORMAT = "freres.vllm/1"
# Bundles kept after they are read: a question about one of them reads nothing.
NUM_KEPT = 32


@dataclass(frozen=True)
class BundleRows:
    """A bundle as rows of a prompt. ``digest``: SHA-256 of its file, its identity in every cache of vLLM."""

    digest: str
    video: PlacedVideo


def make_payload(content: bytes) -> dict[str, Tensor]:
    """Return what a request carries under ``multi_modal_data["video"]`` for the bytes of a bundle, or of a file that
    ``freres export --to vllm`` wrote."""
    return {
        CONTENT: torch.frombuffer(bytearray(content), dtype=torch.uint8),
        NUM_BYTES: torch.tensor([len(content)]),
    }


def load_payload(path: str | Path) -> dict[str, Tensor]:
    """Return the payload of a file. Raises ``BundleError`` if it cannot be read; its content is checked by the server."""
    path = Path(path)
    if not path.is_file():
        raise BundleError(f"{explain_no_file(path)}: expected a bundle", "make one with: freres compress VIDEO")
    return make_payload(path.read_bytes())


def is_payload(data: object) -> bool:
    """Whether the data of a request is one or more bundles."""
    return isinstance(data, Mapping) and CONTENT in data


def split_payload(data: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of every file in a payload. Raises ``BundleError`` if the sizes are not those of the content."""
    content, sizes = data[CONTENT], data.get(NUM_BYTES)
    if not isinstance(content, Tensor) or content.dtype != torch.uint8 or not isinstance(sizes, Tensor):
        raise BundleError("bundle: expected its bytes and their number, as make_payload gives them")
    counts = sizes.flatten().tolist()
    if not counts or min(counts) < 1 or sum(counts) != content.numel():
        raise BundleError(f"bundle: expected {content.numel()} bytes in all, got sizes {counts}")
    return [part.numpy().tobytes() for part in content.flatten().split(counts)]


class BundleReader:
    """Reads bundles for one served model. ``model``, ``revision``: as the server names it."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        self._models = Models(make_source(model, "cpu", revision=revision))
        self._read = functools.lru_cache(NUM_KEPT)(self._read_uncached)

    def read(self, content: bytes) -> BundleRows:
        """Return the rows of a bundle or an exported file. Raises ``BundleError`` for a bad file, ``BackboneError`` for one
        of another model, or of a family that vLLM is not given."""
        return self._read(content)

    def _read_uncached(self, content: bytes) -> BundleRows:
        is_archive = content.startswith(b"PK")
        video = self._place(content) if is_archive else self._load(content)
        check_rows(video, self._models.prompt_counter.width, self._models.prompt_counter.num_deep_layers)
        return BundleRows(hashlib.sha256(content).hexdigest(), video)

    def _place(self, content: bytes) -> PlacedVideo:
        with tempfile.TemporaryDirectory(prefix="freres-") as folder:
            path = Path(folder) / "bundle.pt"
            path.write_bytes(content)
            try:
                bundle = read_bundle(path)
            except BundleError as error:
                raise BundleError(error.message.replace(str(path), "bundle"), error.hint) from error
            return place_bundle(bundle, self._models, "bundle").video

    def _load(self, content: bytes) -> PlacedVideo:
        try:
            tensors, size = load(content), int.from_bytes(content[:8], "little")
            facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][HEADER])
            if facts["format"] != VLLM_FORMAT:
                raise BundleError(f"bundle: expected {VLLM_FORMAT}, got {facts['format']}", "export it with --to vllm")
            width, after = int(facts["width"]), float(facts["next_position"])
            ids, positions, latents = (tensors[name] for name in ("ids", "positions", "latents"))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BundleError("bundle: neither a bundle nor a file of freres export --to vllm") from error
        counter, identity = self._models.prompt_counter, self._models.identify_encoder().fingerprint
        check_identity(facts["model"], width, identity, counter.width, "bundle")
        pad: int = counter.video_token_id  # type: ignore[attr-defined]
        return PlacedVideo(ids, ids == pad, positions.T, latents, width, after)


def check_rows(video: PlacedVideo, width: int, num_deep_layers: int) -> None:
    """Refuse rows that the engine would trip over. ``width``, ``num_deep_layers``: those of the served model. Raises
    ``BundleError``."""
    num_rows, num_tokens, channels = len(video.ids), int(video.is_visual.sum()), width * (1 + num_deep_layers)
    wanted = {"ids": (num_rows,), "positions": (3, num_rows), "latents": (num_tokens, channels)}
    for name, shape in wanted.items():
        tensor: Tensor = getattr(video, name)
        if tuple(tensor.shape) != shape:
            raise BundleError(f"bundle: {name}: expected {shape}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BundleError(f"bundle: {name}: expected finite numbers")
    if not num_tokens or video.ids.dtype != torch.int64:
        raise BundleError("bundle: expected at least one visual token, and ids of int64")
    if bool((video.positions < 0).any()) or not 0 < video.next_position < 2**24:
        raise BundleError("bundle: positions: expected none below 0, and the text after them above it")
