"""What ``freres eval`` reports: every promised figure, and videos and results files that are broken."""

from __future__ import annotations

import errno
import os
import re
import shutil
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from freres_cli.evaluation import results
from freres_cli.evaluation.results import ResultsFile
from freres_cli.presets import parse_grid
from tests.evaluations import (
    FRAMES,
    make_request,
    read_rows,
    rows_for,
    run_eval,
    write_clips,
    write_questions,
    write_rows,
)
from tests.loaded_models import loaded_models
from tests.runner import check_failure, fails, run_freres


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def questions(folder):
    return write_questions(folder)


@pytest.fixture(scope="module")
def per_frame(questions):
    """Tokens of a frame of the bundled model in its preset, whatever its size."""
    grid = parse_grid(make_request(questions, "full").options.settings.grid)
    return loaded_models().encoder.frame_size(64, 64, grid).num_tokens


def with_whole_paths(questions):
    """The rows, with absolute paths, for a file that lies elsewhere."""
    rows = read_rows(questions)
    for row in rows:
        row["video"] = str((questions.parent / row["video"]).resolve())
    return rows


def test_json_has_every_promised_field(questions, per_frame):
    run = run_freres(
        "eval", questions, "--methods", "full,uniform,lowres,fre-res,blind", "--budgets", "0.3,60", "--json"
    )
    document = run.json
    assert document["schema"] == "freres.eval/1" and document["num_questions"] == 6 and document["failed"] == []
    assert (
        document["full_tokens_max"] == (FRAMES + 2) * per_frame and document["full_tokens"] == (FRAMES + 1) * per_frame
    )
    rows = {(row["method"], row["budget"]): row for row in document["rows"]}
    assert list(rows) == [
        ("full", None),
        *[(method, budget) for method in ("uniform", "lowres", "fre-res") for budget in (0.3, 60)],
        ("blind", None),
    ]
    shares = [int(Fraction(3, 10) * (FRAMES + i) * per_frame) for i in range(3)]
    for (method, budget), row in rows.items():
        assert row["visual_tokens"] <= row["budget_tokens"] and row["visual_tokens_max"] <= row["budget_tokens_max"]
        if method in ("uniform", "lowres"):
            assert row["visual_tokens"] == row["budget_tokens"] == (60 if budget == 60 else sum(shares) / 3)
        assert row["num_questions"] == 6 and row["ci_low"] <= row["accuracy"] <= row["ci_high"]
        assert row["chance"] == 0.25 and row["by_category"]["Action"]["chance"] == 0.5
        assert set(row["by_category"]) == {"Action", "Count"} and row["by_category"]["Count"]["num_questions"] == 3
        mean = (row["by_category"]["Action"]["accuracy"] + row["by_category"]["Count"]["accuracy"]) / 2
        assert row["mean_over_categories"]["accuracy"] == pytest.approx(mean)
        assert row["compress_s"] > 0 and row["ttft_s"] > row["prefill_s"] > 0 and row["next_ttft_s"] > 0
        full = rows["full", None]["accuracy"]
        assert row["retention"] == (row["accuracy"] / full if full else None)
    pairs = [(row["method"], row["minus"], row["budget"]) for row in document["differences"]]
    budgeted = [(method, budget) for method in ("uniform", "lowres", "fre-res") for budget in (0.3, 60)]
    from_full = [(method, "full", budget) for method, budget in (*budgeted, ("blind", None))]
    at_equal = [
        (method, minus, budget)
        for budget in (0.3, 60)
        for minus, method in combinations(("uniform", "lowres", "fre-res"), 2)
    ]
    assert sorted(pairs, key=str) == sorted([*from_full, *at_equal], key=str)
    for row in document["differences"]:
        one = rows[row["method"], row["budget"]]
        other = rows["full", None] if row["minus"] == "full" else rows[row["minus"], row["budget"]]
        assert row["difference"] == pytest.approx(one["accuracy"] - other["accuracy"])
        means = [part["mean_over_categories"]["accuracy"] for part in (one, other)]
        assert row["mean_over_categories"]["difference"] == pytest.approx(means[0] - means[1])
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
    assert rows["full", None]["visual_tokens"] == document["full_tokens"] and rows["blind", None]["visual_tokens"] == 0
    assert document["model"]["model_id"] == "bundled" and len(document["questions_sha256"]) == 64
    assert document["environment"]["torch"] == torch.__version__ and document["encode_s"] > 0
    assert document["settings"]["anchors"]["source"] == "preset bundled"


