"""Answers to single questions that are published: they are whole, and those of the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freres_cli.evaluation.results import ResultsLog, digest_run, read_log

RESULTS = Path(__file__).parent.parent / "freres_cli" / "bench" / "results"
FILES = sorted((RESULTS / "answers").iterdir())
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PART = json.loads((RESULTS / "all_methods_level_3.json").read_text(encoding="utf-8"))


def read(path: Path) -> ResultsLog:
    log = read_log(path, "", packed=True)
    assert log is not None
    return log


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_answers_are_whole_and_name_no_place(path: Path) -> None:
    log = read(path)
    assert log.run_sha256 == digest_run(log.run) and log.rows
    assert len({row["video"] for row in log.rows}) == len(log.rows)
    for row in log.rows:
        assert row["status"] == "ok" and len(row["cells"]) == len(log.run["methods"])
        assert all(cell["status"] == "ok" for cell in row["cells"])
        assert not Path(row["video"]).is_absolute()


def test_the_figures_at_two_point_one_are_those_of_the_answers() -> None:
    part = PART["at_2.1x"]
    log = read(RESULTS / part["answers"])
    assert log.run["questions_sha256"] == part["questions_sha256"] == PART["questions_sha256"]
    assert len(log.rows) == part["num_videos"]
    for place, row in enumerate(part["rows"]):
        answers = [answer for video in log.rows for answer in video["cells"][place]["answers"].values()]
        assert [cell["method"] for video in log.rows for cell in video["cells"][place : place + 1]] == [
            row["method"]
        ] * len(log.rows)
        assert len(answers) == row["num_questions"] == part["num_questions"]
        assert sum(is_right for _, is_right, _ in answers) / len(answers) == pytest.approx(row["accuracy"])
    told = README.partition("**Every method, level 3**")[2].partition("At 2.1x")[2].partition("```")[0]
    assert f"{part['num_questions']} questions on {part['num_videos']} clips" in told
    assert f"the other {PART['num_videos'] - part['num_videos']} clips" in told
    mean = {row["method"]: row["mean_over_categories"]["accuracy"] for row in part["rows"]}
    ahead = {d["method"] for d in part["differences"] if d["mean_over_categories"]["ci_low"] > 0}
    behind = {d["method"] for d in part["differences"] if d["mean_over_categories"]["ci_high"] < 0}
    assert not ahead and behind == {"aot-norm", "fourier-raw", "prumerge-norm", "visionzip-norm"}
    assert all(f"`{name}`" in told for name in behind)
    assert sum(share > mean["adaptive"] for share in mean.values()) == 6
    assert "six have a higher mean, by 0.6 or less" in told
    assert max(d["mean_over_categories"]["difference"] for d in part["differences"]) < 0.0065
