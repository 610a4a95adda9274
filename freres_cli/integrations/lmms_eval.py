"""The model ``freres`` of lmms-eval: any method at any budget answers the tasks that generate text about one video."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from freres_cli.backbones.generation import Sampling
from freres_cli.baselines.registry import ADAPTIVE, METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.devices import memory_errors_as
from freres_cli.errors import UsageError, VideoError
from freres_cli.evaluation.cells import parse_budget
from freres_cli.pipeline.adapters import (
    TRAINED_METHODS,
    AnyModules,
    choose_adapter,
    load_modules_for,
    refuse_unused_adapter,
)
from freres_cli.pipeline.choices import choose_preset, count_budget, refuse_unavailable
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.method_session import check_methods, make_method_session
from freres_cli.pipeline.models import Models, make_source
from freres_cli.pipeline.notes import kind_of_note
from freres_cli.pipeline.planning import CompressOptions, refuse_lost_settings
from freres_cli.pipeline.query import Query, check_limit, check_query
from freres_cli.pipeline.reasoning import refuse_reasoning
from freres_cli.pipeline.session import Session
from freres_cli.presets import BUNDLED, load_settings
from freres_cli.video.probe import check_video

LOG = logging.getLogger(__name__)
MAX_NEW_TOKENS = 128  # where a task sets no limit, as in lmms-eval's Qwen2-VL


class FreRes(lmms):  # type: ignore[misc]  # lmms-eval is not installed where types are checked
    """Answers with the tokens of one method at one budget. A video is decoded, encoded and prefilled once for all its
    questions.

    ``pretrained``: ``bundled``, a folder, or a hub id. ``method``: a name that ``freres methods`` lists. ``budget``: as in
    ``freres eval --budgets``, a share of the tokens (0.1) or a count (1280). ``preset``, ``revision``, ``device``,
    ``dtype``, ``adapter``: as the flags of freres eval. ``batch_size`` and ``max_batch_size`` come from lmms-eval; questions
    are asked one at a time. ``models``: a model that is already loaded. Further arguments are settings by name, see
    freres-preset(5).

    Raises ``UsageError``, ``PresetError``, ``BackboneError`` or ``ResourceError``, as the command would.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = BUNDLED,
        method: str = ADAPTIVE,
        budget: str | float = "0.1",
        preset: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        adapter: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        models: Models | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto") or str(max_batch_size or 1) != "1":
            raise UsageError(f"batch_size: expected 1, got {batch_size}", "questions are asked one at a time")
        refuse_unavailable(method, "method")
        if method not in METHODS:
            raise UsageError(f"method: expected one of {', '.join(METHODS)}, got {method}", "see: freres methods")
        self._method, self._budget = method, parse_budget(str(budget), "budget")
        source = models.source if models else make_source(pretrained, device, dtype, revision)
        chosen = load_settings(
            str(preset or choose_preset(source.name)),
            settings,
            "model_args",
            {key: f"model_args: {key}" for key in settings},
        )
        if "budget_tokens" in settings:
            raise UsageError("model_args: budget_tokens: budget decides", "use budget")
        if chosen.quality is not None:
            raise UsageError("quality: expected none: the budget decides", "leave it out")
        refuse_lost_settings(chosen, (method,), "model_args: name method=fre-res as well")
        refuse_unused_adapter(adapter, (method,), "model_args: adapter")
        self._options = CompressOptions(source, chosen, method)
        self._models = models or Models(source)
        check_methods([method], self._models.language_model)
        refuse_reasoning(self._models.language_model, "lmms-eval")
        self.device = torch.device(source.device.name)  # lmms-eval reads it where it runs in several processes
        self._timer = StageTimer(self.device)
        self._told: set[str] = set()
        self._modules = self._load_modules(adapter) if method in TRAINED_METHODS else None

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return the answers, in the order of the requests. Where tokens are drawn, a request that comes again draws others.

        Of a video that is damaged further inside, what can be decoded is used, and the log has a warning. Raises
        ``VideoError``: before anything is encoded for a video that is missing or cannot be opened, and for one without a
        frame that can be decoded when it is reached. An empty answer would count as a wrong one, or for some tasks not at
        all. Raises ``UsageError`` before anything is encoded for a request that the model cannot be asked.
        """
        by_video: dict[Path, list[int]] = {}
        for place, request in enumerate(requests):
            self._check(request)
            by_video.setdefault(self._find_video(request), []).append(place)
        _check_videos(by_video)
        seeds = _number_repeats(requests)
        answers: dict[int, GenerationResult] = {}
        for video, places in by_video.items():
            with memory_errors_as(f"video {video}", "use a smaller dtype, or a machine with more memory"):
                session = self._open(video)
                for place in places:
                    answers[place], notes = _answer(session, requests[place], seeds[place])
                    self._tell(video, (*session.notes, *notes))
                    self.cache_hook.add_partial("generate_until", requests[place].args, answers[place].text)
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises ``UsageError``: lmms-eval's interface asks for log-likelihoods, but its tasks pick the smallest value, as if
        it were a loss, so no answer is right for both."""
        raise UsageError("loglikelihood: not supported", "choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises ``UsageError``: each question is asked on its own."""
        raise UsageError("generate_until_multi_round: not supported", "choose a task with output_type generate_until")

    def _load_modules(self, named: str | None) -> AnyModules | None:
        settings = self._options.settings
        path = choose_adapter(named, self._options.model.name, self._method, settings.variant)
        if path is None:
            return None
        return load_modules_for(path, self._method, self._models, settings.values())

    def _check(self, request: Instance) -> None:
        """Refuse a request that the model cannot be asked. Found hours later, one would cost all answers so far."""
        _, wanted, _, doc_id, task, _ = request.args
        try:
            with self._models.language_model.lock:
                check_query(Query(_question_of(request)), self._models.language_model)
            _choose_sampling(wanted, 0)
            check_limit(_limit_of(wanted))
        except UsageError as error:
            raise UsageError(f"{task}, document {doc_id}: {error.message}", error.hint) from error

    def _tell(self, video: Path, notes: Iterable[str]) -> None:
        """Log each kind of note once."""
        for note in notes:
            if (kind := kind_of_note(note)) not in self._told:
                self._told.add(kind)
                LOG.warning("%s: %s", video, note)

    def _find_video(self, request: Instance) -> Path:
        """Return the video of a request. Raises ``UsageError`` unless there is exactly one, given as a path."""
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if not isinstance(visuals, list) or len(visuals) != 1 or not isinstance(visuals[0], str | Path):
            kinds = ", ".join(type(item).__name__ for item in visuals) if isinstance(visuals, list) else visuals
            raise UsageError(f"{task}, document {doc_id}: expected the path of one video, got {kinds or 'nothing'}")
        return Path(visuals[0])

    def _open(self, video: Path) -> Session:
        model, options = self._models.language_model, self._options
        clip = EncodedClip(VideoSource(video), options, self._models.encoder, self._timer)
        budget_tokens = count_budget(self._method, self._budget, clip.full_tokens)
        text_after = options.settings.text_after
        session = make_method_session(clip, self._method, budget_tokens, model, text_after, self._modules)
        # The method may have decoded the file again.
        if clip.lost_s > 0:
            LOG.warning("%s: damaged: %.2f s of video are lost; answers are about the rest", video, clip.lost_s)
        return session


def _check_videos(videos: Collection[Path]) -> None:
    """Refuse videos that cannot be opened. Found hours later, one would cost all answers so far."""
    errors = []
    for video in videos:
        try:
            check_video(video)
        except VideoError as error:
            errors.append(error)
    if errors:
        told = f"{errors[0].message}; videos that cannot be used: {len(errors)} of {len(videos)}"
        raise VideoError(told, errors[0].hint)


def _number_repeats(requests: Iterable[Instance]) -> list[int]:
    """Return how often each request was made before: with ``--repeats``, lmms-eval sends the same one several times."""
    seen: Counter[tuple[Any, ...]] = Counter()
    numbers = []
    for request in requests:
        _, _, _, doc_id, task, split = request.args
        numbers.append(seen[task, split, doc_id])
        seen[task, split, doc_id] += 1
    return numbers


def _question_of(request: Instance) -> str:
    return str(request.args[0].replace("<image>", ""))


def _limit_of(wanted: Mapping[str, Any]) -> int:
    return int(wanted.get("max_new_tokens") or MAX_NEW_TOKENS)


def _answer(session: Session, request: Instance, seed: int) -> tuple[GenerationResult, tuple[str, ...]]:
    """Return the answer to a request, and the notes that it came with."""
    question, wanted = _question_of(request), request.args[1]
    said = session.ask(question, max_new_tokens=_limit_of(wanted), sampling=_choose_sampling(wanted, seed))
    stops = wanted.get("until") or []
    text = said.text
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return GenerationResult(text, TokenCounts(said.num_context_tokens, said.num_new_tokens)), said.notes


def _choose_sampling(wanted: Mapping[str, Any], seed: int) -> Sampling | None:
    """Return how tokens are picked; ``None`` for greedily. Raises ``UsageError`` for a search over several beams."""
    beams = wanted.get("num_beams") or 1
    if beams != 1:
        raise UsageError(f"num_beams: expected 1, got {beams}", "run with --gen_kwargs num_beams=1")
    temperature = float(wanted.get("temperature") or 0.0)
    if temperature == 0 or wanted.get("do_sample") is False:
        return None
    return Sampling(temperature, float(wanted.get("top_p") or 1.0), seed)
