"""What the decoder gave -> an answer with its facts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import VideoPrefix
from freres_cli.backbones.generation import Generation, TextStream
from freres_cli.pipeline.query import Query
from freres_cli.records import Answer


def report_generation(generation: Generation, prefix: VideoPrefix) -> Answer:
    """Return the answer of a ``generation`` that is complete. ``prefix``: the video it is about."""
    assert generation.ttft_s is not None
    return Answer(
        text=generation.text,
        num_visual_tokens=prefix.num_answering_tokens,
        num_context_tokens=generation.num_context_tokens,
        num_new_tokens=generation.num_new_tokens,
        ttft_s=generation.ttft_s,
        tpot_s=generation.tpot_s,
        finish_reason=generation.finish_reason or "length",
        notes=prefix.notes,
    )


def report_tokens(model: LanguageModel, ids: Sequence[int], prefix: VideoPrefix, suffix: Sequence[int]) -> Answer:
    """Return an answer that was written together with others.

    ``model``: whose tokens ``ids`` are, with the one that stopped it. ``prefix``: the video it is about. ``suffix``: the
    token ids between the video and the answer.
    """
    is_stopped = ids[-1] in model.stop_ids
    stream = TextStream(model.tokenizer)
    text = "".join([*map(stream.add, ids[:-1] if is_stopped else ids), stream.flush()])
    return Answer(
        text=text,
        num_visual_tokens=prefix.num_answering_tokens,
        num_context_tokens=prefix.num_tokens + len(suffix),
        num_new_tokens=len(ids),
        ttft_s=None,
        tpot_s=None,
        finish_reason="stop" if is_stopped else "length",
        notes=prefix.notes,
    )


def report_choice(
    query: Query, prefix: VideoPrefix, suffix: Sequence[int], scores: Tensor, ttft_s: float | None = None
) -> Answer:
    """Return the most likely option of a ``query`` as its answer.

    ``prefix``: the video it is about. ``suffix``: the token ids between the video and the option. ``scores``: (n,), the
    log-likelihood of each option. ``ttft_s``: seconds that they took, if that was measured.
    """
    probabilities = torch.softmax(scores.to(torch.float64), 0).tolist()
    return Answer(
        text=query.choices[int(scores.argmax())],
        num_visual_tokens=prefix.num_answering_tokens,
        num_context_tokens=prefix.num_tokens + len(suffix),
        num_new_tokens=0,
        ttft_s=ttft_s,
        tpot_s=None,
        finish_reason="choice",
        choices=dict(zip(query.choices, probabilities, strict=True)),
        notes=prefix.notes,
    )
