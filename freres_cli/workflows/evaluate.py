"""questions -> accuracy: each video is encoded once, then every method answers its questions at every budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from freres_cli.backbones.base import LanguageModel
from freres_cli.baselines.registry import METHODS
from freres_cli.bench.clock import PeakMemory, StageTimer
from freres_cli.devices import memory_errors_as
from freres_cli.errors import FreresError, VideoError, as_freres_error
from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.joined import JoinedAnswers, KnownCells
from freres_cli.evaluation.questions import Question, QuestionFile, check_length
from freres_cli.evaluation.results import ResultsFile
from freres_cli.evaluation.scores import summarize
from freres_cli.files import InputFiles
from freres_cli.pipeline.adapters import AnyModules, describe_overlap, load_modules_for, read_training_videos
from freres_cli.pipeline.choices import count_budget
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.method_session import check_methods, make_method_session
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.notes import describe_limits
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.pipeline.query import refuse_control_tokens
from freres_cli.pipeline.reasoning import refuse_reasoning
from freres_cli.pipeline.session import Session
from freres_cli.presets import BUNDLED
from freres_cli.records import Answer
from freres_cli.video.opening import hash_file
from freres_cli.workflows.eval_run import EvalRequest, describe_answers, describe_run
from freres_cli.world.make import is_world_clip

Progress = Callable[[int, int], None]
Modules = Mapping[Path | None, AnyModules]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    ``summary``: rows, questions and failed videos, as in the ``--json`` document. ``run``: what decides the answers, from
    ``describe_run``. ``dtype``: of the language model; ``storage``: of its cache and weights. ``num_resumed``: videos that an
    earlier run had answered. ``num_joined``: rows of a video, method and budget that were taken from other runs. ``notes``:
    what the user should know.
    """

    summary: dict[str, Any]
    run: dict[str, Any]
    dtype: torch.dtype
    storage: dict[str, str]
    num_resumed: int
    num_joined: int
    notes: tuple[str, ...]


def evaluate(request: EvalRequest, progress: Progress | None = None, models: Models | None = None) -> EvalResult:
    """Ask every question with every method, summarize the answers, and write the files that are asked for.

    A video that cannot be used becomes a failed row, and its questions count for no method. A method that fails on a
    video at a budget loses that video in that row of the results only. ``progress``: called with the number of videos
    done and the number of all videos. ``models``: a model that is already loaded. Raises the error of the first video
    if none could be used, and ``UsageError`` for a question that holds a control token of the model or a file that cannot be
    written, and ``BackboneError`` for a method that cannot prune its decoder or a model that reasons first.
    """
    taken = InputFiles(request.inputs)
    taken.refuse(request.output)
    taken.add("file of -o", request.output)
    request.files.check(request.force, taken)
    models = models or Models(request.options.model)
    encoder, model = models.encoder, models.language_model
    _check_questions(request, model)
    modules = load_all_modules(request.cells, request.options, models)
    trained = read_training_videos(request.cells)
    run = describe_run(request, models)
    joined = JoinedAnswers(request.joined, run)
    videos = request.questions.by_video()
    num_resumed = num_joined = 0
    failures: list[FreresError] = []
    with ResultsFile(request.output, run, request.force, request.remedy) as results:
        for done, (name, questions) in enumerate(videos.items()):
            if progress is not None:
                progress(done, len(videos))
            known = _find_known(joined, results.rows.get(name), name, questions)
            if len(known.cells) - known.num_joined == len(request.cells):
                num_resumed += 1
                continue
            row = evaluate_video(request, name, questions, models, modules, failures, known)
            num_joined += known.num_joined if row["status"] == "ok" else 0
            results.append(row)
    rows = [results.rows[name] for name in videos]
    if all(row["status"] == "failed" for row in rows):
        raise _explain_none(request.questions, rows, failures[0])
    summary = summarize(request.questions, rows, request.cells)
    request.files.write(summary, request.force)
    notes = (*request.questions.notes, *describe_answers(request, model, rows, summary), *encoder.notes, *model.notes)
    seen = [row["video_sha256"] for row in rows if row["status"] == "ok"]
    notes = (*_describe_limits(request, videos, rows), *describe_overlap(trained, seen), *notes)
    storage = model.storage.describe(model.dtype)
    return EvalResult(summary, run, model.dtype, storage, num_resumed, num_joined, tuple(dict.fromkeys(notes)))


