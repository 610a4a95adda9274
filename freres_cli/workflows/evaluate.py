"""questions -> accuracy: every video encoded once, asked all its questions by every method at every budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from freres_cli import __version__
from freres_cli.backbones.base import LanguageModel, VisionEncoder
from freres_cli.backbones.checkpoint import BUNDLED
from freres_cli.backbones.registry import load_language_model
from freres_cli.bench.clock import StageTimer
from freres_cli.devices import memory_errors_as
from freres_cli.errors import FreresError, VideoError
from freres_cli.method.fusion import FreResModules
from freres_cli.video.probe import hash_file
from freres_cli.workflows.adapters import check_shape, check_variant, load_adapter
from freres_cli.workflows.ask import Session, refuse_control_tokens, with_deep_rows
from freres_cli.workflows.budgets import Cell
from freres_cli.workflows.clips import EncodedClip
from freres_cli.workflows.compress import CompressRequest, describe_limits, load_encoder
from freres_cli.workflows.questions import Question, QuestionFile, is_right
from freres_cli.workflows.results import REMEDY, ResultsFile
from freres_cli.workflows.scores import summarize
from freres_cli.world.bundled_model import bundled_model_dir
from freres_cli.world.make import is_world_clip

MAX_ANSWER_TOKENS = 16

Progress = Callable[[int, int], None]
Modules = Mapping[Path | None, FreResModules]


@dataclass(frozen=True)
class EvalRequest:
    """What to ask and how. ``compress`` holds model, device and settings; its video is none of the questions'.

    ``output``: the results file, continued where it holds the same run; ``None`` keeps them in memory. ``remedy``: what
    to do where it holds something else.
    """

    questions: QuestionFile
    cells: tuple[Cell, ...]
    compress: CompressRequest
    output: Path | None = None
    force: bool = False
    remedy: str = REMEDY


@dataclass(frozen=True)
class EvalResult:
    """``summary``: rows, questions and failed videos, as ``--json`` has them. ``notes``: what the user should know."""

    summary: dict[str, Any]
    run: dict[str, Any]
    dtype: torch.dtype
    num_resumed: int
    notes: tuple[str, ...]


def evaluate(request: EvalRequest, progress: Progress | None = None) -> EvalResult:
    """Ask every question by every method and sum up.

    A video that cannot be used is a failed row, and its questions count for no method. Raises
    ``VideoError`` when no video could be used, ``UsageError`` for a question the model reads as a command.
    """
    encoder = load_encoder(request.compress)
    model = _load_language_model(request.compress)
    refuse_control_tokens(request.questions, model)
    modules = load_all_modules(request, model)
    run = describe_run(request, model)
    results = ResultsFile(request.output, run, request.force, request.remedy)
    videos = request.questions.by_video()
    num_resumed = 0
    for done, (name, questions) in enumerate(videos.items()):
        if progress is not None:
            progress(done, len(videos))
        if _is_done(results.rows.get(name), questions, len(request.cells)):
            num_resumed += 1
            continue
        results.append(evaluate_video(request, name, questions, encoder, model, modules))
    rows = [results.rows[name] for name in videos]
    if all(row["status"] == "failed" for row in rows):
        raise VideoError(
            f"{request.questions.path}: none of {len(rows)} videos could be used: {rows[0]['message']}",
            "paths of videos are relative to the questions file",
        )
    summary = summarize(request.questions, rows, request.cells)
    # Every file is opened again for it: only where the bundled model answers.
    is_known = request.compress.model != BUNDLED or all(
        is_world_clip(videos[row["video"]][0].video) for row in rows if row["status"] == "ok"
    )
    limits = describe_limits(request.compress.model, is_known)
    notes = (*limits, *_describe_drop(request, model), *encoder.notes, *model.notes)
    return EvalResult(summary, run, model.dtype, num_resumed, tuple(dict.fromkeys(notes)))


def load_all_modules(request: EvalRequest, model: LanguageModel) -> Modules:
    """Read the adapter of every cell that has one. Raises ``BackboneError`` for one of another model or variant, or for
    fewer coefficients than the cell's settings allow: whether a clip has them is only known once it is compressed."""
    found: dict[Path | None, FreResModules] = {}
    for cell in request.cells:
        if cell.adapter is not None:
            adapter = load_adapter(cell.adapter, model.fingerprint)
            settings = {key: setting.value for key, setting in request.compress.settings.items()} | dict(cell.settings)
            check_variant(adapter, settings["variant"])
            check_shape(adapter, model.width, settings["max_coefficients"])
            found[cell.adapter] = adapter.modules.to(model.device)
    return found


