"""The one place that loads models: which one, where it runs, and its two halves, each loaded once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from freres_cli.backbones.base import EncoderIdentity, LanguageModel, VisionEncoder
from freres_cli.backbones.checkpoint import Checkpoint
from freres_cli.backbones.registry import (
    digest_half,
    find_checkpoint,
    identify_vision_encoder,
    load_language_model,
    load_prompt_counter,
    load_vision_encoder,
    load_weightless_encoder,
)
from freres_cli.bundle.adapter import MODEL_FACTS
from freres_cli.devices import AS_COMPUTED, DTYPE_NAMES, Device, Storage, choose_device
from freres_cli.errors import BackboneError, UsageError
from freres_cli.pipeline.choices import check_revision
from freres_cli.presets import BUNDLED, environment_value
from freres_cli.world.bundled_model import bundled_model_dir, name_weights

T = TypeVar("T")
# What a folder holds of a model, beside anything else that a user keeps there.
MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors")

# Loading sets functions and a dtype of torch for the whole process for a while: two loads at once would undo each other.
LOADING = threading.RLock()


@dataclass(frozen=True)
class ModelSource:
    """Which model, and where and how it runs.

    ``name``: ``bundled``, a folder, or a hub id. ``revision``: branch, tag or commit of a hub model. ``dtype``: one of
    ``devices.DTYPE_NAMES``, ``None`` for automatic. ``is_random``: only the config and the tokenizer of a folder are read;
    its weights are drawn at random. ``storage``: how the language half keeps its cache and its weights.
    """

    name: str
    device: Device
    revision: str | None = None
    dtype: str | None = None
    is_random: bool = False
    storage: Storage = AS_COMPUTED

    @property
    def folder(self) -> str | None:
        """The absolute path of a local folder; ``None`` for the bundled model and for hub models."""
        folder = Path(self.name).expanduser()
        return str(folder.resolve()) if self.name != BUNDLED and folder.is_dir() else None

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """The files of a local folder that belong to the model, as ``InputFiles`` takes them."""
        found = () if self.folder is None else (path for kind in MODEL_FILES for path in Path(self.folder).glob(kind))
        return tuple((f"model's {path.name}", path) for path in found)


def describe_model(model: Mapping[str, Any]) -> str:
    """Return what messages call the model with these facts. All embedded weights share one id, so they go by their own
    names."""
    is_embedded = model.get("model_id") == BUNDLED
    return f"embedded weights {describe_weights(model)}" if is_embedded else str(model.get("model_id"))


def describe_weights(model: Mapping[str, Any]) -> str:
    """Return what messages call the embedded weights of a model with these facts."""
    return name_weights(model.get("projector_sha256")) or "unknown to this release"


def name_model(model: str | os.PathLike[str]) -> str:
    """Return the name of a model: of a folder its full path, which stays right when the current folder changes. A path is
    that of a folder, even one named like a model. Raises ``UsageError``."""
    if isinstance(model, os.PathLike):
        return str(Path(model).expanduser().absolute())
    if not isinstance(model, str):
        raise UsageError(f"model: expected a name or a folder, got {type(model).__name__}")
    if not model:
        raise UsageError("model: expected a name or a folder, got an empty text", "name one, or leave it out")
    folder = os.path.expanduser(model)  # noqa: PTH111 (a Path raises for the home of nobody)
    return os.path.abspath(folder) if model != BUNDLED and os.path.isdir(folder) else model  # noqa: PTH100, PTH112


def make_source(
    name: str | os.PathLike[str],
    device: str | torch.device | Device | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    attention: str | None = None,
    storage: Storage = AS_COMPUTED,
) -> ModelSource:
    """Return a model source. A missing device or dtype comes from FRERES_DEVICE or FRERES_DTYPE, else it is automatic.

    ``name``: ``bundled``, a folder, or a hub id. ``device``: a name, torch's, or a device already chosen. ``dtype``,
    ``revision``: as ``ModelSource`` has them. ``attention``: one of ``devices.ATTENTION_NAMES``. ``storage``: from
    ``devices.choose_storage``. Raises ``UsageError`` or ``ResourceError``.
    """
    name = name_model(name)
    check_revision(name, revision)
    return ModelSource(name, find_device(device, attention), revision, find_dtype(dtype), storage=storage)


def find_device(device: str | torch.device | Device | None = None, attention: str | None = None) -> Device:
    """Return the named device, else that of FRERES_DEVICE, else the best one available.

    Raises ``UsageError`` or ``ResourceError``.
    """
    if isinstance(device, Device):
        return device
    if not device and (found := environment_value("device")) is not None:
        return choose_device(found, attention, "FRERES_DEVICE")
    return choose_device(str(device) if device else None, attention)


def find_dtype(dtype: str | None = None) -> str | None:
    """Return the named dtype, else that of FRERES_DTYPE, else ``None`` for automatic."""
    name = dtype or environment_value("dtype")
    if name not in (None, *DTYPE_NAMES):
        named_with = "--dtype" if dtype else "FRERES_DTYPE"
        raise UsageError(f"{named_with}: expected one of {', '.join(DTYPE_NAMES)}, got {name}")
    return name


class Models:
    """The two halves of one model, each loaded when first used, and then kept. Threads may share them.

    ``source``: which model. ``encoder``, ``language_model``: halves that are already loaded, as in tests and services.
    Raises ``BackboneError`` or ``ResourceError`` when a half is first used.
    """

    def __init__(
        self,
        source: ModelSource,
        encoder: VisionEncoder | None = None,
        language_model: LanguageModel | None = None,
    ) -> None:
        self.source = source
        self._encoder = encoder
        self._language_model = language_model
        self._prompt_counter: LanguageModel | None = None
        self._identity: EncoderIdentity | None = None

    @property
    def encoder(self) -> VisionEncoder:
        """The vision tower and projector."""
        if self._encoder is None:
            with LOADING:
                self._encoder = self._encoder or self._from_checkpoint(load_vision_encoder)
        return self._encoder

    @property
    def language_model(self) -> LanguageModel:
        """The language half, with its tokenizer."""
        if self._language_model is None:
            load = partial(load_language_model, storage=self.source.storage)
            with LOADING:
                self._language_model = self._language_model or self._from_checkpoint(load)
        return self._language_model

    @property
    def prompt_counter(self) -> LanguageModel:
        """The language half to count the rows of prompts with: without its weights, if it is not loaded anyway."""
        if self._language_model is not None:
            return self._language_model
        if self._prompt_counter is None:
            load = partial(load_prompt_counter, storage=self.source.storage)
            with LOADING:
                self._prompt_counter = self._prompt_counter or self._from_checkpoint(load)
        return self._prompt_counter

    @property
    def weightless_encoder(self) -> VisionEncoder:
        """The vision half to ask for sizes: without its weights, if it is not loaded anyway."""
        return self._encoder or self._from_checkpoint(load_weightless_encoder)

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the model is."""
        return self._from_checkpoint(find_checkpoint)

    @property
    def has_encoder(self) -> bool:
        """Whether the tower is loaded."""
        return self._encoder is not None

    @cached_property
    def tower_sha256(self) -> str:
        """Digest of samples of the tower's and projector's stored weights. The fingerprint has only the projector's."""
        return self._from_checkpoint(partial(digest_half, "vision"))

    @cached_property
    def decoder_sha256(self) -> str:
        """Digest of samples of the language half's stored weights."""
        return self._from_checkpoint(partial(digest_half, "language"))

    @property
    def facts(self) -> dict[str, str | None]:
        """What an adapter is for: the fingerprint and both digests."""
        weights = {"tower_sha256": self.tower_sha256, "decoder_sha256": self.decoder_sha256}
        return {**self.language_model.fingerprint, **weights}

    def identify_encoder(self) -> EncoderIdentity:
        """Return what determines the latents, without loading the tower."""
        if self._encoder is not None:
            it = self._encoder
            return EncoderIdentity(it.fingerprint, it.dtype, it.attention, it.pixels_sha256)
        if self._identity is None:
            self._identity = self._from_checkpoint(identify_vision_encoder)
        return self._identity

    @cached_property
    def _place(self) -> str | Checkpoint:
        """What loads the model: its name, or a checkpoint with random weights."""
        source = self.source
        if not source.is_random:
            return source.name
        from freres_cli.backbones.drawn import draw_checkpoint  # brings transformers with it

        return draw_checkpoint(source.name, source.device.name)

    def _from_checkpoint(self, load: Callable[[str | Checkpoint, Device, str | None, str | None, Path | None], T]) -> T:
        source = self.source
        # A branch may move: all parts come from the commit that it was when the first was read.
        read = (self._encoder, self._identity, self._language_model, self._prompt_counter)
        commits = (part.fingerprint.get("revision") for part in read if part is not None)
        revision = next(filter(None, commits), source.revision)
        with LOADING:
            return load(self._place, source.device, source.dtype, revision, bundled_model_dir())


