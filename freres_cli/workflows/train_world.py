"""The bundled model, from nothing to a checkpoint folder: tower first, then the language half on top of it, frozen."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freres_cli import __version__
from freres_cli.bench.report import describe_environment
from freres_cli.devices import Device
from freres_cli.errors import BackboneError, UsageError
from freres_cli.files import write_atomically
from freres_cli.world.bundled_model import GRID, WIDTH, make_checkpoint, make_config, make_tokenizer, tokenizer_corpus
from freres_cli.world.train_language import FIRST_SEED, train_language
from freres_cli.world.train_tower import train_tower


@dataclass(frozen=True)
class TrainRequest:
    """``output``: the folder of the checkpoint, which also keeps the states that a stopped run goes on from. ``start``: the
    folder of a model of the same shape whose weights are the first, instead of random ones."""

    output: Path
    device: Device
    tower_steps: int
    language_steps: int
    seed: int = 0
    start: Path | None = None


def train_world(request: TrainRequest, log: Callable[[str], None]) -> dict[str, Any]:
    """Train both halves and write the checkpoint. Called again, it goes on where it was stopped. Returns what was
    done."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel
    from transformers.utils import logging as transformers_logging

    # Its bars for a file of 7 MB would be there with --quiet too.
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    device = torch.device(request.device.name)
    tokenizer = make_tokenizer(tokenizer_corpus())
    config = make_config(tokenizer)
    states = request.output / "training"
    torch.manual_seed(request.seed)
    tower = Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config).to(device)
    decoder = Qwen2VLTextModel._from_config(config.text_config).to(device)
    if request.start is not None:
        _load_weights(request.start, tower, decoder)
    _claim(request, states)
    train_tower(tower, WIDTH, GRID, request.tower_steps, states / "tower.pt", device, log, request.seed)
    tower.eval().requires_grad_(False)
    train_language(
        decoder, tower, tokenizer, GRID, request.language_steps, states / "language.pt", device, log, request.seed
    )
    facts = {
        "tower_steps": request.tower_steps,
        "language_steps": request.language_steps,
        "train_seeds": f"from {FIRST_SEED * (request.seed + 1)} on",
        "start": None if request.start is None else request.start.name,
        "choices_as": "words",
    }
    make_checkpoint(request.output, tower.cpu().state_dict(), decoder.cpu().state_dict(), **facts)
    seconds = time.perf_counter() - start
    return {
        "model": str(request.output),
        **facts,
        "train_s": seconds,
        "environment": describe_environment(request.device),
    }


def _claim(request: TrainRequest, states: Path) -> None:
    """Begin a run, or make sure that the states are of this one; it may go on to more steps. Raises ``UsageError``: nothing
    of another run or of another model is replaced."""
    same = {
        "freres_version": __version__,
        "seed": request.seed,
        "start_sha256": None if request.start is None else _hash_weights(request.start),
    }
    steps = {"tower_steps": request.tower_steps, "language_steps": request.language_steps}
    path = states / "run.json"
    remedy = "name another folder with -o"
    if not path.is_file():
        if any(request.output.iterdir()):
            raise UsageError(f"{request.output}: holds something else than a training", remedy)
    else:
        try:
            known = dict(json.loads(path.read_bytes()))
            differing = [key for key, value in same.items() if known[key] != value]
            differing += [key for key, value in steps.items() if value < known[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: damaged", remedy) from error
        if differing:
            raise UsageError(f"{request.output}: the training of another run: {', '.join(differing)} differs", remedy)
    states.mkdir(exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps({**same, **steps}).encode()), force=True)


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _load_weights(folder: Path, tower: Any, decoder: Any) -> None:
    """Fill both halves from a checkpoint folder. Raises ``BackboneError``."""
    from transformers import Qwen2VLForConditionalGeneration

    try:
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tower.load_state_dict(model.model.visual.state_dict())
        decoder.load_state_dict(model.model.language_model.state_dict())
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"{folder}: not a model that training can start from: {reason}") from error
