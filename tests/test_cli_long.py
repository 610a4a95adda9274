"""What compress does for long work: a video through a pipe, and a line on the terminal before torch is there."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from freres_cli.errors import ExitStatus
from freres_cli.pipeline.compressor import Compressor
from freres_cli.presets import BUNDLED
from freres_cli.workflows.compress import compress_stream
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import options_with
from tests.runner import check_failure, fails, run_freres

ROOT = Path(__file__).parents[1]
COMMON = ("--budget", 100, "--device", "cpu")


def test_a_video_through_a_pipe_gives_the_bundle_of_the_file(clip, tmp_path):
    run = run_freres("compress", "-", *COMMON, "-o", tmp_path / "piped.pt", stdin=clip.read_bytes())
    assert run.status == 0 and "standard input is saved" in run.err, run.err
    titled = tmp_path / "standard input"
    titled.write_bytes(clip.read_bytes())
    assert run_freres("compress", titled, *COMMON, "-o", tmp_path / "file.pt").status == 0
    assert (tmp_path / "piped.pt").read_bytes() == (tmp_path / "file.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pt", "piped.pt", "standard input"]


@pytest.mark.parametrize(("content", "text"), [(b"", "the file is empty"), (b"no video\n" * 99, "not a video")])
def test_what_is_no_video_is_named_as_standard_input_and_leaves_nothing(tmp_path, content, text):
    run = run_freres("compress", "-", *COMMON, "-o", tmp_path / "b.pt", stdin=content)
    check_failure(run, ExitStatus.VIDEO, "standard input: ")
    assert text in run.err and ".tmp" not in run.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-", "-o", "new/"), "-o new/: is a folder: standard input has no name"),
        (("-", "-o", "."), "-o .: is a folder"),
        (("-", "b.mp4"), "-: standard input is one video"),
        (("-", "--dry-run"), "--dry-run: expected a video file, got standard input"),
    ],
)
def test_what_cannot_be_done_with_a_pipe_is_refused_before_it_is_read(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)  # nothing is loaded, either
    check_failure(run_freres("compress", *arguments, stdin=b"x"), ExitStatus.USAGE, text)
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_name_is_the_sign_of_a_pipe_can_be_named(clip, tmp_path, monkeypatch):
    (tmp_path / "-").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    run = run_freres("compress", "./-", *COMMON, "--method", "uniform", "-o", "b.pt")
    assert run.status == 0 and "standard input" not in run.err, run.err


def test_a_disk_too_full_for_a_pipe_is_told(tmp_path, monkeypatch):
    def copy(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("freres_cli.files.shutil.copyfileobj", copy)
    run = run_freres("compress", "-", *COMMON, "-o", tmp_path / "b.pt", stdin=b"x")
    check_failure(run, ExitStatus.RESOURCE, "standard input: cannot be saved")
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_says_that_the_model_is_loaded_before_torch_is_imported(clip, tmp_path):
    # torch cannot be imported here at all, so whatever is shown came before it.
    code = "import sys; sys.modules['torch'] = None; from freres_cli.cli.app import main; main()"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, "compress", str(clip), "-o", str(tmp_path / "b.pt")]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.wait() == 1 and b"loading model" in shown, shown


class Untouched(io.BytesIO):
    """A pipe that is not to be read."""

    def read(self, *_):
        raise AssertionError("the pipe was read")


@pytest.mark.parametrize(
    ("changes", "model", "status"),
    [({"start_s": 2.0, "end_s": 1.0}, BUNDLED, ExitStatus.USAGE), ({}, "/no/such/model", ExitStatus.BACKBONE)],
)
def test_a_pipe_is_not_read_for_a_run_that_cannot_be(tmp_path, changes, model, status):
    options = options_with()
    options = replace(options, model=replace(options.model, name=model), **changes)
    with fails(status):
        compress_stream(Compressor.from_options(options), Untouched(), tmp_path / "b.pt")
    assert list(tmp_path.iterdir()) == []
