"""Train a form of Fre-Res on a frozen backbone: adapters, absorber, type embeddings and gates (method section 10)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freres_cli import __version__
from freres_cli.backbones.base import LanguageModel
from freres_cli.baselines.registry import ADAPTIVE
from freres_cli.bundle.adapter import write_adapter
from freres_cli.errors import UsageError, count_of
from freres_cli.evaluation.questions import QuestionFile
from freres_cli.files import InputFiles, check_destination
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.stretch_modules import NUM_ORDERS, StretchModules
from freres_cli.pipeline.adapters import TRAINED_ON, AnyModules, name_videos
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.notes import find_damaged
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.pipeline.query import refuse_control_tokens
from freres_cli.pipeline.reasoning import refuse_reasoning
from freres_cli.training.state import read_state
from freres_cli.training.workers import Workers
from freres_cli.workflows.training_data import Example, Progress, TrainingData, prepare_data, used_settings
from freres_cli.workflows.training_loop import Recipe, TrainingLoop, best_of

MAX_RANK, MAX_SHARE = 64, 0.01  # MAX_SHARE: of the language model's parameters
SHOWN_FAILURES = 10


@dataclass(frozen=True)
class TrainRequest:
    """What to train on, and how.

    ``data``: the questions with their answers. ``options``: model, device, settings and method. ``recipe``: how to train.
    ``output``: the adapter to write; the training state is kept next to it, in a ``.state`` file. ``cache``: folder of
    the compressed videos. ``force``: replace an existing adapter, also when a run that began with it goes on without.
    """

    data: QuestionFile
    options: CompressOptions
    recipe: Recipe
    output: Path
    cache: Path
    force: bool = False


def train_adapter(
    request: TrainRequest,
    log: Callable[[str], None],
    progress: Progress | None = None,
    models: Models | None = None,
) -> dict[str, Any]:
    """Train, write the adapter that does best in validation, and return a report.

    A stopped run resumes when you start it again, and ends with the same bits on the same CPU. ``request``: what to
    train on, and how. ``log``: called with each line of progress. ``progress``: called with the number of videos
    prepared and the number of all videos. ``models``: a model that is already loaded. Raises ``UsageError`` if there is
    too little data, or if the state next to the output belongs to another run.
    """
    options, recipe = request.options, request.recipe
    if options.method == ADAPTIVE:
        options = _keep_trends(options)
        request = replace(request, options=options)
    models = models or Models(options.model)
    workers = Workers(options.model.device)
    state_path = request.output.with_name(request.output.name + ".state")
    check_destination(state_path, True)
    inputs = InputFiles([*request.data.inputs("data"), *options.files])
    for output in (request.output, state_path):
        inputs.refuse(output)
    state = read_state(state_path)
    request = replace(request, force=request.force or bool(state.get("force")))
    check_destination(request.output, request.force)
    model = models.language_model
    for note in model.notes:
        log(note)
    refuse_control_tokens(request.data.places(), model)
    refuse_reasoning(model, "train")
    torch.manual_seed(recipe.seed)
    modules = make_modules(model, options, recipe.rank)
    identity: dict[str, Any] = {"run": _identify(request, models, modules)}
    if state and state.get("run") != identity["run"]:
        raise UsageError(f"{state_path}: the state of another run", "remove it, or name another output with -o")
    videos = list(request.data.by_video().values())
    data = workers.first_then_all(
        lambda: prepare_data(videos, recipe.budgets, options, models, request.cache, progress)
    )
    # The tower is loaded only if a video is not in the cache yet.
    for note in models.encoder.notes if models.has_encoder else ():
        if note not in model.notes:
            log(note)
    learned, held_out = _split(data, recipe)
    identity |= {"videos": _identify_videos(data), "num_videos": len(data.examples), "force": request.force}
    _refuse_other_videos(state, identity, data, state_path)
    run = TrainingLoop(recipe, options.settings, model, modules, learned, held_out, workers, identity)
    start = time.perf_counter()
    done = run.train(state, state_path, log)
    facts = _facts(request, model, modules, data, done)
    if workers.is_first:
        # Held-out ones are among them: they choose the weights.
        used = name_videos(example.sha256 for example in data.examples)
        _write(request, models, modules, done["best"], {**facts, TRAINED_ON: used})
        state_path.unlink(missing_ok=True)
    workers.wait()
    told = {"cache": str(request.cache), "failed": data.failed, "video_notes": data.video_notes}
    return {"adapter": str(request.output), **facts, "train_s": time.perf_counter() - start, **told}


def _keep_trends(options: CompressOptions) -> CompressOptions:
    """Return the options with the trends that adapters of adaptive read. Raises ``UsageError`` if those are to go."""
    settings = options.settings
    if settings.is_named("trends") and settings.trends != "keep":
        raise UsageError(
            f"{settings.name_of('trends')}: adapters of {ADAPTIVE} read trends: expected keep, got {settings.trends}",
            "leave it out",
        )
    return replace(options, settings=settings.with_values("train", trends="keep"))


def describe_left_out(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that training left out, or had only a part of. The reasons are known only right after
    training."""
    shown = facts.get("failed", ())[:SHOWN_FAILURES]
    yield from (f"left out: {message}" for message in shown)
    if facts["num_left_out"] > len(shown):
        yield f"{facts['num_left_out'] - len(shown)} {'more ' if shown else ''}were left out of the training"
    if facts["num_videos_untaught"]:
        counted = count_of(facts["num_videos_untaught"], "video")
        yield f"{counted} without a full-token teacher: too long for the model, or only free answers"
    if facts["num_videos_teacher_failed"]:
        counted = count_of(facts["num_videos_teacher_failed"], "video")
        yield (
            f"{counted} whose full-token teacher did not fit in memory on this machine, or gave no finite scores; to try "
            f"again here, remove {facts.get('cache', 'the cache')}"
        )
    if facts["num_videos_damaged"]:
        first = next(iter(find_damaged(facts.get("video_notes", ()))), None)
        named = "" if first is None else f": {first['video']}, {first['lost_s']:.2f} s lost"
        counted = count_of(facts["num_videos_damaged"], "damaged video")
        yield f"{counted} trained on, as far as they can be read{named}"


