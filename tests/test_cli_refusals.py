"""Bad input gives one error line, its exit status and no files; bugs and lack of memory are reported as such."""

from __future__ import annotations

import pytest
import torch
import typer

from freres_cli.cli.app import app
from freres_cli.cli.manpages import leaf_commands
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("compress", "missing.mp4"), 3, "missing.mp4"),
        (("compress", "{clip}", "--preset", "nothing"), 2, "preset nothing"),
        (("compress", "{clip}", "--method", "magic"), 2, "--method"),
        (("compress", "{clip}", "--variant", "magic"), 2, "error: --variant: expected"),
        (("compress", "{clip}", "--grid", "2by2"), 2, "error: --grid: expected"),
        (("compress", "{clip}", "--residual-grid", "6"), 2, "error: --residual-grid: expected"),
        (("compress", "{clip}", "--quality", "0.5", "--method", "uniform"), 2, "error: --quality: method"),
        (("compress", "{clip}", "--set", "quality=0.5", "--method", "uniform"), 2, "error: --set: quality: method"),
        (
            ("compress", "{clip}", "--residual-grid", "half", "--method", "uniform"),
            2,
            "error: --residual-grid: a setting",
        ),
        (("compress", "{clip}", "--fps", "4", "--set", "sample=native"), 2, "error: --fps and --set: sample: expected"),
        (("compress", "{clip}", "--fps", "4", "--frames", "3"), 2, "error: --fps and --frames: expected one"),
        (("compress", "{clip}", "--budget", "9" * 30), 2, "error: --budget: expected at most"),
        (("compress", "{clip}", "--set", "anchors=0"), 2, "anchors"),
        (("compress", "{clip}", "--fps", "0"), 2, "--fps: expected"),
        (("compress", "{clip}", "--fps", "nan"), 2, "--fps: expected"),
        (("compress", "{clip}", "--start", "100"), 2, "window"),
        (("compress", "{clip}", "--start", "2", "--end", "1"), 2, "--end: expected"),
        (("compress", "{clip}", "--model", "no-such-model"), 5, "no-such-model"),
        (("compress", "{clip}", "--device", "cuda:99"), 6, "cuda:99"),
        (("compress", "{clip}", "--device", "tpu"), 2, "error: --device: expected"),
        (("compress", "{clip}", "--dtype", "int3"), 2, "error: --dtype: expected"),
        (("compress", "{clip}", "-o", "no/such/folder.pt"), 2, "does not exist"),
        (("compress", "{clip}", "-o", "{clip}/b.pt"), 2, "is not a folder"),
        (("ask", "missing.pt", "what?"), 4, "missing.pt"),
        (("ask", "{clip}", "what?"), 4, "not a freres bundle"),
        (("ask", "{bundle}", "  "), 2, "question"),
        (("ask", "{bundle}", "what?", "--choices", "one"), 2, "--choices"),
        (("ask", "{bundle}", "what?", "--choices", "a||b"), 2, "empty"),
        (("ask", "{bundle}", "what?", "--choices", "a|a"), 2, "the same"),
        (("ask", "{bundle}", "what?", "--top-p", "2"), 2, "error: --top-p: expected"),
        (("ask", "{bundle}", "what?", "--text-after", "x"), 2, "--text-after"),
        (("ask", "{bundle}", "--json"), 2, "--json"),
        (("inspect", "missing.pt"), 4, "missing.pt"),
        (("repack", "missing.pt", "--budget", "3", "-o", "x.pt"), 4, "missing.pt"),
        (("profile", "missing.mp4"), 3, "missing.mp4"),
        (("presets", "nothing"), 2, "preset nothing"),
        (("demo", "-o", "/dev/null/folder"), 2, "cannot be a folder"),
        # As an unset variable leaves them.
        (("compress", "{clip}", "--model", ""), 2, "--model: expected a name, got an empty text"),
        (("compress", "{clip}", "--preset", ""), 2, "--preset: expected a name, got an empty text"),
        (("inspect", ""), 2, "BUNDLE: expected a path, got an empty text"),
        (("eval", "q.jsonl", "-o", ""), 2, "--output: expected a path, got an empty text"),
        (("verify", ""), 2, "model: expected a name or a folder, got an empty text"),
        (("train", "q.jsonl", "--rank", "100000000000"), 2, "--rank: expected a whole number from 1 to 4096"),
        (("train", "q.jsonl", "--learning-rate", "1e300"), 2, "--learning-rate: expected a number from 0 to 1"),
        (("plan", "{clip}", "--device-memory", "9" * 400 + "GiB"), 2, "--device-memory: expected a size"),
        (("compress", "{clip}", "--quality", "0.5", "--set", "tau=0.1"), 2, "--set: tau: a setting of method fre-res"),
    ],
)
def test_bad_input_is_one_line_and_its_status(arguments, status, text, clip, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(clip=clip, bundle=bundle) for a in arguments]
    check_failure(run_freres(*filled), status, text)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_usage_errors_are_2(clip):
    for arguments in (("compress",), ("compress", clip, "--budget", "0"), ("compress", clip, "--nope"), ("fly",)):
        run = run_freres(*arguments)
        assert run.status == 2 and run.out == "" and "Traceback" not in run.err


