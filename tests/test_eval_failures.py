"""A method that fails on a video loses that video in its own row, and nothing else; cells share one encoding and no
memory."""

from __future__ import annotations

import gc

import pytest
import torch

from freres_cli.errors import VideoError
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.workflows import evaluate
from tests.evaluations import FRAMES, figures, read_rows, run_eval, write_clips, write_questions, write_rows
from tests.loaded_models import CountingEncoder, CountingLanguageModel, loaded_models, models_with
from tests.runner import fails, run_freres

CELLS = ("full,uniform,evs", "0.5")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(write_clips(tmp_path_factory.mktemp("eval")))


@pytest.fixture(scope="module")
def two_clips(questions):
    """The questions about clip0.mp4 and clip2.mp4."""
    rows = [row for row in read_rows(questions) if row["video"] != "clip1.mp4"]
    return write_rows(questions.parent / "two.jsonl", rows)


@pytest.fixture
def uniform_fails(monkeypatch):
    """``uniform`` has a fault that shows on clip1.mp4."""
    build_tokens = EncodedClip.build_tokens

    def build(self, method, *rest):
        if method == "uniform" and self.num_frames == FRAMES + 1:
            raise IndexError("index 7 is out\nof bounds")
        return build_tokens(self, method, *rest)

    monkeypatch.setattr(EncodedClip, "build_tokens", build)


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in ("failed", *keys)}


def test_the_other_rows_are_those_of_a_run_without_the_failure(questions, two_clips, uniform_fails, monkeypatch):
    failing = run_eval(questions, *CELLS).summary
    monkeypatch.undo()
    whole, two = run_eval(questions, *CELLS).summary, run_eval(two_clips, *CELLS).summary
    assert failing["failed"] == [] and failing["num_videos"] == 3
    rows, whole_rows, two_rows = (figures(summary)[0] for summary in (failing, whole, two))
    assert [rows[0], rows[2]] == [whole_rows[0], whole_rows[2]]
    message = "uniform 0.5: unexpected IndexError: index 7 is out of bounds"
    assert rows[1]["failed"] == [{"video": "clip1.mp4", "message": message}] and rows[1]["num_videos"] == 2
    # Its own row, and all that compares it with another, is of the two videos that it answered.
    assert without(rows[1]) == without(two_rows[1])
    for row, of_whole, of_two in zip(failing["differences"], whole["differences"], two["differences"], strict=True):
        assert row == (of_two if "uniform" in (row["method"], row["minus"]) else of_whole)


def test_the_table_and_a_warning_say_what_a_row_lacks(questions, uniform_fails, tmp_path):
    log = tmp_path / "a.jsonl"
    run = run_freres("eval", questions, "--methods", "uniform,evs", "--budgets", "0.5", "-o", log)
    assert run.status == 0
    assert "failed on 1 of 3 videos, which this row lacks: uniform 0.5: unexpected IndexError" in run.err
    lines = [line.split() for line in run.out.splitlines()]
    assert lines[0][-1] == "questions" and [line[-1] for line in lines[1:3]] == ["4", "6"]


def test_the_video_is_tried_again(questions, tmp_path, uniform_fails, monkeypatch):
    log = tmp_path / "a.jsonl"
    run_eval(questions, *CELLS, output=log)
    monkeypatch.undo()
    again = run_eval(questions, *CELLS, output=log)
    assert again.num_resumed == 2 and all(not row["failed"] for row in again.summary["rows"])


def test_of_a_video_only_what_failed_is_tried_again(questions, tmp_path, uniform_fails, monkeypatch):
    """A method may fail on every video, as one does that needs more memory than there is."""
    log, asked, ask_cell = tmp_path / "a.jsonl", [], evaluate.ask_cell
    run_eval(questions, *CELLS, output=log)
    monkeypatch.setattr(evaluate, "ask_cell", lambda cell, *rest: asked.append(cell.name) or ask_cell(cell, *rest))
    again = run_eval(questions, *CELLS, output=log)
    assert asked == ["uniform 0.5"] and again.num_resumed == 2 and again.num_joined == 0
    monkeypatch.undo()
    whole = run_eval(questions, *CELLS)
    assert figures(run_eval(questions, *CELLS, output=log).summary) == figures(whole.summary)


def test_answers_outlast_a_run_that_cannot_encode_their_video(questions, tmp_path, uniform_fails, monkeypatch):
    """In that run the video counts for no method."""
    log = tmp_path / "a.jsonl"
    before = run_eval(questions, *CELLS, output=log)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "EncodedClip", fail_to_encode)
        again = run_eval(questions, *CELLS, output=log)
    assert [video["video"] for video in again.summary["failed"]] == ["clip1.mp4"] and again.num_resumed == 2
    last = run_eval(questions, *CELLS, output=log)
    assert figures(last.summary) == figures(before.summary)


def fail_to_encode(*_):
    raise VideoError("no memory today")


def test_a_method_that_does_not_fit_in_memory_leaves_the_others(questions):
    """The full tokens of the longest clip do not fit; half of them do."""
    full = run_eval(questions, "full").summary["full_tokens_max"]
    model = CountingLanguageModel(loaded_models().language_model, max_video_tokens=full - 1)
    rows = run_eval(questions, *CELLS, models=models_with(language_model=model)).summary["rows"]
    assert [row["num_videos"] for row in rows] == [2, 3, 3]
    assert "out of memory" in rows[0]["failed"][0]["message"] and rows[0]["failed"][0]["video"] == "clip2.mp4"


def test_a_row_without_any_answer_is_empty_and_a_video_without_any_is_failed(questions, monkeypatch):
    model = CountingLanguageModel(loaded_models().language_model, max_video_tokens=0)
    rows = run_eval(questions, "full,blind", models=models_with(language_model=model)).summary["rows"]
    assert rows[0]["accuracy"] is None and rows[0]["visual_tokens"] is None and rows[0]["num_questions"] == 0
    assert rows[1]["num_questions"] == 6 and rows[1]["retention"] is None
    with fails(6, "none of 3 videos could be used: full: answering: out of memory"):
        run_eval(questions, "full", models=models_with(language_model=model))


def live_bytes():
    """Bytes of all tensors that something still holds."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) is torch.Tensor and item.layout == torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
def test_memory_and_encoding_do_not_grow_with_the_cells(questions):
    """What is held when a cell's prefill begins: its own tokens and the clip, not the caches of earlier cells."""

    class Meter(CountingLanguageModel):
        def splice(self, *args):
            held.append(live_bytes())
            return super().splice(*args)

    peaks = []
    for budgets in ("0.5", "0.5,0.4,0.25"):
        held: list[int] = []
        encoder = CountingEncoder(loaded_models().encoder)
        models = models_with(encoder, Meter(loaded_models().language_model))
        run_eval(questions, "uniform,adaptive", budgets, limit=1, models=models)
        assert sum(encoder.num_frames) == FRAMES
        peaks.append(max(held))
    assert peaks[1] <= peaks[0]


def test_a_question_that_is_too_long_is_refused_by_its_line_before_any_work(questions, tmp_path):
    rows = read_rows(questions)
    rows[1]["question"] = "why " * 9000
    path = write_rows(questions.parent / "long.jsonl", rows)
    encoder = CountingEncoder(loaded_models().encoder)
    with fails(2, f"{path}:2: too long"):
        run_eval(path, *CELLS, models=models_with(encoder=encoder))
    assert encoder.num_frames == []
