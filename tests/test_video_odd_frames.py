"""Pictures that are not plain: mirrored, interlaced, of high dynamic range, of changing size; and files that grow."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.records import FrameSize
from freres_cli.video import resizing
from freres_cli.video.decode import decode_frames
from freres_cli.video.oddities import screen_colours
from freres_cli.video.opening import hash_file
from freres_cli.video.packets import _is_spoilt
from freres_cli.video.probe import probe_video
from tests import clips
from tests.decoding import NATIVE, SMALL, decode
from tests.runner import fails

ONE = 1 << 16
# How a point (x, y) of the stored picture moves: x' = a x + c y, y' = b x + d y, y downwards.
MATRICES = [(a, b, c, d) for a, b, c, d in np.ndindex(3, 3, 3, 3) if abs((a - 1) * (d - 1) - (b - 1) * (c - 1)) == 1]
MATRICES = [tuple(v - 1 for v in m) for m in MATRICES if (m[0] == 1) == (m[3] == 1) and (m[1] == 1) == (m[2] == 1)]


def _set_matrix(path, a, b, c, d):
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_each_of_the_eight_ways_to_turn_a_picture_moves_every_point_where_the_file_says(tmp_path, matrix):
    a, b, c, d = matrix
    path = clips.write_clip(
        tmp_path / "turned.mp4", 3, size=(96, 64), pictures=clips.numbered(3, 96, 64, first=0b0010110111000001)
    )
    stored = clips.draw_index(0b0010110111000001, 96, 64)
    _set_matrix(path, a, b, c, d)
    info = probe_video(path)
    assert (info.width_px, info.height_px) == ((96, 64) if a else (64, 96)) and not info.notes
    size = FrameSize(info.height_px, info.width_px, 1, 1)
    shown = next(iter(decode_frames(path, info, NATIVE, size))).pixels[0].numpy()
    y, x = np.mgrid[4:64:8, 4:96:8]
    # Points are turned around the origin; the picture is then moved back into view.
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = (
        new_x + (info.width_px - 1 if new_x.min() < 0 else 0),
        new_y + (info.height_px - 1 if new_y.min() < 0 else 0),
    )
    assert np.abs(shown[new_y, new_x].astype(int) - stored[y, x]).max() < 20


def test_there_are_eight_ways():
    assert len(set(MATRICES)) == 8


def _write_hdr(path, curve, levels):
    """A clip of 10-bit greys in BT.2020, one column for each level of the signal in [0, 1]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx265",
            rate=Fraction(10),
            options={"x265-params": "log-level=none:lossless=1:pools=none:frame-threads=1"},
        )
        stream.width, stream.height, stream.pix_fmt = 16 * len(levels), 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = curve, 9, 9, 1
        luma = np.repeat(64 + 876 * np.array(levels), 16).round().astype(np.uint16)
        planes = np.full((96, 16 * len(levels)), 512, np.uint16)
        planes[:64] = luma
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p10le")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = curve, 9, 9, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _pq(signal):
    """SMPTE ST 2084: cd/m2 of a signal."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = np.power(signal, 1 / m2)
    return 10000 * np.power(np.maximum(power - c1, 0) / (c2 - c3 * power), 1 / m1)


@pytest.mark.slow
@pytest.mark.skipif(not clips.has_encoder("libx265"), reason="no HEVC encoder in this build")
def test_pq_is_shown_as_its_standard_says_with_reference_white_as_white(tmp_path):
    levels = [0.0, 0.2, 0.3, 0.4, 0.5, 0.55, 0.7, 0.9]
    path = _write_hdr(tmp_path / "pq.mp4", 16, levels)
    decoder = decode_frames(path, probe_video(path), NATIVE, FrameSize(64, 16 * len(levels), 1, 1))
    shown = next(iter(decoder)).pixels[0, 32, 8::16].float()
    # ITU-R BT.2408: reference white is 203 cd/m2. BT.1886: a display's gamma is 2.4.
    expected = 255 * np.minimum(1, _pq(np.array(levels)) / 203) ** (1 / 2.4)
    assert (shown.amax(1) - shown.amin(1)).max() <= 2
    assert np.abs(shown[:, 0].numpy() - expected).max() < 8, (shown[:, 0], expected)
    list(decoder)
    assert any("PQ" in note for note in decoder.report.notes)


@pytest.mark.skipif(not clips.has_encoder("libx265"), reason="no HEVC encoder in this build")
def test_hlg_and_wide_colours_are_told(tmp_path):
    for curve, word in ((18, "HLG"), (14, "BT.2020")):
        path = _write_hdr(tmp_path / f"{curve}.mp4", curve, [0.1, 0.3])
        decoder = decode_frames(path, probe_video(path), NATIVE, SMALL)
        list(decoder)
        assert sum(word in note for note in decoder.report.notes) == 1, decoder.report.notes


@pytest.mark.parametrize(
    ("curve", "primaries", "is_turned"), [(1, 1, False), (1, 9, True), (16, 9, True), (18, 1, True)]
)
def test_wide_colours_are_turned_into_those_of_a_screen_as_hdr_is(curve, primaries, is_turned):
    frame = av.VideoFrame(16, 16, "yuv420p")
    frame.color_trc, frame.color_primaries = curve, primaries
    assert screen_colours(frame) == ({"dst_color_trc": 1, "dst_color_primaries": 1} if is_turned else {})


def test_what_resizes_is_used_again_and_keeps_nothing_of_the_clip_before(tmp_path, monkeypatch):
    made, spare = [], []
    kind = resizing.VideoReformatter
    monkeypatch.setattr(resizing, "VideoReformatter", lambda: made.append(kind()) or made[-1])
    monkeypatch.setattr(resizing, "_SPARE", spare)
    paths = [
        clips.write_clip(tmp_path / "plain.mp4", 6),
        clips.write_clip(tmp_path / "wide.mp4", 6, size=(96, 64), color_range=2, pix_fmt="yuvj420p"),
        clips.write_size_change(tmp_path / "sizes.h264"),
    ]

    def pixels(path):
        return torch.cat([batch.pixels for batch in decode_frames(path, probe_video(path), NATIVE, SMALL)])

    alone = []
    for path in paths:
        spare.clear()
        alone.append(pixels(path))
    spare.clear()
    made.clear()
    for path, wanted in zip([*paths, *reversed(paths)], [*alone, *reversed(alone)], strict=True):
        assert torch.equal(pixels(path), wanted)
    assert 0 < len(made) <= resizing.MOST_RESIZE_THREADS and sorted(map(id, spare)) == sorted(map(id, made))


def test_plain_clips_have_no_such_notes(tmp_path):
    assert decode(clips.write_clip(tmp_path / "plain.mp4", 12))[-1].notes == ()


def test_interlaced_pictures_are_counted(tmp_path):
    options = {"g": "12", "qmax": "3", "flags": "+ildct+ilme"}
    path = clips.write_clip(tmp_path / "fields.ts", 24, codec="mpeg2video", options=options)
    notes = decode(path)[-1].notes
    assert any("interlaced" in note and "24 pictures" in note for note in notes), notes


def test_a_change_of_size_is_told_and_every_frame_fits(tmp_path):
    shown, *_, report = decode(clips.write_size_change(tmp_path / "sizes.h264"))
    assert shown == list(range(24))
    assert any("64x64, to 96x48" in note and "12 pictures" in note for note in report.notes), report.notes


@pytest.mark.parametrize("name", ["grows.ts", "grows.mkv"])
def test_of_a_file_that_grows_what_it_held_at_first_is_used(tmp_path, name):
    path = clips.write_clip(tmp_path / name, 240)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before = decode(path)
    info = probe_video(path)
    decoder = decode_frames(path, info, NATIVE, SMALL, 16)
    batches = iter(decoder)
    pixels = [next(batches).pixels]
    path.write_bytes(whole)
    pixels += [batch.pixels for batch in batches]
    assert torch.equal(torch.cat(pixels), before[3]) and decoder.report == before[4]
    again = decode_frames(path, info, NATIVE, SMALL, 16)
    assert torch.equal(torch.cat([batch.pixels for batch in again]), before[3])
    path.write_bytes(whole[:1000])
    with fails(3, "became smaller"):
        list(decode_frames(path, info, NATIVE, SMALL))


def test_a_bundle_of_a_file_that_grows_is_that_of_its_beginning(tmp_path):
    path = clips.write_clip(tmp_path / "live.ts", 96)
    whole = path.read_bytes()
    part = tmp_path / "part.ts"
    part.write_bytes(whole[: 188 * (len(whole) // 376)])
    path.write_bytes(part.read_bytes())
    compressor = Compressor(budget_tokens=100)

    def grow(done, total):
        path.write_bytes(whole)

    grown, still = compressor.compress(path, progress=grow), compressor.compress(part)
    assert any("grew while it was read" in note for note in grown.notes)
    assert not any("while it was read" in note for note in still.notes)
    assert torch.equal(grown.tokens().latents, still.tokens().latents)
    assert grown.manifest["source"]["sha256"] == still.manifest["source"]["sha256"] == hash_file(part)


def test_a_file_that_is_removed_while_it_is_read_is_said_to_be(tmp_path):
    """Its frames are read to the end: the system keeps what is open."""
    path = clips.write_clip(tmp_path / "a.mp4", 4)
    source = VideoSource(path)
    assert list(source.describe_change()) == []
    path.unlink()
    assert list(source.describe_change()) == ["the file was removed while it was read"]


@pytest.mark.parametrize(("color_range", "shown"), [(1, (0, 255)), (2, (16, 235))])
def test_gray_video_of_limited_range_is_as_bright_as_any_other(tmp_path, color_range, shown):
    for level, expected in zip((16, 235), shown, strict=True):
        path = tmp_path / f"{level}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "gray"
            stream.codec_context.color_range = color_range
            frame = av.VideoFrame.from_ndarray(np.full((64, 64), level, np.uint8), format="gray")
            frame.color_range = color_range
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        batches = list(decode_frames(path, probe_video(path), NATIVE, SMALL))
        assert batches[0].pixels.unique().tolist() == [expected]


@pytest.mark.parametrize(("alpha", "num_notes"), [(255, 0), (128, 1)])
def test_transparency_that_is_left_out_is_told(tmp_path, alpha, num_notes):
    path = tmp_path / "clear.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgba"
        picture = np.full((64, 64, 4), 200, np.uint8)
        picture[..., 3] = 255
        picture[0, 0, 3] = alpha
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode(None))
    decoder = decode_frames(path, probe_video(path), NATIVE, SMALL)
    list(decoder)
    told = "transparency is left out, so that the colours beneath show: 1 picture with transparent parts"
    assert decoder.report.notes == (told,) * num_notes


def test_of_an_animation_with_a_still_picture_ahead_the_animation_is_read(tmp_path):
    if not clips.has_encoder("libsvtav1"):
        pytest.skip("no such encoder in this build")
    path = clips.write_clip(
        tmp_path / "moving.avif",
        12,
        codec="libsvtav1",
        options={"preset": "12", "svtav1-params": "lp=1"},
    )
    assert probe_video(path).num_packets == 12


@pytest.mark.parametrize("steps", [[], [10**6]])
def test_one_or_two_frames_that_last_for_days_are_no_time_lapse(steps):
    assert _is_spoilt(np.array(steps, dtype=np.int64), 1e6, Fraction(1))
    assert not _is_spoilt(np.array(steps, dtype=np.int64) // 10**4, 100.0, Fraction(1))