def test_the_table_says_what_is_which(questions):
    run = run_freres("eval", questions, "--methods", "full,uniform,fre-res", "--budgets", "0.5")
    assert run.status == 0 and "fre-res - uniform" in run.out
    header, full, uniform = (re.split(r"\s{2,}", line) for line in run.out.splitlines()[:3])
    assert header[:6] == ["method", "budget", "tokens", "context", "accuracy", "95 % interval"]
    assert full[0].split()[0] == "full" and uniform[:2] == ["uniform", "0.5"]
    assert (
        "Action" in run.out and "6 questions on 3 videos, 0 failed" in run.out and "only knows its own world" in run.err
    )


def test_differences_are_from_full_wherever_it_stands(questions):
    differences = run_eval(questions, "blind,full").summary["differences"]
    assert [(row["method"], row["minus"]) for row in differences] == [("blind", "full")]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"status": "ok"', '"status": "fine"'), ("true", "5"), ("false", "null"), ('"cells"', '"celle"')],
)
def test_damaged_answers_do_not_count(questions, tmp_path, old, new):
    log = tmp_path / "a.jsonl"
    run_eval(questions, "blind", output=log)
    lines = log.read_text().splitlines(keepends=True)
    damaged = next(i for i, line in enumerate(lines[1:-1], 1) if old in line)
    lines[damaged] = lines[damaged].replace(old, new, 1)
    log.write_text("".join(lines))
    with fails(2, f"{log}:{damaged + 1}: damaged results"):
        run_eval(questions, "blind", output=log)


def test_a_pipe_among_the_videos_is_a_failed_row(questions, tmp_path):
    """It is never opened: reading it would block forever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    rows = with_whole_paths(questions)
    rows[0] = {**rows[0], "video": str(tmp_path / "pipe.mp4")}
    summary = run_eval(write_rows(tmp_path / "q.jsonl", rows), "blind").summary
    assert [part["video"] for part in summary["failed"]] == [str(tmp_path / "pipe.mp4")]


def test_a_video_under_two_names_is_one(questions, tmp_path):
    rows = read_rows(questions)[:2]
    shutil.copy(questions.parent / rows[0]["video"], tmp_path / "a.mp4")
    rows[0]["video"], rows[1]["video"] = "a.mp4", "./a.mp4"
    assert run_eval(write_rows(tmp_path / "q.jsonl", rows), "blind").summary["num_videos"] == 1


def test_names_do_not_control_the_terminal(questions, tmp_path):
    rows = [{**row, "category": "a\n\x1b[31mb"} for row in with_whole_paths(questions)]
    run = run_freres("eval", write_rows(tmp_path / "q.jsonl", rows), "--methods", "blind")
    assert run.status == 0 and "a  [31mb" in run.out and "\x1b" not in run.out + run.err


def test_a_name_beyond_the_file_systems_is_one_line(questions):
    check_failure(run_freres("eval", questions, "-o", "x" * 300), 2, "file name too long")


def test_the_limit_counts_questions(questions):
    summary = run_eval(questions, "blind", limit=3).summary
    assert summary["num_questions"] == 3 and summary["num_videos"] == 2


def test_a_broken_video_is_a_failed_row_and_not_a_dead_run(folder, tmp_path):
    (folder / "broken.mp4").write_bytes(b"no video")
    videos = ["clip0.mp4", "broken.mp4", "absent.mp4", "clip1.mp4", "."]
    path = write_rows(folder / "some_broken.jsonl", rows_for(videos))
    run = run_freres("eval", path, "--methods", "full,blind", "--json", "-q")
    assert run.status == 0
    document = run.json
    assert document["num_questions"] == 4 and document["num_videos"] == 2
    assert [item["video"] for item in document["failed"]] == videos[1:3] + videos[4:]
    assert all(item["num_questions"] == 2 and item["message"] for item in document["failed"])
    assert "3 of 5 videos failed; questions that count for no method: 6" in run.err and "absent.mp4" in run.err
    assert all(row["num_questions"] == 4 for row in document["rows"])


def test_no_usable_video_is_a_video_error(folder):
    path = write_rows(folder / "all_broken.jsonl", rows_for(["absent.mp4", "gone.mp4"]))
    with fails(3, "none of 2 videos could be used"):
        run_eval(path, "full,uniform,fre-res")


def test_a_header_for_which_there_is_no_room_is_told(tmp_path, monkeypatch):
    """Closing the file writes what is left in it, and fails once more."""

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = flush = lambda self: self.write(b"")

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = results._open_alone
    monkeypatch.setattr(results, "_open_alone", lambda path: Full(opened(path)))
    with fails(6, "No space left on device"):
        results.ResultsFile(tmp_path / "a.jsonl", {})


def test_a_row_is_synced_to_the_disk_before_append_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.jsonl", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), synced.append(path.stat().st_size)))
    with ResultsFile(path, {"methods": []}) as results:
        for name in "ab":
            results.append({"video": name, "status": "failed", "message": "missing"})
            assert synced[-1:] == [path.stat().st_size]
    assert len(synced) == 3, "the header and two rows"
