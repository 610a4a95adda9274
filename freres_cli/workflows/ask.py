"""bundle -> answer: splice the tokens into the prompt, answer one question or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import VideoPrefix, prefill_video, score_options
from freres_cli.backbones.generation import Sampling, generate
from freres_cli.backbones.registry import load_language_model
from freres_cli.bundle.adapter import MODEL_FACTS
from freres_cli.bundle.store import Bundle, read_bundle
from freres_cli.devices import Device, memory_errors_as
from freres_cli.errors import BackboneError, BundleError, UsageError
from freres_cli.method.tokens import build_tokens
from freres_cli.records import Answer, VideoTokens
from freres_cli.workflows.adapters import choose_adapter, load_modules
from freres_cli.workflows.compress import describe_drop, describe_limits
from freres_cli.workflows.questions import QuestionFile, check_choices, find_control_token, format_choices
from freres_cli.world.bundled_model import bundled_model_dir


@dataclass(frozen=True)
class AskRequest:
    """What to open and how. ``model`` and ``revision`` override where the bundle's model is looked for. ``adapter``: as
    ``adapters.choose_adapter`` takes it."""

    bundle: Path
    device: Device
    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    adapter: str | None = None
    text_after: str | None = None


@dataclass
class Session:
    """Visual tokens, their language model and the prefilled video: many questions, one prefill.

    ``full_tokens``: what the uncompressed clip would take. ``load_s``: seconds that reading bundle and model took.
    """

    model: LanguageModel
    tokens: VideoTokens
    full_tokens: int
    text_after: str
    load_s: float
    notes: tuple[str, ...] = ()
    _prefixes: dict[tuple[int, ...], VideoPrefix] = field(default_factory=dict)

    @property
    def prefill_s(self) -> float:
        """Seconds that the prefill of [system + video] took; after the first question."""
        return next(iter(self._prefixes.values())).prefill_s

    def forget_prefix(self) -> None:
        """Drop the prefilled video, so that the next question pays for it again."""
        self._prefixes.clear()

    def ask(
        self,
        question: str,
        *,
        choices: Sequence[str] = (),
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question; ``on_text`` receives the text as it comes. TTFT runs from this call, bundle and model
        loaded.

        With ``choices`` the answer is the option whose letter, or whose words, are likeliest (``choices_as`` of the
        model). Raises ``UsageError`` or ``BackboneError``.
        """
        submitted = time.perf_counter()
        if not question.strip():
            raise UsageError("question: is empty", 'ask something, such as: freres ask bundle.pt "what moves first?"')
        self._refuse_control_tokens(question, *choices)
        if choices:
            return self._choose(question, list(choices), submitted, on_text)
        prefix, suffix = self._prompt(question)
        generation = generate(self.model, prefix, suffix, max_new_tokens, sampling, submitted)
        for piece in generation:
            if on_text is not None:
                on_text(piece)
        assert generation.ttft_s is not None
        return Answer(
            text=generation.text,
            num_visual_tokens=len(self.tokens),
            num_context_tokens=generation.num_context_tokens,
            num_new_tokens=generation.num_new_tokens,
            ttft_s=generation.ttft_s,
            tpot_s=generation.tpot_s,
            finish_reason=generation.finish_reason or "length",
            notes=prefix.notes,
        )

    def _refuse_control_tokens(self, *texts: str) -> None:
        """A question that ends its own turn, or names another video, would change the prompt unseen."""
        token = find_control_token(texts, control_tokens(self.model))
        if token is not None:
            raise UsageError(f"question: holds {token}, which the model reads as a command", "leave it out")

    def _prompt(self, question: str) -> tuple[VideoPrefix, tuple[int, ...]]:
        """Return the prefilled [system + video], computed once, and the question's ids after it."""
        ids = self.model.prompt(question)
        if ids.prefix not in self._prefixes:
            self._prefixes[ids.prefix] = prefill_video(self.model, ids.prefix, self.tokens, self.text_after)
        return self._prefixes[ids.prefix], ids.suffix

    def _choose(
        self, question: str, choices: list[str], submitted: float, on_text: Callable[[str], None] | None
    ) -> Answer:
        letters = check_choices(choices)
        encode, end = self.model.tokenizer.encode, self.model.tokenizer.eos_token_id
        if self.model.choices_as == "words":
            prefix, suffix = self._prompt(question)
            # With the end of the turn, no option gains by being the beginning of another.
            encoded = [(*encode(choice, add_special_tokens=False), end) for choice in choices]
        else:
            prefix, suffix = self._prompt(format_choices(question, choices))
            encoded = [tuple(encode(letter, add_special_tokens=False)) for letter in letters]
        scores = score_options(self.model, prefix, suffix, encoded)
        probabilities = torch.softmax(scores.to(torch.float64), 0).tolist()
        text = choices[int(scores.argmax())]
        ttft = time.perf_counter() - submitted
        if on_text is not None:
            on_text(text)
        return Answer(
            text=text,
            num_visual_tokens=len(self.tokens),
            num_context_tokens=prefix.num_tokens + len(suffix),
            num_new_tokens=0,
            ttft_s=ttft,
            tpot_s=None,
            finish_reason="choice",
            choices=dict(zip(choices, probabilities, strict=True)),
            notes=prefix.notes,
        )


