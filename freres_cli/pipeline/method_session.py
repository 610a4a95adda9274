"""An encoded clip and any method -> a session to ask, whether the method picks tokens before the question or for it."""

from __future__ import annotations

from collections.abc import Iterable

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.pruning import Pruning, check_pruning
from freres_cli.baselines.declaration import Method
from freres_cli.baselines.registry import METHODS
from freres_cli.pipeline.adapters import AnyModules
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.refining import REFINER
from freres_cli.pipeline.session import Session
from freres_cli.pipeline.tokens import with_deep_rows
from freres_cli.records import VideoTokens


def make_method_session(
    clip: EncodedClip,
    method: str,
    budget_tokens: int,
    model: LanguageModel,
    text_after: str,
    modules: AnyModules | None = None,
) -> Session:
    """Return a session about a clip in which ``method`` decides the visual tokens.

    ``clip``: the encoded clip. ``budget_tokens``: how many are kept. ``model``: the language half. ``text_after``: as in
    ``Session``. ``modules``: trained modules for this method.
    """
    tokens = clip.build_tokens(method, budget_tokens, modules)
    return open_method_session(clip, tokens, method, budget_tokens, model, text_after)


def open_method_session(
    clip: EncodedClip, tokens: VideoTokens, method: str, budget_tokens: int, model: LanguageModel, text_after: str
) -> Session:
    """Return a session about the tokens that ``method`` made of a clip.

    A method that needs the question makes every token of the clip, and the session picks ``budget_tokens`` of them for
    each question. ``clip``, ``budget_tokens``, ``model``, ``text_after``: as in ``make_method_session``. ``tokens``: of
    ``EncodedClip.build_tokens``.
    """
    declared = METHODS[method]
    picks = declared.pick_for_question is not None
    return Session(
        model,
        with_deep_rows(tokens, model.num_deep_layers),
        clip.full_tokens,
        text_after,
        load_s=0.0,
        refine=budget_tokens if picks else None,
        refiner=declared if picks else REFINER,
        pruning=make_pruning(declared, budget_tokens),
    )


def make_pruning(method: Method, budget_tokens: int) -> Pruning | None:
    """Return how a method prunes in the decoder; ``None`` for the others."""
    if method.pick_attended is None:
        return None
    return Pruning(method.num_full_layers, budget_tokens, method.pick_attended, method.name)


def check_methods(methods: Iterable[str], model: LanguageModel) -> None:
    """Refuse a method that prunes in the decoder, for a model whose decoder cannot be pruned, before any video is read.

    Raises ``BackboneError``, which names both.
    """
    for name in methods:
        if (pruning := make_pruning(METHODS[name], 1)) is not None:
            check_pruning(model, pruning, model.new_cache())
