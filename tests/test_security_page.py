"""freres-security(7) names tests and files: each is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.hostile import COUNTS, EXPECTED, LIMIT_BYTES, LIMIT_S

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "man/man7/freres-security.7").read_text().replace("\\-", "-").replace("\\:", "")
RESULTS = ROOT / "freres_cli/bench/results/hostile.json"


def test_every_test_and_file_that_the_page_names_exists():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"\btest_\w+(?!\.py)\b", PAGE)) - {
        "test_video_refusals",
        "test_hostile",
        "test_security_page",
    }
    assert len(names) >= 8 and all(f"def {name}(" in code for name in names), names
    paths = set(re.findall(r"(?:tests|freres_cli)/[\w/]+\.(?:py|json)", PAGE))
    assert len(paths) >= 3 and all((ROOT / path).exists() for path in paths), paths


def test_the_committed_counts_are_complete_and_hold_no_bug():
    document = json.loads(RESULTS.read_text())
    for part in COUNTS:
        record = document[part]
        assert sum(record["outcomes"].values()) == record["cases"] > 0 and "bugs" not in record
        assert set(record["outcomes"]) <= EXPECTED
        assert record["most_cpu_s"] <= LIMIT_S and record["most_memory_bytes"] <= LIMIT_BYTES
    assert document["videos"]["cases"] >= 10_000 and document["bundles"]["cases"] >= 10_000
