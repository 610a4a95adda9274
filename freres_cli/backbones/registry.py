"""The model families, by the ``model_type`` of their config, and published checkpoints of each.

To add a family, write one file and add one line to ``FAMILIES``: that is enough to compress and ask. ``freres verify`` and
the tests take a line in ``stock_processors.py`` and ``stock.py``, and a case in ``tests/tiny_families.py``; ``freres plan``
one in ``sizes.py``; and ``freres export`` one in ``placement.py``. Classes are named by strings, so that listing models
imports none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from freres_cli.backbones.base import EncoderIdentity, LanguageModel, VisionEncoder
from freres_cli.backbones.checkpoint import Checkpoint, resolve_checkpoint
from freres_cli.devices import AS_COMPUTED, Device, Storage
from freres_cli.errors import BackboneError
from freres_cli.imports import quick_imports


@dataclass(frozen=True)
class Family:
    """Where to import the two halves of a family from, as ``module:class``."""

    vision: str
    language: str


def _family(module: str, name: str) -> Family:
    path = f"freres_cli.backbones.{module}:{name}"
    return Family(vision=f"{path}VisionEncoder", language=f"{path}LanguageModel")


FAMILIES: dict[str, Family] = {
    "qwen2_vl": _family("qwen2_vl", "Qwen2VL"),
    "qwen2_5_vl": _family("qwen2_5_vl", "Qwen25VL"),
    "qwen3_vl": _family("qwen3_vl", "Qwen3VL"),
    "qwen3_vl_moe": _family("qwen3_vl_moe", "Qwen3VLMoe"),
    "qwen3_5": _family("qwen3_5", "Qwen35"),
    "internvl": _family("internvl", "InternVL"),
    "llava_onevision": _family("llava_onevision", "LlavaOnevision"),
    "smolvlm": _family("smolvlm", "SmolVLM"),
    "minicpmv4_6": _family("minicpm_v", "MiniCPMV46"),
    "minicpmv4_7": _family("minicpm_v", "MiniCPMV47"),
}


@dataclass(frozen=True)
class KnownCheckpoint:
    """A published checkpoint of a supported family.

    The numbers come from its config or from that of the language model it was built on; None means unknown.
    ``kv_bytes_per_token`` and ``weight_bytes`` are for bfloat16. ``tokens_per_frame``: (frame width px, height px) ->
    visual tokens, with one entry if frames have only one size. ``is_tested``: whether this project has ever run the real
    weights. ``num_deep_layers``: rows of ``width`` stored in addition to the first.
    """

    model_id: str
    family: str
    width: int | None
    kv_bytes_per_token: int | None
    weight_bytes: int | None
    tokens_per_frame: dict[tuple[int, int], int]
    is_tested: bool
    num_deep_layers: int | None = 0

    @property
    def bundle_bytes_per_token(self) -> int | None:
        """Bytes of the latents of one stored token in bfloat16."""
        if self.width is None or self.num_deep_layers is None:
            return None
        return 2 * self.width * (1 + self.num_deep_layers)


_CELLS_28 = {(336, 336): 144, (448, 448): 256, (672, 672): 576, (1288, 728): 1196}
_CELLS_32 = {(320, 320): 100, (448, 448): 196, (672, 672): 441, (768, 768): 576, (1280, 736): 920}
_INTERNVL, _ONEVISION = {(448, 448): 256}, {(384, 384): 196}

KNOWN_CHECKPOINTS: tuple[KnownCheckpoint, ...] = (
    KnownCheckpoint("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", 1536, 28 * 1024, 2 * 2_208_985_600, _CELLS_28, False),
    KnownCheckpoint("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", 3584, 56 * 1024, 2 * 8_291_375_616, _CELLS_28, False),
    KnownCheckpoint("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 2048, 36 * 1024, 2 * 3_754_622_976, _CELLS_28, False),
    KnownCheckpoint("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 3584, 56 * 1024, 2 * 8_292_166_656, _CELLS_28, False),
    KnownCheckpoint("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", 2560, 144 * 1024, 2 * 4_437_815_808, _CELLS_32, False, 3),
    KnownCheckpoint("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", 4096, 144 * 1024, 2 * 8_767_123_696, _CELLS_32, False, 3),
    KnownCheckpoint("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe", 2048, 96 * 1024, None, _CELLS_32, False, 3),
    KnownCheckpoint("Qwen/Qwen3.5-27B", "qwen3_5", None, None, None, {}, False),
    KnownCheckpoint("OpenGVLab/InternVL3-1B-hf", "internvl", 896, 12 * 1024, None, _INTERNVL, False),
    KnownCheckpoint("OpenGVLab/InternVL3-8B-hf", "internvl", 3584, 56 * 1024, None, _INTERNVL, False),
    KnownCheckpoint("OpenGVLab/InternVL3_5-8B-HF", "internvl", 4096, 144 * 1024, None, _INTERNVL, False),
    KnownCheckpoint(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision", 896, 12 * 1024, None, _ONEVISION, False
    ),
    KnownCheckpoint(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", 3584, 56 * 1024, None, _ONEVISION, False
    ),
    KnownCheckpoint(
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm", 960, 40 * 1024, None, {(512, 512): 64}, False
    ),
    KnownCheckpoint("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm", 2048, 192 * 1024, None, {(384, 384): 81}, False),
)


def load_vision_encoder(
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
) -> VisionEncoder:
    """Load the vision half of a model, in evaluation mode, without reading weights of the language half.

    ``model``: ``bundled``, a local folder, a hub id, or a checkpoint already found. ``device``: where to run it.
    ``dtype``: a name from ``devices.DTYPE_NAMES``, by default auto. ``revision``: branch, tag or commit of a hub model.
    ``bundled_directory``: where the bundled model is. Raises BackboneError if it cannot be loaded, ResourceError if memory
    runs out.
    """
    checkpoint = resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)
    return _class_of(checkpoint, "vision").load(checkpoint, device, dtype)


def identify_vision_encoder(
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
) -> EncoderIdentity:
    """What identifies the encoder that ``load_vision_encoder`` would load, from its config and projector alone.

    See ``load_vision_encoder`` for the arguments.
    """
    checkpoint = resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)
    identity: EncoderIdentity = _class_of(checkpoint, "vision").identify(checkpoint, device, dtype)
    return identity


def digest_half(
    half: str,
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
) -> str:
    """Return a SHA-256 of samples of the stored weights of a ``half``, ``vision`` or ``language``, without loading it.

    See ``load_vision_encoder`` for the other arguments; ``device`` and ``dtype`` have no effect.
    """
    from freres_cli.backbones.weight_samples import digest_stored

    checkpoint = resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)
    files = _class_of(checkpoint, half).files
    return digest_stored(checkpoint, files.vision if half == "vision" else files.language)


def load_language_model(
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
    storage: Storage = AS_COMPUTED,
) -> LanguageModel:
    """Load the language half of a model and its tokenizer. Of the vision half, only the projector is read, to hash it.

    See ``load_vision_encoder`` for the arguments. ``storage``: how cache and weights are kept.
    """
    checkpoint = resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)
    return _class_of(checkpoint, "language").load(checkpoint, device, dtype, storage)


def load_prompt_counter(
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
    storage: Storage = AS_COMPUTED,
) -> LanguageModel:
    """Return the language half without weights: it counts the rows of prompts, and cannot run. Only config and tokenizer
    are read.

    See ``load_language_model`` for the arguments; ``device`` and ``dtype`` have no effect.
    """
    checkpoint = resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)
    return _class_of(checkpoint, "language").load_without_weights(checkpoint, storage)


def load_weightless_encoder(
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
) -> VisionEncoder:
    """Return the vision half without weights: it knows the sizes of frames, and cannot encode. Only configs are read.

    See ``load_vision_encoder`` for the arguments; ``device`` and ``dtype`` have no effect.
    """
    checkpoint = resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)
    return _class_of(checkpoint, "vision").load_without_weights(checkpoint)


def find_checkpoint(
    model: str | Checkpoint,
    device: Device,
    dtype: str | None = None,
    revision: str | None = None,
    bundled_directory: Path | None = None,
) -> Checkpoint:
    """Return where a model is, after checking its config. Of a hub model, only configs are downloaded.

    See ``load_vision_encoder`` for the arguments; ``device`` and ``dtype`` have no effect.
    """
    return resolve_checkpoint(model, tuple(FAMILIES), revision, bundled_directory)


def _class_of(checkpoint: Checkpoint, half: str) -> Any:
    return import_half(checkpoint.model_type, half)


def import_half(model_type: str, half: str) -> Any:
    """The class of a family's ``vision`` or ``language`` half. Raises BackboneError if transformers lacks the family."""
    module_name, _, class_name = getattr(FAMILIES[model_type], half).partition(":")
    try:
        with nullcontext() if module_name in sys.modules else quick_imports():
            loaded: Callable[..., Any] = getattr(import_module(module_name), class_name)
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"{model_type}: transformers {version('transformers')} lacks this family: {reason}",
            "install transformers 5.23 or newer, below 6",
        ) from error
    return loaded
