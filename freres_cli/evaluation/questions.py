"""Questions with known answers: the file, the options, and what counts as correct. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from freres_cli.errors import UsageError
from freres_cli.files import URL

MAX_CHOICES = 26
TRAILING = " .,;:!?\u3002"
# A tokenizer may take minutes on a single endless word, so the length is checked before it. About 3,000 words.
MAX_TEXT_BYTES = 16384


@dataclass(frozen=True)
class Question:
    """A row of a questions file. ``video_name``: as written there, without ``./``; ``video``: its path. Without
    ``choices`` the answer is free text. ``line``: counted from 1.

    Of a benchmark, ``prompt`` is the whole text that is asked, options included, and ``answer`` the letter of the right
    option; ``video_name`` also names the part of the video. ``place``: where the question stands, if not in a line of the
    file. ``start_s``, ``end_s``: the part of the video that it is about, in seconds after the first frame, ``None`` for
    all of it. ``problem``: why the video cannot be used, if its reader knows.
    """

    id: str
    video_name: str
    video: Path
    category: str
    question: str
    choices: tuple[str, ...]
    answer: str
    line: int
    prompt: str = ""
    place: str = ""
    start_s: float | None = None
    end_s: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Protocol:
    """How a benchmark asks, and reads answers.

    ``benchmark``: its name. ``prompt``, ``extraction``: where these come from, for reports. ``max_new_tokens``: most tokens
    of an answer. ``extract``: (answer, options) -> the letter in the answer, or ``""``. ``stop``: an answer ends before this
    text. ``guesses``: an answer without a letter counts as a guess. The originals draw it at random; ours is drawn from
    the id of the question, so that a run can be repeated.
    """

    benchmark: str
    prompt: str
    extraction: str
    max_new_tokens: int
    extract: Callable[[str, Sequence[str]], str]
    stop: str = ""
    guesses: bool = False

    def read_letter(self, text: str, question: Question) -> str:
        """Return the letter in an answer, ``""`` if there is none."""
        return self.extract(text.partition(self.stop)[0] if self.stop else text, question.choices)

    def is_right(self, text: str, question: Question) -> bool:
        """Return whether the answer, or the guess in its place, is the right option."""
        letter = self.read_letter(text, question)
        if not letter and self.guesses:
            draw = int.from_bytes(hashlib.sha256(question.id.encode()).digest()[:8])
            letter = chr(ord("A") + draw % len(question.choices))
        return letter == question.answer


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file, in order, and the SHA-256 of its bytes.

    Of a benchmark, ``path`` is the folder of the copy, the digest is that of the annotations that were read, ``protocol``
    says how answers are scored, ``notes`` what the user should know, and ``annotations`` which files were read.
    ``shard``: which part of how many this is, of a questions file that several runs share.
    """

    path: Path
    sha256: str
    questions: tuple[Question, ...]
    protocol: Protocol | None = None
    notes: tuple[str, ...] = ()
    annotations: tuple[Path, ...] = ()
    shard: tuple[int, int] | None = None

    def inputs(self, name: str = "questions file") -> Iterator[tuple[str, Path]]:
        """The file, called ``name``, with a benchmark's annotations, and its videos, as ``files.InputFiles`` takes them."""
        yield name, self.path
        yield from (("annotation file", file) for file in self.annotations)
        yield from (("video", video) for video in dict.fromkeys(question.video for question in self.questions))

    def by_video(self) -> dict[str, list[Question]]:
        """Return the questions of each video, in the order of the file."""
        videos: dict[str, list[Question]] = {}
        for question in self.questions:
            videos.setdefault(question.video_name, []).append(question)
        return videos

    def take_shard(self, part: int, count: int) -> QuestionFile:
        """Return the questions about every ``count``-th video, from the ``part``-th on, counted from 1. Raises
        ``UsageError`` if there is none."""
        videos = list(self.by_video())
        own = set(videos[part - 1 :: count])
        if not own:
            raise UsageError(
                f"{self.path}: shard {part} of {count} is empty: its videos are {len(videos)}", "take fewer shards"
            )
        questions = tuple(question for question in self.questions if question.video_name in own)
        return replace(self, questions=questions, shard=(part, count))

    def places(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield where each question stands, as FILE:LINE, and its texts."""
        for question in self.questions:
            place = question.place or f"{self.path}:{question.line}"
            yield place, (question.prompt or question.question, *question.choices, question.answer)

    def is_right(self, text: str, question: Question) -> bool:
        """Return whether a text answers the question, by the protocol if there is one, else as ``is_right`` does."""
        return is_right(text, question) if self.protocol is None else self.protocol.is_right(text, question)

    def describe_scoring(self) -> dict[str, str | int | None]:
        """Return how answers are made and read, for the ``--json`` document."""
        if self.protocol is None:
            return {
                "benchmark": None,
                "answers": "options by their probabilities; free answers greedily",
                "prompt": "freres",
                "extraction": "none",
            }
        return {
            "benchmark": self.protocol.benchmark,
            "answers": f"greedily, at most {self.protocol.max_new_tokens} tokens",
            "prompt": self.protocol.prompt,
            "extraction": self.protocol.extraction,
        }


class _BadRow(Exception):
    """What is wrong with a row, and how to fix it."""


def check_choices(choices: Sequence[str], where: str = "choices", separator: str | None = None) -> list[str]:
    """Return the letters of the options. ``separator``: what stands between them, if they are no list. Raises ``UsageError``
    for too few or too many, empty or equal options."""
    hint = f"list 2 to {MAX_CHOICES} options" if separator is None else f"separate options with {separator}"
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise UsageError(f"{where}: expected 2 to {MAX_CHOICES} options, got {len(choices)}", hint)
    if any(not choice.strip() for choice in choices):
        raise UsageError(f"{where}: an option is empty", hint)
    if len({choice.strip() for choice in choices}) < len(choices):
        raise UsageError(f"{where}: two options are the same")
    return [chr(ord("A") + i) for i in range(len(choices))]


def check_text(text: object, where: str = "question") -> None:
    """Refuse what is not text, or text with an unpaired surrogate. ``where``: its place. Raises ``UsageError``."""
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: an unpaired surrogate", "write the whole character") from error


def check_length(texts: Iterable[str], where: str = "question") -> None:
    """Raise ``UsageError`` if a question and its options are too long together. ``where``: where they come from."""
    num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    if num_bytes > MAX_TEXT_BYTES:
        raise UsageError(
            f"{where}: too long: expected at most {MAX_TEXT_BYTES} bytes of UTF-8 with its options, got {num_bytes}",
            "shorten the question or its options",
        )


def format_choices(question: str, choices: Sequence[str]) -> str:
    """Return the question with lettered options. They stay in the prompt (paper F.4)."""
    options = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    return f"{question}\nOptions:\n{options}\nAnswer with the option's letter from the given choices directly."


def find_control_token(texts: Iterable[str], tokens: Iterable[str]) -> str | None:
    """Return the first token that occurs in a text. Such a text would end its own turn, or refer to another video."""
    joined = "\0".join(texts)
    return next((token for token in tokens if token in joined), None)


def is_right(prediction: str, question: Question) -> bool:
    """Return whether the option is the answer, or a free text equals it up to case, spaces and final punctuation."""
    if question.choices:
        return prediction == question.answer
    return normalize_answer(prediction) == normalize_answer(question.answer)


def normalize_answer(text: str) -> str:
    """Return a free answer in the form that is compared: case-folded, single spaces, no final punctuation."""
    return " ".join(text.casefold().split()).rstrip(TRAILING)


def read_questions(path: Path, limit: int | None = None, *, is_named: bool = True) -> QuestionFile:
    """Return the first ``limit`` questions of a JSON Lines file, and check every row.

    ``is_named=False``: ids and categories are not read, as in training data; the line number is the id. Raises a
    ``UsageError`` that names the first bad row as FILE:LINE, and the lines of the others.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read: {reason}", "give a JSON Lines file of questions") from error
    found: list[Question] = []
    bad: list[tuple[int, str]] = []
    line_of: dict[str, int] = {}
    for line, row in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not row.strip():
            continue
        try:
            question = _read_row(row, line, path.parent, is_named)
            if question.id in line_of:
                raise _BadRow(
                    f"id {question.id!r} is already used in line {line_of[question.id]}: give each row its own"
                )
        except _BadRow as error:
            bad.append((line, str(error)))
            continue
        line_of[question.id] = line
        found.append(question)
    if bad:
        others = [str(line) for line, _ in bad[1:]]
        more = f"; {len(others)} more bad rows: lines {', '.join(others[:10])}" if others else ""
        named = ("id, ", "category, ") if is_named else ("", "")
        hint = f"keys of a row: {named[0]}video, {named[1]}question, choices (optional), answer"
        raise UsageError(f"{path}:{bad[0][0]}: {bad[0][1]}", hint + more + (", ..." if len(others) > 10 else ""))
    if not found:
        raise UsageError(f"{path}: holds no questions", "write one JSON object per line")
    return QuestionFile(path, hashlib.sha256(data).hexdigest(), tuple(found[:limit]))


def _read_row(row: bytes, line: int, folder: Path, is_named: bool) -> Question:
    try:
        values = json.loads(row.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRow("expected UTF-8 text, got other bytes: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise _BadRow(f"not valid JSON ({reason}): write one object per line") from error
    if not isinstance(values, dict):
        raise _BadRow(f"expected a JSON object, got {type(values).__name__}: write one object per line")
    if not is_named:
        values = {**values, "id": f"line {line}", "category": "all"}
    name, category, question, answer, own_id = (
        _read_text(values, key) for key in ("video", "category", "question", "answer", "id")
    )
    if "\0" in name:
        raise _BadRow("video: contains a zero byte: give the name of a file")
    if URL.match(name):
        raise _BadRow(f"video: {name[:60]} is a URL, not a file: download it first")
    choices = _read_choices(values)
    if choices and answer not in choices:
        raise _BadRow(f"answer {answer[:40]!r} is not one of the choices: copy one of them exactly")
    if not choices and not normalize_answer(answer):
        raise _BadRow("answer: only punctuation: write the answer in words")
    return Question(own_id, str(PurePath(name)), folder / name, category, question, choices, answer, line)


def _read_text(values: dict[str, Any], key: str) -> str:
    if key not in values:
        raise _BadRow(f"{key!r} is missing: add it")
    text = values[key]
    if not isinstance(text, str):
        raise _BadRow(f"{key}: expected text, got {json.dumps(text)[:40]}: put it in quotes")
    return _check_text(text, key)


def _check_text(text: str, key: str) -> str:
    if not text.strip():
        raise _BadRow(f"{key}: is empty: fill it in")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"{key}: contains an unpaired surrogate: write the whole character") from error
    return text.strip()


def _read_choices(values: dict[str, Any]) -> tuple[str, ...]:
    listed = values.get("choices")
    if listed is None or listed == []:
        return ()
    if not isinstance(listed, list) or not all(isinstance(choice, str) for choice in listed):
        raise _BadRow("choices: expected a list of strings: put each in quotes, or leave the key out")
    try:
        choices = tuple(choice.strip() for choice in listed)
        check_choices(choices)
    except UsageError as error:
        raise _BadRow(f"{error.message}: list 2 to {MAX_CHOICES} different options, or leave the key out") from error
    return tuple(_check_text(choice, "choices") for choice in choices)