def make_modules(model: LanguageModel, options: CompressOptions, rank: int | None) -> AnyModules:
    """Return untrained modules for the method in ``options``, on the device of ``model``. ``rank``: as in ``Recipe``."""
    is_adaptive = options.method == ADAPTIVE
    kind: type[AnyModules] = StretchModules if is_adaptive else FreResModules
    num_bands = NUM_ORDERS if is_adaptive else options.settings.max_coefficients
    return kind(choose_shape(kind, model, num_bands, rank)).to(model.device)


def choose_shape(kind: type[AnyModules], model: LanguageModel, num_bands: int, rank: int | None) -> ModuleShape:
    """Return the sizes of the trained modules.

    ``kind``: their class. ``model``: what they are for. ``num_bands``: maximum coefficients of a trajectory, or orders in
    time. ``rank``: as in ``Recipe``.
    """
    if rank is not None:
        return ModuleShape(model.width, rank, num_bands)
    rank, allowed = MAX_RANK, MAX_SHARE * model.num_parameters
    while rank > 1 and _size(kind, ModuleShape(model.width, rank, num_bands)) > allowed:
        rank //= 2
    return ModuleShape(model.width, rank, num_bands)


def _size(kind: type[AnyModules], shape: ModuleShape) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(shape).parameters())


def _split(data: TrainingData, recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Return training and validation videos. Apart from the data, the split depends only on the seed."""
    order = np.random.default_rng([recipe.seed, 1]).permutation(len(data.examples))
    if len(order) < 2:
        raise UsageError(f"training data: expected at least 2 videos that can be used, got {len(order)}", "add videos")
    count = min(len(order) - 1, max(1, round(recipe.validation_share * len(order))))
    chosen = [data.examples[i] for i in order]
    return chosen[count:], chosen[:count]


def _refuse_other_videos(state: Mapping[str, Any], identity: Mapping[str, Any], data: TrainingData, path: Path) -> None:
    """Refuse to go on from the ``state`` in ``path`` with other videos: they decide which ones are held out. Raises
    ``UsageError``."""
    if not state or state.get("videos") == identity["videos"]:
        return
    first = f": {data.failed[0]}" if data.failed else ""
    raise UsageError(
        f"{path}: the state of a run with other videos or questions: {count_of(identity['num_videos'], 'video')} can be "
        f"used now, {state.get('num_videos')} when it began{first}",
        "bring back what could be used then, or remove the state to begin anew",
    )


def _identify_videos(data: TrainingData) -> str:
    return _digest([[example.sha256, len(example.questions)] for example in data.examples])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _identify(request: TrainRequest, models: Models, modules: AnyModules) -> str:
    """Return a digest of everything that decides this run, apart from what can be used of the data; the state of another
    run is not resumed."""
    machine = [str(models.language_model.dtype), request.options.model.device.name.partition(":")[0]]
    made = [__version__, models.facts, models.checkpoint.small_files_sha256, asdict(modules.shape), machine]
    return _digest([*made, request.recipe.facts(), used_settings(request.options), request.data.sha256])


def _facts(
    request: TrainRequest, model: LanguageModel, modules: AnyModules, data: TrainingData, done: dict[str, Any]
) -> dict[str, Any]:
    """Return what the header of an adapter records about its training."""
    trained = sum(parameter.numel() for parameter in modules.parameters())
    best = best_of(done["history"])
    return {
        "method": request.options.method,
        "variant": request.options.settings.variant,
        "settings": used_settings(request.options),
        "recipe": request.recipe.facts(),
        "data_sha256": request.data.sha256,
        "num_questions": len(request.data.questions),
        "num_videos": len(data.examples),
        "num_videos_untaught": data.num_untaught,
        "num_videos_teacher_failed": data.num_teacher_failed,
        "num_videos_damaged": len(find_damaged(data.video_notes)),
        "num_left_out": len(data.failed),
        "num_parameters": trained,
        "share_of_model": trained / model.num_parameters,
        "steps": done["steps"],
        "best_step": best[0],
        "validation": {"accuracy": best[1], "loss": best[2], "untrained": done["history"][0][1:]},
        "history": done["history"],
    }


def _write(
    request: TrainRequest,
    models: Models,
    modules: AnyModules,
    best: dict[str, torch.Tensor],
    facts: dict[str, Any],
) -> None:
    header = {
        "freres_version": __version__,
        "model": models.facts,
        "method": request.options.method,
        "shape": modules.shape.to_dict(),
        "training": facts,
    }
    try:
        write_adapter(request.output, best, header, force=request.force)
    except UsageError as error:
        came = request.output.exists()  # meanwhile, or the folder would not do
        way = "move it away, or use --force" if came else error.hint
        raise UsageError(error.message, f"{way}; the training is kept, and ends at once when run again") from error