def refuse_beside(models: Models, model: str | os.PathLike[str] | None, **settled: object) -> None:
    """Refuse arguments that say what a loaded model has settled. ``models``: it. ``model``: its name, or another one.
    ``settled``: the others by name, ``None`` where they are left out. Raises ``UsageError``."""
    source, name = models.source, None if model is None else name_model(model)
    if name not in (None, source.name, source.folder) and str(Path(name or "").expanduser().resolve()) != source.folder:
        raise UsageError(f"model: expected none or {source.name} with models, got {name}")
    for key, value in settled.items():
        if value is not None:
            raise UsageError(f"{key}: expected none with models, which are loaded already", "leave it out")


def find_model(
    recorded: Mapping[str, Any],
    bundle: str,
    device: Device,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    storage: Storage = AS_COMPUTED,
) -> ModelSource:
    """Return where to find a bundle's own model, unless another one is named.

    ``recorded``: the manifest's facts about the model. ``bundle``: its name, for messages. ``model``: the named one, if
    there is one. ``device``, ``revision``, ``dtype``, ``storage``: as ``ModelSource`` has them. Raises ``BackboneError``, or
    ``UsageError`` for a revision of a model that has none.
    """
    name, folder = model or recorded["model_id"], recorded["folder"]
    if model is None and folder is not None:
        if not Path(folder).is_dir():
            raise BackboneError(
                f"{bundle}: made with a model in {folder}: no such folder here",
                "name that model's folder with --model",
            )
        name = folder
    check_revision(name, revision)
    # Another repository has other commits.
    own = recorded["revision"] if name == recorded["model_id"] else None
    return ModelSource(name, device, revision or own, dtype, storage=storage)


