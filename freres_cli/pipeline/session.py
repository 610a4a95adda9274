"""Visual tokens and a language model, opened once: the video is prefilled once for any number of questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import VideoPrefix, check_scores, prefill_video, score_options
from freres_cli.backbones.evidence import Evidence, find_evidence, find_places, why_no_evidence
from freres_cli.backbones.generation import Sampling, generate
from freres_cli.backbones.locks import ThreadLock
from freres_cli.backbones.pruning import Pruning
from freres_cli.backbones.saved_prefix import SUFFIX, open_prefix
from freres_cli.baselines.declaration import Method
from freres_cli.bundle.store import read_bundle
from freres_cli.devices import AS_COMPUTED, Device, Storage, memory_errors_as
from freres_cli.errors import BackboneError, UsageError
from freres_cli.pipeline.answers import report_choice, report_generation, report_tokens
from freres_cli.pipeline.choices import MAX_NEW_TOKENS
from freres_cli.pipeline.manifest import clip_end_s
from freres_cli.pipeline.models import Models, check_model, find_model
from freres_cli.pipeline.notes import describe_limits
from freres_cli.pipeline.prompt_text import Moves, settle_tokens
from freres_cli.pipeline.query import Query, check_limit, check_query, encode_choices, read_queries, read_query
from freres_cli.pipeline.reasoning import NOTE, opens_reasoning
from freres_cli.pipeline.refining import REFINER, AskedFacts, check_refine, describe_refine, refine_tokens
from freres_cli.pipeline.tokens import AnyBundle, load_tokens
from freres_cli.pipeline.torch_state import plain_torch
from freres_cli.records import Answer, VideoTokens

# Limits on questions answered together: each has rows of its own in the cache, and of some families a copy of the video's.
MAX_BATCH = 32
MAX_BATCH_BYTES = 2**30

_fits = memory_errors_as(
    "answering", "repack the bundle to fewer tokens, or use a smaller dtype or a device with more memory"
)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class AskRequest:
    """Which bundle to open, and how.

    ``model``, ``revision``: where to find the model, if not where the bundle says. ``dtype``: the language model's.
    ``adapter``: as ``adapters.choose_adapter`` takes it. ``text_after``: overrides the bundle's. ``save_prefix``: keep the
    prefilled video in a file beside the bundle, and read it from there. ``storage``: how the language model keeps its cache
    and its weights.
    """

    bundle: Path
    device: Device
    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    adapter: str | None = None
    text_after: str | None = None
    save_prefix: bool = False
    storage: Storage = AS_COMPUTED


@dataclass(eq=False)
class Session:
    """Visual tokens, their language model and the prefilled video: many questions, one prefill. Threads may share one: it
    answers one call at a time, and those that share a model run it in turns.

    ``model``: the language half. ``tokens``: the video, settled at the instants that the family's text allows; ``moves``
    says how, ``None`` if nothing moved. ``full_tokens``: token count of the uncompressed clip.
    ``text_after``: position of the text after the video. ``load_s``: seconds spent loading bundle and model. ``notes``:
    what the user should know. ``refine``: that of ``ask``, where it has none of its own. ``refiner``: the method that
    picks these tokens. ``pruning``: which tokens reach the later layers of the decoder; ``None`` for all.
    ``prefix_file``: where to keep the prefilled video, if anywhere. ``end_s``: when the part that was read ends.
    """

    model: LanguageModel
    tokens: VideoTokens
    full_tokens: int
    text_after: str
    load_s: float
    notes: tuple[str, ...] = ()
    refine: int | None = None
    refiner: Method = REFINER
    pruning: Pruning | None = None
    prefix_file: Path | None = None
    end_s: float | None = None
    moves: Moves | None = field(default=None, init=False)
    _prefixes: dict[Ids, VideoPrefix] = field(default_factory=dict)
    _lock: ThreadLock = field(default_factory=ThreadLock, repr=False, compare=False)
    _facts: AskedFacts | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        with self.model.lock:
            self.tokens, self.moves = settle_tokens(self.tokens, self.model.text_per_frame(self.tokens))
        if self.moves is not None:
            self.notes = (*self.notes, self.moves.describe(len(self.tokens)))

    @property
    def text_overhead_tokens(self) -> int:
        """Rows of the prefilled video that are no visual tokens. Available after the first question."""
        return self._facts_of("text_overhead_tokens").overhead_tokens

    @property
    def prefill_s(self) -> float:
        """Seconds that the prefill of [system + video] for the last question took. Available after the first question."""
        return self._facts_of("prefill_s").prefill_s

    @property
    def refine_s(self) -> float:
        """Seconds that picking tokens for the last question took, 0 if all were used. Available after the first question."""
        return self._facts_of("refine_s").refine_s

    @property
    def chunk_tokens(self) -> int | None:
        """Rows of a pass of that prefill, ``None`` if it was read from a file. Available after the first question."""
        return self._facts_of("chunk_tokens").chunk_tokens

    def _facts_of(self, name: str) -> AskedFacts:
        if self._facts is None:
            raise UsageError(f"{name}: not known before the first question", "ask a question first")
        return self._facts

    def forget_prefix(self) -> None:
        """Drop the prefilled video, so the next question pays for it again."""
        with self._lock:
            self._prefixes.clear()
            self._facts = None

    @plain_torch()
    @_fits
    def ask(
        self,
        question: str,
        *,
        choices: Sequence[str] | None = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
        refine: int | None = None,
        relevant_text: str | None = None,
    ) -> Answer:
        """Answer a question. TTFT counts from this call, with bundle and model loaded; it includes waiting for other threads.

        ``question``: the text. ``choices``: the answer is the option whose letter or words are most likely (the model's
        ``choices_as`` decides which). ``max_new_tokens``: limit for a free answer. ``sampling``: how its tokens are
        picked, greedily by default. ``on_text``: called with each piece of text; it must not wait for another thread that
        asks this session. ``refine``: only use this many visual tokens, those that the question needs, as CDPruner picks
        them; they are prefilled for this question alone. ``relevant_text``: what they are picked by, if not by the
        question: one without its options, for example. Raises ``UsageError``, ``BackboneError`` or ``ResourceError``.
        """
        submitted = time.perf_counter()
        query, limit = Query(question, choices, relevant_text), check_limit(max_new_tokens)
        if not isinstance(sampling, Sampling | None):
            raise UsageError(f"sampling: expected a Sampling, got {type(sampling).__name__}", "see freres(3)")
        # A method that picks for each question says so in its name.
        told = describe_refine(check_refine(refine), len(self.tokens))
        refine = check_refine(self.refine if refine is None else refine)
        with self._lock:
            self._check(query)
            if query.choices:
                answer = self._choose(query, refine, submitted)
                if on_text is not None:
                    on_text(answer.text)
            else:
                answer = self._write(query, refine, limit, sampling, on_text, submitted)
        return replace(answer, notes=(*answer.notes, *told))

    @plain_torch()
    @_fits
    def find_evidence(self, query: Query | str) -> Evidence:
        """Return which visual tokens the model attends to as it begins to answer. See ``backbones.evidence``.

        ``query``: a question, or a query with its options. Raises ``UsageError`` for one that cannot be asked,
        ``BackboneError`` for a family whose decoder keeps a state in place of attention.
        """
        query = read_query(query)
        with self._lock, self.model.lock:
            self._check(query)
            if (why := why_no_evidence(self.model)) is not None:
                raise BackboneError(why)
            if self.pruning is not None:
                raise BackboneError("evidence: not known for a method that drops tokens inside the decoder")
            prefix, suffix = self._encode_choices(query)[:2] if query.choices else self._prompt(query)
            ids = next(ids for ids, own in self._prefixes.items() if own is prefix)
            places = find_places(self.model, ids, self.tokens, self.text_after)
            return find_evidence(self.model, prefix, places, suffix)

    @plain_torch()
    @_fits
    def ask_many(
        self,
        queries: Iterable[Query | str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_answer: Callable[[int, Answer], None] | None = None,
        refine: int | None = None,
    ) -> list[Answer]:
        """Answer several questions at a time, greedily. Answers are those of ``ask``, except for rounding.

        In float32, logits move by about 1e-5. ``queries``: questions, or queries with their options. ``max_new_tokens``:
        limit for each free answer. ``on_answer``: called with the index of each query and its answer as batches finish.
        ``refine``: as in ``ask``; unless all tokens are kept, the questions are then answered one at a time, because each
        has its own prefill. Raises ``UsageError`` or ``BackboneError``.
        """
        asked, limit = read_queries(queries), check_limit(max_new_tokens)
        refine = check_refine(self.refine if refine is None else refine)
        answers: dict[int, Answer] = {}
        with self._lock:
            for query in asked:
                self._check(query)
            if self.pruning is not None or (refine is not None and refine < len(self.tokens)):
                made = self._ask_each(asked, limit, refine)
            else:
                made = self._ask_batches(asked, limit, describe_refine(refine, len(self.tokens)))
            for place, answer in made:
                answers[place] = answer
                if on_answer is not None:
                    on_answer(place, answer)
        return [answers[place] for place in range(len(asked))]

    def _check(self, query: Query) -> None:
        with self.model.lock:
            check_query(query, self.model)

    def _choose(self, query: Query, refine: int | None, submitted: float) -> Answer:
        with self.model.lock:
            prefix, suffix, options = self._encode_choices(query, refine)
            scores = score_options(self.model, prefix, suffix, options)
        return report_choice(query, prefix, suffix, scores, time.perf_counter() - submitted)

    def _write(
        self,
        query: Query,
        refine: int | None,
        max_new_tokens: int,
        sampling: Sampling | None,
        on_text: Callable[[str], None] | None,
        submitted: float,
    ) -> Answer:
        """Answer in words. While ``on_text`` runs, other threads may use the model for another session."""
        with self.model.lock:
            prefix, suffix = self._prompt(query, refine)
        generation = generate(self.model, prefix, suffix, max_new_tokens, sampling, submitted)
        with closing(generation.pieces) as pieces:  # whatever on_text raises, the prefix is given back at once
            while (piece := self._next(pieces)) is not None:
                if on_text is not None:
                    on_text(piece)
        return report_generation(generation, prefix)

    def _next(self, pieces: Iterator[str]) -> str | None:
        with self.model.lock:
            return next(pieces, None)

    def _ask_each(
        self, queries: Sequence[Query], max_new_tokens: int, refine: int | None
    ) -> Iterator[tuple[int, Answer]]:
        for place, query in enumerate(queries):
            ask = partial(self.ask, query.question, choices=query.choices, relevant_text=query.relevant_text)
            yield place, ask(max_new_tokens=max_new_tokens, refine=refine)

    def _ask_batches(
        self, queries: Sequence[Query], max_new_tokens: int, told: tuple[str, ...]
    ) -> Iterator[tuple[int, Answer]]:
        for with_choices in (True, False):
            mine = [place for place, query in enumerate(queries) if bool(query.choices) == with_choices]
            while mine:
                with self.model.lock:
                    part = self._first_batch(mine, queries, 0 if with_choices else max_new_tokens)
                    batch = [queries[place] for place in part]
                    made = self._choose_batch(batch) if with_choices else self._answer_batch(batch, max_new_tokens)
                for place, answer in zip(part, made, strict=True):
                    yield place, replace(answer, notes=(*answer.notes, *told))
                mine = mine[len(part) :]

    def _first_batch(self, places: list[int], queries: Sequence[Query], max_new_tokens: int) -> list[int]:
        """The first of the questions at ``places``: as many as are answered together, padded to the longest."""
        # It imports transformers, which whoever only reads tokens does without.
        from freres_cli.backbones.batches import copies_video

        longest = 0
        for count, place in enumerate(places, start=1):
            query = queries[place]
            prefix, suffix = self._encode_choices(query)[:2] if query.choices else self._prompt(query)
            longest = max(longest, len(suffix))
            num_rows = longest + max_new_tokens + (prefix.num_tokens if copies_video(prefix) else 0)
            if count > MAX_BATCH or (count > 1 and count * num_rows > self._most_rows):
                return places[: count - 1]
        return places

    @property
    def _most_rows(self) -> int:
        """Rows of the cache that may be held beside the video for questions answered together."""
        return MAX_BATCH_BYTES // max(1, self.model.kv_bytes_per_token)

    def _choose_batch(self, queries: Sequence[Query]) -> list[Answer]:
        from freres_cli.backbones.batches import score_options_batch

        encoded = [self._encode_choices(query) for query in queries]
        found: dict[int, Answer] = {}
        for prefix, mine in _by_prefix([prefix for prefix, _, _ in encoded]):
            suffixes, options = [encoded[place][1] for place in mine], [encoded[place][2] for place in mine]
            scores = score_options_batch(self.model, prefix, suffixes, options, self._most_rows)
            for place, suffix, own in zip(mine, suffixes, scores, strict=True):
                found[place] = report_choice(queries[place], prefix, suffix, check_scores(own))
        return [found[place] for place in range(len(queries))]

    def _answer_batch(self, queries: Sequence[Query], max_new_tokens: int) -> list[Answer]:
        from freres_cli.backbones.batches import answer_batch

        prompts = [self._prompt(query) for query in queries]
        found: dict[int, Answer] = {}
        for prefix, mine in _by_prefix([prefix for prefix, _ in prompts]):
            suffixes = [prompts[place][1] for place in mine]
            for place, suffix, ids in zip(
                mine, suffixes, answer_batch(self.model, prefix, suffixes, max_new_tokens), strict=True
            ):
                found[place] = report_tokens(self.model, ids, prefix, suffix)
        return [found[place] for place in range(len(queries))]

    def _prompt(self, query: Query, refine: int | None = None, text: str | None = None) -> tuple[VideoPrefix, Ids]:
        """Return the prefilled [system + video], computed once unless refined, and the ids after it: those of ``text``, or
        else of the question."""
        ids, start = self.model.prompt(text or query.question), time.perf_counter()
        tokens, about = self.tokens, query.relevant_text or query.question
        tokens = tokens if refine is None else refine_tokens(tokens, self.model, about, refine, self.refiner)
        refine_s = 0.0 if tokens is self.tokens else time.perf_counter() - start
        prefix = self._prefixes.get(ids.prefix) if tokens is self.tokens else None
        if prefix is None and self.prefix_file is not None and tokens is self.tokens:
            prefix = open_prefix(self.model, ids.prefix, tokens, self.text_after, self.prefix_file)
        elif prefix is None:
            prefix = prefill_video(self.model, ids.prefix, tokens, self.text_after, pruning=self.pruning)
        if tokens is self.tokens:
            self._prefixes[ids.prefix] = prefix
        overhead = prefix.num_tokens - len(ids.prefix) - prefix.num_visual_tokens
        self._facts = AskedFacts(overhead, prefix.prefill_s, refine_s, prefix.chunk_tokens)
        return prefix, ids.suffix

    def _encode_choices(self, query: Query, refine: int | None = None) -> tuple[VideoPrefix, Ids, list[Ids]]:
        """Return the prefilled video, the question's ids after it, and those of each option."""
        text, options = encode_choices(self.model, query)
        return *self._prompt(query, refine, text), options


