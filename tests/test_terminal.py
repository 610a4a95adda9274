"""What reaches a terminal: names and answers without control characters, JSON that is JSON, nothing endless."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from freres_cli import Compressor
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.cli import output
from freres_cli.cli.app import ANY_NAME, main
from freres_cli.cli.video_rows import VideoRows
from freres_cli.evaluation.questions import MAX_TEXT_BYTES
from tests.clips import write_clip
from tests.runner import check_failure, run_freres

ESCAPES = "\x1b]0;title\x07\x1b[31mred\x9b2J"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    clip = write_clip(folder / f"clip{ESCAPES}.mp4", 4, fps=4)
    return Compressor(method="fre-res", budget_tokens=20, device="cpu").compress(clip).save(folder / "b.pt").path


def is_harmless(text):
    return all(character.isprintable() or character == "\n" for character in text)


def test_inspect_shows_the_name_of_the_source_without_escapes(bundle):
    shown = run_freres("inspect", bundle)
    assert shown.status == 0 and is_harmless(shown.out), repr(shown.out[:200])
    assert "[31mred" in shown.out


def test_json_holds_the_name_as_it_is_but_escaped(bundle):
    shown = run_freres("inspect", bundle, "--json")
    assert is_harmless(shown.out) and ESCAPES in json.loads(shown.out)["source"]["file"]


def test_ask_shows_choices_without_escapes(bundle):
    choice = f"a ring{ESCAPES}"
    run = run_freres("ask", bundle, "what?", "--choices", f"{choice}|{choice}2", "--device", "cpu")
    assert run.status == 0 and is_harmless(run.out) and run.out.count("[31mred") == 3


def test_a_failed_video_is_named_without_escapes(tmp_path):
    bad = tmp_path / f"bad{ESCAPES}.mp4"
    bad.write_bytes(b"nothing")
    run = run_freres("compress", bad, tmp_path / "missing\x1b[0m.mp4", "-o", tmp_path / "out", "--device", "cpu")
    assert run.status == 3 and is_harmless(run.err) and is_harmless(run.out)


def test_paths_are_plain_on_a_terminal_and_exact_for_programs(capsys, monkeypatch):
    path = Path(f"b{ESCAPES}.pt")
    output.print_path(path)
    assert capsys.readouterr().out == f"{path}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    output.print_path(path)
    assert is_harmless(capsys.readouterr().out)


def test_an_answer_keeps_its_lines_and_its_emoji(capsys):
    output.print_text("one\ttwo\nthree \U0001f468‍\U0001f469 \x1b[1m\x9b")
    assert capsys.readouterr().out == "one\ttwo\nthree \U0001f468‍\U0001f469  [1m \n"


@pytest.mark.parametrize("where", ["question", "choices", "stdin"])
def test_an_endless_question_is_refused_at_once(bundle, where):
    long = "\U0001f600" * 100_000
    start = time.perf_counter()
    run = {
        "question": lambda: run_freres("ask", bundle, long),
        "choices": lambda: run_freres("ask", bundle, "which?", "--choices", f"{long}|b"),
        "stdin": lambda: run_freres("ask", bundle, "-", stdin=long),
    }[where]()
    check_failure(run, 2, f"too long: expected at most {MAX_TEXT_BYTES} bytes")
    assert time.perf_counter() - start < 20


@pytest.mark.slow
def test_the_longest_question_is_answered(bundle):
    run = run_freres("ask", bundle, "word " * (MAX_TEXT_BYTES // 5), "--max-new-tokens", 1, "--device", "cpu")
    assert run.status == 0, run.err


def test_bidi_controls_do_not_reach_the_terminal(bundle):
    run = run_freres("ask", bundle, "what?", "--choices", "a\u202eb|c", "--device", "cpu")
    assert run.status == 0 and "\u202e" not in run.out


def test_an_answer_of_numbers_that_are_not_finite_is_refused(bundle, tmp_path):
    """The latents are finite, and what the model makes of them is not."""
    tracks = read_bundle(bundle).content
    loud = replace(tracks, anchor_latents=tracks.anchor_latents.sign() * 3e38)
    write_bundle(tmp_path / "loud.pt", loud, read_bundle(bundle).manifest)
    for flags in ([], ["--choices", "a|b"]):
        check_failure(run_freres("ask", tmp_path / "loud.pt", "what?", "--device", "cpu", *flags), 5, "not finite")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_can_be_written_in_any_encoding(bundle, encoding, monkeypatch):
    written, choices = io.BytesIO(), "caf\u00e9 \U0001f600|caf\u00e9"
    monkeypatch.setattr(
        sys, "argv", ["freres", "ask", str(bundle), "what?", "--choices", choices, "--device", "cpu", "-q"]
    )
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and written.getvalue().startswith("caf\u00e9".encode(encoding, ANY_NAME))


def test_what_an_encoding_lacks_is_written_as_json_has_it():
    name = "\U0001f600\u00e9\u4e2d a"
    assert json.loads(b'"' + name.encode("ascii", ANY_NAME) + b'"') == name
    assert "\udcff".encode("utf-8", ANY_NAME) == b"\xff"


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [("--help >/dev/full", 6, "error: output cannot be written"), ("presets --nosuch 2>/dev/full", 2, "")],
)
def test_help_and_usage_that_cannot_be_written_are_no_bug(flags, status, text):
    code = "from freres_cli.cli.start import main; main()"
    run = subprocess.run(["bash", "-c", f"{sys.executable} -c '{code}' {flags}"], capture_output=True, text=True)
    assert run.returncode == status and run.stderr.startswith(text) and "bug" not in run.stderr, run


class Ended(io.StringIO):
    """A stream on which the run is ended while a row is written. ``code``: of that end."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def write(self, text):
        raise SystemExit(self.code)


