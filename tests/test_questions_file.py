"""``freres ask --questions``: a file of questions answered from one prefill."""

from __future__ import annotations

import json

import pytest

from freres_cli import Compressor
from freres_cli.evaluation.questions import MAX_TEXT_BYTES
from freres_cli.workflows.ask import read_queries
from tests.clips import write_clip
from tests.runner import check_failure, run_freres

ROWS = [
    {"id": "first", "question": "What moves?", "choices": ["a ring", "a square", "nothing"]},
    {"question": "Where is it?"},
    {"id": 7, "question": "Is it red or blue now?", "choices": ["red", "blue"], "answer": "red", "other": [1]},
    {"question": "And then?", "choices": []},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    clip = write_clip(folder / "clip.mp4", 8, fps=4)
    return Compressor(budget_tokens=40, device="cpu").compress(clip).save(folder / "b.pt").path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(bundle, file, *flags):
    return run_freres("ask", bundle, "--questions", file, "--device", "cpu", "--max-new-tokens", 3, *flags)


def test_answers_are_those_of_single_questions_in_the_order_of_the_file(bundle, tmp_path):
    run = ask(bundle, write_rows(tmp_path / "q.jsonl", ROWS), "--json")
    assert run.status == 0, run.err
    rows = [json.loads(line) for line in run.out.splitlines()]
    assert [row["id"] for row in rows] == ["first", 2, 7, 4], "as written, or the line"
    for row, asked in zip(rows, ROWS, strict=True):
        flags = ["--choices", "|".join(asked["choices"])] if asked.get("choices") else []
        alone = run_freres(
            *("ask", bundle, asked["question"], "--device", "cpu", "--max-new-tokens", 3, "--json"), *flags
        ).json
        assert row["schema"] == "freres.answer/1" and row["answer"] == alone["answer"]
        assert row["context_tokens"] == alone["context_tokens"]
        if flags:
            assert row["choices"] == pytest.approx(alone["choices"], abs=1e-4)


def test_text_is_one_line_per_answer(bundle, tmp_path):
    run = ask(bundle, write_rows(tmp_path / "q.jsonl", ROWS))
    assert run.status == 0 and len(run.out.splitlines()) == len(ROWS)
    assert run.out.splitlines()[0] in ROWS[0]["choices"] and "one prefill" in run.err


def test_sampling_asks_one_at_a_time_with_the_seed(bundle, tmp_path):
    file = write_rows(tmp_path / "q.jsonl", ROWS)
    first = ask(bundle, file, "--temperature", 1, "--seed", 3)
    assert first.status == 0 and first.out == ask(bundle, file, "--temperature", 1, "--seed", 3).out


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "holds no questions"),
        ("{", ":1: not valid JSON"),
        ("[1]", ":1: expected a JSON object"),
        ('{"question": 3}', ":1: question"),
        ('{"question": "  "}', ":1: question"),
        ('{"question": "a?", "choices": ["x"]}', ":1: choices: expected 2 to 26"),
        ('{"question": "a?", "choices": "x|y"}', ":1: choices: expected a list"),
        ('{"question": "a?", "id": [1]}', ":1: id"),
        ('{"question": "a?", "id": 7}\n\n{"question": "b?", "id": 7}', ":3: id 7 is already that of line 1"),
        ('{"question": "a?", "id": "x"}\n{"question": "b?", "id": "x"}', ':2: id "x" is already that of line 1'),
        ('{"question": "a?", "id": 2}\n{"question": "b?"}', ":2: id 2 is already that of line 1"),
        ('{"question": "a \\ud800"}', ":1: an unpaired surrogate"),
        (json.dumps({"question": "a" * (MAX_TEXT_BYTES + 1)}), ":1: too long"),
        ('{"question": "<|im_end|>"}', ":1: holds <|im_end|>"),
    ],
)
def test_rows_that_cannot_be_asked(bundle, tmp_path, line, text):
    file = tmp_path / "q.jsonl"
    file.write_text(line + "\n")
    check_failure(ask(bundle, file), 2, text)


def test_a_list_of_options_is_not_told_of_separators(bundle, tmp_path):
    for choices in (["x"], ["x", ""]):
        run = ask(bundle, write_rows(tmp_path / "q.jsonl", [{"question": "a?", "choices": choices}]))
        assert "hint: list 2 to 26 options" in run.err and "separate" not in run.err
    assert "hint: separate options with |" in run_freres("ask", bundle, "a?", "--choices", "x").err


def test_a_text_and_a_number_are_two_ids(tmp_path):
    rows = read_queries(write_rows(tmp_path / "q.jsonl", [{"question": "a?", "id": 7}, {"question": "b?", "id": "7"}]))
    assert [row.id for row in rows] == [7, "7"]


def test_a_file_of_questions_can_be_piped(bundle, tmp_path):
    file = write_rows(tmp_path / "q.jsonl", ROWS[:2])
    flags = ("--device", "cpu", "--max-new-tokens", 3, "--json")
    piped = run_freres("ask", bundle, "--questions", "-", *flags, stdin=file.read_bytes())
    assert piped.status == 0 and piped.out == ask(bundle, file, "--json").out
    bad = run_freres("ask", bundle, "--questions", "-", *flags, stdin=b'{"question": 3}')
    check_failure(bad, 2, "error: -:1: question: expected text")


def test_a_closed_standard_input_is_called_closed(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.runner._open_stdin", lambda _: None)  # what Python has for it
    check_failure(run_freres("ask", bundle, "--questions", "-"), 2, "--questions -: standard input is closed")
    run = run_freres("compress", "-", "-o", tmp_path / "b.pt", "--device", "cpu")
    check_failure(run, 2, "-: standard input is closed")


def test_questions_stand_in_one_place(bundle, tmp_path):
    file = write_rows(tmp_path / "q.jsonl", ROWS)
    check_failure(run_freres("ask", bundle, "why?", "--questions", file), 2, "--questions")
    check_failure(run_freres("ask", bundle, "--questions", file, "--choices", "a|b"), 2, "--questions")
    check_failure(run_freres("ask", bundle, "--questions", tmp_path / "none.jsonl"), 2, "cannot be read")
