"""Generate an answer token by token, as pieces of text, and measure its latencies."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import VideoPrefix, check_context, check_scores, lend_cache, read_question
from freres_cli.devices import synchronize
from freres_cli.errors import UsageError

_REPLACEMENT = "\ufffd"
# Logits divided by less than this may overflow.
LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked.

    Temperature 0 is greedy. ``top_p``: draw from the smallest set of tokens whose probabilities add up to this.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("temperature", Real), ("top_p", Real), ("seed", Integral)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                expected = "a number" if kind is Real else "a whole number"
                raise UsageError(f"{name}: expected {expected}, got {value!r:.80}")
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed: expected -2^63 to 2^64 - 1, got {self.seed}")
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf):
            raise UsageError(f"temperature: expected 0, or at least {LEAST_TEMPERATURE}, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: expected a number in (0, 1], got {self.top_p}")


@dataclass
class Generation:
    """An answer in progress: iterate over it to get pieces of text; its fields are final once it is exhausted.

    ``ttft_s``: seconds from submission to the first token. ``tpot_s``: mean seconds per further token, None below two
    tokens. ``num_new_tokens`` counts the stop token. ``finish_reason``: stop, length, or None while unfinished.
    """

    num_context_tokens: int
    pieces: Generator[str] = field(init=False, repr=False)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    finish_reason: str | None = None

    @property
    def num_new_tokens(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return self.pieces


def generate(
    model: LanguageModel,
    prefix: VideoPrefix,
    suffix_ids: tuple[int, ...],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    submitted_s: float | None = None,
) -> Generation:
    """Answer a question about a prefilled video. Work starts when the result is iterated.

    ``model`` and ``prefix`` are the language model and the video it has prefilled. ``suffix_ids``: the token ids after
    the video, from ``model.prompt``. The answer has at most ``max_new_tokens`` tokens, picked by ``sampling`` (greedy by
    default). ``submitted_s``: ``time.perf_counter()`` when the question was submitted, by default the start of the
    iteration. Raises ContextError if the prompt and answer can exceed the model's context.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    num_context = prefix.num_tokens + len(suffix_ids)
    check_context(model, num_context + max_new_tokens, prefix.next_position, prefix.num_tokens)
    result = Generation(num_context)
    result.pieces = _pieces(model, prefix, suffix_ids, max_new_tokens, sampling or Sampling(), submitted_s, result)
    return result


def _pieces(
    model: LanguageModel,
    prefix: VideoPrefix,
    suffix_ids: tuple[int, ...],
    max_new_tokens: int,
    sampling: Sampling,
    submitted_s: float | None,
    result: Generation,
) -> Generator[str]:
    # It imports transformers, which whoever only reads tokens does without.
    from freres_cli.backbones.token_steps import TokenSteps

    start_s = time.perf_counter() if submitted_s is None else submitted_s
    picker = torch.Generator().manual_seed(int(sampling.seed))
    stream = TextStream(model.tokenizer)
    with lend_cache(prefix) as cache:
        step_s, later_s = start_s, 0.0
        steps = TokenSteps(model, prefix, cache)
        logits = model.logits(read_question(model, prefix, suffix_ids, cache))[0]
        position = prefix.next_position + len(suffix_ids)
        while True:
            token = pick_token(check_scores(logits), sampling, picker)
            synchronize(model.device)
            spent_s = time.perf_counter() - step_s
            result.ids.append(token)
            if result.ttft_s is None:
                result.ttft_s = spent_s
            else:
                later_s += spent_s
            if token in model.stop_ids:
                result.finish_reason = "stop"
            elif len(result.ids) == max_new_tokens:
                result.finish_reason = "length"
            piece = "" if result.finish_reason == "stop" else stream.add(token)
            piece += stream.flush() if result.finish_reason else ""
            result.text += piece
            if piece:
                yield piece
            if result.finish_reason:
                break
            # The time the caller spends between two pieces does not count as the model's.
            step_s = time.perf_counter()
            logits = steps.run(token, position)
            position += 1
    if len(result.ids) > 1:
        result.tpot_s = later_s / (len(result.ids) - 1)


def pick_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from (vocabulary,) logits. Sampling runs on the CPU, so a seed means the same on every device."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    is_outside = ordered.cumsum(-1) - ordered >= sampling.top_p
    is_outside[0] = False  # even if in float32 top_p is 0
    choice = torch.multinomial(ordered.masked_fill(is_outside, 0.0), 1, generator=generator)
    return int(order[choice])


class TextStream:
    """Turns token ids into text as they arrive. A character split across tokens appears once it is complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_sent = 0

    def add(self, token: int) -> str:
        """The new text that is certain after this token; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # An unfinished character at the end is one replacement character, or one for each of its bytes.
        certain = text.rstrip(_REPLACEMENT)
        piece = certain[self._num_sent :]
        self._num_sent = max(self._num_sent, len(certain))  # a token without text shows what was not certain before it
        last = self._decode(self._ids[-1:])
        if certain == text and last and _REPLACEMENT not in last:
            # Keep one whole token as context: some tokenizers treat the start of a text specially.
            self._ids, self._num_sent = self._ids[-1:], len(last)
        return piece

    def flush(self) -> str:
        """The rest of the text, with replacement characters for characters that were never completed."""
        piece = self._decode(self._ids)[self._num_sent :]
        self._ids, self._num_sent = [], 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
