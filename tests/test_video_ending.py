"""A file that ends inside a packet, in containers that do not say how long they are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from freres_cli.errors import VideoError
from freres_cli.video.decode import decode_frames
from freres_cli.video.packets import read_packet_table
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from tests import clips
from tests.decoding import NATIVE, SMALL, decode

SOUND = {"audio": "last"}
FOUR_FPS = Sampling("fps", fps=4)
FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
# Name of the file: how it is written, and of how many bytes a cut between two packets leaves a multiple.
OPEN_ENDED = {
    "broadcast.ts": (SOUND, 188),
    "silent.ts": ({"codec": "mpeg2video"}, 188),
    "disc.m2ts": (SOUND, 192),
    "windows.wmv": ({"codec": "wmv2"}, 0),
    "picture.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, 0),
    "open.ogv": ({"codec": "libvpx", "options": {"cpu-used": "8"}}, 0),
    "old.mpg": ({"codec": "mpeg2video", "options": {"bf": "2"}}, 0),
    "fragments.mp4": (FRAGMENTS, 0),
}


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("endings")
    return {name: clips.write_clip(folder / name, 48, **made) for name, (made, _) in OPEN_ENDED.items()}


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_a_whole_file_does_not_end_inside_a_packet(whole_files, name):
    shown, *_, report = decode(whole_files[name], strict=True)
    assert shown == list(range(48)) and report.lost_s == 0 and not report.notes


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_a_file_cut_inside_a_packet_is_not_whole(whole_files, tmp_path, name):
    whole, path = whole_files[name].read_bytes(), tmp_path / name
    dice, unit, num_cut = random.Random(name), OPEN_ENDED[name][1], 0
    for sampling in (NATIVE, NATIVE, NATIVE, FOUR_FPS, FOUR_FPS, FOUR_FPS):
        size = dice.randrange(len(whole) // 3, len(whole) - 300)
        path.write_bytes(whole[: size + 1 if unit and size % unit == 0 else size])
        try:
            info = probe_video(path)
        except VideoError:  # FFmpeg opens no mp4 of which the head of a fragment is cut
            continue
        if info.num_packets == 48:  # only the index or blank bytes are missing
            continue
        num_cut += 1
        decoder = decode_frames(path, info, sampling, SMALL)
        list(decoder)
        assert decoder.report.notes, (size, sampling)
        with pytest.raises(VideoError, match="damaged"):
            list(decode_frames(path, info, sampling, SMALL, strict=True))
    assert num_cut


def test_what_is_missing_after_the_window_does_not_matter(whole_files, tmp_path):
    path = tmp_path / "cut.ts"
    path.write_bytes(whole_files["broadcast.ts"].read_bytes()[:-100])
    assert not decode(path, Sampling("fps", fps=4, end_s=1.0), strict=True)[4].notes


def test_a_cut_between_packets_of_a_transport_stream_cannot_be_seen(whole_files, tmp_path):
    """As freres-security(7) says. A broadcast begins and ends anywhere."""
    whole, path = whole_files["silent.ts"].read_bytes(), tmp_path / "cut.ts"
    path.write_bytes(whole[: 188 * (len(whole) // 376)])
    assert not read_packet_table(str(path), 0).is_cut


@pytest.mark.parametrize("sampling", [Sampling("fps", fps=2), Sampling("count", count=4)])
def test_sampling_a_cut_file_says_what_is_lost(tmp_path, sampling):
    """The last frame that is asked for comes before the end of what is there."""
    path = clips.write_clip(tmp_path / "cut.mkv", 120)
    clips.cut(path, 0.7)
    info = probe_video(path)
    decoder = decode_frames(path, info, sampling, SMALL)
    list(decoder)
    assert decoder.report.lost_s == pytest.approx(5.0 - info.duration_s, abs=0.1) and decoder.report.lost_s > 1
    with pytest.raises(VideoError, match="are lost"):
        list(decode_frames(path, info, sampling, SMALL, strict=True))
