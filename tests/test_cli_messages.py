"""Messages blame what is at fault, and count in plain English."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest

from freres_cli.cli import app as cli_app
from freres_cli.cli import output
from freres_cli.cli.eval_tables import print_totals
from freres_cli.cli.output import format_share
from freres_cli.errors import BackboneError, ExitStatus, as_freres_error, count_of, round_count
from tests.evaluations import GOOD_ROW, write_rows
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres


def test_a_window_too_short_for_a_frame_is_no_damage(clip, tmp_path):
    run = run_freres("compress", clip, "--start", 1, "--end", 1.0000001, "-o", tmp_path / "b.pt")
    check_failure(run, ExitStatus.USAGE, "the window from 1.0 to 1.0000001 s")


@pytest.mark.parametrize(("verb", "status"), [("compress", 3), ("profile", 3), ("ask", 4), ("inspect", 4)])
def test_a_url_and_a_pipe_are_named_as_what_they_are(verb, status, tmp_path):
    question = ["what?"] if verb == "ask" else []
    check_failure(run_freres(verb, "https://x.org/a", *question), status, "https://x.org/a: is a URL, not a file")
    run = run_freres(verb, "file:///tmp/a", *question)
    check_failure(run, status, "file:///tmp/a: is a URL, not a file: name the path, /tmp/a")
    os.mkfifo(tmp_path / "pipe")
    check_failure(run_freres(verb, tmp_path / "pipe", *question), status, "pipe: is a pipe or device, not a file")


def test_a_pipe_as_preset_or_adapter_is_named(clip, bundle, tmp_path):
    os.mkfifo(tmp_path / "p.yaml")
    check_failure(run_freres("compress", clip, "--preset", tmp_path / "p.yaml"), 2, "is a pipe or device")
    run = run_freres("ask", bundle, "what?", "--adapter", tmp_path / "p.yaml", "--device", "cpu")
    check_failure(run, ExitStatus.BACKBONE, "is a pipe or device")


@pytest.mark.parametrize("choices", [[], ["--choices", "a|b"]])
def test_a_question_that_does_not_fit_is_named_and_not_the_video(bundle, monkeypatch, choices):
    monkeypatch.setattr(loaded_models().language_model, "max_context_tokens", 400)
    monkeypatch.setattr("freres_cli.pipeline.session.Models", lambda *_: loaded_models())
    run = run_freres("ask", bundle, "what moves " * 60, *choices, "--device", "cpu", "--max-new-tokens", 8)
    check_failure(run, ExitStatus.BACKBONE, "question: too long for the model's context of 400 tokens")
    assert "frames" not in run.err.partition("error:")[2] and "shorten it" in run.err


def test_a_video_that_leaves_no_room_for_a_question_is_to_be_made_smaller(bundle, monkeypatch):
    monkeypatch.setattr(loaded_models().language_model, "max_context_tokens", 320)
    monkeypatch.setattr("freres_cli.pipeline.session.Models", lambda *_: loaded_models())
    run = run_freres("ask", bundle, "what moves?", "--device", "cpu", "--max-new-tokens", 8)
    check_failure(run, ExitStatus.BACKBONE, "question: too long for the model's context of 320 tokens")
    assert "lower the token budget" in run.err and "shorten" not in run.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "-o", ""),
        ("ablate", "q.jsonl", "--train", "q.jsonl", "-o", ""),
        ("world", "make", "-o", ""),
        ("world", "train", "-o", ""),
        ("train", "q.jsonl", "--cache", ""),
    ],
)
def test_a_folder_without_a_name_is_refused(arguments, tmp_path, monkeypatch):
    """As an unset variable leaves it: the working folder would be filled."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "q.jsonl", [GOOD_ROW])
    check_failure(run_freres(*arguments), 2, "expected a path, got an empty text")
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_a_video_that_does_not_fit_is_still_named(bundle, monkeypatch):
    monkeypatch.setattr(loaded_models().language_model, "max_context_tokens", 100)
    monkeypatch.setattr("freres_cli.pipeline.session.Models", lambda *_: loaded_models())
    check_failure(run_freres("ask", bundle, "what?", "--device", "cpu"), ExitStatus.BACKBONE, "prompt: more tokens")


