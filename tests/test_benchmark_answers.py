"""The parts of the benchmark that ask questions: every set has its answers, and a stopped run goes on."""

from __future__ import annotations

import json

import pytest

from freres_cli.cli.benchmark import choices, variants
from freres_cli.cli.benchmark.grids import GRIDS, measure_grids
from freres_cli.cli.benchmark.variants import Variant, ask_variants
from freres_cli.evaluation.cells import Cell, parse_budget
from freres_cli.method import merging
from tests.evaluations import write_clips, write_questions
from tests.loaded_models import loaded_models


@pytest.fixture
def questions(tmp_path):
    return write_questions(write_clips(tmp_path))


def test_each_storage_answers_and_a_second_run_asks_nothing(questions, monkeypatch):
    named = {name: Variant(loaded_models().language_model) for name in ("one", "another")}
    cells = [Cell("full", None), *(Cell("adaptive", parse_budget(budget)) for budget in ("0.25", "0.1"))]
    found = ask_variants(questions, named, cells, "answers.jsonl")
    assert [row["label"] for row in found["rows"]] == [
        f"{method}, {name}" for name in named for method in ("full", "adaptive", "adaptive")
    ]
    assert all(row["num_questions"] == 6 and not row["failed"] for row in found["rows"])
    of_the_same = [
        own for own in found["differences"] if own["method"].partition(", ")[0] == own["minus"].partition(", ")[0]
    ]
    assert len(of_the_same) == 3 and all(own["mean_over_categories"]["difference"] == 0 for own in of_the_same)
    monkeypatch.setattr(variants, "ask_cell", None)
    assert ask_variants(questions, named, cells, "answers.jsonl") == found


def test_each_choice_merges_with_its_own_constants(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "LEVELS", (1,))
    monkeypatch.setattr(choices, "ALL_CLIPS", {1: 1})
    seen = []

    def note(cell, clip, request, asked, *_):
        stretches, _ = clip.make_bundle(40, loaded_models().language_model, "adaptive")
        seen.append((merging.COST_EXPONENT, merging.APART_S, stretches.boxes.tolist()))
        answers = {question.id: ("", True, 0.0) for question in asked}
        figures = dict.fromkeys(("num_frames", "encoded_tokens", "visual_tokens", "context_tokens", "budget_tokens"), 1)
        return {**figures, "status": "ok", "compress_s": 0.0, "prefill_s": 0.0, "answers": answers} | dict.fromkeys(
            ("kv_cache_bytes", "peak_memory_bytes")
        )

    monkeypatch.setattr(variants, "ask_cell", note)
    measured = choices.measure_choices(tmp_path, count=2)
    rows = list(map(json.loads, (tmp_path / "level_1" / "questions.jsonl").read_text().splitlines()))
    assert len({row["video"] for row in rows}) == 2 and {row["category"] for row in rows} <= {"Action", "Character"}
    [found] = measured["sets"].values()
    assert found["num_questions"] == len(rows)
    usual = merging.COST_EXPONENT, merging.APART_S
    num_budgets = len(choices.BUDGETS)
    num_asked = 2 * len(choices.CONSTANTS) * num_budgets
    of_clips, of_whole = seen[:num_asked:num_budgets], seen[num_asked :: len(choices.ALL_BUDGETS)]
    of_each = {name: of_clips[place :: len(choices.CONSTANTS)] for place, name in enumerate(choices.CONSTANTS)}
    changed = [usual, (0.3, usual[1]), (1.0, usual[1]), (usual[0], 1e9)]
    assert [{own[:2] for own in clips} for clips in of_each.values()] == [{own} for own in changed]
    merged = [[own[2] for own in clips] for clips in of_each.values()]
    assert all(own != merged[0] for own in merged[1:])
    [whole] = measured["all_categories"].values()
    assert whole["num_videos"] == 1 and len(whole["rows"][0]["by_category"]) > 2
    assert [own[:2] for own in of_whole] == [usual, (1.0, usual[1])]
    for row in measured["order"]["rows"]:
        assert 0 < row["one_at_a_time"] < 1 and row["rounds"] == pytest.approx(row["one_at_a_time"], abs=0.03)


@pytest.mark.slow
def test_each_grid_answers(questions):
    found = measure_grids([questions])["sets"][questions.parent.name]
    assert {row["label"] for row in found["rows"]} == {f"residual_grid {grid}" for grid in GRIDS}
    assert all(row["num_questions"] == 6 and not row["failed"] for row in found["rows"])
