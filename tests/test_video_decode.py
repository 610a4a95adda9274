"""Decoding, on files made here whose frames show their own number."""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from freres_cli.errors import VideoError
from freres_cli.records import FrameSize
from freres_cli.video import decode as decode_module
from freres_cli.video.decode import decode_frames
from freres_cli.video.opening import hash_file
from freres_cli.video.packets import read_packet_table
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling, num_sampled_frames, num_shown_frames
from tests import clips, decoding
from tests.decoding import NATIVE, SMALL, decode
from tests.runner import fails

plain_clip = decoding.plain_clip

FORMATS = {
    "h264_b_frames.mp4": {},
    "h264.mov": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264_10bit.mkv": {"pix_fmt": "yuv420p10le"},
    "h264_444_odd.mkv": {"pix_fmt": "yuv444p", "size": (67, 45)},
    "h264_full_range.mp4": {"pix_fmt": "yuvj420p", "color_range": 2},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp8_hidden_frames.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "8", "crf": "5"}, "size": (128, 128)},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2", "qmin": "1", "qmax": "3"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "color_range": 2},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "audio_first.mp4": {"audio": "first"},
    "audio_last.mkv": {"audio": "last"},
    "h264_b_frames.avi": {},
    "raw.h264": {},
}


@pytest.mark.parametrize("name", FORMATS)
def test_native_gives_every_frame_once_in_display_order(tmp_path, name):
    if not clips.has_encoder(FORMATS[name].get("codec", "libx264")):
        pytest.skip("no such encoder in this build")
    path = clips.write_clip(tmp_path / name, **FORMATS[name])
    shown, times, indices, _, report = decode(path)
    assert shown == indices == list(range(48))
    assert np.allclose(np.diff(times), 1 / 24, atol=1e-3)
    info = probe_video(path)
    assert info.num_packets == report.num_frames_decoded == report.num_frames_sampled == 48
    assert info.duration_s == pytest.approx(2.0, abs=2e-3)
    assert info.source_fps == pytest.approx(24, rel=1e-3)
    assert times[0] == 0
    assert report.lost_s == 0


@pytest.mark.parametrize(
    ("num_frames", "fps", "sampling"),
    [
        (1, 1000, {"mode": "count", "count": 4}),
        (1, 1000, {"mode": "fps", "fps": 2.0}),
        (33, 1000, {"mode": "count", "count": 33}),
        (3, 30, {"mode": "count", "count": 3}),
    ],
)
def test_the_last_frame_is_shown_to_its_end(tmp_path, num_frames, fps, sampling):
    """Of a clip this short an instant may lie within the tolerance of the end, where no other frame follows."""
    path = clips.write_clip(tmp_path / "a.mp4", num_frames, fps=fps)
    info = probe_video(path)
    decoder = decode_frames(path, info, Sampling(**sampling), FrameSize(32, 32, 1, 1))
    shown = [index for batch in decoder for index in batch.source_index]
    assert len(shown) == num_sampled_frames(Sampling(**sampling), info.start_s, info.duration_s, num_frames)
    assert shown[-1] == num_frames - 1 and decoder.report.lost_s == 0


@pytest.mark.parametrize(
    "sampling", [NATIVE, Sampling("fps", fps=7), Sampling("fps", fps=60), Sampling("count", count=5)]
)
def test_batch_size_changes_nothing(plain_clip, sampling):
    reference = decode(plain_clip, sampling, batch_frames=1000)
    for batch_frames in (1, 2, 3, 16, 48):
        other = decode(plain_clip, sampling, batch_frames=batch_frames)
        assert torch.equal(other[3], reference[3])
        assert other[:3] == reference[:3] and other[4] == reference[4]


