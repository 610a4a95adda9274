"""Many videos with one command: the model is loaded once, bad videos are failed rows, and a second run skips what exists."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from freres_cli.bundle.store import read_bundle
from freres_cli.cli import compress as command
from freres_cli.cli.output import print_notes, print_warning
from freres_cli.errors import ResourceError, VideoError
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.matching import find_differences
from freres_cli.pipeline.models import Models, make_source
from freres_cli.video.ending import DAMAGED, ENDS_INSIDE, SKIPPED
from freres_cli.video.listing import list_videos
from freres_cli.workflows import compress as compress_workflow
from freres_cli.workflows.compress import Row, compress_many
from tests.clips import write_short_clips
from tests.runner import check_failure, fails, run_freres

FLAGS = ("--budget", 40, "--device", "cpu")


class CountingModels(Models):
    """Counts how often the tower is loaded."""

    num_loads = 0

    @property
    def encoder(self):
        self.num_loads += not self.has_encoder
        return super().encoder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_short_clips(tmp_path_factory.mktemp("many"), 3)


@pytest.fixture
def compressor():
    models = CountingModels(make_source("bundled", "cpu"))
    return Compressor(budget_tokens=40, models=models)


def videos_of(folder):
    return list_videos([folder]).videos


def statuses(rows):
    return [row.status for row in rows]


def test_one_load_for_all_and_none_for_a_second_run(clips, compressor, tmp_path):
    rows = compress_many(compressor, videos_of(clips), tmp_path / "out")
    assert statuses(rows) == ["done"] * 3 and compressor.models.num_loads == 1
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"clip0.pt", "clip1.pt", "clip2.pt"}
    again = Compressor.from_options(compressor.options, CountingModels(compressor.models.source))
    assert statuses(compress_many(again, videos_of(clips), tmp_path / "out")) == ["skipped"] * 3
    assert again.models.num_loads == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written


def test_each_bundle_is_what_compressing_its_video_alone_gives(clips, compressor, tmp_path):
    compress_many(compressor, videos_of(clips), tmp_path / "out")
    alone = tmp_path / "alone.pt"
    assert run_freres("compress", clips / "clip1.mp4", *FLAGS, "-o", alone).status == 0
    ours, theirs = read_bundle(tmp_path / "out" / "clip1.pt"), read_bundle(alone)
    assert (
        ours.manifest["tensors"] == theirs.manifest["tensors"] and ours.manifest["source"] == theirs.manifest["source"]
    )


def test_a_bad_video_is_a_failed_row(clips, compressor, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video at all")
    seen = []
    videos = [(bad, Path("bad")), *videos_of(clips)]
    rows = compress_many(compressor, videos, tmp_path / "out", on_row=seen.append)
    assert statuses(rows) == ["failed", "done", "done", "done"] and seen == rows
    assert isinstance(rows[0].error, VideoError)
    assert not (tmp_path / "out" / "bad.pt").exists()


def test_without_a_model_the_run_ends_and_leaves_no_folder(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips" / "deep")
    (tmp_path / "model").mkdir()
    there = sorted(tmp_path.rglob("*"))
    arguments = (tmp_path / "clips", "-o", tmp_path / "new" / "out", *FLAGS)
    check_failure(run_freres("compress", *arguments, "--model", tmp_path / "model"), 5, "config.json")
    assert sorted(tmp_path.rglob("*")) == there


def test_a_failed_video_leaves_the_folder_that_another_worker_writes_in(clips, compressor, tmp_path, monkeypatch):
    """Both are under way in a folder that the one that fails has made."""
    begun = {name: threading.Event() for name in ("clip0.mp4", "clip1.mp4")}
    whole = Compressor.compress

    def compress(self, video, **options):
        begun[video.name].set()
        if video.name == "clip1.mp4":
            assert begun["clip0.mp4"].wait(30)
            raise VideoError(f"{video}: damaged")
        bad.join()
        assert (tmp_path / "out" / "deep").is_dir()
        return whole(self, video, **options)

    monkeypatch.setattr(Compressor, "compress", compress)
    videos = [(path, Path("deep") / path.stem) for path, _ in videos_of(clips)]
    bad = threading.Thread(target=compress_many, args=(compressor, videos[1:2], tmp_path / "out"))
    bad.start()
    assert begun["clip1.mp4"].wait(30)
    rows = compress_many(compressor, videos[:1], tmp_path / "out")
    assert statuses(rows) == ["done"], rows[0].error


def test_a_folder_that_another_command_removed_meanwhile_is_made_again(clips, compressor, tmp_path, monkeypatch):
    whole = Compressor.compress

    def compress(self, video, **options):
        bundle = whole(self, video, **options)
        (tmp_path / "out").rmdir()
        return bundle

    monkeypatch.setattr(Compressor, "compress", compress)
    assert statuses(compress_many(compressor, videos_of(clips)[:1], tmp_path / "out")) == ["done"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budget_tokens": 30}, "budget_tokens"),
        ({"trends": "keep"}, "trends"),
        ({"sample_fps": 2.0}, "sample"),
    ],
)
def test_another_compression_in_its_place_is_neither_taken_nor_replaced(clips, compressor, tmp_path, change, named):
    videos = videos_of(clips)[:1]
    compress_many(compressor, videos, tmp_path)
    before = (tmp_path / "clip0.pt").read_bytes()
    other = Compressor(models=compressor.models, **{"budget_tokens": 40, **change})
    row = compress_many(other, videos, tmp_path)[0]
    assert row.status == "failed" and named in row.error.message and "--force" in row.error.hint
    assert (tmp_path / "clip0.pt").read_bytes() == before
    assert statuses(compress_many(other, videos, tmp_path, force=True)) == ["done"]
    assert statuses(compress_many(other, videos, tmp_path)) == ["skipped"]


def test_another_video_window_or_method_is_another_compression(clips, compressor, tmp_path):
    video, name = videos_of(clips)[0]
    compress_many(compressor, [(video, name)], tmp_path)
    other = shutil.copy(clips / "clip2.mp4", tmp_path / "other.mp4")
    assert "video" in compress_many(compressor, [(Path(other), name)], tmp_path)[0].error.message
    for change in ({"end_s": 0.5}, {"method": "uniform"}):
        changed = Compressor.from_options(replace(compressor.options, **change), compressor.models)
        assert (
            next(iter(change)).removesuffix("_s") in compress_many(changed, [(video, name)], tmp_path)[0].error.message
        )


@pytest.mark.parametrize("content", [b"", b"somebody's weights", None])
def test_a_file_that_is_not_an_intact_bundle_is_not_replaced(clips, compressor, tmp_path, content):
    videos = videos_of(clips)[:1]
    path = tmp_path / "clip0.pt"
    if content is None:
        compress_many(compressor, videos, tmp_path)
        content = path.read_bytes()[:-100]
    path.write_bytes(content)
    row = compress_many(compressor, videos, tmp_path)[0]
    assert row.status == "failed" and "not an intact bundle" in row.error.message
    assert path.read_bytes() == content
    assert statuses(compress_many(compressor, videos, tmp_path, force=True)) == ["done"]


def test_the_command_compresses_a_folder(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "in" / "deep")
    (tmp_path / "in" / "notes.md").write_text("not a video")
    (tmp_path / "in" / "a.mp4").write_bytes(b"broken")
    run = run_freres("compress", tmp_path / "in", "-o", tmp_path / "out", *FLAGS)
    assert run.status == 3 and "1 of 4 videos failed" in run.errors[0]
    assert run.out.split() == [str(tmp_path / "out" / "deep" / f"clip{i}.pt") for i in range(3)]
    assert "warning: failed:" in run.err and "skipped 1 file without a video suffix" in run.err
    (tmp_path / "in" / "a.mp4").unlink()
    again = run_freres("compress", tmp_path / "in", "-o", tmp_path / "out", *FLAGS)
    assert again.status == 0 and again.err.count("already exists") == 3 and again.out == run.out


def test_json_is_one_line_per_video(clips, tmp_path):
    listed = tmp_path / "list.txt"
    names = [str(clips / "clip0.mp4"), "missing.mp4"]
    listed.write_text("# two\n\n" + "\n".join(names) + "\n")
    run = run_freres("compress", listed, "-o", tmp_path / "out", *FLAGS, "--json")
    rows = [json.loads(line) for line in run.out.splitlines()]
    assert run.status == 3 and [row["status"] for row in rows] == ["done", "failed"]
    assert {row["schema"] for row in rows} == {"freres.compress_many/1"}
    assert rows[0]["visual_tokens"] <= 40 and rows[0]["timings_s"]["encode"] > 0
    assert rows[1]["message"].endswith("no such file") and rows[1]["exit_status"] == 3
    again = run_freres("compress", listed, "-o", tmp_path / "out", *FLAGS, "--json")
    assert json.loads(again.out.splitlines()[0])["status"] == "skipped"


def test_two_files_are_many_and_the_folder_is_made(clips, tmp_path):
    out = tmp_path / "new" / "out"
    run = run_freres("compress", clips / "clip0.mp4", clips / "clip1.mp4", "-o", out, *FLAGS)
    assert run.status == 0 and {path.name for path in out.iterdir()} == {"clip0.pt", "clip1.pt"}
    one = run_freres("compress", clips / "clip2.mp4", "-o", out, *FLAGS)
    assert one.status == 0 and (out / "clip2.pt").is_file()


def test_a_dry_run_is_of_one_video(clips):
    assert run_freres("compress", clips, "--dry-run").status == 2


@pytest.mark.slow
def test_results_reach_stdout_while_a_bar_is_drawn_on_the_terminal(clips, tmp_path):
    ours, theirs = pty.openpty()
    code = "from freres_cli.cli.app import main; main()"
    command = [sys.executable, "-c", code, "compress", str(clips), "-o", str(tmp_path / "out"), *map(str, FLAGS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 4096):
            drawn += part
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.split() == [str(tmp_path / "out" / f"clip{i}.pt") for i in range(3)]
    assert b"videos" in drawn and b"clip0.mp4: " in drawn


def test_a_name_that_is_not_utf8_is_compressed_read_and_skipped(clips, tmp_path):
    name = os.fsdecode(b"caf\xe9\xff.mp4")
    shutil.copy(clips / "clip0.mp4", tmp_path / name)
    first = run_freres("compress", tmp_path / name, "-o", f"{tmp_path}/out/", *FLAGS)
    assert first.status == 0, first.err
    again = run_freres("compress", tmp_path / name, "-o", f"{tmp_path}/out/", *FLAGS, "--json")
    row = json.loads(again.out)
    assert row["status"] == "skipped"
    assert again.out.isascii() and run_freres("inspect", tmp_path / "out" / f"{name[:-4]}.pt").status == 0


def test_a_folder_is_told_by_its_slash_and_an_empty_name_is_none(clips, tmp_path):
    run = run_freres("compress", clips / "clip0.mp4", "-o", f"{tmp_path}/new/", *FLAGS)
    assert run.status == 0 and (tmp_path / "new" / "clip0.pt").is_file()
    for arguments in (("",), (clips / "clip0.mp4", "-o", "")):
        assert run_freres("compress", *arguments).status == 2
    assert run_freres("compress", clips / "clip0.mp4", "-o", tmp_path, "--dry-run", *FLAGS).status == 0


def test_one_file_under_two_names_is_one_video(clips):
    here = clips / "clip0.mp4"
    assert len(list_videos([here, clips / "." / "clip0.mp4", clips / ".." / clips.name / "clip0.mp4"]).videos) == 1


def test_a_bundle_that_another_run_wrote_meanwhile_is_skipped(clips, compressor, tmp_path):
    """The other run finishes while this one encodes."""
    videos = videos_of(clips)[:1]
    compress_many(compressor, videos, tmp_path / "theirs")

    class Meanwhile(Compressor):
        def compress(self, video, **options):
            (tmp_path / "ours").mkdir(exist_ok=True)
            shutil.copy(tmp_path / "theirs" / "clip0.pt", tmp_path / "ours" / "clip0.pt")
            return super().compress(video, **options)

    late = Meanwhile.from_options(compressor.options, compressor.models)
    assert statuses(compress_many(late, videos, tmp_path / "ours")) == ["skipped"]


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_the_work(clips, tmp_path):
    code = "from freres_cli.cli.app import main; main()"
    flags = " ".join(map(str, FLAGS))
    command = f"set -o pipefail; {sys.executable} -c '{code}' compress {clips} -o {tmp_path}/out {flags} -q | head -n 0"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize(("fact", "name"), [("attention", "attention"), ("pixels_sha256", "image processor")])
def test_a_bundle_of_a_release_that_did_not_record_a_fact_may_match(clips, compressor, tmp_path, fact, name):
    compress_many(compressor, videos_of(clips)[:1], tmp_path)
    manifest = read_bundle(tmp_path / "clip0.pt").manifest
    sha256, model = manifest["source"]["sha256"], compressor.models.identify_encoder()
    assert find_differences(manifest, sha256, model, compressor.options) == []
    assert (
        find_differences({**manifest, "history": []}, sha256, model, compressor.options) == []
    )  # the schema allows it
    for recorded, differing in ((None, []), ("another", [name])):
        changed = {**manifest, "model": {**manifest["model"], fact: recorded}}
        assert find_differences(changed, sha256, model, compressor.options) == differing


def test_a_failure_names_its_video(clips, tmp_path):
    run = run_freres("compress", clips, "-o", tmp_path / "out", *FLAGS, "--start", 1e4)
    assert run.status == 2
    for video, _ in videos_of(clips):
        assert f"failed: {video}: the window starts" in run.err
    assert f"3 videos failed: {clips / 'clip0.mp4'}: the window" in run.errors[0]


def test_where_nobody_reads_the_notes_the_work_goes_on(monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        print_notes(["first", "second"])
        print_warning("third")
        assert Path(f"/proc/self/fd/{full.fileno()}").readlink() == Path(os.devnull)


def test_where_results_cannot_be_written_the_other_videos_are_compressed_all_the_same(clips, tmp_path, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(ResourceError, match="standard output: cannot be written: No space left"):
            command.compress([str(clips)], output=str(tmp_path / "out"), budget=60, quiet=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"clip{i}.pt" for i in range(3)]


def test_a_window_from_zero_is_the_whole_video(clips, compressor, tmp_path):
    compress_many(compressor, videos_of(clips)[:1], tmp_path)
    manifest = read_bundle(tmp_path / "clip0.pt").manifest
    sha256, model = manifest["source"]["sha256"], compressor.models.identify_encoder()
    for start_s, differing in ((0.0, []), (0.1, ["start"])):
        assert find_differences(manifest, sha256, model, replace(compressor.options, start_s=start_s)) == differing


@pytest.mark.parametrize(("number", "raised"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, False)])
def test_a_full_disk_ends_the_run_at_the_first_bundle(clips, compressor, tmp_path, monkeypatch, number, raised):
    def fill(_, file):
        tried.append(file)
        raise OSError(number, os.strerror(number))

    tried: list[object] = []
    told: list[Row] = []
    monkeypatch.setattr("freres_cli.bundle.store.torch.save", fill)
    with fails(6, "clip0.pt: not enough disk space") if raised else contextlib.nullcontext():
        compress_many(compressor, videos_of(clips), tmp_path / "out", on_row=told.append)
    assert statuses(told) == ["failed"] * len(tried) and len(tried) == (1 if raised else 3)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_fault_that_one_video_shows_does_not_end_the_run(clips, compressor, tmp_path, monkeypatch):
    whole = compress_workflow.compress_file

    def fail_first(compressor, video, *rest, **options):
        if video.name == "clip0.mp4":
            raise IndexError("index 7 is out\nof bounds")
        return whole(compressor, video, *rest, **options)

    monkeypatch.setattr(compress_workflow, "compress_file", fail_first)
    rows = compress_many(compressor, videos_of(clips), tmp_path / "out")
    assert statuses(rows) == ["failed", "done", "done"] and rows[0].error.exit_status == 1
    assert rows[0].error.message.endswith("clip0.mp4: unexpected IndexError: index 7 is out of bounds")
    monkeypatch.setenv("FRERES_DEBUG", "1")
    with pytest.raises(IndexError):
        compress_many(compressor, videos_of(clips), tmp_path / "debug")


@pytest.mark.parametrize("note", [ENDS_INSIDE, f"{DAMAGED}: 3", f"{SKIPPED}: 1"])
def test_a_bundle_of_a_damaged_video_is_another_one_if_asked_to_be_strict(clips, compressor, tmp_path, note):
    compress_many(compressor, videos_of(clips)[:1], tmp_path)
    manifest = read_bundle(tmp_path / "clip0.pt").manifest
    found = (manifest["source"]["sha256"], compressor.models.identify_encoder())
    strict = replace(compressor.options, strict=True)
    assert find_differences(manifest, *found, strict) == []
    damaged = {**manifest, "sampling": {**manifest["sampling"], "notes": ["timed by their order: 2", note]}}
    assert find_differences(damaged, *found, strict) == ["strict"]
    assert find_differences(damaged, *found, compressor.options) == []


def test_a_bundle_of_another_model_or_that_was_cut_is_another_one(clips, compressor, tmp_path):
    compress_many(compressor, videos_of(clips)[:1], tmp_path)
    manifest = read_bundle(tmp_path / "clip0.pt").manifest
    facts = (manifest["source"]["sha256"], compressor.models.identify_encoder())

    def found(section, changed, options=compressor.options):
        return find_differences({**manifest, section: changed}, *facts, options)

    for fact in ("revision", "config_sha256", "projector_sha256"):
        assert found("model", {**manifest["model"], fact: "another"}) == ["model"]
    assert found("model", {**manifest["model"], "dtype": "float16"}) == ["dtype"]
    assert found("history", [*manifest["history"], {"verb": "repack"}]) == ["history"]
    strict = replace(compressor.options, strict=True)
    assert found("sampling", {**manifest["sampling"], "lost_s": 0.5}, strict) == ["strict"]
