"""A question -> the visual tokens that it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.baselines.declaration import Method
from freres_cli.baselines.registry import METHODS
from freres_cli.errors import UsageError, count_of
from freres_cli.pipeline.choices import as_whole
from freres_cli.records import VideoTokens

REFINER = METHODS["cdpruner"]  # the method of ``ask --refine``


@dataclass(frozen=True)
class AskedFacts:
    """What the last question cost. ``overhead_tokens``: rows of [video] that are no visual tokens. ``prefill_s``: seconds
    that the prefill of [system + video] took, ``refine_s``: that picking the tokens for the question took.
    ``chunk_tokens``: rows of a pass of that prefill, ``None`` if there was none."""

    overhead_tokens: int
    prefill_s: float
    refine_s: float
    chunk_tokens: int | None


def embed_question(model: LanguageModel, question: str) -> Tensor:
    """Return the model's own input embeddings of a question's text, (Q, D) float32 on the CPU, without any prompt around
    it."""
    ids = model.tokenizer(question, add_special_tokens=False)["input_ids"]
    return model.text_rows(ids, 0, 0.0).embeds[:, : model.width].to("cpu", torch.float32)


@torch.no_grad()
def refine_tokens(
    tokens: VideoTokens, model: LanguageModel, question: str, count: int, method: Method = REFINER
) -> VideoTokens:
    """Return the ``count`` tokens that a question needs, each unchanged and in the same order.

    ``tokens``: of the video. ``model``: whose embeddings of ``question`` they are compared with. ``method``: which picks
    them. All tokens are returned as they are if there are no more than ``count``.
    """
    if count >= len(tokens):
        return tokens
    pick = method.pick_for_question
    assert pick is not None
    latents = tokens.latents[:, : tokens.width].to("cpu")
    return tokens.pick(pick(latents, embed_question(model, question), count).to(tokens.latents.device))


def check_refine(refine: int | None) -> int | None:
    """Return a number of tokens to keep for each question as Python's own, ``None`` as it is. Raises ``UsageError``."""
    count = None if refine is None else as_whole(refine, "refine")
    if count is not None and count < 1:
        raise UsageError(f"refine: expected at least 1 token, got {count}", "leave it out to keep every token")
    return count


def describe_refine(refine: int | None, num_tokens: int) -> tuple[str, ...]:
    """Return a note on what ``refine`` did to a video of ``num_tokens``; nothing without it."""
    if refine is None:
        return ()
    if refine >= num_tokens:
        return (f"refine {refine}: the video has {count_of(num_tokens, 'token')}, so all are kept",)
    return (
        f"refine: {refine} of {num_tokens} tokens kept for this question; its time to the first token includes picking "
        "and prefilling them",
    )
