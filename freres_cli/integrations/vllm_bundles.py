"""Bundles for vLLM: a file's bytes as the payload of a request, and the checked rows of the prompt that it stands for.

Imports nothing of vLLM. A payload is read where the served model is known, so that any way into the engine, of any client,
passes the same checks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from freres_cli.backbones.placement import PlacedVideo
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import BundleError, count_of, explain_no_file
from freres_cli.pipeline.models import Models, check_identity, make_source
from freres_cli.pipeline.placing import place_bundle
from freres_cli.workflows.export import HEADER, check_served

CONTENT, NUM_BYTES = "freres_bundle", "freres_bundle_bytes"
VLLM_FORMAT = "freres.vllm/1"
# How much of the bundles read last is kept: a further question about one of them has only to hash its file.
KEPT_BYTES = 4 * 2**30
MAKE_ONE = "make one with: freres compress VIDEO"
# Positions below twice this are exact in float32: the bundles of a prompt have one half, its text the other.
MOST_POSITIONS = 2**23
# vLLM shows what its own loggers and those below them say.
LOG = logging.getLogger("vllm.plugins.freres")


@dataclass(frozen=True)
class BundleRows:
    """A bundle as rows of a prompt. ``digest``: SHA-256 of its file, its identity in every cache of vLLM."""

    digest: str
    video: PlacedVideo


def make_payload(content: bytes, name: str = "bundle") -> dict[str, Tensor]:
    """Return what a request carries under ``multi_modal_data["video"]`` for the bytes of a bundle, or of a file that
    ``freres export --to vllm`` wrote. ``name``: for messages. Raises ``BundleError`` if there are none."""
    if not content:
        raise BundleError(f"{name}: is empty: expected a bundle", MAKE_ONE)
    return {
        CONTENT: torch.frombuffer(bytearray(content), dtype=torch.uint8),
        NUM_BYTES: torch.tensor([len(content)]),
    }


def load_payload(path: str | Path) -> dict[str, Tensor]:
    """Return the payload of a file. Raises ``BundleError`` if it cannot be read; its content is checked by the server."""
    path = Path(path)
    if not path.is_file():
        raise BundleError(f"{explain_no_file(path)}: expected a bundle", MAKE_ONE)
    return make_payload(path.read_bytes(), str(path))


def is_payload(data: object) -> bool:
    """Whether the data of a request is one or more bundles: a payload, or a list with one in it."""
    return any(isinstance(item, Mapping) and CONTENT in item for item in (data if isinstance(data, list) else [data]))


def split_payload(data: Mapping[str, Any] | list[Any]) -> list[bytes]:
    """Return the bytes of every file in a payload, or a list of them. Raises ``BundleError`` if the sizes are not those of
    the content, or for a list with anything else in it."""
    if isinstance(data, list):
        if not all(map(is_payload, data)):
            raise BundleError("bundle: expected a list of bundles alone", "put other videos into another request")
        return [content for item in data for content in split_payload(item)]
    content, sizes = data[CONTENT], data.get(NUM_BYTES)
    if not isinstance(content, Tensor) or content.dtype != torch.uint8 or not isinstance(sizes, Tensor):
        raise BundleError("bundle: expected its bytes and their number, as make_payload gives them")
    counts = sizes.flatten().tolist()
    if not counts or min(counts) < 1 or sum(counts) != content.numel():
        raise BundleError(f"bundle: expected {content.numel()} bytes in all, got sizes {counts}")
    return [part.numpy().tobytes() for part in content.flatten().split(counts)]


class BundleReader:
    """Reads bundles for one served model, one at a time, and keeps those read last, up to ``KEPT_BYTES`` or the newest.

    ``model``, ``revision``: as the server names it.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self._models = Models(make_source(model, "cpu", revision=revision))
        self._kept: OrderedDict[str, PlacedVideo] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, content: bytes) -> BundleRows:
        """Return the rows of a bundle or an exported file. Raises ``BundleError`` for a bad file, ``BackboneError`` for one
        of another model, or of a family that vLLM is not given."""
        digest = hashlib.sha256(content).hexdigest()
        with self._lock:
            check_served(self._models.prompt_counter.family)
            if digest not in self._kept:
                video = self._place(content) if content.startswith(b"PK") else self._load(content)
                check_rows(video, self._models.prompt_counter)
                self._kept[digest] = video
            self._kept.move_to_end(digest)
            while len(self._kept) > 1 and sum(map(_count_bytes, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return BundleRows(digest, self._kept[digest])

    def _place(self, content: bytes) -> PlacedVideo:
        with tempfile.TemporaryDirectory(prefix="freres-") as folder:
            path = Path(folder) / "bundle.pt"
            path.write_bytes(content)
            try:
                bundle = read_bundle(path)
            except BundleError as error:
                raise BundleError(error.message.replace(str(path), "bundle"), error.hint) from error
            placed = place_bundle(bundle, self._models, "bundle")
        for note in placed.notes:
            LOG.info("bundle: %s", note)
        return placed.video

    def _load(self, content: bytes) -> PlacedVideo:
        try:
            tensors, size = load(content), int.from_bytes(content[:8], "little")
            facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][HEADER])
            if facts["format"] != VLLM_FORMAT:
                raise BundleError(f"bundle: expected {VLLM_FORMAT}, got {facts['format']}", "export it with --to vllm")
            width, after, model = int(facts["width"]), float(facts["next_position"]), dict(facts["model"])
            ids, positions, latents = (tensors[name] for name in ("ids", "positions", "latents"))
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BundleError("bundle: neither a bundle nor a file of freres export --to vllm") from error
        counter, identity = self._models.prompt_counter, self._models.identify_encoder().fingerprint
        check_identity(model, width, identity, counter.width, "bundle")
        for name, tensor, count in (("ids", ids, 1), ("positions", positions, 2), ("latents", latents, 2)):
            if tensor.ndim != count:
                raise BundleError(f"bundle: {name}: expected {count_of(count, 'dimension')}, got {tensor.ndim}")
        pad: int = counter.video_token_id  # type: ignore[attr-defined]
        return PlacedVideo(ids, ids == pad, positions.T, latents, width, after)


