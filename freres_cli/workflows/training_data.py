"""The training data of an adapter: a bundle per video and budget, and how the full-token model scores the options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli import __version__
from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import check_context, prefill_video, score_options
from freres_cli.baselines.registry import FRE_RES
from freres_cli.bench.clock import StageTimer, total_memory_bytes
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.content import Content, count_by_kind
from freres_cli.devices import Device, memory_errors_as
from freres_cli.errors import BackboneError, BundleError, ContextError, FreresError, ResourceError, VideoError
from freres_cli.evaluation.cells import Budget
from freres_cli.evaluation.questions import Question
from freres_cli.evaluation.scores import describe_reading
from freres_cli.files import make_folder, write_atomically
from freres_cli.method.select import VARIANTS_WITH_OWN_ROWS
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.pipeline.prompt_text import settle_tokens
from freres_cli.pipeline.query import Query, encode_choices
from freres_cli.pipeline.tokens import make_tokens, with_deep_rows
from freres_cli.records import VideoTokens
from freres_cli.video.opening import hash_file

Progress = Callable[[int, int], None]
Ids = tuple[int, ...]
# By question: the scores of its options, ``None`` if it has none, or the machine on which they could not be had.
Taught = dict[str, list[float] | str | None]

# Maximum prompt tokens per visual token: itself, and the timestamp that some families write before each frame.
TOKENS_AROUND = 24


@dataclass(frozen=True)
class Asked:
    """A question as training uses it.

    ``prefix``, ``suffix``: ids of the prompt before and after the video. ``answers``: ids of the k answers to score.
    ``truth``: index of the right one. ``teacher``: (k,) log-likelihoods from the model with every token; ``None`` if the
    question has no options, or the video no teacher.
    """

    prefix: Ids
    suffix: Ids
    answers: tuple[Ids, ...]
    truth: int
    teacher: Tensor | None


@dataclass(frozen=True)
class Example:
    """A video, identified by the SHA-256 of its content, with one bundle per budget and the questions about it.

    ``reading``: its name in the data, the seconds that could not be decoded, and notes on how it was read.
    ``has_failed_teacher``: some scores of the teacher could not be had on this machine.
    """

    sha256: str
    bundles: tuple[Path, ...]
    questions: tuple[Asked, ...]
    reading: dict[str, Any]
    has_failed_teacher: bool

    def content(self, budget: int) -> Content:
        """Read the bundle of a budget, given by its index, and check it like any other."""
        return read_bundle(self.bundles[budget]).content


@dataclass(frozen=True)
class TrainingData:
    """``examples``: the videos. ``failed``: videos, and then questions, that could not be used, each with the reason."""

    examples: tuple[Example, ...]
    failed: tuple[str, ...]

    @property
    def num_teacher_failed(self) -> int:
        """Videos whose teacher failed, for want of memory or with scores that are not finite."""
        return sum(example.has_failed_teacher for example in self.examples)

    @property
    def num_untaught(self) -> int:
        """The other videos without a teacher."""
        return sum(
            all(one.teacher is None for one in example.questions) and not example.has_failed_teacher
            for example in self.examples
        )

    @property
    def video_notes(self) -> list[dict[str, Any]]:
        """How the videos were read that something was lost of, or that have notes."""
        return describe_reading([example.reading for example in self.examples])


def answer_ids(model: LanguageModel, question: Question) -> tuple[Ids, Ids, tuple[Ids, ...], int]:
    """Return prefix, suffix, possible answers and the index of the right one, as ``pipeline.session`` prompts for them.

    A question without options has one possible answer, which ends the turn.
    """
    if question.choices:
        text, answers = encode_choices(model, Query(question.question, question.choices))
        truth = question.choices.index(question.answer)
    else:
        written = model.tokenizer.encode(question.answer, add_special_tokens=False)
        text, answers, truth = question.question, [(*written, model.tokenizer.eos_token_id)], 0
    ids = model.prompt(text)
    return ids.prefix, ids.suffix, tuple(answers), truth


def prepare_data(
    videos: Sequence[Sequence[Question]],
    budgets: Sequence[Budget],
    options: CompressOptions,
    models: Models,
    cache: Path,
    progress: Progress | None = None,
) -> TrainingData:
    """Add to ``cache`` what is missing, and return the training data.

    ``videos``: the questions about each video. ``budgets``: a bundle is made for each. ``options``, ``models``: how the
    bundles are made. ``cache``: folder of bundles and teacher scores. ``progress``: called with the number of videos
    done and the number of all videos.

    The tower is loaded only if a video is not in the cache yet. Videos that cannot be used, and questions too long for
    the model, are left out and reported. Raises ``VideoError`` if nothing is left, ``UsageError`` for a cache folder
    that cannot be made.
    """
    folder = cache / _key(options, models)
    make_folder(folder, "--cache")
    store = _Store(folder, budgets, options, models)
    found: dict[str, Example] = {}
    failed: list[str] = []
    too_long: list[str] = []
    for done, questions in enumerate(videos):
        if progress is not None:
            progress(done, len(videos))
        try:
            example = store.prepare(questions, too_long)
        except ResourceError:
            raise
        except FreresError as error:
            failed.append(_named(questions[0], error))
            continue
        if not example.questions:
            continue
        # A file may have two names. It must not be both trained on and held out.
        known = found.get(example.sha256)
        found[example.sha256] = example if known is None else _joined(known, example)
    failed += too_long
    if not found:
        raise VideoError(
            f"none of {len(videos)} videos could be used: {failed[0]}", "paths are relative to the data file"
        )
    return TrainingData(tuple(found.values()), tuple(failed))


def _joined(one: Example, other: Example) -> Example:
    has_failed = one.has_failed_teacher or other.has_failed_teacher
    return replace(one, questions=one.questions + other.questions, has_failed_teacher=has_failed)


def _named(question: Question, error: FreresError) -> str:
    return error.message if isinstance(error, VideoError) else f"{question.video_name}: {error.message}"


@dataclass
class _Store:
    """The cache for one model and one set of settings."""

    folder: Path
    budgets: Sequence[Budget]
    options: CompressOptions
    models: Models

    @property
    def model(self) -> LanguageModel:
        return self.models.language_model

    def prepare(self, questions: Sequence[Question], too_long: list[str]) -> Example:
        """Make what is missing for a video. Questions that are too long for the model are added to ``too_long``."""
        sha256, machine = hash_file(questions[0].video), name_machine(self.options.model.device)
        stem = self.folder / sha256[:16]
        bundles = tuple(stem.with_name(f"{stem.name}-{budget.number}.pt") for budget in self.budgets)
        path = stem.with_name(f"{stem.name}-teacher.json")
        taught = _read_teacher(path)
        # What failed on one machine may work on another. Here it would fail again, for every worker and at every start.
        tried = {key for key, scores in taught.items() if not isinstance(scores, str) or scores == machine}
        missing = [question for question in questions if _text_key(question) not in tried]
        if missing or not all(map(_is_whole, bundles)):
            timer = StageTimer(torch.device(self.options.model.device.name))
            options = _with_shared_rows(self.options)
            clip = EncodedClip(VideoSource(questions[0].video), options, self.models.encoder, timer)
            _write_bundles(clip, self.budgets, bundles, self.model, self.options.method)
            taught |= _teach(clip, missing, self.model, self.options.settings.text_after, machine)
            write_atomically(path, lambda file: file.write(json.dumps(taught).encode()), force=True)
        asked = []
        made = [read_bundle(bundle) for bundle in bundles]
        tokens = self._largest([bundle.content for bundle in made])
        for question in questions:
            scores = taught[_text_key(question)]
            one = _asked(self.model, question, None if isinstance(scores, str) else scores)
            try:
                self._check_length(one, tokens)
            except BackboneError as error:
                too_long.append(f"line {question.line}: {_named(question, error)}")
                continue
            asked.append(one)
        reading = _describe_reading(questions[0].video_name, [bundle.manifest for bundle in made])
        has_failed = any(isinstance(taught[_text_key(question)], str) for question in questions)
        return Example(sha256, bundles, tuple(asked), reading, has_failed)

    def _largest(self, contents: Sequence[Content]) -> VideoTokens:
        content = max(contents, key=_num_tokens)
        tokens = make_tokens(content, self.options.settings.variant)
        tokens, _ = settle_tokens(tokens, self.model.text_per_frame(tokens))
        return with_deep_rows(tokens, self.model.num_deep_layers)

    def _check_length(self, asked: Asked, tokens: VideoTokens) -> None:
        """Raise ``ContextError`` for a question that exceeds the model's context at the largest budget."""
        longest = len(asked.suffix) + max(map(len, asked.answers)) - 1
        # Timestamps in the prompt take a few tokens per frame. They need no exact count if there is plenty of room.
        roomy = len(asked.prefix) + TOKENS_AROUND * len(tokens) + longest
        if roomy > self.model.max_context_tokens:
            rows = self.model.splice(asked.prefix, tokens, self.options.settings.text_after)
            check_context(self.model, len(rows) + longest, rows.next_position)