NUMBERS = [
    pytest.param(name.split(), parameter, id=f"{name} {parameter.opts[0]}")
    for name, command in leaf_commands(typer.main.get_command(app)).items()
    for parameter in command.params
    if parameter.type_descriptor.annotation in (int, float)
]


@pytest.mark.parametrize(("verb", "parameter"), NUMBERS)
def test_a_number_that_is_none_is_one_line_with_its_flag_and_value(verb, parameter):
    flag, low, high = parameter.opts[0], parameter.min, parameter.max
    bad = ["", "10%", "nan", "inf", "1e999", "9" * 5000]
    bad += [] if low is None else [str(low - 1)]
    bad += [] if high is None else [str(high + 1)]
    for value in bad:
        run = run_freres(*verb, f"{flag}={value}")
        check_failure(run, 2, f"error: {flag}: expected a ")
        assert f"got '{value[:40]}'" in run.errors[0] and len(run.errors[0]) < 120


def test_a_share_as_a_budget_is_told_of_the_quality_where_there_is_one():
    assert "use --quality" in run_freres("compress", "x.mp4", "--budget", "0.1").err
    assert "hint" not in run_freres("profile", "x.mp4", "--budget", "0.1").err


def test_a_question_in_place_of_the_bundle_is_one_line(clip):
    check_failure(run_freres("ask", "what " * 100), 4, "no such file")
    check_failure(run_freres("profile", "v" * 300), 3, "no such file")


def test_a_bug_is_1_and_shows_its_traceback_on_demand(clip, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("freres_cli.workflows.compress.compress_file", fail)
    check_failure(run_freres("compress", clip, "-o", tmp_path / "b.pt"), 1, "ZeroDivisionError: oops")
    monkeypatch.setenv("FRERES_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_freres("compress", clip, "-o", tmp_path / "b.pt")


def test_no_memory_is_6(clip, tmp_path, monkeypatch):
    def allocate(*_, **__):
        return torch.empty(1 << 60)

    monkeypatch.setattr("freres_cli.pipeline.encoding.LatentStream.encode", allocate)
    check_failure(run_freres("compress", clip, "-o", tmp_path / "b.pt"), 6, "memory")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("ask", "b.pt", "what?"), 4),
        (("inspect", "b.pt"), 4),
        (("profile", "b.pt"), 3),
        (("compress", "list.txt"), 2),
        (("presets", "./p.yaml"), 2),
    ],
)
def test_a_file_that_cannot_be_looked_for_is_not_said_to_be_missing(arguments, status, tmp_path, monkeypatch):
    """A link to itself stands for a folder that may not be entered, which root may."""
    monkeypatch.chdir(tmp_path)
    named = next(argument for argument in arguments if "." in argument)
    (tmp_path / named).symlink_to(named)
    check_failure(run_freres(*arguments), status, "too many levels of symbolic links")
