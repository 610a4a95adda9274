"""Train a form of Fre-Res on a frozen backbone: adapters, absorber, type embeddings and gates (method section 10)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from freres_cli import __version__
from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.gradients import score_answers
from freres_cli.baselines.registry import ADAPTIVE
from freres_cli.bundle.adapter import write_adapter
from freres_cli.devices import memory_errors_as
from freres_cli.errors import UsageError
from freres_cli.evaluation.cells import Budget
from freres_cli.evaluation.questions import QuestionFile
from freres_cli.files import check_destination
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.losses import answer_loss, distillation_loss, total_loss
from freres_cli.method.stretch_modules import NUM_ORDERS, StretchModules
from freres_cli.pipeline.adapters import AnyModules
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.pipeline.prompt_text import settle_tokens
from freres_cli.pipeline.query import refuse_control_tokens
from freres_cli.pipeline.reasoning import refuse_reasoning
from freres_cli.pipeline.tokens import make_tokens, with_deep_rows
from freres_cli.training.state import put_back, read_state, save_state
from freres_cli.training.workers import Workers
from freres_cli.workflows.training_data import Example, Progress, TrainingData, prepare_data, used_settings

MAX_RANK, MAX_SHARE = 64, 0.01  # MAX_SHARE: of the language model's parameters
SHOWN_FAILURES = 10
WARM_UP_SHARE = 0.05
LAST_SHARE = 0.02  # of the peak learning rate, at the end of the cosine


@dataclass(frozen=True)
class Recipe:
    """How to train.

    ``budgets``: each video in a step uses one of them. ``num_steps``: maximum steps. ``batch``: videos per step.
    ``questions_a_video``: maximum questions about a video in a step. ``learning_rate``: the peak. ``rank``: width of the
    bottlenecks; ``None`` chooses the largest power of two, up to 64, that trains at most 1 % as many parameters as the
    language model has. ``validation_share``: of the videos, held out. ``validate_every``: steps between validations.
    ``patience``: validations without improvement before training ends. ``seed``: decides weights, order and held-out
    videos.
    """

    budgets: tuple[Budget, ...]
    num_steps: int
    batch: int = 8
    questions_a_video: int = 4
    learning_rate: float = 1e-3
    rank: int | None = None
    validation_share: float = 0.1
    validate_every: int = 50
    patience: int = 5
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """Return the recipe as states and adapters record it."""
        return {**asdict(self), "budgets": [budget.text for budget in self.budgets]}


@dataclass(frozen=True)
class TrainRequest:
    """What to train on, and how.

    ``data``: the questions with their answers. ``options``: model, device, settings and method. ``recipe``: how to train.
    ``output``: the adapter to write; the training state is kept next to it, in a ``.state`` file. ``cache``: folder of
    the compressed videos. ``force``: replace an existing adapter.
    """

    data: QuestionFile
    options: CompressOptions
    recipe: Recipe
    output: Path
    cache: Path
    force: bool = False


@dataclass(frozen=True)
class Score:
    """The score on the validation videos, over all budgets.

    ``accuracy``: on questions with options; ``None`` if there are none. ``loss``: mean over the right answers of the loss
    per token. The loss chooses the weights (ours, because a few out of a few hundred answers change by chance).
    """

    accuracy: float | None
    loss: float


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
        options = replace(options, settings=options.settings.with_values("train", trends="keep"))
        request = replace(request, options=options)
    models = models or Models(options.model)
    workers = Workers(options.model.device)
    state_path = request.output.with_name(request.output.name + ".state")
    check_destination(state_path, True)
    check_destination(request.output, request.force or state_path.exists())
    state = read_state(state_path)
    model = models.language_model
    for note in model.notes:
        log(note)
    refuse_control_tokens(request.data.places(), model)
    refuse_reasoning(model, "train")
    videos = list(request.data.by_video().values())
    data = workers.first_then_all(
        lambda: prepare_data(videos, recipe.budgets, options, models, request.cache, progress)
    )
    # The tower is loaded only if a video is not in the cache yet.
    for note in models.encoder.notes if models.has_encoder else ():
        if note not in model.notes:
            log(note)
    learned, held_out = _split(data, recipe)
    torch.manual_seed(recipe.seed)
    modules = make_modules(model, options, recipe.rank)
    run = _Run(request, model, modules, learned, held_out, workers, _identify(request, models, modules, data))
    if state and state.get("run") != run.identity:
        raise UsageError(f"{state_path}: the state of another run", "remove it, or name another output with -o")
    start = time.perf_counter()
    done = run.train(state, state_path, log)
    facts = _facts(request, model, modules, data, done)
    if workers.is_first:
        _write(request, models, modules, done["best"], facts)
        state_path.unlink(missing_ok=True)
    workers.wait()
    return {"adapter": str(request.output), **facts, "train_s": time.perf_counter() - start, "failed": data.failed}


def describe_left_out(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that training left out. The reasons are known only right after training."""
    shown = facts.get("failed", ())[:SHOWN_FAILURES]
    yield from (f"left out: {message}" for message in shown)
    if facts["num_left_out"] > len(shown):
        yield f"{facts['num_left_out'] - len(shown)} {'more ' if shown else ''}were left out of the training"
    if facts["num_videos_untaught"]:
        why = "too long for the model or for memory, or only free answers"
        yield f"{facts['num_videos_untaught']} videos without a full-token teacher: {why}"


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


