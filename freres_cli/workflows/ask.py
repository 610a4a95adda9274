"""A bundle and a file of questions -> answers, from one prefill; and where in the clip the model looked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freres_cli.backbones.evidence import why_no_evidence
from freres_cli.backbones.generation import Sampling
from freres_cli.errors import UsageError
from freres_cli.evaluation.questions import check_choices, check_length, check_text
from freres_cli.method.allocation import frame_edges_s, frames_at, sum_in_time, token_boxes
from freres_cli.pipeline.query import Query, refuse_control_tokens
from freres_cli.pipeline.session import Session
from freres_cli.records import Answer
from freres_cli.video.sampling import TOLERANCE_S

HINT = "keys of a row: question, and optionally choices (2 to 26 options) and id"


@dataclass(frozen=True)
class AskedRow:
    """A row of a questions file: its ``query``, its ``id`` as written there, or the line number if it has none, and
    ``where`` it stands."""

    id: str | int
    query: Query
    where: str


def read_queries(path: Path, data: bytes | None = None) -> list[AskedRow]:
    """Return the questions in a JSON lines file. Every row is checked, and no two may have one id; keys other than
    question, choices and id are ignored. ``data``: the bytes of the file, if they are not at ``path``.

    Raises ``UsageError``, which names the first bad row as FILE:LINE.
    """
    try:
        data = (path.read_bytes() if data is None else data).removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read: {reason}", "name a file of questions in JSON lines") from error
    rows: list[AskedRow] = []
    line_of: dict[str | int, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _read_row(line, f"{path}:{number}", number)
        if (first := line_of.setdefault(row.id, number)) != number:
            raise UsageError(
                f"{row.where}: id {json.dumps(row.id)[:40]} is already that of line {first}",
                "give each row an id of its own; one without an id has its line number",
            )
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: holds no questions", "write one JSON object per line")
    return rows


def _read_row(line: bytes, where: str, number: int) -> AskedRow:
    try:
        values: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UsageError(f"{where}: not valid JSON in UTF-8 ({reason})", "write one object per line") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected a JSON object, got {type(values).__name__}", "write one object per line")
    question, choices, own_id = values.get("question"), values.get("choices"), values.get("id", number)
    choices = [] if choices is None else choices
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where}: question: expected text, got {json.dumps(question)[:40]}", HINT)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError(f"{where}: choices: expected a list of strings", HINT)
    if isinstance(own_id, bool) or not isinstance(own_id, str | int):
        raise UsageError(f"{where}: id: expected text or a whole number, got {json.dumps(own_id)[:40]}", HINT)
    query = Query(question.strip(), tuple(choice.strip() for choice in choices))
    for text in (*query.texts, str(own_id)):
        check_text(text, where)
    if choices:
        check_choices(query.choices, f"{where}: choices")
    check_length(query.texts, where)
    return AskedRow(own_id, query, where)


def answer_rows(
    session: Session,
    rows: Sequence[AskedRow],
    max_new_tokens: int,
    sampling: Sampling,
    on_answer: Callable[[AskedRow, Answer], None] | None = None,
    refine: int | None = None,
) -> list[Answer]:
    """Answer every question from one prefill: several together, or one at a time if tokens are sampled or refined.

    ``session``: the open bundle. ``rows``: the questions. ``max_new_tokens``: limit for each free answer. ``sampling``:
    how its tokens are picked. ``on_answer``: called with each row and its answer, in the order of the rows. ``refine``:
    as ``Session.ask`` takes it, with a prefill for each question. Raises ``UsageError`` or ``BackboneError``.
    """
    refuse_control_tokens(((row.where, row.query.texts) for row in rows), session.model)
    if sampling.temperature > 0:
        answers = []
        for row in rows:
            answer = session.ask(
                row.query.question,
                choices=row.query.choices,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                refine=refine,
            )
            answers.append(answer)
            if on_answer is not None:
                on_answer(row, answer)
        return answers
    known: dict[int, Answer] = {}
    told = 0

    def keep(place: int, answer: Answer) -> None:
        nonlocal told
        known[place] = answer
        while told in known:
            if on_answer is not None:
                on_answer(rows[told], known[told])
            told += 1

    queries = [row.query for row in rows]
    return session.ask_many(queries, max_new_tokens=max_new_tokens, on_answer=keep, refine=refine)


MAX_SPANS = 24
SPAN_LENGTHS_S = (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


def locate_evidence(session: Session, query: Query) -> dict[str, Any] | str:
    """Return where in the clip the model looks as it begins to answer, or why that cannot be said.

    ``spans``: equal parts of the clip in time order, each with its share of the attention to visual tokens (``share``),
    and of the tokens (``token_share``), to compare with. A token's share is spread evenly over the time that it stands
    for. ``visual_share``: how much of all the attention goes to visual tokens.
    """
    if (why := why_no_evidence(session.model)) is not None:
        return why
    evidence = session.find_evidence(query)
    edges_s = frame_edges_s(session.tokens.frame_seconds, session.end_s)
    start, end = float(edges_s[0]), float(edges_s[-1])
    length = next(
        (length for length in SPAN_LENGTHS_S if (end - start) / length <= MAX_SPANS), (end - start) / MAX_SPANS
    )
    last = end - TOLERANCE_S  # sums of times round: no span is so short
    bounds = torch.arange(start, last, length, dtype=torch.float64) if last > start else torch.tensor([start])
    bounds = torch.cat([bounds.double(), edges_s[-1:]])
    boxes, places = token_boxes(session.tokens), frames_at(edges_s, bounds)
    shares = sum_in_time(boxes, places, evidence.shares).tolist()
    counts = (sum_in_time(boxes, places) / len(session.tokens)).tolist()
    starts, ends = bounds[:-1].tolist(), bounds[1:].tolist()
    spans = [
        {"start_s": low, "end_s": high, "share": share, "token_share": count}
        for low, high, share, count in zip(starts, ends, shares, counts, strict=True)
    ]
    return {"num_layers": evidence.num_layers, "visual_share": evidence.visual_share, "spans": spans}
