"""A few of the cases that ``python -m tests.hostile`` runs by the thousand."""

from __future__ import annotations

import pytest

from tests.hostile import EXPECTED, fill_once, kill_once, write_twice
from tests.hostile_cases import run_case


@pytest.mark.parametrize(("kind", "count"), [("videos", 40), ("bundles", 60)])
def test_mutated_files_end_in_a_result_or_in_a_named_error(tmp_path_factory, kind, count):
    folder = tmp_path_factory.getbasetemp() / f"hostile-{kind}"
    outcomes = {run_case(kind, 20_000 + number, folder) for number in range(count)}
    assert outcomes <= EXPECTED and len(outcomes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", [kill_once, fill_once, write_twice])
def test_a_run_that_is_killed_or_starved_or_meets_another_leaves_nothing_by_halves(tmp_path_factory, case):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    folder.mkdir(exist_ok=True)
    for number in range(6):
        assert case(number, folder) in EXPECTED
