"""Our prompts and rules against lmms-eval's own code: equal on small copies and on made-up answers. Needs lmms-eval."""

from __future__ import annotations

import csv
import importlib
import json
import random
import sys
from types import ModuleType

import pytest

from freres_cli.evaluation.readers.letters import read_egoschema, read_longvideobench, read_mvbench, read_nextqa
from freres_cli.evaluation.readers.registry import read_any_questions
from tests.benchmark_copies import MAKERS

pytestmark = pytest.mark.slow
NUM_ANSWERS = 20_000
OPTIONS = ("sit down", "run away", "jump high", "fall", "wave")
LETTERS = list("ABCDE")
PIECES = (
    *LETTERS, *"ABCDE", *"abe", "(", ")", ".", ". ", ",", " ", " ", " ", "\n", "\t", ":", "?", "'", '"', "-", "_", "/", "1,0",
    "2.5", "the answer is ", "The answer is ", "The best answer is", "Best option:", "or ", "an apple", *OPTIONS, "F", "é",
)  # fmt: skip


class Unreadable:
    """Stands for a module that a task's file imports, and that its rule does not use."""


def load_task(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    for missing in ("decord", "cv2"):
        stand_in = ModuleType(missing)
        stand_in.VideoReader = stand_in.cpu = Unreadable  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, missing, sys.modules.get(missing, stand_in))
    monkeypatch.setenv("HF_HOME", "unused")
    return importlib.import_module(f"lmms_eval.tasks.{name}.utils")


def made_up_answers() -> list[str]:
    dice = random.Random(0)
    return ["".join(dice.choices(PIECES, k=dice.randrange(1, 12))) for _ in range(NUM_ANSWERS)]


def no_choice(_: object) -> str:
    """In place of their random letter."""
    return ""


def check(ours, theirs) -> None:
    different = [(said, ours(said), theirs(said)) for said in made_up_answers() if ours(said) != theirs(said)]
    assert different[:3] == []


def test_mvbench(monkeypatch):
    task = load_task("mvbench", monkeypatch)

    def theirs(said: str) -> str:
        return next((letter for letter in LETTERS if task.mcq_acc(letter, said)), "")

    check(read_mvbench, theirs)


def test_nextqa(monkeypatch):
    pytest.importorskip("pandas", reason="lmms-eval's task needs pandas")
    task = load_task("nextqa", monkeypatch)
    monkeypatch.setattr(task.random, "choice", no_choice)
    by_letter = dict(zip(LETTERS, OPTIONS, strict=True))
    check(
        lambda said: read_nextqa(said, OPTIONS), lambda said: task.parse_multi_choice_response(said, LETTERS, by_letter)
    )


def test_egoschema(monkeypatch):
    task = load_task("egoschema", monkeypatch)
    monkeypatch.setattr(task.random, "choice", no_choice)
    by_letter = {letter: f"{letter}. {option}" for letter, option in zip(LETTERS, OPTIONS, strict=True)}
    check(
        lambda said: read_egoschema(said, OPTIONS),
        lambda said: task.parse_multi_choice_response(said, LETTERS, by_letter)[0],
    )


def test_longvideobench(monkeypatch):
    task = load_task("longvideobench", monkeypatch)
    monkeypatch.setattr(task.random, "choice", no_choice)
    check(read_longvideobench, lambda said: task.parse_multi_choice_response(said, LETTERS, {}))


def test_prompts(monkeypatch, tmp_path):
    def prompts(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        return [question.prompt for question in read_any_questions(MAKERS[name](tmp_path / name)).questions]

    def entries(name: str, file: str) -> list[dict]:
        return json.loads((tmp_path / name / file).read_text())

    direct = "Answer with the option's letter from the given choices directly."
    ours, task = prompts("mvbench"), load_task("mvbench", monkeypatch)
    only_best = {"post_prompt": "Only give the best option.\n"}
    first = entries("mvbench", "json/action_sequence.json")
    assert ours[:2] == [task.mvbench_doc_to_text(doc, only_best) for doc in first]

    ours, task = prompts("nextqa"), load_task("nextqa", monkeypatch)
    with (tmp_path / "nextqa/test.csv").open(newline="") as file:
        assert ours == [task.nextqa_doc_to_text_mc(doc) for doc in csv.DictReader(file)]

    ours, task = prompts("egoschema"), load_task("egoschema", monkeypatch)
    docs = [
        {**doc, "option": [f"{letter}. {doc[f'option {i}']}" for i, letter in enumerate(LETTERS)]}
        for doc in entries("egoschema", "questions.json")
        if doc["q_uid"] in ("u-1", "u-3")
    ]
    assert ours == [task.egoschema_doc_to_text(doc, {"post_prompt": f"\n{direct}"}) for doc in docs]

    ours, task = prompts("longvideobench"), load_task("longvideobench", monkeypatch)
    docs = [
        {**doc, **{f"option{i}": option for i, option in enumerate([*doc["candidates"], "N/A"])}}
        for doc in entries("longvideobench", "lvb_val.json")
    ]
    plain = {"pre_prompt": "", "post_prompt": f"{direct}\n"}
    assert ours == [task.longvideobench_doc_to_text(doc, plain) for doc in docs]
