"""A bundle -> the video's part of its model's prompt, for runtimes other than ours. Loads no weights but the projector's,
which identify the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freres_cli.backbones.placement import PlacedVideo, place_video
from freres_cli.errors import BackboneError
from freres_cli.pipeline.models import Models, check_identity
from freres_cli.pipeline.prompt_text import settle_tokens
from freres_cli.pipeline.tokens import AnyBundle, load_tokens

_MARK = "QUESTION"


@dataclass(frozen=True)
class PlacedBundle:
    """The video of a bundle in a prompt. ``family``: of its model. ``notes``: what the user should know."""

    video: PlacedVideo
    family: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ChatText:
    """The rest of a chat prompt: the ids before the video, and the text around the question that follows it."""

    prefix: tuple[int, ...]
    before_question: str
    after_question: str


def place_bundle(bundle: AnyBundle, models: Models, name: str, adapter: str | None = None) -> PlacedBundle:
    """Place the tokens that ``freres ask`` would give the model where it would place them.

    ``bundle``: in memory or from a file. ``models``: its model, not loaded. ``name``: the bundle's, for messages.
    ``adapter``: as ``tokens.load_tokens`` takes it. Raises ``BackboneError`` for another model, or a family that cannot be
    placed.
    """
    counter, manifest = models.prompt_counter, bundle.manifest
    identity = models.identify_encoder().fingerprint
    check_identity(manifest["model"], bundle.content.width, identity, counter.width, name)
    loaded = load_tokens(bundle, adapter, models)
    tokens, moves = settle_tokens(loaded.tokens, counter.text_per_frame(loaded.tokens))
    told = () if moves is None else (moves.describe(len(tokens)),)
    video = place_video(counter, tokens, manifest["settings"]["text_after"]["value"])
    return PlacedBundle(video, counter.family, (*loaded.notes, *told))


def split_chat(models: Models) -> ChatText:
    """Return the model's chat prompt around a video and a question. Raises ``BackboneError`` if its tokenizer does not give
    back the text that it reads."""
    model: Any = models.prompt_counter
    prompt = model.prompt(_MARK)
    text = model.tokenizer.decode(prompt.suffix, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before, _, after = text.partition(_MARK)
    told = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if tuple(told) != prompt.suffix or _MARK not in text:
        raise BackboneError(f"{models.source.name}: its tokenizer does not give back the text that it reads")
    return ChatText(prompt.prefix, before, after)