def open_session(request: AskRequest, models: Models | None = None) -> Session:
    """Read a bundle and load the language half of its model.

    ``models``: a model that is already loaded. Raises ``BundleError`` for a bad bundle, ``BackboneError`` for a model
    that is not the one that encoded it.
    """
    start = time.perf_counter()
    bundle = read_bundle(request.bundle)
    return open_bundle(bundle, request, models, start)


def open_bundle(
    bundle: AnyBundle, request: AskRequest, models: Models | None = None, start: float | None = None
) -> Session:
    """Return a session for a bundle that is in memory.

    ``bundle``: what to ask about. ``request``: how to open it; its path is only used in messages. ``models``: the model,
    if it is already loaded. ``start``: ``time.perf_counter()`` when loading began. Raises ``BackboneError`` or
    ``ResourceError``.
    """
    start = time.perf_counter() if start is None else start
    manifest = bundle.manifest
    recorded = manifest["model"]
    if models is None:
        own = (request.model, request.revision, request.dtype, request.storage)
        models = Models(find_model(recorded, str(request.bundle), request.device, *own))
    model = models.language_model
    check_model(recorded, bundle.content.width, model, str(request.bundle))
    loaded = load_tokens(bundle, request.adapter, models)
    limits = describe_limits(recorded["model_id"], manifest["source"]["made_by_world"], is_bundle=True)
    text_after = request.text_after or manifest["settings"]["text_after"]["value"]
    load_s = time.perf_counter() - start
    full_tokens = manifest["tokens"]["full_tokens"]
    kept = request.bundle.with_name(request.bundle.name + SUFFIX) if request.save_prefix else None
    notes = (*limits, *model.notes, *((NOTE,) if opens_reasoning(model) else ()), *loaded.notes)
    return Session(
        model, loaded.tokens, full_tokens, text_after, load_s, notes, prefix_file=kept, end_s=clip_end_s(manifest)
    )


def _by_prefix(prefixes: Sequence[VideoPrefix]) -> Iterator[tuple[VideoPrefix, list[int]]]:
    """Yield each prefilled video with the places it has in ``prefixes``. Questions about one video nearly always share
    the text before it."""
    for prefix in {id(prefix): prefix for prefix in prefixes}.values():
        yield prefix, [place for place, own in enumerate(prefixes) if own is prefix]