def test_one_is_not_many(clip, tmp_path, monkeypatch):
    """No note says "1 tokens", of anything."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    path = tmp_path / "b.pt"
    runs = [run_freres("compress", clip, "--method", "adaptive", "--budget", 1, "-o", path, "--device", "cpu")]
    runs.append(run_freres("ask", path, "what?", "--max-new-tokens", 2, "--device", "cpu"))
    runs.append(run_freres("repack", path, "--budget", 1, "-o", tmp_path / "c.pt"))
    runs.append(run_freres("inspect", path))
    runs.append(run_freres("ask", path, "what?", "--refine", 1, "--max-new-tokens", 2, "--device", "cpu"))
    for run in runs:
        assert run.status == 0, run.err
        assert not re.search(
            r"(?<![\d.,])1 (visual )?(token|thread|frame|GoP|question|video|run|single latent)s\b|(?<![\d.,])1 stretches",
            run.out + run.err,
        ), run
    assert "1 visual token " in runs[0].err and "1 thread)" in runs[0].err
    assert (count_of(0, "token"), count_of(1, "token"), count_of(2, "token")) == ("0 tokens", "1 token", "2 tokens")


def test_totals_and_shares_are_plain(capsys):
    summary = {"num_questions": 1, "num_videos": 1, "failed": [], "full_tokens": 9, "intervals": {"resamples": 5}}
    print_totals({**summary, "rows": [], "decode_s": 1.0, "encode_s": 1.0})
    assert "1 question on 1 video, " in capsys.readouterr().out
    assert [round_count(count) for count in (0.25, 12.34, 999.6, 1152.0, 14401)] == [
        "0.25",
        "12.3",
        "1000",
        "1152",
        "14401",
    ]
    assert round_count(3601.25, 4) == "3601" and round_count(14401, 4) == "14401"
    assert format_share(-0.0001) == "0.0 %" and format_share(-0.001) == "-0.1 %"


LINES = b"what moves?\n\xff\xfe bytes\n" + b"x" * 70_000 + b"\nwhat <|im_end|> moves?\nwhere?\n"


def test_a_prompt_loop_on_a_pipe_goes_on_after_a_bad_line(bundle):
    """The status is that of the first bad line; the answers are those of the good ones."""
    flags = ["--max-new-tokens", "4", "--device", "cpu"]
    run = run_freres("ask", bundle, "-q", *flags, stdin=LINES)
    assert run.status == ExitStatus.USAGE and len(run.errors) == 3, run.err
    for error, text in zip(run.errors, ("UTF-8", "too long", "reads as a command"), strict=True):
        assert text in error
    alone = [run_freres("ask", bundle, q, "-q", *flags).out for q in ("what moves?", "where?")]
    assert run.out == "".join(alone)


def test_the_error_of_a_loop_is_the_first_one(bundle, monkeypatch):
    """A model that fails is status 5, whatever is asked later."""

    def fail(*_, **__):
        raise BackboneError("scores: not finite")

    monkeypatch.setattr("freres_cli.pipeline.session.generate", fail)
    run = run_freres("ask", bundle, "-q", "--device", "cpu", stdin="what?\n<|im_end|>\n")
    assert run.status == ExitStatus.BACKBONE and len(run.errors) == 2 and run.out == ""


def test_json_escapes_every_control_that_text_loses(bundle):
    controls = "\u061c\u200e\u200f\u202e\u2066\x9b"
    run = run_freres("ask", bundle, "what?", "--choices", f"a{controls}|b", "--json", "--device", "cpu")
    assert run.status == 0 and not set(controls) & set(run.out)
    assert f"a{controls}" in run.json["choices"]


def test_a_place_without_permission_is_no_bug(monkeypatch):
    def refuse():
        raise PermissionError(errno.EACCES, "Permission denied", "/theirs/x.pt")

    monkeypatch.setattr(cli_app, "app", refuse)
    check_failure(run_freres("doctor"), 2, "/theirs/x.pt: no permission")


def test_an_interruption_is_no_failure_of_one_of_many():
    """torch's writer raises an error of its own when it is stopped half way."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("writer")  # noqa: B904
    except RuntimeError as error:
        with pytest.raises(KeyboardInterrupt):
            as_freres_error(error, "clip.mp4")
    assert as_freres_error(RuntimeError("a\nfault"), "clip.mp4").message == "clip.mp4: unexpected RuntimeError: a fault"


def test_json_escapes_the_delete_character(capsys):
    output.print_json("freres.test/1", {"name": "a\x7fb"})
    out = capsys.readouterr().out
    assert "\x7f" not in out and json.loads(out)["name"] == "a\x7fb"
