"""``freres eval`` runs that were stopped: they resume with the same numbers, and refuse another run's results."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from freres_cli.cli.eval import run_notes
from freres_cli.workflows import evaluate
from tests.clips import write_clip
from tests.evaluations import (
    FRAMES,
    figures,
    make_request,
    rows_for,
    run_eval,
    write_clips,
    write_questions,
    write_rows,
)
from tests.loaded_models import CountingEncoder, loaded_models, models_with
from tests.runner import check_failure, fails, run_freres

CELLS = ("full,fre-res,blind", "0.25")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(write_clips(tmp_path_factory.mktemp("eval")))


def test_a_killed_run_resumes_with_the_same_numbers(questions, tmp_path):
    whole = run_eval(questions, *CELLS, output=tmp_path / "whole.jsonl")
    path, tower = tmp_path / "stopped.jsonl", loaded_models().encoder
    with pytest.raises(KeyboardInterrupt):
        run_eval(questions, *CELLS, output=path, models=models_with(CountingEncoder(tower, stop_at=3)))
    text = path.read_bytes()
    assert text.count(b"\n") == 3
    path.write_bytes(text[:-40])  # the machine went down while the second row was written
    encoder = CountingEncoder(tower)
    resumed = run_eval(questions, *CELLS, output=path, models=models_with(encoder))
    # Each clip has a length of its own: these are clip1.mp4 and clip2.mp4.
    assert encoder.num_frames == [FRAMES + 1, FRAMES + 2] and resumed.num_resumed == 1
    assert figures(resumed.summary) == figures(whole.summary)
    again = run_eval(questions, *CELLS, output=path, models=models_with(encoder))
    assert len(encoder.num_frames) == 2 and again.summary["rows"] == resumed.summary["rows"], "times are read back too"
    assert path.read_bytes().count(b"\n") == 4


def test_the_command_ends_with_130_and_resumes(questions, tmp_path, monkeypatch):
    """The patch acts as Ctrl-C at the third video."""
    flags = ("eval", questions, "--methods", "blind", "-o", tmp_path, "--json")
    evaluate_video = evaluate.evaluate_video

    def stop_at_the_third(request, name, *rest):
        if name == "clip2.mp4":
            raise KeyboardInterrupt
        return evaluate_video(request, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_video", stop_at_the_third)
        assert run_freres(*flags).status == 130
    document = run_freres(*flags).json
    assert document["num_videos_resumed"] == 2 and document["results_file"] == str(tmp_path / "eval.jsonl")


def test_a_changed_video_and_a_failed_one_are_done_again(tmp_path):
    write_clip(tmp_path / "a.mp4", 4, fps=10)
    path = write_rows(tmp_path / "q.jsonl", rows_for(["a.mp4", "b.mp4"]))
    first = run_eval(path, "full", output=tmp_path)
    assert len(first.summary["failed"]) == 1
    assert make_request(path, "full", output=tmp_path).output == tmp_path / "eval.jsonl"
    assert (tmp_path / "eval.jsonl").exists()
    write_clip(tmp_path / "a.mp4", 6, fps=10)
    write_clip(tmp_path / "b.mp4", 6, fps=10)
    second = run_eval(path, "full", output=tmp_path)
    assert second.summary["failed"] == [] and second.num_resumed == 0
    assert second.summary["full_tokens"] == first.summary["full_tokens"] / 4 * 6


def test_answers_outlast_a_run_in_which_their_videos_are_away(tmp_path):
    """A disk may be unmounted for a while."""
    path, output = write_questions(write_clips(tmp_path)), tmp_path / "a.jsonl"
    first = run_eval(path, *CELLS, output=output)
    (tmp_path / "clip1.mp4").rename(tmp_path / "away.mp4")
    away = run_eval(path, *CELLS, output=output)
    assert [video["video"] for video in away.summary["failed"]] == ["clip1.mp4"] and away.num_resumed == 2
    (tmp_path / "away.mp4").rename(tmp_path / "clip1.mp4")
    again = run_eval(path, *CELLS, output=output)
    assert again.num_resumed == 3 and again.summary["rows"] == first.summary["rows"]
    write_clip(tmp_path / "clip1.mp4", 9, fps=10)
    changed = run_eval(path, *CELLS, output=output)
    assert changed.num_resumed == 2 and changed.summary["full_tokens"] > first.summary["full_tokens"]


def test_a_video_is_read_once_to_be_known(questions, tmp_path, monkeypatch):
    """A film takes seconds to hash."""
    hashed, hash_file = [], evaluate.hash_file
    monkeypatch.setattr(evaluate, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    run_eval(questions, "blind", output=tmp_path / "a.jsonl")
    run_eval(questions, "blind,uniform", "0.5", output=tmp_path / "b.jsonl", joined=[tmp_path / "a.jsonl"])
    assert hashed == ["clip0.mp4", "clip1.mp4", "clip2.mp4"] * 2


def test_a_larger_limit_resumes(questions, tmp_path):
    output = tmp_path / "a.jsonl"
    assert run_eval(questions, "blind", output=output, limit=3).summary["num_videos"] == 2
    result = run_eval(questions, "blind", output=output)
    assert result.num_resumed == 1 and result.summary["num_questions"] == 6


def test_a_smaller_limit_has_the_figures_of_its_own_questions(tmp_path):
    rows = rows_for(["clip0.mp4", "clip1.mp4"])
    rows[3]["question"] = "How many of them are there in the picture, counting those that are hidden? " * 4
    questions = write_rows(write_clips(tmp_path) / "q.jsonl", rows)
    run_eval(questions, "blind", output=tmp_path / "a.jsonl")
    cut = run_eval(questions, "blind", output=tmp_path / "a.jsonl", limit=3)
    assert figures(cut.summary) == figures(run_eval(questions, "blind", limit=3).summary)
    assert cut.num_resumed == 1, "the video whose questions are all asked"


def test_results_of_another_run_are_refused(questions, tmp_path):
    path = tmp_path / "a.jsonl"
    run_eval(questions, "blind", output=path)
    held = path.read_bytes()
    with fails(2, "holds the results of another run: methods differs"):
        run_eval(questions, "full", output=path)
    with fails(2, "settings differs"):
        run_eval(questions, "blind", output=path, settings={"text_after": "max"})
    assert path.read_bytes() == held
    run_eval(questions, "full", output=path, force=True)
    assert path.read_bytes() != held and path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("content", [b"notes\n", b'{"schema": "other"}\n', b"notes"])
def test_a_file_that_holds_something_else_is_left_alone(questions, tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with fails(2, "no results of freres eval"):
        run_eval(questions, "blind", output=path)
    assert path.read_bytes() == content


def test_a_damaged_middle_line_is_refused_and_a_cut_header_begun_anew(questions, tmp_path):
    path = tmp_path / "a.jsonl"
    run_eval(questions, "blind", output=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + b"".join(lines[2:]))
    with fails(2, f"{path}:2: damaged"):
        run_eval(questions, "blind", output=path)
    path.write_bytes(lines[0][:30])
    run_eval(questions, "blind", output=path)
    assert path.read_bytes().startswith(lines[0])


@pytest.mark.parametrize("change", ["method", "budget", "time"])
def test_a_row_without_its_method_or_with_no_number_is_damaged(questions, tmp_path, change):
    path = tmp_path / "a.jsonl"
    run_eval(questions, "blind", output=path)
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[1])
    cell = row["cells"][0]
    if change == "method":
        del cell["method"]
    else:
        cell["budget" if change == "budget" else "prefill_s"] = "0.5" if change == "budget" else float("nan")
    path.write_text("".join([lines[0], json.dumps(row) + "\n", *lines[2:]]))
    with fails(2, f"{path}:2: damaged"):
        run_eval(questions, "blind", output=path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_unwritable_output_is_refused_before_any_work(questions, tmp_path):
    check_failure(run_freres("eval", questions, "-o", "/dev/full"), 2, "not a regular file")
    (tmp_path / "link").symlink_to("/dev/null")
    check_failure(run_freres("eval", questions, "-o", tmp_path / "link"), 2, "not a regular file")


def test_a_run_that_goes_on_says_how_many_videos_were_answered():
    request = SimpleNamespace(output=Path("a.jsonl"), joined=())
    told = {0: [], 1: ["a.jsonl: 1 video was already answered"], 2: ["a.jsonl: 2 videos were already answered"]}
    for num_resumed, notes in told.items():
        assert run_notes(SimpleNamespace(num_resumed=num_resumed, num_joined=0), request) == notes
