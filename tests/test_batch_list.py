"""What freres batch is to compress: every way to name videos, settings of their own, and lists that cannot be used."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import fsspec
import pytest

from freres_cli.cli.compress import make_options
from freres_cli.errors import FreresError
from freres_cli.video.listing import list_videos
from freres_cli.workflows.batch_list import list_jobs, with_own
from freres_cli.workflows.batch_store import Store, is_url, join_url, short_name
from tests.runner import check_failure, fails, run_freres

FLAGS = {"budget_tokens": 40, "sample_count": 8}


def make(own):
    named = {key: own.get(f"{key}_s") for key in ("start", "end")}
    return make_options(
        with_own(FLAGS, own),
        None,
        None,
        None,
        own.get("method"),
        **named,
        strict=own.get("strict", False),
        device="cpu",
    )


jobs_of = partial(list_jobs, make_options=make)


def named(*arguments):
    return {job.name: job.video for job in jobs_of([str(a) for a in arguments])[0]}


@pytest.fixture
def videos(tmp_path):
    for name in ("a.mp4", "b.webm", "deep/a.mp4", "deep/c.mp4", "notes.md"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "videos"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_what_compress_finds_in_it(videos):
    assert named(videos) == {str(name): str(video) for video, name in list_videos([videos]).videos}


def test_a_pattern_names_bundles_by_their_place_below_its_fixed_part(videos):
    assert set(named(videos / "**" / "*.mp4")) == {"a", "deep/a", "deep/c"}
    assert set(named(videos / "*" / "a.mp4")) == {"deep/a"}
    with fails(2, "no file fits the pattern"):
        named(videos / "*.mov")


def test_a_file_whose_name_looks_like_a_pattern_is_itself(videos):
    (videos / "a[1].mp4").touch()
    assert named(videos / "a[1].mp4") == {"a[1]": str(videos / "a[1].mp4")}


def test_lists_name_paths_beside_them_and_each_video_once(videos):
    write(videos / "list.txt", "# two\na.mp4\ndeep/c.mp4\n")
    write(videos / "rows.jsonl", {"video": "a.mp4"}, {"video": str(videos / "b.webm")})
    found = named(videos / "list.txt", videos / "rows.jsonl", videos / "a.mp4")
    assert found == {"a": str(videos / "a.mp4"), "c": str(videos / "deep/c.mp4"), "b": str(videos / "b.webm")}


def test_a_video_that_is_found_twice_keeps_its_first_name(videos):
    assert set(named(videos / "deep" / "c.mp4", videos)) == {"c", "a", "b", "deep/a"}


def test_a_question_mark_in_a_url_is_no_wildcard(store):
    store.pipe_file("/in/a.mp4?key=1", b"video")
    assert list(named("memory://in/a.mp4?key=1").values()) == ["memory://in/a.mp4?key=1"]


def test_settings_of_a_line_are_those_of_the_flags_with_these_names(videos):
    own = {"budget_tokens": 30, "method": "uniform", "start_s": 1, "sample_fps": 2.0, "strict": True}
    write(videos / "rows.jsonl", {"video": "a.mp4", **own}, {"video": "b.webm"})
    first, second = (job.options for job in jobs_of([str(videos / "rows.jsonl")])[0])
    flags = {"budget_tokens": 30, "sample_fps": 2.0}
    assert first == make_options(flags, None, None, None, "uniform", start=1, strict=True, device="cpu")
    assert second == make_options(FLAGS, None, None, None, None, device="cpu")


def test_one_video_twice_needs_names(videos):
    rows = [{"video": "a.mp4", "end_s": 1}, {"video": "a.mp4", "start_s": 1}]
    write(videos / "rows.jsonl", *rows)
    with fails(2, "rows.jsonl:1: ") as caught:
        named(videos / "rows.jsonl")
    assert "rows.jsonl:2: " in caught.value.message and "the same name" in caught.value.message
    write(videos / "rows.jsonl", *[{**row, "name": f"part.{i}/a.b"} for i, row in enumerate(rows)])
    assert set(named(videos / "rows.jsonl")) == {"part.0/a.b", "part.1/a.b"}


def test_two_videos_of_one_name_are_refused_before_anything_runs(videos):
    with fails(2, "the same name"):
        named(videos / "a.mp4", videos / "deep" / "a.mp4")
    assert {"a", "deep/a"} <= set(named(videos))


@pytest.mark.parametrize(
    ("row", "text", "hint"),
    [
        ({"video": "a.mp4", "bugdet_tokens": 3}, "unknown key 'bugdet_tokens'", "budget_tokens"),
        ({"video": "a.mp4", "zzzz": 3}, "unknown key 'zzzz'", "start_s"),
        ({"video": "a.mp4", "description": "x"}, "unknown key", ""),
        ({"video": "a.mp4", "budget_tokens": "many"}, "budget_tokens: expected a whole number", ""),
        ({"video": "a.mp4", "method": "other"}, "other", ""),
        ({"video": "a.mp4", "start_s": 10**400}, "start_s: expected a number of seconds, 0 or more, got inf", ""),
        ({"video": "a.mp4", "end_s": 10**400}, "end_s: expected a number of seconds above", ""),
        ({"video": "a.mp4", "method": "uniform", "quality": 0.9}, "quality", ""),
        ({"video": "a.mp4", "start_s": -1}, "start_s: expected", ""),
        (
            {"video": "a.mp4", "start_s": 1, "end_s": 0.5},
            "end_s: expected a number of seconds above the start, 1, got",
            "",
        ),
        ({"video": "a.mp4", "end_s": 0}, "end_s: expected a number of seconds above the start, 0, got 0", ""),
        ({"video": "a.mp4", "start_s": "1"}, "start_s: expected a number", ""),
        ({"video": "a.mp4", "strict": 1}, "strict: expected true or false", ""),
        ({"video": "a.mp4", "end_s": True}, "end_s: expected a number", ""),
        ({"video": 3}, "video: expected text", ""),
        ({"video": ""}, "video: expected a path", ""),
        ({}, "video: expected a path", ""),
        ({"video": ".."}, "got a folder", ""),
        ({"video": "a.mp4", "name": "../b"}, "name: expected a relative path", ""),
        ({"video": "a.mp4", "name": "/b"}, "name: expected a relative path", ""),
        ({"video": "a.mp4", "name": ""}, "name: expected a relative path", ""),
        ({"video": "a.mp4", "name": "\ud800"}, "name: expected a relative path", ""),
        ({"video": "\ud800.mp4"}, "video: expected a path or URL", ""),
        ("[1]\n", "expected a JSON object, got list", ""),
        ("{video: 1}\n", "not valid JSON", ""),
        ("[" * 100_000 + "\n", "not valid JSON", ""),
    ],
)
def test_a_bad_line_is_named_by_its_number(videos, row, text, hint):
    listed = write(videos / "rows.jsonl", {"video": "b.webm"}, "# a comment\n", row)
    with pytest.raises(FreresError) as caught:
        named(listed)
    assert caught.value.exit_status == 2
    assert f"{listed}:3: " in caught.value.message and text in caught.value.message, caught.value.message
    assert hint in (caught.value.hint or "")


def test_what_a_line_names_is_named_by_its_key_and_not_by_a_flag(videos, tmp_path):
    listed = write(videos / "rows.jsonl", {"video": "a.mp4", "method": "other"})
    run = run_freres("batch", listed, "-o", tmp_path / "out")
    check_failure(run, 2, f"{listed}:1: {videos / 'a.mp4'}: method: expected one of full, uniform")


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe\n"])
def test_a_list_that_names_nothing(videos, content):
    (videos / "rows.jsonl").write_bytes(content)
    with fails(2, "rows.jsonl"):
        named(videos / "rows.jsonl")


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    for name in ("in/a.mp4", "in/b.webm", "in/deep/a.mp4", "in/notes.md"):
        files.pipe_file(f"/{name}", b"video")
    yield files
    files.rm("/", recursive=True)


def test_folders_patterns_and_lists_on_a_store(store):
    found = named("memory://in")
    assert found == {"a": "memory:///in/a.mp4", "b": "memory:///in/b.webm", "deep/a": "memory:///in/deep/a.mp4"}
    assert jobs_of(["memory://in"])[1] == ["memory://in: skipped 1 file without a video suffix"]
    assert set(named("memory://in/**/a.mp4")) == {"a", "deep/a"}
    with fails(2, "memory://in/*.mkv: no file fits the pattern"):
        named("memory://in/a.mp4", "memory://in/*.mkv")
    store.pipe_file("/in/talk [1].mp4", b"x")
    assert named("memory://in/talk [1].mp4") == {"talk [1]": "memory://in/talk [1].mp4"}
    store.rm_file("/in/talk [1].mp4")
    assert named("memory://in/a.mp4") == {"a": "memory://in/a.mp4"}
    store.pipe_file("/in/rows.jsonl", b'{"video": "deep/a.mp4", "name": "x"}\n{"video": "memory://in/b.webm"}\n')
    store.pipe_file("/in/list.txt", b"a.mp4\n")
    expected = {"x": "memory://in/deep/a.mp4", "b": "memory://in/b.webm", "a": "memory://in/a.mp4"}
    assert named("memory://in/rows.jsonl", "memory://in/list.txt") == expected


def test_a_chain_keeps_its_tail(tmp_path, videos):
    import zipfile

    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("x/a.mp4", b"")
        archive.writestr("x/list.txt", b"a.mp4\n")
    tail = f"::file://{tmp_path}/v.zip"
    for url in (f"zip://x/a.mp4{tail}", f"zip://x/*.mp4{tail}", f"zip://x/list.txt{tail}"):
        assert named(url) == {"a": f"zip://x/a.mp4{tail}"}


def test_a_file_url_is_a_path(videos):
    assert named(f"file://{videos}/a.mp4", videos / "a.mp4") == {"a": str(videos / "a.mp4")}


@pytest.mark.parametrize("url", ["nosuch://a/b.mp4", "memory://in/gone.txt", "memory://in/gone.jsonl"])
def test_stores_and_lists_that_are_not_there_are_refused_at_once(url):
    with fails(2, url):
        named(url)


@pytest.mark.parametrize("arguments", [[""], ["memory://in/none/*.mp4"]])
def test_arguments_that_name_no_video(arguments):
    with fails(2):
        named(*arguments)


def test_a_pattern_that_fits_lists_reads_them(videos, tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", {"video": f"videos/{name}.{'mp4' if name == 'a' else 'webm'}"})
    assert set(named(tmp_path / "?.jsonl")) == {"a", "b"}
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "a.mp4").touch()
    write(tmp_path / "all" / "rows.jsonl", {"bundle": "a.pt"})  # of an earlier run of the same command
    assert set(named(tmp_path / "all" / "*.mp*")) == {"a"}
    assert {str(Path(video).name) for video in named(tmp_path / "all" / "*").values()} == {"a.mp4", "rows.jsonl"}


def test_a_signed_url_gives_a_short_name_without_the_signature(tmp_path):
    signed = f"https://host/deep/clip.mp4?X-Amz-Signature={'f' * 400}"
    assert short_name(signed) == "clip.mp4" and short_name("s3://bucket/what?.mp4") == "what?.mp4"
    assert short_name("https://host/clip.mp4?sv=2&sig=abc") == "clip.mp4"
    assert short_name("https://host/get?id=1") == "get?id=1"  # it tells videos apart
    assert short_name("zip://in/a.mp4::https://host/x.zip?key=1") == "a.mp4"
    assert short_name("simplecache::s3://bucket/b.mp4") == "b.mp4"
    long = short_name(f"https://host/{'é' * 300}.mp4")
    assert long.endswith("é.mp4") and len(long.encode()) <= 200
    rows = write(tmp_path / "rows.jsonl", {"video": signed})
    assert list(named(rows).items()) == [("clip", signed)]


@pytest.mark.parametrize("name", ["nope.jsonl", "nope.txt"])
def test_a_list_that_is_not_there_is_refused_before_any_work(tmp_path, name):
    with fails(2, "no such list"):
        list_jobs([str(tmp_path / name)], lambda own: None)


def test_a_link_whose_file_is_gone_is_in_a_pattern_as_in_its_folder(videos):
    (videos / "gone.mp4").symlink_to(videos / "nothing.mp4")
    assert set(named(videos / "*.mp4")) == {"a", "gone"} and "gone" in named(videos)


def test_two_colons_in_a_name_make_no_url(videos, monkeypatch):
    (videos / "a::b.mp4").touch()
    monkeypatch.chdir(videos)
    assert named("a::b.mp4") == {"a::b": str(videos / "a::b.mp4")}
    assert named(write(videos / "own.txt", "a::b.mp4\n")) == named("a::b.mp4")
    assert all(map(is_url, ("simplecache::s3://b/c.mp4", "filecache::zip://c.mp4::s3://b/c.zip", "zip://c.mp4::c.zip")))
    assert not any(map(is_url, ("a::b.mp4", "a::b::c.mp4", "folder/a::s3://b")))


def test_dots_in_a_path_beside_a_list_on_a_store_are_folded(store):
    store.pipe_file("/in/deep/list.txt", b"./a.mp4\n../b.webm\n")
    assert named("memory://in/deep/list.txt") == {"a": "memory://in/deep/a.mp4", "b": "memory://in/b.webm"}


def test_a_name_with_two_colons_is_none_on_a_store():
    with fails(2, "S::E.pt: cannot be a name on memory://out"):
        join_url("memory://out", "S::E.pt")
    assert join_url("simplecache::memory://out", "x.pt") == "simplecache::memory://out/x.pt"
    assert join_url("zip://clips::memory://out.zip", "x.mp4") == "zip://clips/x.mp4::memory://out.zip"


def test_what_a_store_of_a_host_holds_is_named_with_the_host(monkeypatch):
    """FTP and SFTP leave it out of their paths."""
    store = Store("memory://in")
    monkeypatch.setattr(store, "url", "ftp://me:x@host:21/in/")
    monkeypatch.setattr(store, "_scheme", "ftp")
    assert store.path == "/in" and store.url_of("/in/deep/a.mp4") == "ftp://me:x@host:21/in/deep/a.mp4"


def test_a_store_that_fails_as_it_is_opened_is_refused(tmp_path):
    with fails(2, "cannot be opened: FileNotFoundError"):
        jobs_of([f"zip://*.mp4::{tmp_path / 'gone.zip'}"])
