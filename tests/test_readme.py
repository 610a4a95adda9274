"""Figures in the README come from committed files, and its commands and names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from freres_cli.cli.app import app
from freres_cli.cli.manpages import leaf_commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "freres_cli" / "bench" / "results"
POINTS_PER_MARK = 2.5
NAMES = {
    "adaptive": "adaptive",
    "fre-res": "Fre-Res",
    "dtd": "DTD",
    "evs": "EVS",
    "uniform": "uniform",
    "lowres": "low-res",
}
COMMANDS: Any = leaf_commands(typer.main.get_command(app))


def read_rows() -> dict[tuple[str, float | None], dict[str, float]]:
    rows = json.loads((RESULTS / "world.json").read_text())["methods"]["rows"]
    return {(row["method"], row["budget"]): row["mean_over_categories"] for row in rows}


def describe(part: dict[str, float]) -> str:
    value, low, high = (100 * part[key] for key in ("accuracy", "ci_low", "ci_high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f}) {'#' * round(value / POINTS_PER_MARK)}"


def draw_chart() -> str:
    """The picture of the first screen."""
    rows = read_rows()
    lines = [
        f"{'':<12}{'at a quarter of the tokens':<61}at a tenth",
        f"{'all tokens':<12}{describe(rows['full', None])}",
    ]
    for method, name in NAMES.items():
        lines.append(f"{name:<12}{describe(rows[method, 0.25]):<61}{describe(rows[method, 0.1])}")
    return "\n".join(lines)


def test_the_chart_is_drawn_from_the_results() -> None:
    assert draw_chart() in README


def test_the_cost_of_many_clips_is_the_measured_one() -> None:
    many = json.loads((RESULTS / "pipeline.json").read_text())["many"]
    one, each = many["one_command_s"]["median"], many["a_command_each_s"]["median"]
    ratio = many["one_command_over_a_command_each"]["median"]
    assert f"20 short clips take {one:.0f} s with one command and {each:.0f} s with 20" in README
    first, others = many["load_s"]["first"]["median"], many["load_s"]["others"]["median"]
    assert f"| {ratio:.2f}x ({one:.0f} s, {each:.0f} s) |" in README
    assert f"{first:.2f} s for the first clip, {1000 * others:.1f} ms for the other 19 together" in README


def test_the_cost_of_many_questions_is_the_measured_one() -> None:
    questions = json.loads((RESULTS / "pipeline.json").read_text())["questions"]

    def ratios(size: str, over: str) -> list[float]:
        return [questions[kind + size][f"together_over_{over}"]["median"] for kind in ("choices", "free_8_tokens")]

    with_options, free = ratios("", "one_at_a_time")
    assert f"| {with_options:.2f}x with options, {free:.2f}x for free answers of 8 tokens |" in README
    with_options, free = ratios("_long", "one_at_a_time")
    assert f"| {with_options:.2f}x, {free:.2f}x |" in README
    with_options, free = ratios("_long", "of_copies")
    shared, copied = (questions["choices_long"][f"{way}_s"]["median"] for way in ("together", "of_copies"))
    assert f"| {with_options:.2f}x ({shared:.1f} s, {copied:.1f} s), {free:.2f}x |" in README


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_place_of_the_machine_that_made_them(path: Path) -> None:
    assert not re.search(r'(?m)"/|: "~|file://', path.read_text())


def test_verbs_and_flags_exist() -> None:
    blocks = [*re.findall(r"(?ms)^```\n(.*?)^```", README), re.sub(r"(?m)^    ", "", README)]
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines() if line.startswith("freres ")]
    assert len(lines) > 20
    for line in lines:
        words = line.split()[1:]
        verb = next((v for v in (" ".join(words[:2]), words[0]) if v in COMMANDS), None)
        assert verb is not None, line
        known = {name for parameter in COMMANDS[verb].params for name in parameter.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line)) <= known, line


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:freres_cli|tests|presets)/[\w./*-]+)`", README))))
def test_files_that_are_named_exist(path: str) -> None:
    assert list(ROOT.glob(path)), path


def test_the_first_screen_says_what_it_is() -> None:
    """What it is, for whom, three commands and the numbers, before anything else."""
    first = "\n".join(README.splitlines()[:24])
    for text in ("Video, made cheap", "For engineers", "freres compress", "freres ask", "freres profile", "all tokens"):
        assert text in first
