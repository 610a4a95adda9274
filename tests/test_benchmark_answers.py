"""The parts of the benchmark that ask questions: every set has its answers, and a stopped run goes on."""

from __future__ import annotations

import pytest

from freres_cli.cli.benchmark import quantized
from freres_cli.cli.benchmark.grids import GRIDS, measure_grids
from tests.evaluations import write_clips, write_questions
from tests.loaded_models import loaded_models


@pytest.fixture
def questions(tmp_path):
    return write_questions(write_clips(tmp_path))


def test_each_storage_answers_and_a_second_run_asks_nothing(questions, monkeypatch):
    models = {"one": loaded_models().language_model, "another": loaded_models().language_model}
    found = quantized.ask_all(questions, models)
    assert [row["label"] for row in found["rows"]] == [
        f"{method}, {name}" for name in models for method in ("full", "adaptive", "adaptive")
    ]
    assert all(row["num_questions"] == 6 and not row["failed"] for row in found["rows"])
    of_the_same = [
        own for own in found["differences"] if own["method"].partition(", ")[0] == own["minus"].partition(", ")[0]
    ]
    assert len(of_the_same) == 3 and all(own["mean_over_categories"]["difference"] == 0 for own in of_the_same)
    monkeypatch.setattr(quantized, "ask_cell", None)
    assert quantized.ask_all(questions, models) == found


@pytest.mark.slow
def test_each_grid_answers(questions):
    found = measure_grids([questions])["sets"][questions.parent.name]
    assert {row["label"] for row in found["rows"]} == {f"residual_grid {grid}" for grid in GRIDS}
    assert all(row["num_questions"] == 6 and not row["failed"] for row in found["rows"])
