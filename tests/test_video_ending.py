"""A file that ends inside a packet, in containers that do not say how long they are."""

from __future__ import annotations

import random
import struct
from array import array
from pathlib import Path

import pytest

from freres_cli.errors import VideoError
from freres_cli.video.decode import decode_frames
from freres_cli.video.ending import ASF_PROPERTIES, ends_inside, is_whole_avi
from freres_cli.video.packets import PacketTable, read_packet_table, tolerated_s
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


def test_a_broadcast_says_nothing_of_its_size(whole_files, tmp_path):
    path, data = tmp_path / "live.wmv", bytearray(whole_files["windows.wmv"].read_bytes())
    path.write_bytes(data)
    assert ends_inside(str(path), "asf", len(data) - 1)
    data[data.index(ASF_PROPERTIES) + 88] |= 1
    path.write_bytes(data)
    assert not ends_inside(str(path), "asf", len(data) - 1)


def test_a_chunk_of_odd_size_has_a_byte_after_it(tmp_path):
    path, chunk = tmp_path / "old.avi", b"RIFF" + struct.pack("<I", 3) + b"odd"
    for data, is_whole in ((chunk + b"\0", True), (chunk, False), (chunk + b"\0" + chunk + b"\0", True)):
        path.write_bytes(data)
        assert is_whole_avi(str(path), len(data)) == is_whole


def trim(path, skipped, kept):
    """Let the edit list of an mp4 show ``kept`` frames of 512 units and 1/24 s, after those ``skipped``."""
    data, shown_ms = bytearray(path.read_bytes()), kept * 1000 // 24
    struct.pack_into(">Ii", data, data.index(b"elst") + 12, shown_ms, 512 * skipped)
    for name, offset in ((b"mvhd", 20), (b"tkhd", 24)):
        struct.pack_into(">I", data, data.index(name) + offset, shown_ms)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("gop", ["48", "12"])
@pytest.mark.parametrize(("skipped", "kept"), [(12, 36), (0, 36), (12, 24)])
def test_what_an_edit_list_trims_is_not_missing(tmp_path, skipped, kept, gop):
    """Phones trim so: all packets stay in the file. FFmpeg passes over whole GoPs, and decodes the others unseen."""
    options = {**clips.X264_P_FRAMES, "g": gop, "x264-params": "scenecut=0"}
    path = trim(clips.write_clip(tmp_path / "trimmed.mp4", 48, options=options), skipped, kept)
    shown, times, _, _, report = decode(path, strict=True)
    assert shown == list(range(skipped, skipped + kept)) and times == pytest.approx([k / 24 for k in range(kept)])
    info = probe_video(path)
    assert info.num_packets == kept and report.lost_s == 0 and not report.notes
    assert not any("promises" in note for note in info.notes)


def test_a_last_frame_may_stay_as_long_as_any_other():
    """Slides: few containers store how long the last one is shown."""
    stamps = array("d", [0, 0.04, 0.08, 0.12, 9.12, 9.16])
    table = PacketTable(stamps, 9.2, 0.04, True, False, 0.0, False)
    assert tolerated_s(table, 18.2) == pytest.approx(9)


def test_a_line_feed_after_the_end_of_a_gif_is_no_damage(whole_files, tmp_path):
    path = tmp_path / "fed.gif"
    path.write_bytes(whole_files["picture.gif"].read_bytes() + b"\n")
    assert decode(path, strict=True)[0] == list(range(48))


def test_the_box_of_a_fragment_may_have_a_size_of_64_bits(tmp_path):
    """A box may give its size in 64 bits."""
    path, part = tmp_path / "long.mp4", struct.pack(">I4s", 8, b"moof")
    data = part + struct.pack(">I4sQ", 1, b"mdat", 16 + 40) + bytes(40)
    path.write_bytes(data * 2)
    assert not ends_inside(str(path), "mov,mp4,m4a", 2 * len(data))
    for missing in (1, 30):
        assert ends_inside(str(path), "mov,mp4,m4a", 2 * len(data) - missing)