def control_tokens(model: LanguageModel) -> list[str]:
    """Return what the model reads as commands."""
    return [str(token) for token in model.tokenizer.added_tokens_decoder.values()]


def refuse_control_tokens(questions: QuestionFile, model: LanguageModel) -> None:
    """Raises ``UsageError`` for a row that holds what the model reads as a command."""
    tokens = control_tokens(model)
    for question in questions.questions:
        token = find_control_token((question.question, *question.choices, question.answer), tokens)
        if token is not None:
            raise UsageError(
                f"{questions.path}:{question.line}: holds {token}, which the model reads as a command", "leave it out"
            )


def open_session(request: AskRequest) -> Session:
    """Read a bundle and load the language half of its model.

    Raises ``BundleError`` for a bad bundle, ``BackboneError`` for a model that is not the one that encoded it.
    """
    start = time.perf_counter()
    bundle = read_bundle(request.bundle)
    recorded = bundle.manifest["model"]
    model = load_language_model(
        request.model or _recorded_model(bundle),
        request.device,
        request.dtype,
        request.revision or recorded.get("revision"),
        bundled_directory=bundled_model_dir(),
    )
    check_model(bundle, model)
    is_from_world = bool(bundle.manifest["source"].get("made_by_world"))
    notes = [*describe_limits(str(recorded.get("model_id")), is_from_world), *model.notes]
    variant = _setting(bundle, "variant")
    adapter = choose_adapter(request.adapter, recorded.get("model_id"), variant)
    modules = None if adapter is None else load_modules(adapter, recorded, bundle.tracks, variant)
    if modules is None and variant == "concat":
        notes.append("variant concat without an adapter: coefficients enter the model raw")
    with torch.no_grad(), memory_errors_as(f"opening {request.bundle}", "repack it to a smaller budget"):
        tokens = build_tokens(bundle.tracks, variant, modules)
    if _setting(bundle, "deepstack") == "drop" and (cost := describe_drop(model.num_deep_layers)) is not None:
        tokens = with_deep_rows(tokens, model)
        notes.append(cost)
    text_after = request.text_after or _setting(bundle, "text_after")
    full_tokens = int(bundle.manifest["tokens"]["full_tokens"])
    return Session(model, tokens, full_tokens, text_after, time.perf_counter() - start, tuple(notes))


def with_deep_rows(tokens: VideoTokens, model: LanguageModel) -> VideoTokens:
    """Tokens whose DeepStack rows were dropped, with zeros in their place; all others as they are."""
    if tokens.latents.shape[1] != tokens.width:
        return tokens
    zeros = tokens.latents.new_zeros(len(tokens), tokens.width * model.num_deep_layers)
    return replace(tokens, latents=torch.cat([tokens.latents, zeros], dim=1))


def check_model(bundle: Bundle, model: LanguageModel) -> None:
    """Refuse a model other than the one whose tower and projector made the latents. Raises ``BackboneError``."""
    recorded = bundle.manifest["model"]
    differing = [fact for fact in MODEL_FACTS if recorded.get(fact) != model.fingerprint.get(fact)]
    if differing or bundle.tracks.width != model.width:
        raise BackboneError(
            f"{bundle.path}: made for another model: expected {recorded.get('model_id')}, "
            f"got {model.fingerprint.get('model_id')} ({', '.join(differing) or 'width'} differs)",
            "name the model that made the bundle with --model, or compress the video again",
        )


def _recorded_model(bundle: Bundle) -> str:
    """Return where the bundle's own model is to be found: a hub id, ``bundled``, or a folder of this machine."""
    recorded = bundle.manifest["model"]
    folder = recorded.get("folder")
    if folder is None:
        return str(recorded.get("model_id"))
    if not Path(folder).is_dir():
        raise BackboneError(
            f"{bundle.path}: made with a model in {folder}: no such folder here",
            "name that model's folder with --model",
        )
    return str(folder)


def _setting(bundle: Bundle, key: str) -> Any:
    try:
        return bundle.manifest["settings"][key]["value"]
    except (KeyError, TypeError) as error:
        raise BundleError(f"{bundle.path}: damaged bundle: the manifest lacks setting {key!r}") from error
