"""Train the bundled model from scratch: first the tower, then the language half on top of the frozen tower."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from freres_cli import __version__
from freres_cli.bench.report import describe_environment
from freres_cli.devices import Device
from freres_cli.errors import BackboneError, ResourceError, UsageError
from freres_cli.files import write_atomically
from freres_cli.presets import MODEL_INFO_FILE
from freres_cli.training.state import read_state
from freres_cli.world.bundled_model import GRID, WIDTH, make_checkpoint, make_config, tokenizer_corpus
from freres_cli.world.tokenizer import make_tokenizer
from freres_cli.world.train_language import FIRST_SEED, train_language
from freres_cli.world.train_tower import train_tower


@dataclass(frozen=True)
class TrainRequest:
    """What to train, and where.

    ``output``: folder of the checkpoint; it also keeps the states that a stopped run resumes from. ``device``: where to
    train. ``tower_steps``, ``language_steps``: steps of each half. ``seed``: decides weights and clips. ``start``: folder
    of a model of the same shape to start from, instead of random weights.
    """

    output: Path
    device: Device
    tower_steps: int
    language_steps: int
    seed: int = 0
    start: Path | None = None


def train_world(request: TrainRequest, log: Callable[[str], None]) -> dict[str, Any]:
    """Train both halves, write the checkpoint, and return a report.

    A stopped run resumes when you start it again. ``log``: called with each line of progress. Raises ``UsageError`` if
    ``output`` holds something else, ``BackboneError`` for a model that training cannot start from.
    """
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel
    from transformers.utils import logging as transformers_logging

    # It would show progress bars even with --quiet.
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
        "start": None if request.start is None else _name_weights(request.start),
        "start_sha256": None if request.start is None else _hash_weights(request.start),
        "choices_as": "words",
    }
    _write_checkpoint(request.output, states, tower.cpu().state_dict(), decoder.cpu().state_dict(), facts)
    seconds = time.perf_counter() - start
    return {
        "model": str(request.output),
        **facts,
        "train_s": seconds,
        "environment": describe_environment(request.device),
    }


def _write_checkpoint(
    folder: Path, states: Path, tower: Mapping[str, Any], decoder: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the checkpoint beside the ``states``, and move it into its ``folder``: the weights last, so that where they are,
    all of it is. Raises ``ResourceError``."""
    made = states / "made"
    try:
        shutil.rmtree(made, ignore_errors=True)  # of a run that was killed here
        made.mkdir()
        make_checkpoint(made, tower, decoder, weights=folder.resolve().name, **facts)
        for path in sorted(made.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:  # safetensors has no code of what went wrong
        raise ResourceError(
            f"{folder}: the model cannot be written: {error}", "free some space, and run the command again: it goes on"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _claim(request: TrainRequest, states: Path) -> None:
    """Start a run, or check that the states belong to this one, which may have more steps than before.

    Raises ``UsageError`` instead of replacing another run or another model.
    """
    same = {
        "freres_version": __version__,
        "seed": request.seed,
        "start_sha256": None if request.start is None else _hash_weights(request.start),
    }
    steps = {"tower_steps": request.tower_steps, "language_steps": request.language_steps}
    path = states / "run.json"
    remedy = "name another folder with -o"
    if not path.is_file():
        # A run that was stopped before it wrote anything leaves an empty folder.
        if any(entry != states or any(states.iterdir()) for entry in request.output.iterdir()):
            raise UsageError(f"{request.output}: holds something other than a training run", remedy)
    else:
        try:
            known = dict(json.loads(path.read_bytes()))
            differing = [key for key, value in same.items() if known[key] != value]
            differing += [key for key, value in steps.items() if value < min(known[key], _steps_done(states, key))]
            # A decoder belongs to the tower whose latents it learned from.
            if steps["tower_steps"] != known["tower_steps"] and (states / "language.pt").exists():
                differing.append("tower_steps")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: damaged", remedy) from error
        if differing:
            raise UsageError(
                f"{request.output}: the training of another run: differs in {', '.join(differing)}", remedy
            )
    states.mkdir(exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps({**same, **steps}).encode()), force=True)


def _steps_done(states: Path, key: str) -> int:
    """How many steps the state of a half has, 0 if there is none. ``key``: of the half's number of steps."""
    return int(read_state(states / f"{key.removesuffix('_steps')}.pt").get("step", 0))


def _name_weights(folder: Path) -> str:
    """Return the name that weights have in their own MODEL_INFO.json, else that of their folder. The embedded ones, of
    whatever release, are in a folder of one name."""
    try:
        return str(json.loads((folder / MODEL_INFO_FILE).read_bytes())["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.resolve().name


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _load_weights(folder: Path, tower: Any, decoder: Any) -> None:
    """Load the weights of both halves from a checkpoint folder. Raises ``BackboneError``."""
    from transformers import Qwen2VLForConditionalGeneration

    try:
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        tower.load_state_dict(model.model.visual.state_dict())
        decoder.load_state_dict(model.model.language_model.state_dict())
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"{folder}: not a model that training can start from: {reason}") from error
