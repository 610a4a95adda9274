"""What an adapter is trained on: every video as one bundle a budget, and what the full-token model thinks of the options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli import __version__
from freres_cli.backbones.base import LanguageModel, VisionEncoder
from freres_cli.backbones.engine import prefill_video, score_options
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.store import read_bundle, write_atomically, write_bundle
from freres_cli.devices import memory_errors_as
from freres_cli.errors import BackboneError, FreresError, ResourceError, VideoError
from freres_cli.records import Tracks
from freres_cli.video.probe import hash_file
from freres_cli.workflows.budgets import Budget
from freres_cli.workflows.clips import EncodedClip
from freres_cli.workflows.compress import CompressRequest
from freres_cli.workflows.questions import Question, format_choices

Progress = Callable[[int, int], None]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question as it is trained: its prompt around the video, the ``answers`` it is scored on and which is true.
    ``teacher``: (k,) log-likelihoods by the model with all tokens; None where there are no options, or no teacher."""

    prefix: Ids
    suffix: Ids
    answers: tuple[Ids, ...]
    truth: int
    teacher: Tensor | None


@dataclass(frozen=True)
class Example:
    """A video: its bundles, one a budget, and its questions."""

    video: str
    bundles: tuple[Path, ...]
    questions: tuple[Asked, ...]

    def tracks(self, budget: int) -> Tracks:
        """Read the bundle of the budget with this number, checked like any other."""
        return read_bundle(self.bundles[budget]).tracks


@dataclass(frozen=True)
class TrainingData:
    """``failed``: videos that could not be used, with the reason. ``num_untaught``: those without a teacher."""

    examples: tuple[Example, ...]
    failed: tuple[str, ...]
    num_untaught: int


def answer_ids(model: LanguageModel, question: Question) -> tuple[Ids, Ids, tuple[Ids, ...], int]:
    """Prefix, suffix, possible answers and the number of the true one, as ``workflows.ask`` prompts for them.

    A free answer is the only one of its kind, and ends its turn.
    """
    encode, end = model.tokenizer.encode, model.tokenizer.eos_token_id

    def whole(text: str) -> Ids:
        return (*encode(text, add_special_tokens=False), end)

    if question.choices and model.choices_as == "letters":
        ids = model.prompt(format_choices(question.question, question.choices))
        letters = [chr(ord("A") + i) for i in range(len(question.choices))]
        answers = tuple(tuple(encode(letter, add_special_tokens=False)) for letter in letters)
    else:
        ids = model.prompt(question.question)
        answers = tuple(map(whole, question.choices or (question.answer,)))
    truth = question.choices.index(question.answer) if question.choices else 0
    return ids.prefix, ids.suffix, answers, truth


def prepare_data(
    videos: Sequence[Sequence[Question]],
    budgets: Sequence[Budget],
    request: CompressRequest,
    encoder: Callable[[], VisionEncoder],
    model: LanguageModel,
    cache: Path,
    progress: Progress | None = None,
) -> TrainingData:
    """Fill ``cache`` with what is not there yet, and return everything. ``videos``: the questions of each.

    The tower is loaded only where a video is new. A video that cannot be used is left out, and named. Raises
    ``VideoError`` when none is left.
    """
    folder = cache / _key(request, model)
    _make_folder(folder)
    examples, failed, tower = [], [], None
    num_untaught = 0
    for done, questions in enumerate(videos):
        if progress is not None:
            progress(done, len(videos))
        try:
            stem = folder / hash_file(questions[0].video)[:16]
            bundles = tuple(stem.with_name(f"{stem.name}-{budget.text}.pt") for budget in budgets)
            path = stem.with_name(f"{stem.name}-teacher.json")
            taught = _read_teacher(path)
            missing = [question for question in questions if _text_key(question) not in taught]
            if missing or not all(bundle.exists() for bundle in bundles):
                tower = tower or encoder()
                clip_request = replace(request, video=questions[0].video)
                clip = EncodedClip(clip_request, tower, StageTimer(torch.device(request.device.name)))
                _write_bundles(clip, budgets, bundles)
                taught |= _teach(clip, missing, model, request.value("text_after"))
                write_atomically(path, lambda file, taught=taught: file.write(json.dumps(taught).encode()), force=True)
        except ResourceError:
            raise
        except FreresError as error:
            failed.append(error.message)
            continue
        asked = tuple(_asked(model, question, taught[_text_key(question)]) for question in questions)
        num_untaught += all(one.teacher is None for one in asked)
        examples.append(Example(questions[0].video_name, bundles, asked))
    if not examples:
        raise VideoError(
            f"none of {len(videos)} videos could be used: {failed[0]}", "paths are relative to the data file"
        )
    return TrainingData(tuple(examples), tuple(failed), num_untaught)


def _key(request: CompressRequest, model: LanguageModel) -> str:
    """What the cached bundles depend on, besides video and budget; a variant may keep other rows."""
    settings = {key: setting.value for key, setting in request.settings.items()}
    rest = {key: value for key, value in settings.items() if key not in ("description", "budget_tokens")}
    facts = [__version__, dict(model.fingerprint), str(model.dtype), request.method, rest]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be a folder: {error.strerror}", "name another with --cache") from error


def _text_key(question: Question) -> str:
    return json.dumps([question.question, *question.choices])


def _read_teacher(path: Path) -> dict[str, list[float] | None]:
    try:
        taught: dict[str, list[float] | None] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return taught


def _write_bundles(clip: EncodedClip, budgets: Sequence[Budget], bundles: Sequence[Path]) -> None:
    for budget, path in zip(budgets, bundles, strict=True):
        if not path.exists():
            write_bundle(path, *clip.make_bundle(budget.tokens(clip.full_tokens)), force=True)


def _teach(
    clip: EncodedClip, questions: Sequence[Question], model: LanguageModel, text_after: str
) -> dict[str, list[float] | None]:
    """Log-likelihoods of the options with every token of the clip; None for free answers, and where all tokens are
    more than the model's context."""
    taught: dict[str, list[float] | None] = {}
    tokens = clip.build_tokens("full", clip.full_tokens)
    prefixes: dict[Ids, Any] = {}
    for question in questions:
        prefix, suffix, answers, _ = answer_ids(model, question)
        try:
            with memory_errors_as(f"the full-token teacher of {question.video_name}", "use a device with more memory"):
                if question.choices and prefix not in prefixes:
                    prefixes = {prefix: prefill_video(model, prefix, tokens, text_after)}
            scores = score_options(model, prefixes[prefix], suffix, list(answers)) if question.choices else None
        except BackboneError:
            scores = None
        taught[_text_key(question)] = None if scores is None else scores.tolist()
    return taught


def _asked(model: LanguageModel, question: Question, teacher: list[float] | None) -> Asked:
    prefix, suffix, answers, truth = answer_ids(model, question)
    return Asked(prefix, suffix, answers, truth, None if teacher is None else torch.tensor(teacher))
