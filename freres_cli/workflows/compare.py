"""A video and questions -> what each method makes of them, side by side. The video is decoded and encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli.baselines.registry import FRE_RES, METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.devices import memory_errors_as
from freres_cli.errors import FreresError, UsageError
from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.fidelity import READERS, measure_energy, measure_loss, share_kept
from freres_cli.pipeline.adapters import AnyModules, describe_overlap, read_training_videos
from freres_cli.pipeline.choices import MAX_NEW_TOKENS, count_budget
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.method_session import check_methods, open_method_session
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.notes import describe_limits, describe_times
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.pipeline.query import Query, refuse_control_tokens
from freres_cli.pipeline.session import Session
from freres_cli.video.opening import hash_file
from freres_cli.workflows.eval_run import describe_adapters, describe_frame_counts, reads_other_frames
from freres_cli.workflows.evaluate import Modules, failure_of, load_all_modules
from freres_cli.workflows.fidelity import Rebuild, rebuild_clip, rebuild_tokens
from freres_cli.world.make import is_world_clip


@dataclass(frozen=True)
class CompareRequest:
    """What to compare.

    ``video``: the file. ``cells``: the methods and budgets. ``options``: model, device and settings. ``queries``: the
    questions; without any, neither the language model nor an adapter is loaded. ``max_new_tokens``: most tokens of a free
    answer.
    """

    video: Path
    cells: tuple[Cell, ...]
    options: CompressOptions
    queries: tuple[Query, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class CompareResult:
    """What was found: ``rows``, one for each cell, and facts about the clip. ``model``: the encoder's fingerprint.
    ``dtype``: of its latents. ``notes``: what the user should know."""

    rows: list[dict[str, Any]]
    num_frames: int
    full_tokens: int
    decode_s: float
    encode_s: float
    model: dict[str, Any]
    dtype: torch.dtype
    notes: tuple[str, ...]


def compare(request: CompareRequest, models: Models | None = None) -> CompareResult:
    """Encode the video once; then let every method make its tokens, measure what they keep, and ask every question.

    A method that fails is a row that says why. ``models``: a model that is already loaded. Raises ``UsageError`` for a
    method that needs a question where there is none, ``VideoError`` for a video that cannot be read, and
    the error of the first method if every one fails.
    """
    for cell in request.cells:
        if not (METHODS[cell.method].is_question_blind or request.queries):
            raise UsageError(f"--methods: {cell.method} needs a question, got none", "ask one with --question")
    models = models or Models(request.options.model)
    notes = [*describe_times((cell.method for cell in request.cells), request.options.model.device)]
    modules: Modules = {}
    if request.queries:
        model = models.language_model
        check_methods([cell.method for cell in request.cells], model)
        refuse_control_tokens([("--question", [query.question for query in request.queries])], model)
        refuse_control_tokens([("--choices", query.choices) for query in request.queries], model)
        modules = load_all_modules(request.cells, request.options, models)
        notes += describe_adapters(request.cells)
        notes += [*describe_limits(request.options.model.name, is_world_clip(request.video)), *model.notes]
    encoder = models.encoder
    timer = StageTimer(torch.device(request.options.model.device.name))
    with memory_errors_as(f"video {request.video}", "compare a shorter part, or use a smaller --dtype"):
        clip = EncodedClip(VideoSource(request.video), request.options, encoder, timer)
        energy = measure_energy(clip.latents, encoder.width)
    if modules:
        notes += describe_overlap(read_training_videos(request.cells), [hash_file(request.video)])
    failures: list[FreresError] = []
    rows = [
        _try_cell(cell, clip, energy, request, models, modules.get(cell.adapter), timer, failures)
        for cell in request.cells
    ]
    if len(failures) == len(rows):
        first = failures[0]
        raise type(first)(f"{request.video}: every method failed: {first.message}", first.hint)
    if reads_other_frames(rows):
        notes.append(describe_frame_counts(rows, request.options.settings.track_density))
    return CompareResult(
        rows,
        clip.num_frames,
        clip.full_tokens,
        timer.seconds["decode"],
        timer.seconds["encode"],
        dict(encoder.fingerprint),
        encoder.dtype,
        tuple(dict.fromkeys((*notes, *encoder.notes, *clip.notes))),
    )


def _try_cell(
    cell: Cell,
    clip: EncodedClip,
    energy: float,
    request: CompareRequest,
    models: Models,
    modules: AnyModules | None,
    timer: StageTimer,
    failures: list[FreresError],
) -> dict[str, Any]:
    """Return the row of one method at one budget; if it fails, with the reason, which ``failures`` gets as well, and what
    was known by then."""
    budget_tokens = count_budget(cell.method, cell.budget, clip.full_tokens)
    figures = ("visual_tokens", "context_tokens", "kept_hold", "kept_linear", "compress_s", "prefill_s", "ttft_s")
    row: dict[str, Any] = {
        "method": cell.method,
        "budget": None if cell.budget is None else cell.budget.number,
        "status": "ok",
        "message": None,
        "budget_tokens": budget_tokens,
        "full_tokens": clip.full_tokens,
        "num_frames": None,
        "adapter": None if modules is None or cell.adapter is None else cell.adapter.name,
        **dict.fromkeys(figures),
        "answers": [],
        "notes": [],
    }
    try:
        with memory_errors_as(cell.name, "use a smaller --dtype, or leave it out"):
            timer.seconds.pop("compress", None)
            tokens = clip.build_tokens(cell.method, budget_tokens, modules)
            row["compress_s"] = timer.seconds["compress"]
            row["num_frames"] = clip.count_frames(cell.method, budget_tokens)[0]
            # A method that needs the question has its own tokens for each.
            if METHODS[cell.method].is_question_blind:
                row["visual_tokens"] = len(tokens)
                if len(tokens):
                    # Fre-Res is rebuilt from its tracks, which its tokens no longer are; and modules make others of tokens.
                    is_own = modules is None and cell.method != FRE_RES
                    own = rebuild_tokens(clip, tokens) if is_own else rebuild_clip(clip, cell.method, budget_tokens)[1]
                    row |= _measure_kept(clip.latents, own, tokens.width, energy)
            if request.queries:
                text_after = request.options.settings.text_after
                session = open_method_session(
                    clip, tokens, cell.method, budget_tokens, models.language_model, text_after
                )
                row |= _ask(session, request, row["compress_s"])
    except Exception as error:
        failures.append(failure_of(error, cell.name))
        row |= {"status": "failed", "message": failures[-1].message}
    return row


def _measure_kept(latents: Tensor, own: Mapping[str, Rebuild], width: int, energy: float) -> dict[str, float]:
    """Return the share of ``energy`` that each reader rebuilds, as ``freres fidelity`` has it. ``own``: what they rebuild."""
    lost = {reader: float(measure_loss(latents, own[reader], width).sum()) for reader in READERS}
    return {f"kept_{reader}": share_kept(lost[reader], energy) for reader in READERS}


def _ask(session: Session, request: CompareRequest, compress_s: float) -> dict[str, Any]:
    """Return what the language model says to each question, and what the first one costs. ``compress_s``: so far."""
    answers, costs = [], []
    for query in request.queries:
        answers.append(session.ask(query.question, choices=query.choices, max_new_tokens=request.max_new_tokens))
        costs.append((session.prefill_s, session.refine_s))
    prefill_s, refine_s = costs[0]
    return {
        "visual_tokens": max(answer.num_visual_tokens for answer in answers),
        "context_tokens": max(answer.num_context_tokens for answer in answers),
        "compress_s": compress_s + refine_s,
        "prefill_s": prefill_s,
        "ttft_s": answers[0].ttft_s,
        "notes": [*session.notes, *dict.fromkeys(note for answer in answers for note in answer.notes)],
        "answers": [
            {
                "question": query.question,
                "answer": answer.text,
                "choices": answer.choices,
                "context_tokens": answer.num_context_tokens,
                "new_tokens": answer.num_new_tokens,
                "finish_reason": answer.finish_reason,
                "ttft_s": answer.ttft_s,
            }
            for query, answer in zip(request.queries, answers, strict=True)
        ],
    }
