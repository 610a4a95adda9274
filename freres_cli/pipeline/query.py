"""What is asked: a question and its options, and the checks that need the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from freres_cli.backbones.base import LanguageModel
from freres_cli.errors import UsageError
from freres_cli.evaluation.questions import (
    check_choices,
    check_length,
    check_text,
    find_control_token,
    format_choices,
)
from freres_cli.pipeline.choices import as_whole
from freres_cli.pipeline.reasoning import refuse_reasoning

# By model: how its turn begins, as far as an answer's first word, and the ids of that.
_OPENINGS: WeakKeyDictionary[LanguageModel, tuple[str, list[int]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Query:
    """A question, with its options if it has any, and what ``refine`` picks tokens by, if not by the question."""

    question: str
    choices: tuple[str, ...] = ()
    relevant_text: str | None = None

    def __init__(self, question: str, choices: Sequence[str] | None = (), relevant_text: str | None = None) -> None:
        if isinstance(choices, str):
            raise UsageError(f"choices: expected a list of texts, got {choices!r}", f"pass [{choices!r}, ...]")
        if not isinstance(choices, Iterable | None):
            raise UsageError(f"choices: expected a list of texts, got {choices!r:.80}")
        object.__setattr__(self, "question", question)
        object.__setattr__(self, "choices", () if choices is None else tuple(choices))
        object.__setattr__(self, "relevant_text", relevant_text)

    @property
    def texts(self) -> tuple[str, ...]:
        """The question, its options and its relevant text."""
        return (self.question, *self.choices, *(() if self.relevant_text is None else (self.relevant_text,)))


def encode_choices(model: LanguageModel, query: Query) -> tuple[str, list[tuple[int, ...]]]:
    """Return the text that asks a question with options, and the token ids of each option after it.

    They are the option's letter, after a text that lists the options, or its words and the end of the turn: with the end, no
    option gains from being a prefix of another. The ``choices_as`` of ``model`` decides.
    """
    encode, end = model.tokenizer.encode, model.tokenizer.eos_token_id
    if model.choices_as == "words":
        return query.question, [(*encode(choice, add_special_tokens=False), end) for choice in query.choices]
    letters = check_choices(query.choices)
    return format_choices(query.question, query.choices), [_ids_in_turn(model, letter) for letter in letters]


def _ids_in_turn(model: LanguageModel, text: str) -> tuple[int, ...]:
    """Return the ids of a text as the model's turn begins with it: tokenizers have other tokens for a letter after a space,
    or at the start of a text."""
    if model not in _OPENINGS:
        _OPENINGS[model] = _read_opening(model)
    opening, before = _OPENINGS[model]
    whole = model.tokenizer.encode(opening + text, add_special_tokens=False)
    if whole[: len(before)] != before:
        return tuple(model.tokenizer.encode(text, add_special_tokens=False))
    return tuple(whole[len(before) :])


def _read_opening(model: LanguageModel) -> tuple[str, list[int]]:
    """Return what the prompt ends in, after its last control token, with the space that is to follow, and the ids of it
    without that space."""
    ids = model.prompt("?").suffix
    controls = [place for place, token in enumerate(ids) if token in model.tokenizer.added_tokens_decoder]
    own = list(ids[max(controls, default=-1) + 1 :])
    opening = str(model.tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    gap = " " if opening and not opening[-1].isspace() else ""  # `Assistant:`, as SmolVLM's turn begins
    return opening + gap, model.tokenizer.encode(opening, add_special_tokens=False)


def read_queries(queries: Iterable[Query | str]) -> list[Query]:
    """Return questions, some of them plain texts, as queries. Raises ``UsageError``."""
    if isinstance(queries, str | Query):
        got = "text" if isinstance(queries, str) else "query"
        raise UsageError(f"queries: expected a list, got one {got}", "pass [question], or use ask")
    if not isinstance(queries, Iterable):
        raise UsageError(f"queries: expected a list, got {type(queries).__name__}")
    return [read_query(query) for query in queries]


def read_query(query: Query | str) -> Query:
    """Return a question as a query. Raises ``UsageError``."""
    if isinstance(query, str):
        return Query(query)
    if not isinstance(query, Query):
        raise UsageError(f"query: expected a question or a Query, got {type(query).__name__}")
    return query


def check_limit(max_new_tokens: object) -> int:
    """Return the limit for a free answer as Python's own number. Raises ``UsageError``."""
    limit = as_whole(max_new_tokens, "max_new_tokens")
    if limit < 1:
        raise UsageError(f"max_new_tokens: expected at least 1, got {limit}")
    return limit


def check_query(query: Query, model: LanguageModel) -> None:
    """Refuse what ``model`` cannot be asked. Raises ``UsageError``."""
    for text in query.texts:
        check_text(text)
    if not query.question.strip() or (query.relevant_text is not None and not query.relevant_text.strip()):
        raise UsageError("question: is empty", 'ask something, such as: freres ask bundle.pt "what moves first?"')
    check_length(query.texts)
    if query.choices:
        check_choices(query.choices)
        refuse_reasoning(model, "choices")
    refuse_control_tokens([("question", query.texts)], model)


def refuse_control_tokens(places: Iterable[tuple[str, Sequence[str]]], model: LanguageModel) -> None:
    """Refuse texts that hold a token the model reads as a command: one that ends its own turn, or names another video,
    would silently change the prompt.

    ``places``: where each question stands, for the message, and its texts. Raises ``UsageError``.
    """
    # A word that a tokenizer knows as a whole is no command.
    added = model.tokenizer.added_tokens_decoder.values()
    tokens = [str(token) for token in added if token.special or not str(token).strip().isalpha()]
    for where, texts in places:
        if (token := find_control_token(texts, tokens)) is not None:
            raise UsageError(f"{where}: holds {token}, which the model reads as a command", "leave it out")
