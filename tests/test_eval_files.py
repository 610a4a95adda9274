"""``freres eval``: its CSV, its plot, the costs of a row, and tables that stay readable with many methods."""

from __future__ import annotations

import csv
import io
import json
import sys
from contextlib import redirect_stdout
from itertools import combinations

import av
import pytest

from freres_cli.cli.eval_tables import MOST_DIFFERENCES, TABLE_WIDTH, print_differences, print_rows, print_totals
from freres_cli.evaluation.accuracy_csv import write_rows
from freres_cli.evaluation.accuracy_plot import draw_accuracy
from tests.evaluations import run_eval, write_clips, write_questions
from tests.loaded_models import loaded_models
from tests.runner import check_failure, run_freres


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(write_clips(tmp_path_factory.mktemp("eval")))


def part(accuracy, count=5):
    return {"accuracy": accuracy, "ci_low": accuracy - 0.1, "ci_high": accuracy + 0.1, "retention": None} | {
        "num_questions": count,
        "chance": 0.25,
    }


def made_summary(num_methods=30, budgets=(0.5, 0.25, 0.1, 0.05), num_categories=20, failed=()):
    """A summary as of a run with many methods, whose accuracies are all different."""
    rows = []
    for i in range(num_methods):
        for budget in budgets:
            accuracy = (1 + len(rows)) / (2 + num_methods * len(budgets))
            row = {"method": f"a-method-{i}", "label": None, "budget": budget, "failed": list(failed), "num_videos": 9}
            row |= part(accuracy, 100) | {"mean_over_categories": part(accuracy)}
            row["by_category"] = {f"category {k}": part(accuracy) for k in range(num_categories)}
            row |= dict.fromkeys(("budget_tokens", "visual_tokens", "visual_tokens_max"), 60_000 * budget)
            row |= {"adapter": None, "num_frames": 64.0, "encoded_tokens": 9216.0}
            row |= {"context_tokens": 61_000.5, "peak_memory_bytes": None, "kv_cache_bytes": 2**31}
            row |= dict.fromkeys(("compress_s", "prefill_s", "ttft_s", "next_ttft_s"), 12.3456)
            rows.append(row)
    differences = [
        {"method": b["method"], "minus": a["method"], "budget": a["budget"], "difference": 0.01}
        | {"ci_low": -0.1, "ci_high": 0.1, "mean_over_categories": {"difference": 0.0, "ci_low": None, "ci_high": None}}
        for a, b in combinations(rows, 2)
        if a["budget"] == b["budget"]
    ]
    return {"rows": rows, "differences": differences, "num_questions": 100, "num_videos": 9}


def printed(show, summary):
    out = io.StringIO()
    with redirect_stdout(out):
        show(summary)
    return out.getvalue().splitlines()


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_csv_holds_the_rows_of_the_document_and_the_plot_is_a_picture(questions, tmp_path):
    flags = ("eval", questions, "--methods", "full,evs", "--budgets", "0.5,9", "--limit", "4")
    made = ("--csv", tmp_path / "rows.csv", "--plot", tmp_path / "rows.png")
    document = run_freres(*flags, *made, "--json").json
    assert document["csv"] == str(tmp_path / "rows.csv") and document["plot"] == str(tmp_path / "rows.png")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(document["rows"]) == 3
    for line, row in zip(lines, document["rows"], strict=True):
        wanted = {key: row[key] for key in line if key in row}
        wanted |= {f"mean_over_categories.{key}": v for key, v in row["mean_over_categories"].items()}
        for category, own in row["by_category"].items():
            wanted |= {f"{category}: {key}": own[key] for key in ("num_questions", "accuracy", "ci_low", "ci_high")}
        assert line == {key: "" if wanted[key] is None else str(wanted[key]) for key in line}
        assert {"method", "budget", "accuracy", "ci_low", "ci_high", "context_tokens", "ttft_s"} < set(line)
    with av.open(str(tmp_path / "rows.png")) as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert min(pixels.shape[:2]) > 500 and len({tuple(p) for p in pixels.reshape(-1, 3)[::7].tolist()}) > 5


