"""Run a language model over a video: one prefill of the system text and the video, reused by every question.

Works with any ``base.LanguageModel``, on one sequence at a time.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel, PromptRows
from freres_cli.backbones.long_attention import (
    LONG_PROMPT_TOKENS,
    HeadKind,
    describe_problem,
    fit_long_chunk,
    is_fit,
)
from freres_cli.backbones.pruning import PrunedVideo, Pruning, check_pruning, read_pruned, run_first_layers
from freres_cli.backbones.sizes import has_experts
from freres_cli.devices import memory_errors_as, synchronize
from freres_cli.errors import BackboneError, ContextError, UsageError, count_of
from freres_cli.records import VideoTokens

# Rows per forward pass of a prefill: enough to keep the device busy, and more where their activations are small.
PREFILL_CHUNK_TOKENS = 2048
PREFILL_CHUNK_BYTES = 256 << 20
SHORT_QUESTION_TOKENS = 64  # a question and its answer may have fewer, but no advice to shorten them helps then


@dataclass
class VideoPrefix:
    """System text and video, prefilled once.

    ``num_tokens``: rows in the cache. ``next_position``: position of the question's first token. ``prefill_s``: how long
    the prefill took. ``notes``: what the user should know. ``cache`` is lent to one question at a time. ``pruned``: if only
    some visual tokens reach the later layers, what the first layers made of all of them; the later layers then run once for
    each question. ``chunk_tokens``: rows of a pass of the prefill, if there was one. ``graph``: the ``StepGraph`` on this
    cache, once one is recorded. ``cannot_record``: whether that failed.
    """

    cache: Any
    num_tokens: int
    num_visual_tokens: int
    next_position: float
    prefill_s: float
    notes: tuple[str, ...] = ()
    pruned: PrunedVideo | None = None
    chunk_tokens: int | None = None
    is_lent: bool = field(default=False, init=False)
    graph: Any = field(default=None, init=False, repr=False)
    cannot_record: bool = field(default=False, init=False)

    @property
    def num_answering_tokens(self) -> int:
        """Visual tokens that reach the last layer."""
        return self.num_visual_tokens if self.pruned is None else self.pruned.num_kept


def prefill_video(
    model: LanguageModel,
    prefix_ids: tuple[int, ...],
    video: VideoTokens,
    text_after: str = "max",
    chunk_tokens: int | None = None,
    pruning: Pruning | None = None,
) -> VideoPrefix:
    """Run the text before the video, ``prefix_ids``, and the visual tokens, ``video``, through ``model``.

    ``text_after`` is the rule for the positions of later text, as in ``base.LanguageModel.splice``; ``chunk_tokens`` is
    the number of rows per forward pass, by default as ``choose_chunk`` says. With a ``pruning``, only the first layers run
    now. Raises ContextError if the prefix alone exceeds the model's context, BackboneError if the model's layers cannot be
    pruned, ResourceError if it does not fit in memory.
    """
    synchronize(model.device)
    start_s = time.perf_counter()
    rows = model.splice(prefix_ids, video, text_after)
    return prefill_rows(model, rows, len(video), start_s, chunk_tokens, pruning)


def prefill_rows(
    model: LanguageModel,
    rows: PromptRows,
    num_visual_tokens: int,
    start_s: float | None = None,
    chunk_tokens: int | None = None,
    pruning: Pruning | None = None,
) -> VideoPrefix:
    """``prefill_video`` from its rows on.

    ``model``, ``chunk_tokens``, ``pruning``: as it takes them. ``rows``: what ``splice`` made of ``num_visual_tokens``
    tokens. ``start_s``: ``time.perf_counter()`` when the work began, by default now.
    """
    start_s = time.perf_counter() if start_s is None else start_s
    notes = check_context(model, len(rows), rows.next_position)
    cache, pruned = model.new_cache(), None
    chunk_tokens = chunk_tokens or choose_chunk(model, len(rows))
    if pruning is None:
        # It imports transformers, which whoever only reads tokens does without.
        from freres_cli.backbones.cache import reserve_rows

        reserve_rows(cache, len(rows))
        prefill(model, rows, cache, chunk_tokens)
    else:
        check_pruning(model, pruning, cache)
        settle_length(cache, rows)
        with memory_of(model, len(rows)):
            pruned = run_first_layers(model, rows, cache, pruning, chunk_tokens)
    synchronize(model.device)
    spent_s = time.perf_counter() - start_s
    if len(rows) >= LONG_PROMPT_TOKENS:
        notes += describe_problem(HeadKind.of(model.device, model.dtype, model.decoder.config))
    position = rows.next_position
    return VideoPrefix(cache, len(rows), num_visual_tokens, position, spent_s, notes, pruned, chunk_tokens)


def settle_length(cache: Any, rows: PromptRows) -> None:
    """Say in an empty ``cache`` how long the prompt is that ``rows`` begin, where rotary angles depend on it."""
    cache.num_settled = math.ceil(rows.next_position)


def check_context(
    model: LanguageModel, num_tokens: int, next_position: float, num_before: int | None = None
) -> tuple[str, ...]:
    """Check a prompt of ``num_tokens``, followed by text at ``next_position``, and return notes about it.

    ``model``: whose context it must fit. ``num_before``: how many of them come before the question and its answer; ``None``
    if there is no question yet. Raises ContextError for more tokens than the model's context. Positions beyond it are
    allowed, because the tokens kept from a long video keep the positions they had in the full grid; they result in a note.
    """
    limit = model.max_context_tokens
    if num_before is not None and num_tokens > limit:
        raise ContextError(
            f"question: too long for the model's context of {limit} tokens: expected at most {limit - num_before} with its "
            f"answer, got {num_tokens - num_before}",
            "shorten it, or allow fewer new tokens"
            if limit - num_before >= SHORT_QUESTION_TOKENS
            else "lower the token budget, or the number of frames: the video fills the context",
        )
    if num_tokens > limit:
        raise ContextError(
            f"prompt: more tokens than the model's context: expected at most {limit}, got {num_tokens}",
            "lower the token budget or the number of frames",
        )
    if next_position > limit:
        return (f"positions reach {next_position:.0f}, beyond the model's context of {limit}",)
    return ()


def choose_chunk(model: LanguageModel, num_rows: int, *, is_cuda: bool | None = None) -> int:
    """Return how many rows a prefill runs at a time.

    As many as have 256 MiB of activations, but at least 2,048 (ours). Of a long prompt on a GPU, ``fit_long_chunk``, for
    which ``attend_long`` is made, unless other attention was asked for or the model has experts, which take more memory.

    ``num_rows``: of the prompt. ``is_cuda``: whether it is a GPU that takes ``attend_long``, by default as it is.
    """
    if is_long_prompt(model, num_rows, is_cuda=is_cuda):
        return fit_long_chunk(num_rows)
    return max(PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_BYTES // model.activation_bytes_per_token)


def is_long_prompt(model: LanguageModel, num_rows: int, *, is_cuda: bool | None = None) -> bool:
    """Whether a prompt of so many rows is run in chunks for ``attend_long``. Arguments as ``choose_chunk`` takes them."""
    if num_rows < LONG_PROMPT_TOKENS:
        return False
    has_kernel = is_fit(model.device, model.dtype) if is_cuda is None else is_cuda and model.dtype.itemsize == 2
    return has_kernel and model.attention == "sdpa" and not has_experts(model.decoder.config)


@torch.no_grad()
def prefill(model: LanguageModel, rows: PromptRows, cache: Any, chunk_tokens: int | None = None) -> Tensor:
    """Run ``rows`` through ``model`` on top of ``cache``, ``chunk_tokens`` at a time (by default as ``choose_chunk``
    says). Returns the last hidden state, (1, D).

    In exact arithmetic the chunk size does not matter; in float32, logits change by about 1e-5. Raises ResourceError if
    memory runs out, and BackboneError if there are no rows, because a cache alone gives no prediction.
    """
    if not len(rows):
        raise BackboneError("prompt: expected at least one token after the video, got none")
    num_cached = cache.get_seq_length()
    if not num_cached:
        settle_length(cache, rows)
    chunk_tokens = chunk_tokens or choose_chunk(model, len(rows))
    is_long = not num_cached and is_long_prompt(model, len(rows))
    with memory_of(model, num_cached + len(rows)):
        for part in rows.split(chunk_tokens):
            hidden = model.decode(part, cache, **({"is_long": True} if is_long else {}))
    return hidden[-1:]


def read_question(model: LanguageModel, prefix: VideoPrefix, suffix_ids: Sequence[int], cache: Any) -> Tensor:
    """Run the text after the video, ``suffix_ids``, through ``model`` on top of ``cache``, which ``prefix`` lends.

    If the video is pruned, this is where the tokens for the later layers are picked, and run through them. Returns the
    last hidden state, (1, D). Raises as ``prefill``.
    """
    if prefix.graph is not None and prefix.num_tokens + len(suffix_ids) > prefix.graph.num_rows:
        prefix.graph = None  # it would keep the buffers that the cache now outgrows
    rows = model.text_rows(suffix_ids, prefix.num_tokens, prefix.next_position)
    if prefix.pruned is None:
        return prefill(model, rows, cache)
    if not len(rows):
        raise BackboneError("prompt: expected at least one token after the video, got none")
    with memory_of(model, prefix.num_tokens + len(rows)):
        return read_pruned(model, prefix.pruned, rows, cache)


@contextmanager
def lend_cache(prefix: VideoPrefix) -> Iterator[Any]:
    """The prefix's cache for one question. Rows added to it are removed afterwards, so the prefix does not change."""
    if prefix.is_lent:
        raise UsageError("question: the video is answering another question", "finish that one first")
    prefix.is_lent = True
    try:
        with branch(prefix.cache) as cache:
            yield cache
    finally:
        prefix.is_lent = False
        if prefix.graph is not None and not prefix.graph.is_of(prefix.cache):
            prefix.graph = None  # it would keep buffers that nothing else uses