def _count_bytes(video: PlacedVideo) -> int:
    return sum(part.nbytes for part in (video.ids, video.is_visual, video.positions, video.latents))


def check_rows(video: PlacedVideo, model: Any) -> None:
    """Refuse rows that the engine would trip over. ``model``: the language half of the served model, without weights. Raises
    ``BundleError``."""
    num_rows, num_tokens = len(video.ids), int(video.is_visual.sum())
    channels = model.width * (1 + model.num_deep_layers)
    wanted = {"ids": (num_rows,), "positions": (3, num_rows), "latents": (num_tokens, channels)}
    for name, shape in wanted.items():
        tensor: Tensor = getattr(video, name)
        kinds = (torch.int64,) if name == "ids" else (torch.float32, torch.bfloat16, torch.float16)
        if tuple(tensor.shape) != shape or tensor.dtype not in kinds:
            raise BundleError(f"bundle: {name}: expected {shape} {kinds[0]}, got {tuple(tensor.shape)} {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise BundleError(f"bundle: {name}: expected finite numbers")
    if not num_tokens:
        raise BundleError("bundle: expected at least one visual token, got none")
    if bool(((video.ids < 0) | (video.ids >= model.decoder.config.vocab_size)).any()):
        raise BundleError(f"bundle: ids: expected 0 to {model.decoder.config.vocab_size - 1}")
    after = video.next_position
    if bool(((video.positions < 0) | (video.positions >= MOST_POSITIONS)).any()):
        raise BundleError(f"bundle: positions: expected 0 to {MOST_POSITIONS}")
    if not 0 < after < MOST_POSITIONS or after != int(after):
        raise BundleError(f"bundle: next_position: expected a whole number from 1 to {MOST_POSITIONS}, got {after}")


def check_lengths(bundles: Sequence[BundleRows]) -> None:
    """Refuse the bundles of a prompt that have too many positions together. Raises ``BundleError``."""
    if (total := sum(int(bundle.video.next_position) for bundle in bundles)) > MOST_POSITIONS:
        raise BundleError(
            f"bundles of one prompt: expected at most {MOST_POSITIONS} positions in all, got {total}",
            "ask about fewer at once",
        )
