"""Files that are not usable videos: each gives one plain error."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch

from freres_cli.errors import VideoError
from freres_cli.video.picture import encode_png
from freres_cli.video.probe import probe_video
from tests import clips, decoding

plain_clip = decoding.plain_clip


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def _made(path: Path, make) -> Path:
    make(path)
    return path


def _listed(folder: Path, name: str, text: str) -> Path:
    """A list that names a real clip beside it, which FFmpeg would open."""
    clip = clips.write_clip(folder / "secret.ts", 12)
    return _written(folder / name, text.format(clip.name).encode())


PLAYLIST = "is text, such as a playlist, not a video"
# An mp4 whose index has a movie header and no tracks.
EMPTY_MP4 = _box(b"ftyp", b"isom" + bytes(4) + b"isom") + _box(
    b"moov", _box(b"mvhd", bytes(12) + b"\0\0\3\xe8" + bytes(84))
)

REFUSALS = {
    "missing": (lambda d: d / "missing.mp4", "no such file"),
    "directory": (lambda d: d, "is a folder"),
    "pipe": (lambda d: _made(d / "pipe.mp4", os.mkfifo), "pipe or device"),
    "empty": (lambda d: _written(d / "empty.mp4", b""), "the file is empty"),
    "text": (lambda d: _written(d / "text.mp4", b"not a video\n" * 20), "not a video"),
    "terminal text": (lambda d: _written(d / "notes.txt", b"not a video\n" * 20), "not a video"),
    "playlist": (
        lambda d: _listed(d, "list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"),
        PLAYLIST,
    ),
    "short playlist": (lambda d: _listed(d, "short.mp4", "#EXTM3U\n#EXTINF:2,\n{}\n"), PLAYLIST),
    "DASH": (lambda d: _listed(d, "list.mpd", '<?xml version="1.0"?>\n<MPD><BaseURL>{}</BaseURL></MPD>\n'), PLAYLIST),
    "list of files": (lambda d: _listed(d, "list.mp4", "ffconcat version 1.0\nfile {}\n"), PLAYLIST),
    "index missing": (
        lambda d: clips.cut(clips.write_clip(d / "cut.mp4", 240), 0.5),
        "not a video that FFmpeg can read",
    ),
    "header only": (
        lambda d: clips.cut(clips.write_clip(d / "head.mkv", 48), 0.1),
        "no frame can be decoded|no video packets|not a video",
    ),
    "audio only": (lambda d: clips.write_audio_only(d / "audio.m4a"), "has no video stream, only audio"),
    "cover art": (lambda d: clips.write_audio_with_cover(d / "song.m4a"), "has no video stream"),
    "no streams": (lambda d: _written(d / "index_only.mp4", EMPTY_MP4), "has no streams of any kind$"),
    "no decodable frame": (
        lambda d: clips.blank_payloads(clips.write_clip(d / "blank.avi", 24, codec="mjpeg", pix_fmt="yuvj420p")),
        "no frame can be decoded",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_files_that_cannot_be_used_give_one_plain_error(tmp_path, kind, capfd):
    make, message = REFUSALS[kind]
    path = make(tmp_path)
    capfd.readouterr()
    with pytest.raises(VideoError, match=message) as caught:
        probe_video(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message and caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_a_kind_that_cannot_be_decoded_is_not_only_called_damaged(tmp_path):
    chunks = b"VP8X" + struct.pack("<IIHBHB", 10, 2, 7, 0, 7, 0)  # animated, 8x8
    chunks += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    # A frame of lossless data: FFmpeg finds the stream, and has no decoder for an animation.
    frame = bytes(6) + struct.pack("<HBHB", 7, 0, 7, 0) + bytes(4) + b"VP8L" + struct.pack("<I", 12)
    frame += b"\x2f\x07\xc0\x01\x00" + bytes(7)
    chunks += b"ANMF" + struct.pack("<I", len(frame)) + frame
    path = _written(tmp_path / "a.webp", b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks)
    with pytest.raises(VideoError, match="no frame can be decoded") as caught:
        probe_video(path)
    assert "animated WebP" in caught.value.hint and "convert it" in caught.value.hint


def test_a_list_for_batch_is_told_apart(tmp_path):
    path = _written(tmp_path / "list.JSONL", b'{"video": "a.mp4"}\n')
    with pytest.raises(VideoError, match=PLAYLIST) as caught:
        probe_video(path)
    assert "freres batch" in caught.value.hint


def test_permission_is_named(plain_clip, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root, who runs tests in containers, may read everything
    with pytest.raises(VideoError, match="permission denied"):
        probe_video(plain_clip)


def test_a_name_that_is_a_pattern_opens_no_other_files(tmp_path):
    """To FFmpeg, a%d.png is every numbered picture beside it."""
    picture = encode_png(torch.zeros(8, 8, 3, dtype=torch.uint8))
    (tmp_path / "a%d.png").write_bytes(picture)
    (tmp_path / "a0.png").write_bytes(picture)
    with pytest.raises(VideoError, match="not a video"):
        probe_video(tmp_path / "a%d.png")
    assert probe_video(tmp_path / "a0.png").num_packets == 1
