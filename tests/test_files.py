"""Writing files, whatever their format: atomic, never overwriting by accident, leaving nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freres_cli.errors import ExitStatus, ResourceError, UsageError
from freres_cli.files import check_destination, make_folder, remove_abandoned_files, write_atomically
from tests.clips import write_clip
from tests.runner import check_failure, run_freres

WRITER = """
import sys, time
from pathlib import Path
from freres_cli.files import write_atomically
def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write, force=True)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is half way through writing."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "theirs")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    yield process
    process.kill()
    process.wait()


def temporaries(folder):
    return sorted(path.name for path in folder.glob(".freres-*.tmp"))


def test_what_a_killed_run_left_is_removed_by_the_next(writer, tmp_path):
    assert len(temporaries(tmp_path)) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(temporaries(tmp_path)) == 1
    write_atomically(tmp_path / "ours", lambda file: file.write(b"whole"), force=False)
    assert temporaries(tmp_path) == [] and (tmp_path / "ours").read_bytes() == b"whole"
    assert not (tmp_path / "theirs").exists()


def test_the_file_of_a_living_run_stays(writer, tmp_path):
    write_atomically(tmp_path / "ours", lambda file: file.write(b"whole"), force=False)
    remove_abandoned_files(tmp_path)
    assert len(temporaries(tmp_path)) == 1


def test_files_of_others_stay(tmp_path):
    for name in (".freres-notes", "x.tmp", ".other-1.tmp"):
        (tmp_path / name).touch()
    remove_abandoned_files(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_command_removes_what_a_killed_command_left(writer, tmp_path):
    writer.kill()
    writer.wait()
    clip = write_clip(tmp_path / "clip.mp4", 3, fps=4)
    assert run_freres("compress", clip, "--budget", 10, "-o", tmp_path / "b.pt", "--device", "cpu").status == 0
    assert temporaries(tmp_path) == []


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "b"

    def write(file):
        path.write_text("theirs")
        file.write(b"ours")

    with pytest.raises(UsageError, match="already exists"):
        write_atomically(path, write, force=False)
    assert path.read_text() == "theirs" and temporaries(tmp_path) == []


def test_a_link_keeps_pointing_where_it_points(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", lambda file: file.write(b"new"), force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("number", [28, 122, 27])  # ENOSPC, EDQUOT, EFBIG
def test_a_full_disk_is_named(tmp_path, number):
    def write(file):
        raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError, match="not enough disk space"):
        write_atomically(tmp_path / "b", write, force=False)
    assert list(tmp_path.iterdir()) == []


def destinations(folder):
    (folder / "there").write_text("something")
    os.mkfifo(folder / "pipe")
    return {
        "there": "already exists",
        ".": "is a folder",
        "pipe": "not a regular file",
        "no/such": "does not exist",
        "x" * 300: "name too long",
    }


def test_places_that_cannot_be_written(tmp_path):
    for name, text in destinations(tmp_path).items():
        with pytest.raises(UsageError, match=text):
            check_destination(tmp_path / name, force=False)
    check_destination(tmp_path / "there", force=True)
    check_destination(tmp_path / "new", force=False)


def test_a_bad_destination_is_a_usage_error_whatever_is_written(tmp_path):
    """A bundle, an adapter and a picture alike: status 2, and 4 is for bundles that cannot be read."""
    clip = write_clip(tmp_path / "clip.mp4", 3, fps=4)
    assert run_freres("compress", clip, "--budget", 10, "-o", tmp_path / "b.pt", "--device", "cpu").status == 0
    taken = tmp_path / "taken.png"
    taken.write_text("a picture")
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"video": "clip.mp4", "question": "what?", "choices": ["a", "b"], "answer": "a"}\n')
    for arguments in (
        ("compress", clip, "-o", taken),
        ("repack", tmp_path / "b.pt", "--budget", 5, "-o", taken),
        ("inspect", tmp_path / "b.pt", "--absorber", taken, "--adapter", "none"),
        ("train", rows, "-o", taken, "--steps", 1),
    ):
        check_failure(run_freres(*arguments), ExitStatus.USAGE, "already exists")
        assert taken.read_text() == "a picture"
    check_failure(run_freres("inspect", taken), ExitStatus.BUNDLE)


def test_folders_are_made_or_refused(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be a folder"):
        make_folder(tmp_path / "file" / "c")


def test_a_terminated_command_says_nothing_and_leaves_nothing(tmp_path):
    """Also at its very end, when nothing is left to clean up."""
    clip = write_clip(tmp_path / "clip.mp4", 3, fps=4)
    late = (
        "import atexit, os, signal, time\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)))\n"
        "from freres_cli.cli.app import main\nmain()"
    )
    command = [sys.executable, "-c", late, "compress", str(clip), "--budget", "10", "-o", str(tmp_path / "b.pt"), "-q"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGTERM and run.stderr == "", run.stderr
    assert (tmp_path / "b.pt").is_file() and temporaries(tmp_path) == []


@pytest.mark.slow
def test_a_command_terminated_half_way_leaves_nothing(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 400, fps=30)
    code = "from freres_cli.cli.app import main; main()"
    command = [sys.executable, "-c", code, "compress", str(clip), "-o", str(tmp_path / "b.pt")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "Exception" not in err
    assert process.returncode in (0, 128 + signal.SIGTERM)
    assert process.returncode == 0 or {path.name for path in Path(tmp_path).iterdir()} == {"clip.mp4"}


def test_a_pipe_or_a_link_with_the_name_of_a_temporary_file_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / ".freres-pipe.tmp")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".freres-link.tmp").symlink_to("theirs")
    write_atomically(tmp_path / "ours", lambda file: file.write(b"whole"), force=False)
    assert len(temporaries(tmp_path)) == 2 and (tmp_path / "theirs").read_text() == "theirs"
