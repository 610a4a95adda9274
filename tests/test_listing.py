"""The videos that a command line names: files, folders and lists, and the names of what is made of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from freres_cli.errors import UsageError
from freres_cli.video.listing import is_many, list_videos
from tests.runner import check_failure, run_freres


def test_names_of_outputs(tmp_path):
    for name in ("a.mp4", "a.webm", "b.mkv", "sub/a.mp4", ".hidden.mp4", ".cache/c.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = list_videos([tmp_path])
    assert {str(name) for _, name in found.videos} == {"a.mp4", "a.webm", "b", "sub/a"}
    assert len(list_videos([tmp_path, tmp_path / "b.mkv", tmp_path]).videos) == 4
    with pytest.raises(UsageError, match="the same name"):
        list_videos([tmp_path / "a.mp4", tmp_path / "sub" / "a.mp4"])


def test_what_is_many(tmp_path):
    (tmp_path / "list.txt").touch()
    assert is_many([tmp_path]) and is_many([tmp_path / "list.txt"]) and is_many([Path("a"), Path("b")])
    assert not is_many([tmp_path / "a.mp4"])


@pytest.mark.parametrize("flags", [(), ("--dry-run",), ("-o", "out/")])
def test_a_list_that_is_not_there_is_no_video(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    check_failure(run_freres("compress", "nope.txt", *flags), 2, "nope.txt: no such list")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe\n", b"a\0b\n"])
def test_lists_that_name_nothing(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"list\.txt"):
        list_videos([path])


@pytest.mark.parametrize("line", ["/", "..", "sub/.."])
def test_a_line_that_names_a_folder_is_named_with_its_place(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(UsageError, match=r"list\.txt:2: "):
        list_videos([path])


def test_only_line_feeds_end_a_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("a\x0cb\x85c\u2028d.mp4\r\nnext.mp4\n".encode())
    assert [video.name for video, _ in list_videos([path]).videos] == ["a\x0cb\x85c\u2028d.mp4", "next.mp4"]


def test_a_url_in_a_list_is_refused_as_a_url(tmp_path):
    (tmp_path / "list.txt").write_text("http://x/y.mp4\nfile:///v/z.mp4\n")
    run = run_freres("compress", tmp_path / "list.txt", "-o", tmp_path / "out", "--device", "cpu")
    assert run.status == 3 and "http://x/y.mp4: is a URL, not a file: download it first" in run.err
    assert "file:///v/z.mp4: is a URL, not a file: name the path, /v/z.mp4" in run.err


def test_a_folder_hides_nothing_that_was_meant(tmp_path):
    (tmp_path / "in" / "own").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("in/own/a.mp4", "elsewhere/b.mp4"):
        (tmp_path / place).touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    listing = list_videos([tmp_path / "in"])
    assert [str(name) for _, name in listing.videos] == ["gone", "own/a"]  # the first will be a failed row
    assert any("did not follow 1 link to folders" in note for note in listing.notes)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refuse(path):  # root may read every folder
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="shut: cannot be read: Permission denied"):
        list_videos([tmp_path])