def test_names_of_any_kind_stay_in_their_cells():
    summary = made_summary(1, num_categories=1)
    summary["rows"][0]["method"] = 'a, "b"\nc'
    lines = list(csv.reader(io.StringIO(write_rows(summary["rows"]))))
    assert lines[1][0] == 'a, "b"\nc' and {len(line) for line in lines} == {len(lines[0])}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--csv", "no/such/folder/rows.csv"), "does not exist"),
        (("--csv", "{questions}", "--force"), "is the questions file itself"),
        (("--csv", "{folder}/clip0.mp4"), "is the video itself"),
        (("--csv", "old.csv"), "already exists"),
        (("--csv", ""), "empty"),
        (("--plot", "rows.jpg"), ".png"),
        (("--plot", "{folder}"), ".png"),
        (("--csv", "{folder}/new.png", "--plot", "{folder}/new.png"), "is the file of --csv itself"),
        (("-o", "{folder}/new.jsonl", "--csv", "{folder}/new.jsonl"), "is the file of -o itself"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(questions, flags, text, tmp_path, monkeypatch):
    """The model would be looked for next: there is none in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").touch()
    names = {"questions": questions, "folder": questions.parent}
    flags = [flag.format(**names) for flag in flags]
    run = run_freres("eval", questions, "--methods", "full", "--model", tmp_path, *flags)
    check_failure(run, 2, text)
    assert questions.read_text().startswith("{") and not (questions.parent / "new.jsonl").exists()


def test_a_plot_needs_matplotlib(questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = run_freres("eval", questions, "--model", tmp_path, "--plot", tmp_path / "a.png")
    check_failure(run, 2, "--plot: needs matplotlib")


def test_many_methods_and_rows_without_figures_are_drawn():
    summary = made_summary()
    summary["rows"][0] |= {"ci_low": None, "ci_high": None}
    summary["rows"][1] |= {"accuracy": None, "visual_tokens": None}
    summary["rows"].append({**summary["rows"][2], "method": "$full^{", "budget": None})
    assert draw_accuracy(summary).startswith(b"\x89PNG")


# --- costs ------------------------------------------------------------------------------------------------------------


def test_context_tokens_are_a_mean_over_questions_also_where_videos_have_different_numbers(questions, tmp_path):
    file = questions.parent / "fewer.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:-1]]
    rows[0]["question"] = "Which way, and why, and how far, and until when?"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_freres("eval", file, "--methods", "blind", "-o", tmp_path / "log.jsonl", "--json")
    _, *videos = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    cells = [video["cells"][0] for video in videos]
    counts = [len(cell["answers"]) for cell in cells]
    assert sorted(counts) == [1, 2, 2]
    total = sum(count * cell["context_tokens"] for count, cell in zip(counts, cells, strict=True))
    assert run.json["rows"][0]["context_tokens"] == pytest.approx(total / 5, abs=1e-9)
    assert total / 5 != pytest.approx(sum(cell["context_tokens"] for cell in cells) / 3, abs=1e-6)


def test_context_and_cache_are_those_of_the_prompt_that_ask_reports(questions, tmp_path):
    """The mean over all questions, and the bytes of the longest prompt. Resident memory is not measured by row."""
    row = run_eval(questions, "uniform", "0.5").summary["rows"][0]
    contexts = []
    for place in range(3):
        video, bundle = questions.parent / f"clip{place}.mp4", tmp_path / f"{place}.pt"
        full = run_freres("compress", video, "--dry-run", "--json").json["full_tokens"]
        run_freres("compress", video, "--method", "uniform", "--budget", full // 2, "-o", bundle)
        for choices in (("--choices", "left|right"), ()):
            text = "Which way?" if choices else "How many?"
            asked = run_freres("ask", bundle, text, *choices, "--max-new-tokens", "1", "--json")
            contexts.append(asked.json["context_tokens"])
    assert row["context_tokens"] == pytest.approx(sum(contexts) / 6)
    assert row["kv_cache_bytes"] == max(contexts) * loaded_models().language_model.kv_bytes_per_token
    assert row["peak_memory_bytes"] is None


# --- tables -----------------------------------------------------------------------------------------------------------


def test_thirty_methods_and_twenty_categories_fit_a_terminal():
    summary = made_summary()
    lines = printed(print_rows, summary)
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert sum(line.startswith("a-method-7 ") for line in lines) > 2 * 4
    columns = " ".join(line for line in lines if line.startswith("accuracy"))
    assert all(f"category {k}" in columns for k in range(20))
    for row in summary["rows"]:
        assert any(line.split()[:2] == [row["method"], str(row["budget"])] for line in lines)


def test_one_category_with_a_long_name_is_still_shown():
    summary = made_summary(2, num_categories=0)
    for row in summary["rows"]:
        row["by_category"] = {"x" * 200: part(0.5)}
    assert any("x" * 200 in line for line in printed(print_rows, summary))


def test_differences_that_are_too_many_are_those_from_the_first_method():
    lines = printed(print_differences, made_summary())
    assert len(lines) == 1 + 1 + 29 * 4 + 1 and all(" - a-method-0 " in line for line in lines[2:-1])
    assert lines[-1].endswith(f"--json has all {435 * 4}")
    few = made_summary(4)
    assert len(few["differences"]) <= MOST_DIFFERENCES
    assert len(printed(print_differences, few)) == 1 + 1 + len(few["differences"])


def test_memory_is_shown_where_it_was_measured():
    summary = made_summary(1)
    assert not any("memory" in line for line in printed(print_rows, summary))
    summary["rows"][0]["peak_memory_bytes"] = 3 * 2**30
    assert any("memory" in line for line in printed(print_rows, summary))
    assert any(line.endswith("3.00 GiB") for line in printed(print_rows, summary))


def test_chance_is_that_of_the_row_with_all_the_questions():
    """A method that failed on the only video of a category has no chance of its own there."""
    summary = made_summary(2, (0.5,), 1)
    first = summary["rows"][0]["by_category"]["category 0"]
    first |= {"accuracy": None, "num_questions": 0, "chance": None}
    lines = [line.split() for line in printed(print_rows, summary)]
    assert ["questions", "5"] in lines and ["chance", "25.0"] in lines


@pytest.mark.parametrize(("frames", "told"), [(64.0, "once for all methods"), (256.0, "for the frames of all methods")])
def test_seconds_of_decoding_are_told_as_what_they_are(frames, told):
    summary = made_summary(2, (0.5,), 1)
    summary["rows"][0]["num_frames"] = frames
    summary |= {"failed": [], "full_tokens": 9, "intervals": {"resamples": 5}, "decode_s": 1.0, "encode_s": 1.0}
    assert printed(print_totals, summary)[-1].endswith(told)
