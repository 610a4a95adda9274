"""``freres demo``: the whole job on a clip made on the spot."""

from __future__ import annotations

import pytest

from tests.runner import check_failure, run_freres


@pytest.mark.slow  # the README's main job, which every landing runs
def test_demo_runs_the_main_job(tmp_path):
    document = run_freres("demo", "-o", tmp_path / "new", "--json").json
    assert [b["visual_tokens"] for b in document["bundles"]] == [1152, 576, 288]
    assert len(document["answers"]) == 9 and any(a["is_transient"] for a in document["answers"])
    assert [row["status"] for row in document["profile"]] == ["ok", "ok"]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "clip.mp4",
        *(f"bundle-{budget}.pt" for budget in (1152, 576, 288)),
    }


def test_the_demo_replaces_nothing(tmp_path):
    (tmp_path / "clip.mp4").write_text("mine")
    check_failure(run_freres("demo", "-o", tmp_path), 2, "already holds clip.mp4")
    assert (tmp_path / "clip.mp4").read_text() == "mine"
