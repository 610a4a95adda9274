"""Asking a questions file of one model or code in several variants, which are compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from freres_cli.backbones.base import LanguageModel
from freres_cli.bench.clock import StageTimer
from freres_cli.cli.output import print_line
from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.questions import Question, read_questions
from freres_cli.evaluation.scores import summarize
from freres_cli.method import merging
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.workflows.eval_run import EvalRequest
from freres_cli.workflows.evaluate import ask_cell


@dataclass(frozen=True)
class Variant:
    """``model``: the language half that answers. ``constants``: those of ``method.merging`` that have other values."""

    model: LanguageModel
    constants: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def merging_with(constants: Mapping[str, float]) -> Iterator[None]:
    """Give constants of ``method.merging`` other values."""
    with ExitStack() as changed:
        for name, value in constants.items():
            changed.enter_context(patch.object(merging, name, value))
        yield


def ask_variants(path: Path, variants: Mapping[str, Variant], cells: Sequence[Cell], results: str) -> dict[str, Any]:
    """Return the document of ``freres eval`` for one file, with a row for each of the cells in each variant.

    ``path``: the questions. ``variants``: by their names, which go into the labels. ``cells``: methods and budgets.
    ``results``: name of the answers beside the questions, from which a run that was stopped goes on.
    """
    compressor, file = Compressor(device="cpu"), read_questions(path)
    of_each = {name: [Cell(cell.method, cell.budget, f"{cell.method}, {name}") for cell in cells] for name in variants}
    listed = tuple(cell for own in of_each.values() for cell in own)
    request = EvalRequest(file, listed, compressor.options)
    kept = path.with_name(results)
    done = {row["video"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    videos = file.by_video()
    for number, (video, asked) in enumerate(videos.items(), 1):
        if video not in done:
            done[video] = {"video": video, **_ask_video(asked, compressor, variants, of_each, request)}
            with kept.open("a") as out:
                out.write(json.dumps(done[video]) + "\n")
        print_line(f"{path.parent.name}: {number} of {len(videos)} videos")
    rows = [done[video] for video in videos]
    return {**summarize(file, rows, listed), "questions_file": f"{path.parent.name}/{path.name}"}


def _ask_video(
    questions: Sequence[Question],
    compressor: Compressor,
    variants: Mapping[str, Variant],
    cells: Mapping[str, Sequence[Cell]],
    request: EvalRequest,
) -> dict[str, Any]:
    timer = StageTimer(torch.device("cpu"))
    source = VideoSource(questions[0].video)
    usual = EncodedClip(source, compressor.options, compressor.models.encoder, timer)
    answered = []
    for name, variant in variants.items():
        with merging_with(variant.constants):
            # A clip keeps what it merged, whatever the constants were.
            clip = usual
            if variant.constants:
                clip = EncodedClip(source, compressor.options, compressor.models.encoder, timer)
            answered += [ask_cell(cell, clip, request, questions, variant.model, {}, timer) for cell in cells[name]]
    return {
        "status": "ok",
        "full_tokens": usual.full_tokens,
        "cells": answered,
        "lost_s": usual.lost_s,
        "notes": list(usual.notes),
        "decode_s": timer.seconds["decode"],
        "encode_s": timer.seconds["encode"],
    }