def test_a_signal_ends_many_videos_and_a_closed_pipe_does_not(monkeypatch):
    row = SimpleNamespace(video="a.mp4", bundle=Path("a.pt"), status="ok", error=None)
    rows = VideoRows(None, quiet=True)
    monkeypatch.setattr(sys, "stdout", Ended(0))
    rows.show(row, "done", [])
    monkeypatch.setattr(sys, "stdout", Ended(143))
    with pytest.raises(SystemExit) as end:
        rows.show(row, "done", [])
    assert end.value.code == 143


@pytest.mark.parametrize("reader", ["head -1", "true"])
@pytest.mark.parametrize(("arguments", "status", "first"), [("methods", 0, "method "), ("presets nope", 2, "error: ")])
def test_one_reader_of_both_streams_that_stops_early_changes_no_status(reader, arguments, status, first):
    code = "from freres_cli.cli.start import main; main()"
    # "true" is gone before the first line is written, "head" perhaps before the second.
    command = f"set -o pipefail; (sleep 0.1; {sys.executable} -c '{code}' {arguments}) 2>&1 | {reader}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (status, ""), run
    assert run.stdout.startswith(first) if reader != "true" else run.stdout == ""


LONG = "/" + "/".join(f"folder-{i}" for i in range(30)) + "/clip.mp4"


class TerminalStream(io.StringIO):
    def isatty(self):
        return True


def test_a_long_path_is_one_line_also_while_a_bar_is_drawn(monkeypatch):
    """Whoever copies it from the screen gets it whole: only the terminal wraps it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, TerminalStream())
    shown = sys.stderr
    with output.progress_bar("compress", quiet=False) as progress:
        progress(1, 3)
        output.print_notes([f"{LONG}: done"])
        output.print_path(LONG)
    lines = [re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\r\n]", shown.getvalue())]
    assert f"note: {LONG}: done" in lines and LONG in lines
    assert max(len(line) for line in lines if LONG not in line) <= 80


def test_inspect_breaks_lines_between_words_only(capsys):
    output.print_wrapped("adapter", f"{'a word ' * 20}{LONG} {'and more ' * 20}")
    shown = capsys.readouterr().out.splitlines()
    assert any(line.strip() == LONG for line in shown)
    assert max(len(line) for line in shown if LONG not in line) <= output.SCREEN_COLUMNS


@pytest.mark.parametrize("choices", [[], ["a", "b"]], ids=["free", "options"])
def test_answers_to_a_file_of_numbers_that_are_not_finite_are_refused(bundle, tmp_path, choices):
    tracks = read_bundle(bundle).content
    loud = replace(tracks, anchor_latents=tracks.anchor_latents.sign() * 3e38)
    write_bundle(tmp_path / "loud.pt", loud, read_bundle(bundle).manifest)
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "what?", "choices": choices}) + "\n")
    check_failure(run_freres("ask", tmp_path / "loud.pt", "--questions", file, "--device", "cpu"), 5, "not finite")