def name_machine(device: Device) -> str:
    """Return what decides whether something fits in memory: the kind of ``device``, and how much it has."""
    kind = device.description if device.is_cuda else "CPU"
    return f"{kind}, {total_memory_bytes(torch.device(device.name)) >> 30} GiB"


def _describe_reading(name: str, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the bundles of a video, one for each budget, say of how it was read. Some read other frames."""
    notes = [note for one in manifests for note in (*one["source"]["notes"], *one["sampling"]["notes"])]
    lost_s = max(one["sampling"]["lost_s"] for one in manifests)
    return {"video": name, "lost_s": lost_s, "notes": list(dict.fromkeys(notes))}


def _num_tokens(content: Content) -> int:
    return sum(count_by_kind(content).values())


def _is_whole(bundle: Path) -> bool:
    try:
        read_bundle(bundle)
    except BundleError:
        return False
    return True


def _with_shared_rows(options: CompressOptions) -> CompressOptions:
    """Return the options to make bundles with: variants that keep the same rows share them."""
    variant = options.settings.variant
    if variant == "absorber" or (variant in VARIANTS_WITH_OWN_ROWS and options.method == FRE_RES):
        return options
    return replace(options, settings=options.settings.with_values("train", variant="absorber"))


def _key(options: CompressOptions, models: Models) -> str:
    """Return a digest of what the cached bundles, and the teacher's scores, depend on besides video and budget."""
    dtype = str(models.language_model.dtype)
    small = models.checkpoint.small_files_sha256  # how pixels are normalised, tokens and prompts are made
    facts = [__version__, models.facts, small, dtype, options.method, used_settings(_with_shared_rows(options))]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def used_settings(options: CompressOptions) -> dict[str, Any]:
    """Return every setting that the bundles depend on, in the types that JSON has."""
    used = {key: value for key, value in options.recorded_settings.values().items() if key != "budget_tokens"}
    return dict(json.loads(json.dumps(used, default=str)))


def _text_key(question: Question) -> str:
    return json.dumps([question.question, *question.choices])


def _read_teacher(path: Path) -> Taught:
    try:
        taught = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return taught if isinstance(taught, dict) else {}


def _write_bundles(
    clip: EncodedClip, budgets: Sequence[Budget], bundles: Sequence[Path], model: LanguageModel, method: str
) -> None:
    for budget, path in zip(budgets, bundles, strict=True):
        if not _is_whole(path):
            write_bundle(path, *clip.make_bundle(budget.tokens(clip.full_tokens), model, method), force=True)


def _teach(
    clip: EncodedClip, questions: Sequence[Question], model: LanguageModel, text_after: str, machine: str
) -> Taught:
    """Return the log-likelihoods of the options with every token of the clip, by question: ``None`` for free answers, and if
    all tokens and the question exceed the model's context; ``machine`` where it failed, for want of memory or with scores
    that are not finite."""
    taught: Taught = {}
    tokens = clip.build_tokens("full", clip.full_tokens)
    prefixes: dict[Ids, Any] = {}
    for question in questions:
        prefix, suffix, answers, _ = answer_ids(model, question)
        try:
            with memory_errors_as(f"the full-token teacher of {question.video_name}", "use a device with more memory"):
                if question.choices and prefix not in prefixes:
                    prefixes = {prefix: prefill_video(model, prefix, tokens, text_after)}
            scores = score_options(model, prefixes[prefix], suffix, list(answers)) if question.choices else None
            taught[_text_key(question)] = None if scores is None else scores.tolist()
        except (BackboneError, ResourceError) as error:
            is_failure = isinstance(error, ResourceError) or (
                prefix in prefixes and not isinstance(error, ContextError)
            )
            taught[_text_key(question)] = machine if is_failure else None
    return taught


def _asked(model: LanguageModel, question: Question, teacher: list[float] | None) -> Asked:
    prefix, suffix, answers, truth = answer_ids(model, question)
    return Asked(prefix, suffix, answers, truth, None if teacher is None else torch.tensor(teacher))
