"""Answers to single questions that are published: they are whole, and those of the figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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


def check_figures(part: dict[str, Any]) -> None:
    """The figures of a part of a results file are those of its answers."""
    log = read(RESULTS / part["answers"])
    assert log.run["questions_sha256"] == part["questions_sha256"]
    assert len(log.rows) == part["num_videos"]
    for place, row in enumerate(part["rows"]):
        cells = [video["cells"][place] for video in log.rows]
        answers = [answer for cell in cells for answer in cell["answers"].values()]
        assert [cell["method"] for cell in cells] == [row["method"]] * len(log.rows)
        assert len(answers) == row["num_questions"] == part["num_questions"]
        assert sum(is_right for _, is_right, _ in answers) / len(answers) == pytest.approx(row["accuracy"])


def compare(part: dict[str, Any]) -> tuple[dict[str, float], set[str], set[str], set[str]]:
    """Differences of the means of other methods less ``adaptive``, and those that are higher, certainly ahead and behind."""
    found = {row["method"]: row["mean_over_categories"]["accuracy"] for row in part["rows"]}
    less = {name: mean - found["adaptive"] for name, mean in found.items() if name != "adaptive"}
    ahead, behind = set(), set()
    for row in part["differences"]:
        interval, is_other = row["mean_over_categories"], row["minus"] == "adaptive"
        name, low, high = row["method"] if is_other else row["minus"], interval["ci_low"], interval["ci_high"]
        ahead |= {name} if (low > 0 if is_other else high < 0) else set()
        behind |= {name} if (high < 0 if is_other else low > 0) else set()
    return less, {name for name, difference in less.items() if difference > 0}, ahead, behind


def test_the_figures_of_level_2_are_those_of_the_answers() -> None:
    parts = json.loads((RESULTS / "world.json").read_text(encoding="utf-8"))
    part = parts["level_2_at_2.1x"]
    check_figures(part)
    assert part["questions_sha256"] == parts["level_2_full"]["questions_sha256"]
    told = README.partition("**Level 2, with every token**")[2].partition("At 2.1x")[2].partition("**Level 3**")[0]
    assert f"{part['num_questions']} of these questions on {part['num_videos']} clips" in told
    less, higher, ahead, _ = compare(part)
    assert higher == {"evs", "dtd", "uniform"} and not ahead
    told_less = ", ".join(f"{100 * less[name]:.1f}" for name in ("evs", "dtd")) + f" and {100 * less['uniform']:.1f}"
    assert f"by {told_less}, and none" in told


def test_the_figures_of_level_3_are_those_of_the_answers() -> None:
    part = PART["at_2.1x"]
    check_figures(part)
    assert part["questions_sha256"] == PART["questions_sha256"] and part["num_videos"] == PART["num_videos"] == 500
    told = README.partition("**Every method, level 3**")[2].partition("At 2.1x")[2].partition("```")[0]
    world = json.loads((RESULTS / "world.json").read_text(encoding="utf-8"))["level_3"]
    others = {key: [row for row in world[key] if row["budget"] == 0.476] for key in ("rows", "differences")}
    others["differences"] = [row for row in others["differences"] if "adaptive" in (row["method"], row["minus"])]
    less, higher, ahead, behind = compare(part)
    known, *found = compare(others)
    assert higher | found[0] == {"fre-res"} and 0 < known["fre-res"] < 0.0005 and not ahead | found[1]
    listed = set(re.findall(r"`([\w-]+)`", told.partition("less than 0.1.")[2].partition("are certainly behind")[0]))
    assert behind | found[2] - {"full"} == listed
    assert len(less | known) - len(listed) - len(higher | found[0]) == 12 and "the other twelve" in told
    assert f"the {len(part['rows'])} methods" in told