def _check_questions(request: EvalRequest, model: LanguageModel) -> None:
    """Refuse questions, models and methods that cannot be asked, before any work is done."""
    for where, texts in request.questions.places():
        check_length(texts, where)
    refuse_control_tokens(request.questions.places(), model)
    refuse_reasoning(model, "eval")
    check_methods((cell.method for cell in request.cells), model)


def _describe_limits(
    request: EvalRequest, videos: Mapping[str, Sequence[Question]], rows: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    """Notes on what the bundled model knows. ``videos``: the questions of each. ``rows``: of the videos."""
    # This opens every file again, so it is done only for the bundled model.
    is_known = request.options.model.name != BUNDLED or all(
        is_world_clip(videos[row["video"]][0].video) for row in rows if row["status"] == "ok"
    )
    return tuple(describe_limits(request.options.model.name, is_known))


def _explain_none(questions: QuestionFile, rows: Sequence[Mapping[str, Any]], first: FreresError) -> FreresError:
    """The error of a run in which no video could be used: that of the first of them."""
    hint = first.hint
    if isinstance(first, VideoError):
        is_own = questions.protocol is None
        hint = (
            "paths of videos are relative to the questions file"
            if is_own
            else "see freres-benchmarks(7) for its layout"
        )
    return type(first)(f"{questions.path}: none of {len(rows)} videos could be used: {rows[0]['message']}", hint)


def load_all_modules(cells: Sequence[Cell], options: CompressOptions, models: Models) -> Modules:
    """Read the adapters of the cells, and return them by path.

    ``cells``: what is compared. ``options``: their settings, where a cell has none of its own. ``models``: both halves.
    Raises ``BackboneError`` for an adapter of another model, method or variant, or with too few bands.
    """
    found: dict[Path | None, AnyModules] = {}
    for cell in cells:
        if cell.adapter is not None:
            settings = options.settings.values() | dict(cell.settings)
            found[cell.adapter] = load_modules_for(cell.adapter, cell.method, models, settings)
    return found


def evaluate_video(
    request: EvalRequest,
    name: str,
    questions: Sequence[Question],
    models: Models,
    modules: Modules,
    failures: list[FreresError],
    known: KnownCells,
) -> dict[str, Any]:
    """Return the row of one video. It is encoded once, and prefilled once for each method and budget that is not known.

    ``request``: what the run asks for. ``name``: the video's name in the questions file. ``questions``: the questions
    about this video. ``models``: both halves of the model. ``modules``: trained modules by adapter path. ``failures``: gets
    what goes wrong. ``known``: what was answered before.
    """
    if known.row is not None and len(known.cells) == len(request.cells):
        cells = [known.cells[place] for place in range(len(request.cells))]
        return {**known.row, "cells": cells, "lost_s": known.lost_s, "notes": list(known.notes)}
    first = questions[0]
    video, model = first.video, models.language_model
    options = replace(request.options, start_s=first.start_s, end_s=first.end_s)
    timer = StageTimer(torch.device(request.options.model.device.name))
    row: dict[str, Any] = {"video": name, "status": "ok", "message": None}
    try:
        with memory_errors_as(f"video {name}", "evaluate it on a machine with more memory, or with a smaller --dtype"):
            if first.problem:
                raise VideoError(first.problem)
            row["video_sha256"] = known.sha256 or hash_file(video)
            clip = EncodedClip(VideoSource(video), options, models.encoder, timer)
            row |= {"num_frames": clip.num_frames, "full_tokens": clip.full_tokens}
            row["cells"] = [
                known.cells.get(place)
                or _try_cell(
                    cell, lambda cell: ask_cell(cell, clip, request, questions, model, modules, timer), failures
                )
                for place, cell in enumerate(request.cells)
            ]
            # After the cells: some decode the file once more.
            notes = dict.fromkeys((*known.notes, *clip.notes))
            row |= {"lost_s": max(known.lost_s, clip.lost_s), "notes": list(notes)}
    except FreresError as error:
        failures.append(error.without_frames())
        return {"video": name, "status": "failed", "message": error.message}
    if all(part["status"] == "failed" for part in row["cells"]):
        return {"video": name, "status": "failed", "message": row["cells"][0]["message"]}
    return row | {"decode_s": timer.seconds["decode"], "encode_s": timer.seconds["encode"]}


def _try_cell(cell: Cell, ask: Callable[[Cell], dict[str, Any]], failures: list[FreresError]) -> dict[str, Any]:
    """Return what ``ask`` returns of a cell, or why it failed: one method must not lose the answers of the others."""
    try:
        with memory_errors_as(cell.name, "use a smaller --dtype, or leave it out"):
            return ask(cell)
    except Exception as error:
        failures.append(failure_of(error, cell.name))
        return {
            "method": cell.method,
            "budget": None if cell.budget is None else cell.budget.number,
            "status": "failed",
            "message": failures[-1].message,
            "answers": {},
        }


def failure_of(error: Exception, name: str) -> FreresError:
    """Return why a method failed on a video, as an error with one line and no frames. ``name``: the method and its budget."""
    kept = as_freres_error(error, name)
    return kept if kept.message.startswith(name) else type(kept)(f"{name}: {kept.message}", kept.hint)


def ask_cell(
    cell: Cell,
    clip: EncodedClip,
    request: EvalRequest,
    questions: Sequence[Question],
    model: LanguageModel,
    modules: Modules,
    timer: StageTimer,
) -> dict[str, Any]:
    """Return tokens, times and answers of one method at one budget.

    ``cell``: the method and its budget. ``clip``: the encoded clip. ``request``: what the run asks for. ``questions``: about
    this clip. ``model``: the language half. ``modules``: trained modules by adapter path. ``timer``: that of the clip. An
    answer, by question id, is (text, whether it is right, seconds to the first token).
    """
    budget_tokens = count_budget(cell.method, cell.budget, clip.full_tokens)
    timer.seconds.pop("compress", None)
    own = clip.with_settings(dict(cell.settings)) if cell.settings else clip
    text_after = request.options.settings.text_after
    session = make_method_session(own, cell.method, budget_tokens, model, text_after, modules.get(cell.adapter))
    # From here on: what the clip keeps for all methods is made by whichever comes first. Resident memory of a process cannot
    # be told apart by cell: what one frees, the next may use.
    memory = PeakMemory(model.device) if model.device.type == "cuda" else None
    answers: dict[str, tuple[str, bool, float]] = {}
    contexts, notes = [], [*session.notes]
    for question in questions:
        said = _ask(session, question, request)
        assert said.ttft_s is not None
        contexts.append(said.num_context_tokens)
        notes += said.notes
        answers[question.id] = (said.text, request.questions.is_right(said.text, question), said.ttft_s)
    # Pruning in the decoder leaves its layers caches of different lengths.
    has_even_cache = "decoder layers" not in METHODS[cell.method].needs
    num_frames, encoded_tokens = own.count_frames(cell.method, budget_tokens)
    return {
        "method": cell.method,
        "budget": None if cell.budget is None else cell.budget.number,
        "status": "ok",
        "budget_tokens": budget_tokens,
        "num_frames": num_frames,
        "encoded_tokens": encoded_tokens,
        "visual_tokens": said.num_visual_tokens,
        "context_tokens": statistics.fmean(contexts),
        "kv_cache_bytes": max(contexts) * model.kv_bytes_per_token if has_even_cache else None,
        "peak_memory_bytes": None if memory is None else memory.read_bytes(),
        "compress_s": timer.seconds["compress"] + session.refine_s,
        "prefill_s": session.prefill_s,
        "notes": list(dict.fromkeys(notes)),
        "answers": answers,
    }


def _ask(session: Session, question: Question, request: EvalRequest) -> Answer:
    """Ask one question: a benchmark's prompt is answered in words, as its protocol has it."""
    protocol = request.questions.protocol
    if protocol is not None:
        # The prompt lists the options, and has no part in what is relevant.
        return session.ask(question.prompt, max_new_tokens=protocol.max_new_tokens, relevant_text=question.question)
    return session.ask(question.question, choices=question.choices, max_new_tokens=request.max_answer_tokens)


def _find_known(
    joined: JoinedAnswers, own: Mapping[str, Any] | None, name: str, questions: Sequence[Question]
) -> KnownCells:
    """What was answered about this exact file before. ``own``: what the run's own file has about it."""
    try:
        sha256 = hash_file(questions[0].video)
    except VideoError:  # evaluating the video says why
        return KnownCells()
    return joined.find(name, sha256, {question.id for question in questions}, own)
