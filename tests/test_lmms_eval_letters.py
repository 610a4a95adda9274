"""Letters read by our rules and by lmms-eval's own code: the same on made-up answers. Needs lmms-eval."""

from __future__ import annotations

import importlib
import random
import sys
from types import ModuleType

import pytest

from freres_cli.evaluation.readers.letters import read_egoschema, read_longvideobench, read_mvbench, read_nextqa

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