@dataclass
class _Run:
    request: TrainRequest
    model: LanguageModel
    modules: AnyModules
    learned: Sequence[Example]
    held_out: Sequence[Example]
    workers: Workers
    identity: str

    def train(self, state: dict[str, Any], state_path: Path, log: Callable[[str], None]) -> dict[str, Any]:
        """Train until the last step, or until validation stops improving.

        Returns the best weights, the validations (step, accuracy, loss) and the number of steps.
        """
        recipe = self.request.recipe
        optimizer = torch.optim.AdamW(self.modules.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
        known = put_back(state, self.modules, [optimizer])
        step, since = known.get("step", 0), 0
        start, loss_sum, first = time.perf_counter(), 0.0, step
        history, best = known.get("history"), known.get("best")
        if not history:
            score, best = self.validate(), self._copy()
            history = [[0, score.accuracy, score.loss]]
        while step < recipe.num_steps and not self._is_over(history):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate(step, recipe.num_steps)
            loss = self._step(step)
            if not math.isfinite(loss):
                raise UsageError(f"step {step + 1}: the loss is {loss}", "use a lower --learning-rate")
            loss_sum += loss
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, since = step + 1, since + 1
            if step % recipe.validate_every and step < recipe.num_steps:
                continue
            score = self.validate()
            if score.loss < _best(history)[2]:
                best = self._copy()
            history.append([step, score.accuracy, score.loss])
            left = (time.perf_counter() - start) / (step - first) * (recipe.num_steps - step)
            log(_progress_line(step, recipe.num_steps, loss_sum / since, score, left))
            loss_sum, since = 0.0, 0
            if self.workers.is_first:
                facts = {"step": step, "history": history, "best": best, "run": self.identity}
                save_state(state_path, self.modules, [optimizer], **facts)
        return {"best": best, "history": history, "steps": step}

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.modules.state_dict().items()}

    def _is_over(self, history: Sequence[Sequence[Any]]) -> bool:
        return len(history) - 1 - history.index(_best(history)) >= self.request.recipe.patience

    def _step(self, step: int) -> float:
        """Compute the gradients of one batch, shared out among the workers, and return its loss."""
        recipe = self.request.recipe
        rng = np.random.default_rng([recipe.seed, 2, step])
        chosen = rng.choice(len(self.learned), min(recipe.batch, len(self.learned)), replace=False)
        budgets = rng.integers(len(recipe.budgets), size=len(chosen))
        total = 0.0
        for number, (place, budget) in enumerate(zip(chosen, budgets, strict=True)):
            if number % self.workers.count != self.workers.rank:
                continue
            example = self.learned[place]
            picked = np.random.default_rng([recipe.seed, 3, step, number]).permutation(len(example.questions))
            with _memory_errors():
                loss = self._loss(example, int(budget), picked[: recipe.questions_a_video].tolist()) / len(chosen)
                loss.backward()
            total += loss.item()
        return self.workers.sum_gradients(self.modules, total)

    def _loss(self, example: Example, budget: int, picked: Sequence[int]) -> torch.Tensor:
        questions = [example.questions[i] for i in picked]
        answers, distilled = [], []
        for question, scores in zip(questions, self._scores(example, budget, picked), strict=True):
            answers.append(answer_loss(scores, question.truth, len(question.answers[question.truth])))
            if question.teacher is not None:
                distilled.append(distillation_loss(scores, question.teacher))
        return total_loss(answers, distilled, self.modules)

    def _scores(self, example: Example, budget: int, picked: Sequence[int]) -> list[torch.Tensor]:
        """Return the log-likelihoods of the possible answers, (k,) for each question picked."""
        settings = self.request.options.settings
        tokens = make_tokens(example.content(budget), settings.variant, self.modules)
        tokens, _ = settle_tokens(tokens, self.model.text_per_frame(tokens))
        tokens = with_deep_rows(tokens, self.model.num_deep_layers)
        found: dict[int, torch.Tensor] = {}
        # Questions about one video nearly always share the text before it.
        for prefix in dict.fromkeys(example.questions[i].prefix for i in picked):
            mine = [i for i in picked if example.questions[i].prefix == prefix]
            asked = [(example.questions[i].suffix, example.questions[i].answers) for i in mine]
            scores = score_answers(self.model, prefix, tokens, settings.text_after, asked)
            found |= dict(zip(mine, scores, strict=True))
        return [found[i] for i in picked]

    @torch.no_grad()
    def validate(self) -> Score:
        """Ask every question about the validation videos at every budget."""
        with _memory_errors():
            score = self._validate()
        # The workers must agree, but the last bit of a sum may differ between them.
        return Score(*self.workers.of_first((score.accuracy, score.loss)))

    def _validate(self) -> Score:
        rights, losses = [], []
        for example in self.held_out:
            for budget in range(len(self.request.recipe.budgets)):
                everything = range(len(example.questions))
                for question, scores in zip(example.questions, self._scores(example, budget, everything), strict=True):
                    losses.append(-float(scores[question.truth]) / len(question.answers[question.truth]))
                    if len(question.answers) > 1:
                        rights.append(int(scores.argmax()) == question.truth)
        return Score(float(np.mean(rights)) if rights else None, float(np.mean(losses)))


