"""Find a model, check its config, and read only the weights that one half of it needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from freres_cli.backbones.hub import CONFIG_FILES, INDEX_FILE, OFFLINE_HINT, SINGLE_FILE, TOKENIZER_FILES, fetch
from freres_cli.errors import BackboneError
from freres_cli.presets import BUNDLED, MODEL_INFO_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_IGNORED_CONFIG_KEYS = {"transformers_version", "_name_or_path", "name_or_path"}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder. ``model_id``: ``bundled``, the folder's name or the hub id. ``revision``: the hub commit, if any.

    ``is_remote``: the model comes from the hub. Each file is downloaded when it is first needed, so ``directory`` may
    contain only some of them.
    """

    model_id: str
    revision: str | None
    directory: Path
    config: dict[str, Any]
    is_remote: bool = False

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @cached_property
    def files_by_key(self) -> dict[str, Path]:
        """The safetensors file that holds each tensor. Raises BackboneError for pickles, missing or damaged files."""
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if index.is_file():
            return self._read_index(index)
        if self.is_remote:
            self.fetch_files([SINGLE_FILE], are_needed=False)
        if single.is_file():
            with open_safetensors(single) as file:
                return dict.fromkeys(file.keys(), single)
        if any(next(self.directory.glob(pattern), None) for pattern in _PICKLES):
            hint = "convert the weights to safetensors; pickle files can run code and are never read"
            raise BackboneError(f"{self.model_id}: only pickled weights: expected model.safetensors", hint)
        where = "or its index on the hub, or in the local cache" if self.is_remote else f"in {self.directory}"
        advice = "pickled weights are never read; convert them to safetensors" if self.is_remote else None
        raise BackboneError(f"{self.model_id}: no weights: expected model.safetensors {where}", advice)

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BackboneError(f"{index}: expected a weight_map")
        for name in set(weight_map.values()):
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise BackboneError(f"{index}: expected safetensors file names in weight_map, got {name!r}")
            if not self.is_remote and not (self.directory / name).is_file():
                raise BackboneError(f"{self.model_id}: weight file {name} is missing", "download the model again")
        return {key: self.directory / name for key, name in weight_map.items()}

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files in bytes; for a hub model, according to its index."""
        facts = self.read_json(INDEX_FILE).get("metadata")
        if self.is_remote and isinstance(facts, dict) and isinstance(size := facts.get("total_size"), int | float):
            return int(size)
        return sum(path.stat().st_size for path in set(self.files_by_key.values()) if path.is_file())

    def read_processor(self) -> dict[str, Any]:
        """The settings of the image processor: as transformers, those in ``processor_config.json`` before those in a file of
        their own."""
        nested = self.read_json("processor_config.json").get("image_processor")
        return nested if isinstance(nested, dict) else self.read_json("preprocessor_config.json")

    def fetch_files(self, names: Iterable[str], *, are_needed: bool = True) -> None:
        """Download those of these files that are missing. Does nothing for a local folder.

        ``are_needed``: it is an error if one of them cannot be had. Raises BackboneError, or ResourceError if the disk
        is full.
        """
        missing = [name for name in names if not (self.directory / name).is_file()]
        if not self.is_remote or not missing:
            return
        fetch(self.model_id, self.revision, missing)
        gone = [name for name in missing if not (self.directory / name).is_file()]
        if gone and are_needed:
            listed = f"{gone[0]} is" if len(gone) == 1 else f"{gone[0]} and {len(gone) - 1} more files are"
            raise BackboneError(f"{self.model_id}: {listed} not in the local cache or on the hub", OFFLINE_HINT)

    def keys_under(self, candidates: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        """The first of these prefixes that the checkpoint uses, and its keys as {key without the prefix: key}.

        Checkpoints of one family come in several layouts with different prefixes. List the longer prefix first.
        Returns ``("", {})`` if none is used.
        """
        for prefix in candidates:
            keys = {key.removeprefix(prefix): key for key in self.files_by_key if key.startswith(prefix)}
            if keys:
                return prefix, keys
        return "", {}

    def stored_dtype(self, candidates: tuple[str, ...]) -> torch.dtype:
        """The stored dtype of the tensors under one of these prefixes, judged by the first tensor."""
        _, keys = self.keys_under(candidates)
        if not keys:
            raise BackboneError(f"{self.model_id}: no tensors named {' or '.join(p + '*' for p in candidates)}")
        key = min(keys.values())
        self.fetch_files([self.files_by_key[key].name])
        with open_safetensors(self.files_by_key[key]) as file:
            name = file.get_slice(key).get_dtype()
        if name not in _STORED_DTYPES:
            raise BackboneError(
                f"{self.model_id}: {key}: expected one of {', '.join(_STORED_DTYPES)}, got {name}",
                "quantized checkpoints are not supported; use the original weights",
            )
        return _STORED_DTYPES[name]

    def planned_dtype(self, candidates: tuple[str, ...]) -> torch.dtype:
        """``stored_dtype``, if all weights are in a folder; else what the config names. Downloads nothing."""
        with suppress(BackboneError):
            if not self.is_remote:
                return self.stored_dtype(candidates)
        return config_dtype(self.config)

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors one at a time, grouped by file. No other file is downloaded and no other tensor read."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.files_by_key[key], []).append(key)
        # All files at once: they download in parallel, and a failure happens before anything is read.
        self.fetch_files(sorted(path.name for path in by_file))
        for path, names in by_file.items():
            with open_safetensors(path) as file:
                for name in names:
                    yield name, file.get_tensor(name)

    @property
    def small_files_sha256(self) -> str:
        """SHA-256 of the files beside the weights that have a part in answers: those of the tokenizer, the chat template and
        the image processor, and what the model says of itself. The config is not among them: it is in ``fingerprint``."""
        digest = hashlib.sha256()
        for name in sorted({*CONFIG_FILES, *TOKENIZER_FILES, MODEL_INFO_FILE} - {"config.json", INDEX_FILE}):
            path = self.directory / name
            if path.is_file():
                content = path.read_bytes()
                digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file in the folder, or {} if it does not exist."""
        path = self.directory / name
        return _read_json(path) if path.is_file() else {}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for lazy reading. Raises BackboneError if it is missing, truncated or invalid."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"{path}: damaged weights: {str(error).partition(chr(10))[0]}", "download or copy the file again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The precision that a checkpoint's config names; bfloat16, as nearly all are stored, if it names none."""
    text = config.get("text_config") or {}
    name = next((c[key] for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
    found = getattr(torch, str(name), torch.bfloat16)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def resolve_checkpoint(
    model: str | Checkpoint,
    supported: tuple[str, ...],
    revision: str | None = None,
    bundled_directory: Path | None = None,
) -> Checkpoint:
    """Find a ``model``: ``bundled`` (in ``bundled_directory``), a local folder, or a hub id ``ORGANISATION/NAME``. One that
    is already found is returned as it is.

    A hub model's config is downloaded and checked; ``Checkpoint`` downloads its weights later. ``revision`` (branch, tag
    or commit) only applies to hub models. Raises BackboneError if the model is missing or unreachable, or if its
    ``model_type`` is not in ``supported``.
    """
    if isinstance(model, Checkpoint):
        return model
    if model == BUNDLED and bundled_directory is not None:
        return _open_folder(BUNDLED, bundled_directory, None, supported)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _open_folder(folder.resolve().name, folder, None, supported)
    if not _HUB_ID.fullmatch(model):
        hint = "see: freres models"
        raise BackboneError(f"{model}: no such model: expected bundled, a folder or ORGANISATION/NAME", hint)
    snapshot = fetch(model, revision, CONFIG_FILES)
    return _open_folder(model, snapshot, snapshot.name, supported)


def _open_folder(model_id: str, folder: Path, revision: str | None, supported: tuple[str, ...]) -> Checkpoint:
    if not (folder / "config.json").is_file():
        if revision is not None:
            raise BackboneError(f"{model_id}: config.json is not in the local cache or on the hub", OFFLINE_HINT)
        raise BackboneError(f"{model_id}: not a model folder: expected config.json in {folder}")
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if (newlines := config.get("mm_newline_position", "one_token")) != "one_token":
        # LLaVA-Video. Its tensors fit the classes of LLaVA-OneVision, which would give it the wrong prompt.
        hint = "transformers has no class with that prompt; use a LLaVA-OneVision checkpoint"
        raise BackboneError(
            f"{model_id}: unsupported newline tokens in the video: expected one_token, got {newlines}", hint
        )
    if model_type not in supported:
        raise BackboneError(
            f"{model_id}: unsupported model_type: expected one of {', '.join(supported)}, got {model_type}",
            "see: freres models",
        )
    if "quantization_config" in config:
        hint = "use the original weights"
        raise BackboneError(f"{model_id}: quantized checkpoints are not supported", hint)
    return Checkpoint(model_id, revision, folder, config, is_remote=revision is not None)


def find_stored(checkpoint: Checkpoint, prefixes: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The keys of a module's tensors in ``checkpoint``, by its own names. ``prefixes``: as for ``load_submodule``."""
    keys: dict[str, str] = {}
    for own_prefix, candidates in prefixes.items():
        _, found = checkpoint.keys_under(candidates)
        keys |= {own_prefix + rest: key for rest, key in found.items() if not rest.endswith(".inv_freq")}
    return keys


def load_submodule(
    checkpoint: Checkpoint,
    module: nn.Module,
    prefixes: Mapping[str, tuple[str, ...]],
    dtype: torch.dtype,
    device: torch.device,
    transposed: tuple[str, ...] = (),
) -> None:
    """Load the weights of ``module`` from ``checkpoint``, reading no other tensor, and move it to ``device``.

    ``prefixes``: prefix of the module's own names -> the prefixes they may have in the checkpoint. Parameters are
    converted to ``dtype``; buffers that are not stored, such as RoPE frequencies, keep the values and dtype that the
    constructor gave them. Tensors whose names end in one of ``transposed`` may be stored with their last two axes
    swapped, and are swapped back if only that fits. Raises BackboneError, naming the keys that are missing, unexpected
    or of the wrong shape.
    """
    keys = find_stored(checkpoint, prefixes)
    wanted = module.state_dict(keep_vars=True)
    _refuse_keys(checkpoint, "missing", sorted(wanted.keys() - keys.keys()))
    _refuse_keys(checkpoint, "unexpected", sorted(keys[name] for name in keys.keys() - wanted.keys()))
    names = {key: name for name, key in keys.items()}
    for key, tensor in checkpoint.tensors(list(names)):
        expected = wanted[names[key]].shape
        if tensor.shape != expected and names[key].endswith(transposed or "\0"):
            tensor = tensor.mT
        if tensor.shape != expected:
            shapes = f"expected {tuple(expected)}, got {tuple(tensor.shape)}"
            raise BackboneError(f"{checkpoint.model_id}: {key}: wrong shape: {shapes}")
        owner_name, _, leaf = names[key].rpartition(".")
        owner = module.get_submodule(owner_name)
        # A copy, so that no weight keeps the memory-mapped file open.
        setattr(
            owner,
            leaf,
            nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True).contiguous(), requires_grad=False),
        )
    module.to(device)


def _refuse_keys(checkpoint: Checkpoint, what: str, keys: list[str]) -> None:
    if keys:
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise BackboneError(f"{checkpoint.model_id}: {what} weights: {shown}", "the config and the weights disagree")


def fingerprint(checkpoint: Checkpoint, projector_prefixes: tuple[str, ...]) -> dict[str, str | None]:
    """What distinguishes this model from others: its id, its revision, and SHA-256 digests of config and projector.

    The config is hashed as canonical JSON without paths and library versions. The projector is hashed by names without
    the prefix, dtypes, shapes and bytes, so the same weights have the same digest in every key layout.
    """
    _, keys = checkpoint.keys_under(projector_prefixes)
    rest_by_key = {key: rest for rest, key in keys.items()}
    digests = {}
    for key, tensor in checkpoint.tensors(sorted(rest_by_key)):
        header = f"{rest_by_key[key]} {tensor.dtype} {tuple(tensor.shape)} ".encode()
        digest = hashlib.sha256(header)
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        digests[rest_by_key[key]] = digest.hexdigest()
    return {
        "model_id": checkpoint.model_id,
        "revision": checkpoint.revision,
        "config_sha256": digest_json(_without_ignored(checkpoint.config)),
        "projector_sha256": digest_json(digests),
    }


def _without_ignored(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_ignored(value) for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}


def digest_json(content: Any) -> str:
    """Return the SHA-256 of ``content`` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
