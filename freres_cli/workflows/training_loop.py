"""The steps of an adapter's training: gradients, validations, the best weights, and the state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.gradients import score_answers
from freres_cli.devices import memory_errors_as
from freres_cli.errors import BackboneError, UsageError
from freres_cli.evaluation.cells import Budget
from freres_cli.method.losses import answer_loss, distillation_loss, total_loss
from freres_cli.pipeline.adapters import AnyModules
from freres_cli.pipeline.prompt_text import settle_tokens
from freres_cli.pipeline.tokens import make_tokens, with_deep_rows
from freres_cli.presets import Settings
from freres_cli.training.state import put_back, save_state
from freres_cli.training.workers import Workers
from freres_cli.workflows.training_data import Example

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
        return {**asdict(self), "budgets": [str(budget.number) for budget in self.budgets]}


@dataclass(frozen=True)
class Score:
    """The score on the validation videos, over all budgets.

    ``accuracy``: on questions with options; ``None`` if there are none. ``loss``: mean over the right answers of the loss
    per token. The loss chooses the weights (ours, because a few out of a few hundred answers change by chance).
    """

    accuracy: float | None
    loss: float


@dataclass
class TrainingLoop:
    """The steps of one training, and its validations.

    ``recipe``, ``settings``: how to train, and how the bundles are read. ``modules``: what is trained, for ``model``.
    ``learned``, ``held_out``: the videos. ``workers``: the processes that share the work. ``identity``: of the run, for its
    state.
    """

    recipe: Recipe
    settings: Settings
    model: LanguageModel
    modules: AnyModules
    learned: Sequence[Example]
    held_out: Sequence[Example]
    workers: Workers
    identity: Mapping[str, Any]

    def train(self, state: dict[str, Any], state_path: Path, log: Callable[[str], None]) -> dict[str, Any]:
        """Train until the last step, or until validation stops improving.

        Returns the best weights, the validations (step, accuracy, loss) and the number of steps.
        """
        recipe = self.recipe
        optimizer = torch.optim.AdamW(self.modules.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
        known = put_back(state, self.modules, [optimizer])
        step, since = known.get("step", 0), 0
        start, loss_sum, first = time.perf_counter(), 0.0, step
        history, best = known.get("history"), known.get("best")
        if not history:
            score, best = self.validate(), self._copy()
            _refuse_overflow(score.loss, 0, "before the first step: the loss on the held-out videos")
            history = [[0, score.accuracy, score.loss]]
        while step < recipe.num_steps and not self._is_over(history):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate(step, recipe.num_steps)
            loss = self._step(step)
            _refuse_overflow(loss, step, f"step {step + 1}: the loss")
            loss_sum += loss
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, since = step + 1, since + 1
            if step % recipe.validate_every and step < recipe.num_steps:
                continue
            score = self.validate()
            _refuse_overflow(score.loss, step, f"step {step}: the loss on the held-out videos")
            if score.loss < best_of(history)[2]:
                best = self._copy()
            history.append([step, score.accuracy, score.loss])
            left = (time.perf_counter() - start) / (step - first) * (recipe.num_steps - step)
            log(_progress_line(step, recipe.num_steps, loss_sum / since, score, left))
            loss_sum, since = 0.0, 0
            if self.workers.is_first:
                facts = {"step": step, "history": history, "best": best, **self.identity}
                save_state(state_path, self.modules, [optimizer], **facts)
        return {"best": best, "history": history, "steps": step}

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.modules.state_dict().items()}

    def _is_over(self, history: Sequence[Sequence[Any]]) -> bool:
        return len(history) - 1 - history.index(best_of(history)) >= self.recipe.patience

    def _step(self, step: int) -> float:
        """Compute the gradients of one batch, shared out among the workers, and return its loss."""
        recipe = self.recipe
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
        settings = self.settings
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
        """Ask every question about the validation videos at every budget. Each worker asks a part of them."""
        mine = []
        # Budgets outermost, or an even number of workers would give each only some of them, whose tokens cost more or less.
        for number, (budget, example) in enumerate(product(range(len(self.recipe.budgets)), self.held_out)):
            if number % self.workers.count == self.workers.rank:
                with _memory_errors():
                    mine.append((number, *self._validate(example, budget)))
        # All have all parts, in one order, so that they agree to the last bit.
        parts = sorted(part for own in self.workers.gather(mine) for part in own)
        losses = [loss for _, found, _ in parts for loss in found]
        rights = [is_right for _, _, found in parts for is_right in found]
        return Score(float(np.mean(rights)) if rights else None, float(np.mean(losses)))

    def _validate(self, example: Example, budget: int) -> tuple[list[float], list[bool]]:
        """Return the loss of each question about a video, and of those with options whether the answer is right. As many are
        asked at a time as in a step: they share its memory."""
        losses, rights = [], []
        for start in range(0, len(example.questions), self.recipe.questions_a_video):
            picked = range(len(example.questions))[start : start + self.recipe.questions_a_video]
            for question, scores in zip(
                [example.questions[i] for i in picked], self._scores(example, budget, picked), strict=True
            ):
                losses.append(-float(scores[question.truth]) / len(question.answers[question.truth]))
                if len(question.answers) > 1:
                    rights.append(int(scores.argmax()) == question.truth)
        return losses, rights


def _memory_errors() -> AbstractContextManager[None]:
    return memory_errors_as(
        "training", "train at smaller budgets or on fewer questions at a time, or use a device with more memory"
    )


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


def _refuse_overflow(loss: float, num_steps: int, what: str) -> None:
    """Refuse a loss that is not finite. ``num_steps``: taken before it. ``what``: it is, in the message."""
    if math.isfinite(loss):
        return
    if num_steps:
        raise UsageError(f"{what} is {loss}", "use a lower learning rate")
    raise BackboneError(f"{what} is {loss}", "use --dtype bfloat16 or float32; else the checkpoint is damaged")


def best_of(history: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return the validation with the lowest loss: (step, accuracy, loss)."""
    return min(history, key=lambda row: row[2])