def _memory_errors() -> AbstractContextManager[None]:
    return memory_errors_as("training", "use fewer --questions, smaller --budgets, or a device with more memory")


def learning_rate(step: int, num_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: a linear warm-up, then a cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, num_steps - warm_up)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def _progress_line(step: int, num_steps: int, loss: float, score: Score, left_s: float) -> str:
    accuracy = "" if score.accuracy is None else f", accuracy {100 * score.accuracy:.1f} %"
    held_out = f"validation: loss {score.loss:.4f}{accuracy}"
    return f"step {step}/{num_steps}: loss {loss:.4f}; {held_out}; {left_s / 60:.0f} min left"


def _best(history: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return the validation with the lowest loss: (step, accuracy, loss)."""
    return min(history, key=lambda row: row[2])


def _identify(request: TrainRequest, models: Models, modules: AnyModules, data: TrainingData) -> str:
    """Return a digest of everything that decides this run; the state of another run is not resumed.

    The usable videos are part of it, because they decide which ones are held out.
    """
    machine = [str(models.language_model.dtype), request.options.model.device.name.partition(":")[0]]
    examples = [[example.sha256, len(example.questions)] for example in data.examples]
    made = [__version__, models.facts, asdict(modules.shape), machine]
    facts = [*made, request.recipe.facts(), used_settings(request.options), request.data.sha256, examples]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _facts(
    request: TrainRequest, model: LanguageModel, modules: AnyModules, data: TrainingData, done: dict[str, Any]
) -> dict[str, Any]:
    """Return what the header of an adapter records about its training."""
    trained = sum(parameter.numel() for parameter in modules.parameters())
    best = _best(done["history"])
    return {
        "method": request.options.method,
        "variant": request.options.settings.variant,
        "settings": used_settings(request.options),
        "recipe": request.recipe.facts(),
        "data_sha256": request.data.sha256,
        "num_questions": len(request.data.questions),
        "num_videos": len(data.examples),
        "num_videos_untaught": data.num_untaught,
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
    write_adapter(request.output, best, header)
