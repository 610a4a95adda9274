"""freres batch on a real Ray: the same bundles and rows as without it, also when actors and drivers are killed."""

from __future__ import annotations

import json

import pytest

from freres_cli.cli.benchmark.batch import KilledBatch
from tests.clips import write_short_clips
from tests.runner import run_freres

pytest.importorskip("ray", reason="needs ray: pip install 'freres[ray]'")
pytestmark = pytest.mark.slow

FLAGS = ("--budget", "40", "--device", "cpu", "--engine", "ray", "--actors", "2")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_short_clips(tmp_path_factory.mktemp("ray"), 4)


def test_rows_and_bundles_are_those_of_one_machine(clips, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    arguments = ("batch", clips, tmp_path / "bad.mp4", "-o", tmp_path / "out", *FLAGS, "--json")
    for status in ("done", "skipped"):
        run = run_freres(*arguments)
        assert run.status == 3 and "1 of 5 videos failed" in run.errors[0], run.err
        rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
        assert [row["status"] for row in rows] == [status] * 4 + ["failed"]
        assert sorted(run.out.splitlines()) == sorted(map(json.dumps, rows))
    alone = tmp_path / "alone.pt"
    assert run_freres("compress", clips / "clip3.mp4", *FLAGS[:4], "-o", alone).status == 0
    assert (tmp_path / "out" / "clip3.pt").read_bytes() == alone.read_bytes()


def test_a_missing_model_ends_the_run(clips, tmp_path):
    run = run_freres("batch", clips, "-o", tmp_path / "out", *FLAGS, "--model", tmp_path)
    assert run.status == 5 and "config.json" in run.errors[0] and "Traceback" not in run.err


def test_killed_runs_leave_whole_bundles_each_made_once(clips, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    found = KilledBatch(clips, out, FLAGS, longest_s=1.0).run(num_kills=2)
    assert found.killed.total() == 2
    assert (found.missing, found.broken, found.replaced, found.made_twice) == (0, 0, 0, 0)
