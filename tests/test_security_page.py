"""freres-security(7) names tests, files and counts: each is there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.hostile import COUNTS, EXPECTED, LIMIT_BYTES, LIMIT_S

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "man/man7/freres-security.7").read_text().replace("\\-", "-").replace("\\:", "")
RESULTS = json.loads((ROOT / "freres_cli/bench/results/hostile.json").read_text())


def test_every_test_and_file_that_the_page_names_exists():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE))
    assert len(names) >= 8 and all(f"def {name}(" in code for name in names), names
    paths = set(re.findall(r"(?:tests|freres_cli)/[\w/]+\.(?:py|json)", PAGE))
    assert len(paths) >= 3 and all((ROOT / path).exists() for path in paths), paths


@pytest.mark.parametrize("part", COUNTS)
def test_the_committed_counts_are_complete_and_hold_no_bug(part):
    record = RESULTS[part]
    assert record["cases"] == sum(record["outcomes"].values()) == COUNTS[part] and "bugs" not in record
    assert set(record["outcomes"]) <= EXPECTED
    assert record["most_cpu_s"] <= LIMIT_S and record["most_memory_bytes"] <= LIMIT_BYTES


@pytest.mark.parametrize("part", COUNTS)
def test_the_page_has_the_committed_counts(part):
    record = RESULTS[part]
    [text] = re.findall(rf"^\.B {part}\n(.*)", PAGE, re.MULTILINE)
    found = sorted(float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text))
    counts = [record["cases"], *record["outcomes"].values(), record["most_cpu_s"]]
    counts.append(math.ceil(record["most_memory_bytes"] / 2**20))  # the page says: at most
    assert found == sorted(map(float, counts))
