"""Writing files, whatever their format: atomic, never overwriting by accident, leaving nothing behind."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freres_cli import files
from freres_cli.errors import ExitStatus, ResourceError, UsageError
from freres_cli.files import check_destination, make_folder, remove_abandoned_files, save_stream, write_atomically
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


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    """In a folder of many files, that takes longer than the write itself."""
    seen = []
    monkeypatch.setattr(files, "remove_abandoned_files", seen.append)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        for name in ("one", "two"):
            write_atomically(folder / name, lambda file: file.write(b"whole"), force=False)
        with save_stream(io.BytesIO(b"video"), folder) as path:
            assert path.read_bytes() == b"video"
    assert seen == folders


@pytest.mark.parametrize("error", [PermissionError(13, "theirs"), OSError(28, "theirs"), KeyError("theirs")])
def test_an_error_of_the_reader_of_a_saved_stream_stays_as_it_is(tmp_path, error):
    with pytest.raises(type(error), match="theirs") as raised, save_stream(io.BytesIO(b"video"), tmp_path):
        raise error
    assert raised.value is error and list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("number", [28, 122])  # ENOSPC, EDQUOT
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


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["/proc/b.pt", "/proc/self/b.pt", "/sys/b.pt", "/dev/fd/b.pt", "/dev/stdout"])
def test_places_of_the_kernel_are_no_destinations(name, force):
    with pytest.raises(UsageError, match=r"kernel|not a regular file"):
        check_destination(Path(name), force=force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", ["gone/b.pt", "gone.pt", "link.pt"])
def test_a_link_to_nothing_is_no_destination(tmp_path, target, force):
    """Nor is a link to itself, or one that leads to a place of the kernel."""
    (tmp_path / "link.pt").symlink_to(target)
    with pytest.raises(UsageError, match=r"link\.pt: is a link to a file that does not exist"):
        check_destination(tmp_path / "link.pt", force=force)
    (tmp_path / "other").symlink_to("/proc")
    with pytest.raises(UsageError, match="kernel"):
        check_destination(tmp_path / "other" / "b.pt", force=force)


def test_a_bad_place_is_refused_before_the_video_is_read(tmp_path):
    (tmp_path / "link.pt").symlink_to("gone/b.pt")
    for place in (tmp_path / "link.pt", "/proc/b.pt", "-"):
        check_failure(run_freres("compress", tmp_path / "missing.mp4", "-o", place, "--force"), ExitStatus.USAGE)


@pytest.mark.parametrize("verb", ["compress", "repack", "eval"])
def test_a_dash_is_no_file(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"id": "1", "video": "a", "category": "x", "question": "b", "choices": ["c", "d"], "answer": "c"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    arguments = {"compress": ["a.mp4"], "repack": ["b.pt", "--budget", 5], "eval": ["q.jsonl"]}[verb]
    check_failure(run_freres(verb, *arguments, "-o", "-"), ExitStatus.USAGE, "standard output is not supported")
    check_failure(run_freres("compress", "a.mp4", "b.mp4", "-o", "-"), ExitStatus.USAGE, "standard output")
    assert {path.name for path in tmp_path.iterdir()} == {"q.jsonl"}


INTERRUPTED = """
import os, signal, sys, torch
from pathlib import Path
from freres_cli.cli.app import main
from freres_cli.files import write_atomically

class Interrupted:
    def __init__(self, file):
        self.file, self.parts = file, 0
    def write(self, data):
        self.parts += 1
        if self.parts == 3:
            os.kill(os.getpid(), getattr(signal, sys.argv.pop()))
        return self.file.write(data)
    def flush(self):
        self.file.flush()

tensors = {"x": torch.zeros(100), "y": torch.ones(100)}
def run(*_, **__):
    write_atomically(Path(sys.argv[1]), lambda file: torch.save(tensors, Interrupted(file)), force=False)
import freres_cli.cli.app as app
app.app = run
# A shell starts jobs in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_an_interruption_while_writing_is_no_bug_and_leaves_nothing(tmp_path, name, status):
    """torch turns what interrupts its writer into a RuntimeError."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "b.pt"), name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (status, "") and list(tmp_path.iterdir()) == []


INTERRUPTED_IMPORT = """
import importlib.abc, sys
from importlib.metadata import entry_points

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "typer":
            raise KeyboardInterrupt

(start,) = entry_points(group="console_scripts", name="freres")
sys.meta_path.insert(0, Interrupt())
start.load()()
"""


# Torch's native part imports numpy, and drops what a handler raises meanwhile.
INTERRUPTED_NUMPY = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy.linalg":
            os.kill(os.getpid(), signal.SIGTERM)

from freres_cli.cli.start import main
sys.meta_path.insert(0, Interrupt())
sys.argv = ["freres", "ask", "missing.pt", "what?"]
import freres_cli.cli.ask as ask
main()
"""


def test_the_end_of_a_process_while_torch_is_imported_is_not_lost():
    run = subprocess.run([sys.executable, "-c", INTERRUPTED_NUMPY], capture_output=True, text=True, timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, run.stderr


def test_an_interruption_while_modules_are_read_is_as_quiet():
    run = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (ExitStatus.INTERRUPTED, "")


def test_repack_and_compress_take_the_same_outputs(tmp_path, monkeypatch):
    """A file, a folder that exists, and a new folder, which is named with a slash at its end."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 3, fps=4)
    (tmp_path / "there").mkdir()
    flags = ("--budget", 10, "-q", "-o")
    assert run_freres("compress", "clip.mp4", *flags, "clip.pt", "--device", "cpu").status == 0
    for verb, source in (("compress", "clip.mp4"), ("repack", "clip.pt")):
        for place, expected in (("there", "there/clip.pt"), (f"{verb}/", f"{verb}/clip.pt"), (f"{verb}.pt", None)):
            run = run_freres(verb, source, *flags, place, "--force")
            assert run.status == 0 and run.out == f"{expected or place}\n", run.err
            assert (tmp_path / (expected or place)).is_file()
        check_failure(run_freres(verb, source, *flags, ""), ExitStatus.USAGE, "expected a path")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch, force):
    out, real, synced = tmp_path / "out", os.fsync, []

    def fsync(descriptor):
        synced.append((out.exists(), stat.S_ISDIR(os.fstat(descriptor).st_mode)))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_atomically(out, lambda file: file.write(b"whole"), force=force)
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EIO, errno.EROFS])
def test_only_where_there_are_no_hard_links_a_file_is_moved(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "link", fail)
    if number in (errno.EPERM, errno.ENOTSUP):
        write_atomically(tmp_path / "out", lambda file: file.write(b"whole"), force=False)
    else:
        with pytest.raises(UsageError, match=os.strerror(number)):
            write_atomically(tmp_path / "out", lambda file: file.write(b"whole"), force=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"] * (number in (errno.EPERM, errno.ENOTSUP))


def test_a_file_that_another_run_took_for_abandoned_is_begun_again(tmp_path, monkeypatch):
    """Between making it and locking it."""
    real, taken = files.fcntl.flock, []

    def flock(file, how):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    write_atomically(tmp_path / "out", lambda file: file.write(b"whole"), force=False)
    assert taken and [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.parametrize("handled", [KeyboardInterrupt, GeneratorExit])
def test_a_failure_while_an_interruption_is_handled_is_told(tmp_path, handled):
    """What the caller was handling before is not what stopped the write."""
    try:
        raise handled
    except handled:
        with pytest.raises(UsageError, match="cannot be written"):
            write_atomically(tmp_path / "no folder" / "a", lambda file: file.write(b"whole"), force=False)
