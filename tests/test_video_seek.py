"""--start seeks: the frames are those that decoding from the beginning gives, whatever the codec and the container."""

from __future__ import annotations

import pytest
import torch

from freres_cli.video import decode as decode_module
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from tests import clips
from tests.decoding import SMALL

COUNT, FPS = 240, 24
X264 = {"bf": "3", "b-adapt": "0", "g": "24", "crf": "12", "preset": "veryfast", "threads": "1"}
OPEN_GOP = {**X264, "x264-params": "open-gop=1"}
INTRA_REFRESH = {**X264, "bf": "0", "x264-params": "intra-refresh=1"}
X265 = {
    "x265-params": "log-level=none:pools=none:frame-threads=1:bframes=3:keyint=24:min-keyint=24:open-gop={}",
    "preset": "ultrafast",
}

# What is written, and whether decoding begins in the middle: it does not where timestamps do not tell frames apart.
CASES = {
    "b_frames.mp4": ({"options": X264}, True),
    "b_frames.mkv": ({"options": X264}, True),
    "b_frames.ts": ({"options": X264}, True),
    "b_frames.mov": ({"options": X264}, True),
    "b_frames.flv": ({"options": X264}, True),
    "fragments.mp4": ({"options": X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}}, True),
    "open_gop.mp4": ({"options": OPEN_GOP}, True),
    "open_gop.mkv": ({"options": OPEN_GOP}, True),
    "open_gop.ts": ({"options": OPEN_GOP}, True),
    "refresh.mp4": ({"options": INTRA_REFRESH}, True),
    "hevc.mp4": ({"codec": "libx265", "options": {k: v.format(0) for k, v in X265.items()}}, True),
    "hevc_open.mkv": ({"codec": "libx265", "options": {k: v.format(1) for k, v in X265.items()}}, True),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": {"g": "24", "cpu-used": "8", "deadline": "realtime"}}, True),
    "vp8.webm": ({"codec": "libvpx", "options": {"g": "24", "cpu-used": "8", "deadline": "realtime"}}, True),
    "av1.mp4": ({"codec": "libsvtav1", "options": {"preset": "12", "g": "24", "svtav1-params": "lp=1"}}, True),
    "mpeg4.mp4": ({"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qmax": "3"}}, True),
    "mpeg2_open.mpg": ({"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "qmax": "3"}}, None),
    "mpeg2_open.ts": ({"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "qmax": "3"}}, None),
    "mpeg4.avi": ({"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qmax": "3"}}, None),
    "intra.mov": ({"codec": "mjpeg", "pix_fmt": "yuvj420p", "color_range": 2}, True),
    "raw.h264": ({"options": X264}, False),
    "no_index.mkv": ({"options": X264, "container_options": {"live": "1"}}, None),
}
SAMPLINGS = (
    Sampling("native", start_s=6.3),
    Sampling("native", start_s=5.0, end_s=7.01),
    Sampling("fps", fps=3, start_s=8.0),
    Sampling("count", count=7, start_s=4.49, end_s=9.0),
)


def read(path, sampling, **options):
    """Everything that decoding gives, and the number of the frame that decoding began at."""
    begun = []
    real = decode_module.frames_from

    def spy(container, stream, entry):
        frames = real(container, stream, entry)
        begun.append(entry.first_index if frames is not None else 0)
        return frames

    decode_module.frames_from = spy
    try:
        decoder = decode_frames(path, probe_video(path), sampling, SMALL, **options)
        batches = list(decoder)
    finally:
        decode_module.frames_from = real
    pixels = torch.cat([batch.pixels for batch in batches])
    facts = [(b.pts_seconds, b.source_index, b.picture_index) for b in batches]
    return (pixels, facts, decoder.report.notes, decoder.report.lost_s), begun


def read_from_the_beginning(path, sampling, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "find_entry", lambda *_: None)
        return read(path, sampling, **options)[0]


def check_same(found, expected):
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


DAILY = ("b_frames.mp4", "refresh.mp4", "open_gop.mkv", "mpeg2_open.ts", "raw.h264")


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_late_start_gives_the_frames_that_decoding_from_the_beginning_gives(tmp_path, name, monkeypatch):
    made, must_seek = CASES[name]
    if not clips.has_encoder(made.get("codec", "libx264")):
        pytest.skip("no such encoder in this build")
    path = clips.write_clip(tmp_path / name, COUNT, fps=FPS, **made)
    for sampling in SAMPLINGS:
        found, begun = read(path, sampling)
        check_same(found, read_from_the_beginning(path, sampling, monkeypatch))
        assert must_seek is None or any(begun) == must_seek, (name, begun)


def test_what_comes_before_the_start_is_not_decoded(tmp_path):
    path = clips.write_clip(tmp_path / "clip.mp4", COUNT, fps=FPS, options=X264)
    decoder = decode_frames(path, probe_video(path), Sampling("native", start_s=9.0), SMALL)
    assert sum(len(batch.source_index) for batch in decoder) == 24
    # A key frame every second: the one at the start, and the run-in before it.
    assert decoder.report.num_frames_decoded <= 48


def test_damage_after_the_start_costs_the_same_frames_and_is_told_alike(tmp_path, monkeypatch):
    path = clips.write_clip(tmp_path / "hole.mov", COUNT, codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    clips.blank_payloads(path, slice(200, 210))
    sampling = Sampling("native", start_s=6.0)
    found, begun = read(path, sampling)
    check_same(found, read_from_the_beginning(path, sampling, monkeypatch))
    assert any(begun) and found[3] == pytest.approx(10 / FPS, abs=0.01)


@pytest.mark.parametrize("blanked", [slice(144, 145), slice(143, 146)])
def test_damage_where_decoding_would_begin_changes_no_number(tmp_path, blanked, monkeypatch):
    """Frame 144 is on screen at the start, and 143 the key frame before it: without them, the first frame is another."""
    path = clips.write_clip(tmp_path / "hole.mov", COUNT, codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    clips.blank_payloads(path, blanked)
    for sampling in (Sampling("native", start_s=6.0), Sampling("fps", fps=24, start_s=6.0)):
        found, _ = read(path, sampling)
        check_same(found, read_from_the_beginning(path, sampling, monkeypatch))


def test_key_frames_that_are_none_are_not_begun_at(tmp_path, monkeypatch):
    """Without its table of key frames, an mp4 says that every frame is one. MPEG-4 decodes them all without complaint."""
    path = clips.write_clip(tmp_path / "all.mp4", COUNT, codec="mpeg4", options={"g": "48", "qmax": "3"})
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))
    sampling = Sampling("fps", fps=2, start_s=7.0)
    check_same(read(path, sampling)[0], read_from_the_beginning(path, sampling, monkeypatch))