@contextmanager
def branch(cache: Any) -> Iterator[Any]:
    """A cache that continues this one, which is restored afterwards. Recurrent caches cannot be cropped: they are copied."""
    if not getattr(cache, "is_croppable", True):
        yield copy.deepcopy(cache)
        return
    # Layers may differ in length: those after a pruning hold fewer rows.
    lengths = [layer.get_seq_length() for layer in cache.layers]
    try:
        yield cache
    finally:
        # Crop each layer by its own excess: a pass that failed half-way extended only some. A negative crop removes rows.
        for layer, length in zip(cache.layers, lengths, strict=True):
            if (num_added := layer.get_seq_length() - length) > 0:
                layer.crop(-num_added)


@torch.no_grad()
def score_options(
    model: LanguageModel,
    prefix: VideoPrefix,
    suffix_ids: tuple[int, ...],
    options: list[tuple[int, ...]],
) -> Tensor:
    """Log-likelihood of each option as the whole continuation of the prompt, (n,) float32 on the CPU.

    ``model`` and ``prefix`` are the language model and the video it has prefilled. ``suffix_ids``: the token ids after
    the video. ``options``: the token ids of each option; all are scored on the same cache. Raises BackboneError if an
    option has no tokens or the prompt exceeds the model's context.
    """
    if not options or not all(options):
        raise BackboneError("options: expected at least one token in each option, got none")
    longest = prefix.num_tokens + len(suffix_ids) + max(map(len, options))
    check_context(model, longest, prefix.next_position, prefix.num_tokens)
    scores = []
    with lend_cache(prefix) as cache:
        first = model.logits(read_question(model, prefix, suffix_ids, cache)).log_softmax(-1)
        num_prompt, position = prefix.num_tokens + len(suffix_ids), prefix.next_position + len(suffix_ids)
        for option in options:
            log_probs = first
            if len(option) > 1:
                continuation = model.text_rows(option[:-1], num_prompt, position)
                with memory_of(model, num_prompt + len(option)), branch(cache) as scratch:
                    later = model.logits(model.decode(continuation, scratch)).log_softmax(-1)
                log_probs = torch.cat([first, later])
            ids = torch.tensor(option, device=log_probs.device)
            scores.append(log_probs.gather(1, ids[:, None]).sum())
    return check_scores(torch.stack(scores).cpu())


def check_scores(scores: Tensor) -> Tensor:
    """Return the log-likelihoods unchanged if all are finite. Raises BackboneError otherwise."""
    if not scores.isfinite().all():
        raise BackboneError(
            "scores: the language model returned values that are not finite",
            "use --dtype bfloat16 or float32; if that does not help, the checkpoint is damaged",
        )
    return scores


def memory_of(model: LanguageModel, num_tokens: int) -> Any:
    """A context that turns running out of memory into a ResourceError naming this many cached tokens."""
    num_bytes = num_tokens * model.kv_bytes_per_token
    what = f"{count_of(num_tokens, 'token')}, {num_bytes} bytes of KV cache ({num_bytes / 2**30:.2f} GiB)"
    return memory_errors_as(what, "lower the token budget, or use a smaller dtype or a device with more memory")
