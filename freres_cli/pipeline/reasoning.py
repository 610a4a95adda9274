"""Models that reason before they answer: who must not read an answer from the reasoning."""

from __future__ import annotations

from freres_cli.backbones.base import LanguageModel
from freres_cli.errors import BackboneError

OPENING = "<think>"
NOTE = "the model's prompt opens a block of reasoning: an answer begins with that, and may reach its limit there"


def opens_reasoning(model: LanguageModel) -> bool:
    """Whether the model's prompt ends in an open block of reasoning, although its template is asked for none."""
    return str(model.tokenizer.decode(list(model.prompt("?").suffix))).rstrip().endswith(OPENING)


def refuse_reasoning(model: LanguageModel, what: str) -> None:
    """Raise BackboneError if the first words of an answer would be reasoning. ``what``: what reads them."""
    if opens_reasoning(model):
        name = model.fingerprint["model_id"]
        raise BackboneError(
            f"{what}: the prompt of {name} opens a block of reasoning, and an answer cannot be read from that",
            "use the checkpoint that answers at once, which is often named Instruct",
        )
