"""Results of several runs as one: shards of the videos, and methods that were compared before."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from freres_cli.errors import VideoError
from freres_cli.evaluation.joined import JoinedAnswers
from freres_cli.evaluation.questions import read_questions
from freres_cli.evaluation.results import ResultsFile
from freres_cli.workflows import evaluate
from tests.clips import write_clip
from tests.evaluations import figures, make_request, run_eval, write_clips, write_questions
from tests.loaded_models import CountingEncoder, loaded_models, models_with
from tests.runner import check_failure, fails, run_freres

CELLS = ("full,uniform,adaptive", "0.25,0.5")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(write_clips(tmp_path_factory.mktemp("joined")))


@pytest.fixture(scope="module")
def before(questions, tmp_path_factory):
    """The results of a run with three methods."""
    path = tmp_path_factory.mktemp("before") / "before.jsonl"
    run_eval(questions, *CELLS, output=path)
    return path


@pytest.fixture
def asked(monkeypatch):
    """The methods and budgets that are asked, one entry for each video."""
    log, ask_cell = [], evaluate.ask_cell
    monkeypatch.setattr(evaluate, "ask_cell", lambda cell, *rest: log.append(cell.name) or ask_cell(cell, *rest))
    return log


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_are_all_videos_once(questions, count):
    file = read_questions(questions)
    parts = [file.take_shard(part, count).questions for part in range(1, count + 1)]
    assert sorted(q.id for part in parts for q in part) == sorted(q.id for q in file.questions)
    assert len({q.video_name for q in file.questions}) == sum(len({q.video_name for q in part}) for part in parts)


def test_shards_that_are_joined_are_the_whole(questions, before, tmp_path, asked):
    files = [tmp_path / f"part{part}.jsonl" for part in (1, 2)]
    for part, path in enumerate(files, start=1):
        run_eval(questions, *CELLS, output=path, shard=(part, 2))
    del asked[:]
    encoder = CountingEncoder(loaded_models().encoder)
    joined = run_eval(questions, *CELLS, output=tmp_path / "all.jsonl", joined=files, models=models_with(encoder))
    assert asked == [] and encoder.num_frames == [] and joined.num_joined == 3 * 5
    assert figures(joined.summary) == figures(run_eval(questions, *CELLS, output=before).summary)
    # What was taken over is in the file of this run, which needs the others no more.
    again = run_eval(questions, *CELLS, output=tmp_path / "all.jsonl", models=models_with(encoder))
    assert again.num_resumed == 3 and again.summary["rows"] == joined.summary["rows"] and asked == []


def test_only_a_method_that_is_new_is_asked(questions, before, asked):
    cells = ("evs,adaptive,blind,full", "0.5,0.25")
    joined = run_eval(questions, *cells, joined=[before])
    assert asked == ["evs 0.5", "evs 0.25", "blind"] * 3 and joined.num_joined == 3 * 3
    assert figures(joined.summary) == figures(run_eval(questions, *cells).summary)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_how_a_video_was_read_is_kept_in_any_order_and_where_one_row_is_new(questions, tmp_path, order):
    """With density 4 adaptive asks for more frames than the clips have, which is a note; uniform does not."""
    settings = {"sample": "count", "sample_count": 4, "track_density": 4, "grid": "4x4"}
    files = [tmp_path / f"{method}.jsonl" for method in ("uniform", "adaptive")]
    for file in files:
        run_eval(questions, file.stem, "0.5", output=file, settings=settings)
    cells = ("uniform,adaptive", "0.5")
    expected = run_eval(questions, *cells, settings=settings).summary["video_notes"]
    assert expected
    for joined in ([files[place] for place in order], [files[order[0]]]):
        found = run_eval(questions, *cells, joined=joined, settings=settings).summary["video_notes"]
        assert [{**item, "notes": set(item["notes"])} for item in found] == [
            {**item, "notes": set(item["notes"])} for item in expected
        ]


def test_the_first_of_two_files_counts_and_one_fills_the_gaps_of_the_other(questions, before, tmp_path, asked):
    run_eval(questions, "evs,adaptive", "0.25", output=tmp_path / "evs.jsonl")
    del asked[:]
    joined = run_eval(questions, "evs,adaptive", "0.25", joined=[before, tmp_path / "evs.jsonl"])
    assert asked == []
    held = [json.loads(line) for line in before.read_text().splitlines()[1:]]
    seconds = sorted(cell["compress_s"] for row in held for cell in row["cells"][3:4])
    [row] = [row for row in joined.summary["rows"] if row["method"] == "adaptive"]
    assert row["compress_s"] == seconds[1], "times are those that were measured"


def test_what_has_changed_since_or_failed_or_answers_other_questions_is_asked_again(tmp_path, asked):
    questions = write_questions(write_clips(tmp_path))
    other = tmp_path / "other.jsonl"
    run_eval(questions, "blind,uniform", "0.5", output=other, limit=5)
    rows = other.read_text().splitlines()
    row = json.loads(rows[1])
    row["cells"][1] = {"method": "uniform", "budget": 0.5, "status": "failed", "message": "no", "answers": {}}
    other.write_text("\n".join([rows[0], json.dumps(row), *rows[2:]]) + "\n")
    write_clip(tmp_path / "clip1.mp4", 7, fps=10)
    del asked[:]
    joined = run_eval(questions, "blind,uniform", "0.5", joined=[other])
    assert asked == ["uniform 0.5", "blind", "uniform 0.5", "blind", "uniform 0.5"] and joined.num_joined == 1
    assert joined.summary["num_videos"] == 3 and joined.summary["rows"][1]["failed"] == []


def test_answers_about_a_video_that_fails_now_are_not_counted(questions, before, monkeypatch):
    """They stand in no row: a video that cannot be used counts for no method."""
    clip_of = evaluate.EncodedClip

    def fail_on_the_second(source, *rest):
        if source.title == "clip1.mp4":
            raise VideoError("no")
        return clip_of(source, *rest)

    monkeypatch.setattr(evaluate, "EncodedClip", fail_on_the_second)
    joined = run_eval(questions, "full,evs", "0.25", joined=[before])
    assert [item["video"] for item in joined.summary["failed"]] == ["clip1.mp4"] and joined.num_joined == 2


def test_a_budget_is_the_same_however_it_is_written(questions, before, asked):
    joined = run_eval(questions, "full,uniform,adaptive", ".25,0.50", joined=[before])
    assert asked == [] and joined.num_joined == 3 * 5


def test_a_file_of_another_run_is_refused(questions, before, tmp_path):
    with fails(2, f"{before}: holds the results of another run: settings differs"):
        run_eval(questions, *CELLS, joined=[before], settings={"text_after": "max"})
    with fails(2, f"{before}: has none of the methods and budgets that are compared: it has full, uniform 0.25"):
        run_eval(questions, "evs", "0.25", joined=[before])
    with fails(2, "questions_sha256 differs"):
        run_eval(
            write_questions(write_clips(tmp_path)).rename(tmp_path / "q.jsonl"),
            *CELLS,
            joined=[other_file(before, tmp_path)],
        )
    lines = before.read_text().splitlines()
    row = json.loads(lines[1])
    for name, text, message in (
        ("cells", "\n".join([lines[0], json.dumps({**row, "cells": row["cells"][:2]})]) + "\n", "2 of 5 methods"),
        ("methods", "\n".join([with_methods(lines[0], [1]), *lines[1:]]) + "\n", "the header names no methods"),
        ("empty", "", "holds no results"),
        ("notes", "some notes\n", "holds no results of freres eval"),
        ("line", "\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n", "line:2: damaged"),
    ):
        (tmp_path / name).write_text(text)
        with fails(2, message):
            run_eval(questions, *CELLS, joined=[tmp_path / name])
    with fails(2, "cannot be read"):
        run_eval(questions, *CELLS, joined=[tmp_path / "none"])
    held = before.read_bytes()
    with fails(2, "is the file of --join itself"):
        run_eval(questions, *CELLS, joined=[before], output=before, force=True)
    assert before.read_bytes() == held


def with_methods(header, methods):
    """A header of the same run, but for its methods."""
    values = json.loads(header)
    return json.dumps({**values, "run": {**values["run"], "methods": methods}})


def test_a_file_that_gzip_compressed_is_joined_and_one_that_is_damaged_is_refused(questions, before, tmp_path, asked):
    packed = tmp_path / "before.jsonl.gz"
    packed.write_bytes(gzip.compress(before.read_bytes()))
    joined = run_eval(questions, *CELLS, joined=[packed])
    assert asked == [] and figures(joined.summary) == figures(run_eval(questions, *CELLS, output=before).summary)
    held = packed.read_bytes()
    for damaged in (held[:-20], held[:8], held[:40] + bytes([held[40] ^ 255]) + held[41:], held[:-8] + bytes(8)):
        packed.write_bytes(damaged)
        with fails(2, f"{packed}: damaged results"):
            run_eval(questions, *CELLS, joined=[packed])


def test_a_file_that_gzip_compressed_is_not_continued(questions, before, tmp_path):
    """Rows that are appended to it could not be read again."""
    packed = tmp_path / "before.jsonl.gz"
    packed.write_bytes(gzip.compress(before.read_bytes()))
    held = packed.read_bytes()
    with fails(2, "holds no results of freres eval"):
        run_eval(questions, *CELLS, output=packed)
    assert packed.read_bytes() == held


def other_file(before, folder):
    """The same results, as if of other questions."""
    path = folder / "changed.jsonl"
    header, *rows = before.read_text().splitlines()
    run = json.loads(header)
    run["run"]["questions_sha256"] = "0"
    path.write_text("\n".join([json.dumps(run), *rows]) + "\n")
    return path


def test_the_command_shares_the_videos_and_puts_them_together(questions, tmp_path):
    flags = ("eval", questions, "--methods", "blind", "--json")
    parts = [run_freres(*flags, "--shard", f"{part}/2", "-o", tmp_path / f"{part}").json for part in (1, 2)]
    assert [part["shard"] for part in parts] == ["1/2", "2/2"]
    assert [part["num_videos"] for part in parts] == [2, 1]
    run = run_freres(*flags, "--join", tmp_path / "1", "--join", tmp_path / "2")
    assert (run.json["num_rows_joined"], run.json["shard"], run.json["num_questions"]) == (3, None, 6)
    assert run.json["joined_files"] == [str(tmp_path / "1"), str(tmp_path / "2")]
    assert "--join: answers of 3 of 3 rows (a video, method and budget) were taken over" in run.err
    for text in ("3/2", "0/2", "2", "a/b", "1/0", "-1/2"):
        check_failure(
            run_freres(*flags, "--shard", text),
            2,
            f"--shard: expected I/N, such as 2/8, with I from 1 to N, got '{text}'",
        )
    check_failure(run_freres(*flags, "--shard", "4/4"), 2, "shard 4 of 4 is empty: its videos are 3")
    check_failure(run_freres(*flags, "--join", ""), 2, "--join: expected a path")


def test_a_shard_is_of_the_same_run_on_any_gpu(questions):
    """Each GPU has a number; what it answers does not depend on that."""
    request = make_request(questions, "blind")
    model = request.options.model
    numbered = replace(model, device=replace(model.device, name="cuda:3"))
    request = replace(request, options=replace(request.options, model=numbered))
    assert evaluate.describe_run(request, loaded_models())["device"] == "cuda"


def joined_row(method, lost_s):
    numbers = (
        "budget_tokens",
        "visual_tokens",
        "context_tokens",
        "encoded_tokens",
        "num_frames",
        "compress_s",
        "prefill_s",
    )
    cell = {"method": method, "budget": 0.5, "status": "ok", "answers": {"q": ["a", True, 0.1]}} | dict.fromkeys(
        numbers, 1
    )
    facts = {"video": "v", "status": "ok", "video_sha256": "s", "notes": [], "cells": [cell], "lost_s": lost_s}
    return facts | {"full_tokens": 1, "decode_s": 1, "encode_s": 1}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_a_video_that_two_files_have_the_larger_loss_counts(tmp_path, order):
    methods, paths = [["uniform", 0.5], ["evs", 0.5]], [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, method, lost_s in zip(paths, methods, (0.25, 2.0), strict=True):
        with ResultsFile(path, {"methods": [method]}) as results:
            results.append(joined_row(method[0], lost_s))
    known = JoinedAnswers([paths[place] for place in order], {"methods": methods}).find("v", "s", {"q"})
    assert len(known.cells) == 2 and known.lost_s == 2.0