@pytest.mark.parametrize("name", ["grid.mp4", "milliseconds.mkv"])
@pytest.mark.parametrize("fps", [1, 2, 7, 24, 50])
def test_fps_gives_the_frame_on_screen_at_each_instant(tmp_path, name, fps):
    path = clips.write_clip(tmp_path / name)
    shown, times, indices, _, report = decode(path, Sampling("fps", fps=fps))
    assert shown == indices == [k * 24 // fps for k in range(2 * fps)]
    assert all(k / fps - 1 / 24 - 2e-3 < t <= k / fps + 1e-3 for k, t in enumerate(times))
    info = probe_video(path)
    predicted = num_sampled_frames(Sampling("fps", fps=fps), info.start_s, info.duration_s, info.num_packets)
    assert predicted == report.num_frames_sampled == len(shown)


@pytest.mark.parametrize("count", [1, 5, 24, 48, 1000])
def test_count_gives_the_middles_of_equal_parts(plain_clip, count):
    shown, _, _, _, report = decode(plain_clip, Sampling("count", count=count))
    expected = min(count, 48)
    assert shown == [int((i + 0.5) * 48 / expected) for i in range(expected)]
    assert any("frames requested" in note for note in report.notes) == (count > 48)


def test_windows_count_from_the_first_frame(tmp_path):
    path = clips.write_shifted(tmp_path / "late.ts", 8.3)
    assert decode(path, Sampling("native", start_s=0.5, end_s=1.0))[0] == list(range(12, 24))
    assert decode(path, Sampling("fps", fps=4, start_s=1.0))[0] == [24, 30, 36, 42]
    assert decode(path, Sampling("fps", fps=4, start_s=0.5, end_s=1.0))[0] == [12, 18]


@pytest.mark.parametrize("window", [(2.0, None), (None, 2.0), (1.3, 2.9), (0.1, 0.15), (3.99, None), (2.01, 2.02)])
@pytest.mark.parametrize("name", ["phone.mp4", "phone.mkv"])
def test_a_window_of_a_variable_rate_holds_as_many_frames_as_planned(tmp_path, name, window):
    """Two seconds at 5 frames a second, then two at 30."""
    pts = [*range(0, 2000, 200), *(round(2000 + k * 1000 / 30) for k in range(60))]
    path = clips.write_clip(tmp_path / name, 70, pts=pts, time_base=Fraction(1, 1000))
    info = probe_video(path)
    stamps = read_packet_table(str(path), info.stream_index).stamps_s
    for mode in ({"mode": "native"}, {"mode": "count", "count": 30}):
        sampling = Sampling(**mode, start_s=window[0], end_s=window[1])
        clip = info.start_s, info.duration_s
        planned = num_sampled_frames(sampling, *clip, num_shown_frames(sampling, *clip, stamps))
        assert decode(path, sampling)[4].num_frames_sampled == planned


def test_native_window_inside_one_long_frame_gives_that_frame(tmp_path):
    path = clips.write_clip(tmp_path / "slides.mkv", 3, pts=[0, 10_000, 20_000], time_base=Fraction(1, 1000))
    assert decode(path, Sampling("native", start_s=12.0, end_s=13.0))[0] == [1]


@pytest.mark.parametrize("name", ["late.ts", "late.mp4", "late.mkv"])
@pytest.mark.parametrize("start", [0.3, 8.3])
def test_clips_that_do_not_start_at_zero(tmp_path, name, start):
    path = clips.write_shifted(tmp_path / name, start)
    info = probe_video(path)
    assert info.start_s == pytest.approx(start, abs=2e-3)
    assert info.duration_s == pytest.approx(2.0, abs=2e-3)
    shown, times, *_ = decode(path, Sampling("fps", fps=2))
    assert shown == [0, 12, 24, 36]
    assert times == pytest.approx([k / 2 for k in range(4)], abs=2e-3)


@pytest.mark.parametrize("name", ["stamps.mp4", "stamps.mkv", "stamps.avi"])
def test_pts_equal_to_dts_keeps_the_order_of_the_decoder(tmp_path, name):
    path = clips.write_pts_equal_dts(tmp_path / name)
    with av.open(str(path)) as container:
        pts = [frame.pts for frame in container.decode(video=0)]
    assert any(b < a for a, b in pairwise(pts)), "the clip made here should have the trouble it is for"
    shown, times, _, _, report = decode(path)
    assert shown == list(range(48))
    assert np.allclose(np.diff(times), 1 / 24, atol=1e-3)
    assert any("run backwards" in note for note in report.notes)


def test_variable_frame_rate_is_sampled_by_time(tmp_path):
    stamps = [0, 40, 160, 240, 250, 1000, 1033, 2000, 5000, 5040]
    path = clips.write_clip(tmp_path / "vfr.mkv", 10, pts=stamps, time_base=Fraction(1, 1000))
    info = probe_video(path)
    assert any("variable frame rate" in note for note in info.notes)
    shown, times, indices, pixels, _ = decode(path, Sampling("fps", fps=2))
    expected = [max(i for i, stamp in enumerate(stamps) if stamp <= k * 500) for k in range(len(shown))]
    assert shown == indices == expected
    assert times == [stamps[i] / 1000 for i in expected]
    assert len(shown) == 11 and torch.equal(pixels[5], pixels[9])  # the frame of 2.0 s is on screen until 5.0 s


def test_headers_are_not_believed(tmp_path):
    path = clips.lie_in_header(clips.write_clip(tmp_path / "lie.avi", codec="mpeg4", options={"qmax": "3"}), 444)
    info = probe_video(path)
    assert (info.num_packets, info.duration_s) == (48, 2.0)
    assert "header promises 444 frames, the file holds 48" in info.notes
    shown, *_, report = decode(path, Sampling("count", count=4), strict=True)
    assert shown == [6, 18, 30, 42] and report.lost_s == 0
    # Nothing is missing: the file says how many bytes it has, and has them.
    shown, *_, report = decode(path, strict=True)
    assert shown == list(range(48)) and report.lost_s == 0


def test_wild_header_rate_is_not_believed(tmp_path):
    path = clips.write_clip(tmp_path / "wild.mkv", fps=144, time_base=Fraction(1, 24))
    info = probe_video(path)
    assert info.source_fps == pytest.approx(24, rel=1e-3)
    assert decode(path, Sampling("fps", fps=2))[0] == [0, 12, 24, 36]


def test_a_timestamp_years_away_does_not_stretch_the_clip(tmp_path):
    stamps = [*range(0, 2300, 100), 10**12]
    path = clips.write_clip(tmp_path / "spoilt.mkv", 24, pts=stamps, time_base=Fraction(1, 1000))
    info = probe_video(path)
    assert info.duration_s < 10 and any("no usable timestamps" in note for note in info.notes)
    assert decode(path)[0] == list(range(24))


@pytest.mark.parametrize("name", ["lapse.mp4", "lapse.mkv", "lapse.avi"])
def test_a_time_lapse_keeps_its_times(tmp_path, name):
    """A frame an hour is not a damaged file; nor is one that has no light at night."""
    hours = list(range(20)) if name.endswith("avi") else [*range(12), *range(24, 36)]
    base = Fraction(3600) if name.endswith("avi") else Fraction(1)
    pts = [hour * 3600 // int(base) for hour in hours]
    path = clips.write_clip(
        tmp_path / name, len(hours), pts=pts, time_base=base, fps=float(1 / base), options={"bf": "0"}
    )
    info = probe_video(path)
    assert info.has_timestamps and not any("no usable timestamps" in note for note in info.notes)
    shown, times, *_ = decode(path)
    assert shown == list(range(len(hours)))
    assert times == [hour * 3600.0 for hour in hours]
    assert decode(path, Sampling("fps", fps=1 / 7200))[0][:6] == [0, 2, 4, 6, 8, 10]


def test_a_rate_that_a_time_lapse_cannot_be_read_at_is_refused(tmp_path):
    stamps = [k * 86_400 for k in range(40)]
    path = clips.write_clip(tmp_path / "days.mkv", 40, pts=stamps, time_base=Fraction(1), fps=1)
    with fails(2, "expected at most 10000000 frames") as caught:
        decode(path, Sampling("fps", fps=30))
    assert "--" not in caught.value.hint  # most verbs have no flag for it


@pytest.mark.parametrize("stamps", [[0, 10**12], [0, 100, 10**12], [0, 10**9, 10**14], [*range(30), 10**9, 2 * 10**9]])
def test_a_few_damaged_timestamps_make_no_time_lapse(tmp_path, stamps):
    path = clips.write_clip(tmp_path / "spoilt.mkv", len(stamps), pts=stamps, time_base=Fraction(1, 1000))
    assert not probe_video(path).has_timestamps


def test_missing_timestamps_are_guessed_and_reported(tmp_path):
    info = probe_video(clips.write_clip(tmp_path / "raw.h264"))
    assert not info.has_timestamps
    assert any("no usable timestamps" in note for note in info.notes)


def test_times_that_ffmpeg_made_up_are_reported(tmp_path):
    told = "holds no times: FFmpeg takes 25 frames per second"
    for suffix, is_told in (("mjpeg", True), ("avi", False)):
        path = clips.write_clip(tmp_path / f"row.{suffix}", 20, fps=10, codec="mjpeg", pix_fmt="yuvj420p")
        assert any(told in note for note in probe_video(path).notes) == is_told
    assert probe_video(tmp_path / "row.avi").duration_s == pytest.approx(2.0)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(tmp_path, degrees):
    marker = 0x1235
    path = clips.write_clip(tmp_path / "turned.mp4", 2, size=(96, 48), pictures=[clips.draw_index(marker, 96, 48)] * 2)
    clips.rotate_mp4(path, degrees)
    info = probe_video(path)
    assert info.rotation_deg == degrees
    assert (info.width_px, info.height_px) == ((96, 48) if degrees % 180 == 0 else (48, 96))
    assert (info.coded_width_px, info.coded_height_px) == (96, 48)
    shown, _, _, pixels, _ = decode(path, size=FrameSize(info.height_px, info.width_px, 1, 1))
    assert tuple(pixels.shape) == (2, info.height_px, info.width_px, 3)
    upright = clips.read_index(np.rot90(clips.draw_index(marker, 96, 48), degrees // 90))
    assert shown == [upright, upright]


def test_pixels_that_are_not_square_widen_the_picture(tmp_path):
    path = clips.write_clip(tmp_path / "wide.mp4", 2, sample_aspect_ratio=Fraction(3, 2))
    info = probe_video(path)
    assert (info.width_px, info.height_px, info.sample_aspect_ratio) == (96, 64, 1.5)


COLOURS = [(200, 40, 60), (30, 180, 90), (255, 255, 255), (0, 0, 0), (128, 128, 128)]


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"pix_fmt": "yuvj420p", "color_range": 2},
        {"color_range": 2},
        {"colorspace": 1, "color_range": 1},
        {"pix_fmt": "yuv420p10le", "colorspace": 1, "color_range": 1},
    ],
    ids=["plain", "yuvj", "full", "bt709", "bt709-10bit"],
)
def test_colours_survive(tmp_path, tags):
    for number, rgb in enumerate(COLOURS):
        path = tmp_path / f"colour{number}.mp4"
        clips.write_clip(path, 1, pictures=clips.solid(1, rgb), options={"crf": "1"}, **tags)
        (batch,) = decode_frames(path, probe_video(path), NATIVE, SMALL)
        error = (batch.pixels[0].int() - torch.tensor(rgb)).abs().max()
        assert error <= 2, f"{rgb}: off by {error}"


def test_streams_are_picked_by_number(tmp_path):
    path = clips.write_clip(tmp_path / "two.mp4", more_streams=[clips.numbered(48, first=1000)], audio="first")
    assert probe_video(path).num_video_streams == 2
    assert any("2 video streams" in note for note in probe_video(path).notes)
    assert decode(path)[0] == list(range(48))
    assert decode(path, stream=1)[0] == list(range(1000, 1048))
    with pytest.raises(VideoError, match="expected 0 to 1, got 2"):
        probe_video(path, 2)


def test_one_frame_is_a_video(tmp_path):
    path = clips.write_clip(tmp_path / "one.mp4", 1)
    info = probe_video(path)
    assert info.num_packets == 1 and info.source_fps is None
    for sampling in (NATIVE, Sampling("fps", fps=1), Sampling("count", count=8)):
        assert decode(path, sampling)[0] == [0]


def test_picture_size_that_changes_is_levelled_out(tmp_path):
    assert decode(clips.write_size_change(tmp_path / "change.h264"))[0] == list(range(24))


# Resources


def test_abandoned_iteration_closes_the_file(plain_clip, monkeypatch):
    opened = []
    real_open = decode_module.open_video
    monkeypatch.setattr(decode_module, "open_video", lambda *given: opened.append(real_open(*given)) or opened[-1])
    frames = iter(decode_frames(plain_clip, probe_video(plain_clip), NATIVE, SMALL, batch_frames=1))
    next(frames)
    frames.close()
    with pytest.raises(AssertionError, match="not open"):
        next(opened[0].demux())


def test_report_is_there_only_after_the_last_batch(plain_clip):
    decoder = decode_frames(plain_clip, probe_video(plain_clip), NATIVE, SMALL, batch_frames=1)
    frames = iter(decoder)
    next(frames)
    with pytest.raises(RuntimeError, match="last batch"):
        _ = decoder.report
    list(frames)
    assert decoder.report.num_frames_sampled == 48


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _most_growth(path: Path) -> int:
    """The most bytes by which this process grows while all frames of a clip are streamed and thrown away."""
    decoder = decode_frames(path, probe_video(path), NATIVE, FrameSize(256, 256, 1, 1), batch_frames=4)
    before = _resident_bytes()
    return max(_resident_bytes() for _ in decoder) - before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_clip(tmp_path):
    path = clips.write_clip(tmp_path / "long.mp4", 1500, fps=30, size=(256, 256), options=clips.X264_P_FRAMES)
    short = clips.write_clip(tmp_path / "short.mp4", 30, fps=30, size=(256, 256), options=clips.X264_P_FRAMES)
    _most_growth(short)  # allocates the decoder's own buffers, which stay
    # Its frames take 147 MB as decoded, and 295 MB as RGB.
    assert _most_growth(path) < 30e6


def test_hash_is_that_of_the_bytes(plain_clip, tmp_path):
    assert hash_file(plain_clip) == hashlib.sha256(plain_clip.read_bytes()).hexdigest()
    with pytest.raises(VideoError, match="no such file"):
        hash_file(tmp_path / "missing.mp4")
