"""Files that are several joined byte by byte, or that begin where nothing can be decoded yet."""

from __future__ import annotations

from array import array
from fractions import Fraction
from types import SimpleNamespace

import av
import pytest

from freres_cli.errors import VideoError
from freres_cli.video.packets import _build_table, _join_parts, _Stamps
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from tests import clips
from tests.decoding import NATIVE, decode

FPS = 24
KEY_EVERY = 48
X265 = f"log-level=none:pools=none:frame-threads=1:bframes=3:keyint={KEY_EVERY}:min-keyint={KEY_EVERY}:open-gop=0"
HEADLESS = {
    "hevc": {"codec": "libx265", "options": {"x265-params": X265, "preset": "ultrafast"}},
    "mpeg2": {"codec": "mpeg2video", "options": {"g": str(KEY_EVERY), "bf": "2", "qmax": "3"}},
}


@pytest.mark.parametrize("options", [clips.X264_P_FRAMES, clips.X264_B_FRAMES])
def test_parts_that_were_joined_are_taken_one_after_the_other(tmp_path, options):
    parts = [
        clips.write_clip(tmp_path / f"{first}.ts", 48, pictures=clips.numbered(48, first=first), options=options)
        for first in (0, 48)
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info = probe_video(path)
    assert info.duration_s == pytest.approx(96 / FPS, abs=0.01)
    assert "timestamps begin again 1 time: the parts are taken one after the other" in info.notes
    shown, times, *_, report = decode(path, strict=True)
    assert shown == list(range(96)) and report.lost_s == 0
    assert times == pytest.approx([k / FPS for k in range(96)], abs=1e-3)
    shown, times, *_ = decode(path, Sampling("fps", fps=2))
    assert shown == list(range(0, 96, 12)) and times == pytest.approx([k / 2 for k in range(8)], abs=1e-3)


@pytest.mark.parametrize(
    ("dts", "num_joints"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], 1),
        ([5, 6, 7, 0, 1, 3, 4, 0, 1], 2),
        ([0, 1, 2, 3, 4], 0),
        ([0, 1, 2, 900, 3, 4], 0),
        ([0, 1, 2, -900, 3, 4], 0),
        ([900, 1, 2, 3], 0),
        ([0, 1, 2, 0], 0),
    ],
)
def test_a_single_stamp_that_is_damaged_is_no_joint(dts, num_joints):
    stamps = _Stamps(pts=array("q", dts), dts=array("q", dts), durations=array("q", [1] * len(dts)))
    assert _join_parts(stamps) == num_joints
    assert list(stamps.pts) == (sorted(stamps.pts) if num_joints else dts)


@pytest.mark.parametrize("kind", HEADLESS)
def test_what_cannot_be_decoded_before_the_first_key_frame_is_told_and_refused_if_strict(tmp_path, kind):
    """The decoder drops these packets without an error."""
    if not clips.has_encoder(HEADLESS[kind]["codec"]):
        pytest.skip("no such encoder in this build")
    whole = clips.write_clip(tmp_path / "whole.ts", 120, **HEADLESS[kind])
    assert decode(whole, strict=True)[4].lost_s == 0
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    num_lost = next(place for place, (_, is_key) in enumerate(packets) if is_key and place) - 8
    data, path = whole.read_bytes(), tmp_path / "headless.ts"
    # The tables of the stream, then everything from the ninth packet on.
    path.write_bytes(data[: 3 * 188] + data[packets[8][0] // 188 * 188 :])
    for sampling in (NATIVE, Sampling("fps", fps=4)):
        report = decode(path, sampling)[4]
        assert report.lost_s == pytest.approx(num_lost / FPS, abs=2.5 / FPS)
        assert any("are lost" in note for note in report.notes)
        with pytest.raises(VideoError, match="are lost"):
            decode(path, sampling, strict=True)
    assert decode(path, Sampling("fps", fps=4, start_s=3.0), strict=True)[4].lost_s == 0


@pytest.mark.parametrize(("pts", "has_keys"), [([0, 10, 20, 30], True), ([0, 10, 10, 30], False)])
def test_reading_begins_at_a_key_frame_only_where_times_tell_frames_apart(pts, has_keys):
    codec = SimpleNamespace(has_b_frames=False)
    stream = SimpleNamespace(time_base=Fraction(1, 100), codec_context=codec, guessed_rate=None)
    keys = array("q", [0, 30])
    stamps = _Stamps(array("q", pts), array("q", [0, 10, 20, 30]), array("q", [10] * 4), keys, keys, 0, 0, 0)
    assert list(_build_table("a.mp4", stream, stamps, 0.0, False).key_pts) == ([0, 30] if has_keys else [])
