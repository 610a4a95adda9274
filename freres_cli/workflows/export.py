"""bundle -> one safetensors file with what another runtime takes. See freres-serving(7)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from freres_cli.backbones.placement import PLACED_FAMILIES
from freres_cli.bundle.store import StoredBundle, read_bundle
from freres_cli.devices import Device
from freres_cli.errors import BackboneError
from freres_cli.files import InputFiles, check_destination, write_atomically
from freres_cli.pipeline.adapters import adapter_file
from freres_cli.pipeline.models import Models, ModelSource, find_model
from freres_cli.pipeline.placing import place_bundle, split_chat
from freres_cli.pipeline.tokens import load_tokens

HEADER = "freres"
# Families that the plug-in for vLLM has a model for.
VLLM_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOKEN_TENSORS = ("latents", "positions", "seconds", "kind", "gop", "energy", "frame_seconds")


@dataclass(frozen=True)
class ExportRequest:
    """What to export. ``target``: one of ``TARGETS``. ``model``, ``revision``, ``adapter``: as ``freres ask`` takes them."""

    bundle: Path
    output: Path
    target: str
    device: Device
    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """What a file holds: ``tensors`` by name, and ``facts`` for its header. ``notes``: what the user should know."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ExportResult:
    """A file that was written. ``shapes``: of its tensors, by name."""

    num_bytes: int
    num_visual_tokens: int
    shapes: dict[str, list[int]]
    notes: tuple[str, ...]


def export_bundle(request: ExportRequest) -> ExportResult:
    """Write what another runtime takes. Raises ``BundleError`` for a bad bundle, ``BackboneError`` for a model that is not
    the bundle's or whose family the target cannot take, ``UsageError`` for a file that cannot be written."""
    check_destination(request.output, request.force)
    named = ("bundle", request.bundle), ("adapter", adapter_file(request.adapter))
    InputFiles(named).refuse(request.output)
    bundle = read_bundle(request.bundle)
    if request.target != "safetensors":  # which needs no model
        InputFiles(_find_source(bundle, request).files).refuse(request.output)
    made = TARGETS[request.target](bundle, request)
    tensors = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
    facts = {"format": f"freres.{request.target}/1", "model": bundle.manifest["model"], **made.facts}
    facts["bundle_sha256"] = hashlib.sha256(request.bundle.read_bytes()).hexdigest()
    content = save(tensors, {HEADER: json.dumps(facts, sort_keys=True)})
    write_atomically(request.output, lambda file: file.write(content), force=request.force)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return ExportResult(len(content), bundle.manifest["tokens"]["visual_tokens"], shapes, made.notes)


def export_tokens(bundle: StoredBundle, request: ExportRequest) -> Exported:
    """The visual tokens themselves, as ``Bundle.tokens`` gives them. Needs no model."""
    loaded = load_tokens(bundle, request.adapter)
    tokens = loaded.tokens
    facts = {"grid": list(tokens.grid), "width": tokens.width}
    facts["text_after"] = bundle.manifest["settings"]["text_after"]["value"]
    return Exported({name: getattr(tokens, name) for name in TOKEN_TENSORS}, facts, loaded.notes)


def export_hf(bundle: StoredBundle, request: ExportRequest) -> Exported:
    """The prompt up to the end of the video, for ``generate`` of transformers: ids, positions and encoder outputs.

    ``position_ids``: (4, L), the plain index, then t, h and w. ``deepstack``: (layers, S, D), empty without DeepStack.
    """
    models = _models_of(bundle, request)
    placed, chat = place_bundle(bundle, models, str(request.bundle), request.adapter), split_chat(models)
    video, num_before = placed.video, len(chat.prefix)
    ids = torch.cat([torch.tensor(chat.prefix, dtype=torch.int64), video.ids])
    count = torch.arange(len(ids), dtype=torch.float32)
    axes = torch.cat([count[:num_before].expand(3, -1), video.positions + num_before], dim=1)
    tensors = {"input_ids": ids, "position_ids": torch.cat([count[None], axes])}
    tensors |= {"video": video.latents[:, : video.width], "deepstack": video.deep_rows}
    facts: dict[str, Any] = {"next_position": video.next_position + num_before}
    facts |= {"before_question": chat.before_question, "after_question": chat.after_question}
    return Exported(tensors, facts, placed.notes)


def export_vllm(bundle: StoredBundle, request: ExportRequest) -> Exported:
    """The video's part of the prompt, for the plug-in that ``freres_cli.integrations`` registers with vLLM."""
    models = _models_of(bundle, request)
    check_served(models.prompt_counter.family)
    placed = place_bundle(bundle, models, str(request.bundle), request.adapter)
    video = placed.video
    tensors = {"ids": video.ids, "positions": video.positions.T, "latents": video.latents}
    return Exported(tensors, {"next_position": video.next_position, "width": video.width}, placed.notes)


def check_served(family: str) -> None:
    """Raise ``BackboneError`` for a family that the plug-in for vLLM does not serve."""
    if family not in VLLM_FAMILIES:
        raise BackboneError(
            f"{family}: the plug-in for vLLM does not serve this family: expected one of {', '.join(VLLM_FAMILIES)}",
            "ask the bundle with freres ask" + (", or see: freres export --to hf" if family in PLACED_FAMILIES else ""),
        )


def _models_of(bundle: StoredBundle, request: ExportRequest) -> Models:
    return Models(_find_source(bundle, request))


def _find_source(bundle: StoredBundle, request: ExportRequest) -> ModelSource:
    """The model that is named, or the one that the bundle records."""
    recorded = bundle.manifest["model"]
    return find_model(recorded, str(request.bundle), request.device, request.model, request.revision)


TARGETS: dict[str, Callable[[StoredBundle, ExportRequest], Exported]] = {
    "vllm": export_vllm,
    "hf": export_hf,
    "safetensors": export_tokens,
}
