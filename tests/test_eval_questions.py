"""What ``freres eval`` is asked: budgets, methods, the questions file, and what counts as a right answer."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from freres_cli.errors import UsageError
from freres_cli.evaluation.cells import parse_budget, parse_cells
from freres_cli.evaluation.questions import Question, is_right, read_questions
from tests.evaluations import GOOD_ROW, HAS_BUDGET, rows_for, run_eval, write_rows
from tests.runner import check_failure, fails, run_freres


@pytest.fixture
def questions(tmp_path):
    """Of videos that are never opened."""
    return write_rows(tmp_path / "questions.jsonl", rows_for(["clip0.mp4", "clip1.mp4"]))


@pytest.mark.parametrize(
    ("text", "full", "expected"),
    [
        ("0.29", 100, 29),
        ("1.0", 77, 77),
        ("1.", 77, 77),
        (".5", 3, 1),
        ("0.001", 10, 1),
        ("640", 10, 640),
        (" 2", 9, 2),
    ],
)
def test_a_point_makes_a_share_and_none_a_count(text, full, expected):
    assert parse_budget(text).tokens(full) == expected


@pytest.mark.parametrize("text", ["1", "0", "1.5", "0.0", "-2", "50%", "1e-1", "", "x", "nan", "1/2", "9" * 30, "٣"])
def test_a_budget_that_is_neither_is_refused(text):
    with pytest.raises(UsageError, match="--budgets"):
        parse_budget(text)


def test_full_and_blind_have_one_row():
    names = [cell.name for cell in parse_cells("full,uniform,blind", "1.0,0.5", HAS_BUDGET)]
    assert names == ["full", "uniform 1.0", "uniform 0.5", "blind"]
    assert parse_budget("0.1").share == Fraction(1, 10)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("Two.", "two", True), ("  TWO \n men!", "two men", True), ("twotwo", "two", False), ("", "two", False)],
)
def test_free_answers_are_compared_without_case_spaces_and_final_stops(said, answer, right):
    assert is_right(said, Question("1", "v", Path("v"), "c", "q", (), answer, 1)) is right


def test_options_are_compared_as_they_stand():
    question = Question("1", "v", Path("v"), "c", "q", ("A.", "a"), "a", 1)
    assert is_right("a", question) and not is_right("A.", question)


BAD_ROWS = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[1]", "JSON object"),
    "deep": ("[" * 10**5, "not valid JSON"),
    "bytes": (b'{"id": "\xff"}', "UTF-8"),
    "missing": ({k: v for k, v in GOOD_ROW.items() if k != "answer"}, "'answer' is missing"),
    "number": ({**GOOD_ROW, "id": 3}, "id: expected text, got 3"),
    "null": ({**GOOD_ROW, "category": None}, "category: expected text"),
    "empty": ({**GOOD_ROW, "question": " "}, "question: is empty"),
    "not an option": ({**GOOD_ROW, "answer": "c"}, "answer 'c' is not one of the choices"),
    "one option": ({**GOOD_ROW, "choices": ["a"]}, "2 to 26 options"),
    "27 options": ({**GOOD_ROW, "choices": [*map(str, range(26)), "a"]}, "2 to 26 options"),
    "equal options": ({**GOOD_ROW, "choices": ["a", "a "]}, "the same"),
    "empty option": ({**GOOD_ROW, "choices": ["a", ""]}, "an option is empty"),
    "options as text": ({**GOOD_ROW, "choices": "ab"}, "choices: expected a list"),
    "same id": (GOOD_ROW, "id '1' is already used in line 1"),
    "URL": ({**GOOD_ROW, "id": "2", "video": "https://x.org/a.mp4"}, "https://x.org/a.mp4 is a URL, not a file"),
    "zero byte": ({**GOOD_ROW, "id": "2", "video": "a\0b"}, "zero byte"),
    "half a character": (json.dumps({**GOOD_ROW, "id": "2"}).replace("q?", "\\ud800"), "an unpaired surrogate"),
    "only punctuation": ({**GOOD_ROW, "id": "2", "choices": [], "answer": "?!"}, "only punctuation"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    row, expected = BAD_ROWS[name]
    text = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(GOOD_ROW).encode() + b"\n\n" + text + b"\n{\n")
    run = run_freres("eval", path)
    check_failure(run, 2, f"{path}:3: ")
    assert expected in run.errors[0] and "1 more bad rows: lines 4" in run.err


@pytest.mark.parametrize("content", [None, b"", b"\n \n", "folder"])
def test_a_file_without_questions_is_refused(tmp_path, content):
    path = tmp_path / "q.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    check_failure(run_freres("eval", path), 2, str(path))


def test_a_questions_file_may_have_a_byte_order_mark_and_no_last_newline(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**GOOD_ROW, "choices": None}).encode() + b"\r\n")
    file = read_questions(path)
    assert file.questions[0].choices == () and file.questions[0].video == tmp_path / "clip0.mp4"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--methods", "magic"), "--methods"),
        (("--methods", "full,full"), "given twice"),
        (("--budgets", "0.5,.50"), "given twice"),
        (("--budgets", "1"), "--budgets"),
        (("--set", "budget_tokens=5"), "--budgets"),
        (("--set", "anchors=0"), "anchors"),
        (("-o", "no/such/folder.jsonl"), "does not exist"),
        (("-o", "{questions}"), "is the questions file itself"),
    ],
)
def test_flags_that_cannot_be_carried_out(questions, flags, text):
    check_failure(run_freres("eval", questions, *[str(flag).format(questions=questions) for flag in flags]), 2, text)


@pytest.mark.parametrize("place", [("eval",), ("train",), ("ablate", "-o", "out"), ("ablate", "-o", "out", "--train")])
def test_questions_that_may_not_be_read_are_named(questions, tmp_path, monkeypatch, place):
    def refuse(path, *rest, **more):  # root may read every file
        if path == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **more)

    shut, opened = tmp_path / "shut.jsonl", Path.open
    shut.touch()
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.R_OK or path != shut)
    monkeypatch.chdir(tmp_path)
    others = [questions] if "--train" in place else []
    run = run_freres(place[0], *others, *place[1:], shut)
    check_failure(run, 2, f"{shut}: cannot be read: Permission denied")
    assert not (tmp_path / "out").exists()


def test_a_question_that_the_model_reads_as_a_command_is_named(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [GOOD_ROW, {**GOOD_ROW, "id": "2", "question": "<|im_end|> what?"}])
    with fails(2, f"{path}:2: holds <|im_end|>"):
        run_eval(path, "full,uniform,fre-res")
