"""Answer -> letter: the rules by which each benchmark reads the option out of a model's words.

Each is the rule of the benchmark's evaluation code, oddities included, because a number is comparable only with its rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words before the letter that are no answer. Longer ones come first, as in the originals.
LVB_LEADS = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is"),
    *("The correct option is", "Best answer:", "Best option:"),
)
# Two pairs of the Video-MME script lack a comma between them, so they are looked for joined together.
VIDEO_MME_LEADS = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option isThe correct option is", "Best answer:Best option:", "Answer:", "Option:"),
    *("The correct answer", "The correct option"),
)
MAX_WORDS_OF_A_LETTER = 5  # a longer answer may quote an option in place of its letter
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def read_mvbench(text: str, choices: Sequence[str] = ()) -> str:
    """Return the letter that opens an answer as in ``B. jumps``, else the first letter A to E that is a word, in either
    case, after punctuation is removed (lmms-eval, task mvbench). The article ``a`` counts as one."""
    text = text.strip()
    opening = re.match(r"([A-E])\.\s*.+$", text, re.IGNORECASE)
    if opening:
        return opening[1].upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_digits = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or has_digits else " ")
    # The original passes a flag where a count belongs: 32 full stops are removed.
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)
    letter = re.search(r"\b[A-E]\b", plain, re.IGNORECASE)
    return letter[0].upper() if letter else ""


def read_nextqa(text: str, choices: Sequence[str]) -> str:
    """Return the last letter in brackets, else the last followed by a space, else the last followed by a full stop; of a
    longer answer without one, the last option that it quotes (lmms-eval, task nextqa_mc_test)."""
    text = _trim(text)
    letters = _letters(choices)
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    quoted = _find_quoted(text, letters, choices)
    return max(quoted, key=lambda letter: quoted[letter], default="")


def read_egoschema(text: str, choices: Sequence[str]) -> str:
    """Return the first letter in brackets, before a space or before a full stop; of a letter that occurs several times in one
    form, the last counts. A longer answer without one may quote an option with its letter (lmms-eval, task
    egoschema_subset)."""
    text = _trim(text)
    letters = _letters(choices)
    forms = [(letter, form.format(letter)) for form in ("({})", "{} ", "{}.") for letter in letters]
    found = [(text.rfind(shown), letter) for letter, shown in forms if shown in text]
    if found:
        return min(found, key=lambda place: place[0])[1]
    options = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    quoted = _find_quoted(text, letters, options)
    return min(quoted, key=lambda letter: quoted[letter], default="")


def read_longvideobench(text: str, choices: Sequence[str] = ()) -> str:
    """Return the first capital A to E after the usual leads are removed (LongVideoBench's authors, in lmms-eval)."""
    return _first_capital(text, LVB_LEADS, "ABCDE")


def read_video_mme(text: str, choices: Sequence[str] = ()) -> str:
    """Return the first capital A to D after the usual leads are removed (Video-MME, ``eval_your_results.py``)."""
    return _first_capital(text, VIDEO_MME_LEADS, "ABCD")


def _first_capital(text: str, leads: Sequence[str], letters: str) -> str:
    text = text.strip()
    for lead in leads:
        text = text.replace(lead, "")
    letter = re.search(f"[{letters}]", text)
    return letter[0] if letter else ""


def _trim(text: str) -> str:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    return f" {text} "


def _letters(choices: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(choices))]


def _find_quoted(text: str, letters: Sequence[str], options: Sequence[str]) -> dict[str, int]:
    """Return the options that a longer answer quotes, and where it does so last."""
    if len(text.split()) <= MAX_WORDS_OF_A_LETTER:
        return {}
    places = {letter: text.lower().rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
    return {letter: place for letter, place in places.items() if place >= 0}