def describe_run(request: EvalRequest, model: LanguageModel) -> dict[str, Any]:
    """Return everything that decides the answers: a results file is continued only where all of it is equal."""
    compress = request.compress
    settings = {key: setting.value for key, setting in compress.settings.items() if key != "description"}
    del settings["budget_tokens"]  # each cell has its own
    return {
        "freres_version": __version__,
        "questions_sha256": request.questions.sha256,
        "methods": [[cell.name, dict(cell.settings), cell.adapter_sha256] for cell in request.cells],
        "model": dict(model.fingerprint),
        "device": compress.device.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": settings,
        "max_answer_tokens": MAX_ANSWER_TOKENS,
    }


def evaluate_video(
    request: EvalRequest,
    name: str,
    questions: Sequence[Question],
    encoder: VisionEncoder,
    model: LanguageModel,
    modules: Modules,
) -> dict[str, Any]:
    """Return the row of one video: encoded once, its questions asked from one prefill for each method and budget."""
    compress = replace(request.compress, video=questions[0].video)
    timer = StageTimer(torch.device(request.compress.device.name))
    row: dict[str, Any] = {"video": name, "status": "ok", "message": None}
    try:
        with memory_errors_as(f"video {name}", "evaluate it on a machine with more memory, or with a smaller --dtype"):
            row["video_sha256"] = hash_file(compress.video)
            clip = EncodedClip(compress, encoder, timer)
            row |= {"num_frames": clip.num_frames, "full_tokens": clip.full_tokens}
            row["cells"] = [_ask_cell(cell, clip, compress, questions, model, modules, timer) for cell in request.cells]
    except FreresError as error:
        return {"video": name, "status": "failed", "message": error.message}
    return row | {"decode_s": timer.seconds["decode"], "encode_s": timer.seconds["encode"]}


def _ask_cell(
    cell: Cell,
    clip: EncodedClip,
    compress: CompressRequest,
    questions: Sequence[Question],
    model: LanguageModel,
    modules: Modules,
    timer: StageTimer,
) -> dict[str, Any]:
    """Return tokens, times and answers of one method at one budget: answers by question id, as
    (text, whether it is right, seconds to the first token)."""
    budget_tokens = {"full": clip.full_tokens, "blind": 0}.get(cell.method)
    if cell.budget is not None:
        budget_tokens = cell.budget.tokens(clip.full_tokens)
    assert budget_tokens is not None
    timer.seconds.pop("compress", None)
    own = clip.with_settings(cell.settings) if cell.settings else clip
    tokens = own.build_tokens(cell.method, budget_tokens, modules.get(cell.adapter))
    tokens = with_deep_rows(tokens, model)
    session = Session(model, tokens, clip.full_tokens, compress.value("text_after"), load_s=0.0)
    answers: dict[str, tuple[str, bool, float]] = {}
    for question in questions:
        said = session.ask(question.question, choices=question.choices, max_new_tokens=MAX_ANSWER_TOKENS)
        answers[question.id] = (said.text, is_right(said.text, question), said.ttft_s)
    return {
        "method": cell.method,
        "budget": None if cell.budget is None else cell.budget.number,
        "budget_tokens": budget_tokens,
        "visual_tokens": len(tokens),
        "compress_s": timer.seconds["compress"],
        "prefill_s": session.prefill_s,
        "answers": answers,
    }


def _describe_drop(request: EvalRequest, model: LanguageModel) -> tuple[str, ...]:
    """What dropped DeepStack rows mean for the comparison, in words; nothing where none are dropped."""
    if request.compress.value("deepstack") != "drop":
        return ()
    if not model.num_deep_layers:
        return ("deepstack has no effect: the model has no such rows",)
    return ("deepstack: drop: method full keeps the DeepStack rows, all others have zeros in their place",)


def _is_done(row: dict[str, Any] | None, questions: Sequence[Question], num_cells: int) -> bool:
    """Whether an earlier run asked all of these about this very file; a failed video is tried again."""
    if row is None or row["status"] != "ok" or len(row["cells"]) != num_cells:
        return False
    if any(question.id not in cell["answers"] for cell in row["cells"] for question in questions):
        return False
    try:
        return bool(row["video_sha256"] == hash_file(questions[0].video))
    except VideoError:
        return False


def _load_language_model(request: CompressRequest) -> LanguageModel:
    return load_language_model(
        request.model, request.device, request.dtype, request.revision, bundled_directory=bundled_model_dir()
    )