def check_model(recorded: Mapping[str, Any], width: int, model: LanguageModel, name: str) -> None:
    """Refuse a model other than the one whose tower and projector made the latents.

    ``recorded``: the manifest's facts about that model. ``width``: D of the latents. ``model``: the loaded one. ``name``:
    the bundle's, for messages. Raises ``BackboneError``.
    """
    check_identity(recorded, width, model.fingerprint, model.width, name)


def check_identity(
    recorded: Mapping[str, Any], width: int, given: Mapping[str, Any], given_width: int, name: str
) -> None:
    """Refuse a model by its facts, as ``check_model`` does, without loading it.

    ``recorded``, ``width``: the facts of the model that made the latents, and D of these. ``given``, ``given_width``:
    those of the model at hand. ``name``: the bundle's, for messages. Raises ``BackboneError``.
    """
    differing = [fact for fact in MODEL_FACTS if recorded.get(fact) != given.get(fact)]
    if not differing and width == given_width:
        return
    weights = describe_weights(recorded), describe_weights(given)
    if weights[0] != weights[1] and recorded.get("model_id") == given.get("model_id") == BUNDLED:
        raise BackboneError(
            f"{name}: made with embedded weights {weights[0]}, these are {weights[1]}",
            "a folder of the old weights opens it with --model FOLDER, or compress the video again",
        )
    raise BackboneError(
        f"{name}: made for another model: expected {describe_model(recorded)}, got {describe_model(given)} "
        f"(differs in {', '.join(differing) or 'width'})",
        "name the model that made the bundle with --model, or compress the video again",
    )
