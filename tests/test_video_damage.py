"""Damaged files: every run returns the same decodable frames and reports what was lost."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from freres_cli.errors import VideoError
from freres_cli.video import decode as decode_module
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from tests import clips, decoding
from tests.decoding import NATIVE, SMALL, decode

plain_clip = decoding.plain_clip


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv", "plain.ts", "old.avi", "fragmented.mp4"])
def test_any_damage_ends_in_frames_or_in_one_of_our_errors(tmp_path, name):
    made = {
        "sound.mp4": {"audio": "last", "more_streams": [clips.numbered(24)]},
        "sound.mkv": {"audio": "first"},
        "old.avi": {"codec": "mpeg4"},
        "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    }
    path = clips.write_clip(tmp_path / name, 24, **made.get(name, {}))
    whole = path.read_bytes()
    for seed in range(25):
        path.write_bytes(whole)
        clips.rot(path, first_fraction=0.0, flips=4 + seed % 9, seed=seed)
        if seed % 3 == 0:
            clips.cut(path, 0.3 + seed / 50)
        for sampling in (NATIVE, Sampling("fps", fps=3), Sampling("count", count=5)):
            with contextlib.suppress(VideoError):
                for batch in decode_frames(path, probe_video(path), sampling, SMALL):
                    assert list(batch.pts_seconds) == sorted(batch.pts_seconds)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("index_first.mp4", {"container_options": {"movflags": "faststart"}}),
        ("no_cues.mkv", {}),
        ("old.avi", {"codec": "mpeg4", "options": {"qmax": "3"}}),
        ("with_sound.mkv", {"audio": "last"}),
    ],
)
def test_cut_files_give_the_good_part_and_say_what_is_lost(tmp_path, name, options):
    path = clips.write_clip(tmp_path / name, 240, **options)
    clips.cut(path, 0.6)
    shown, times, _, _, report = decode(path)
    assert 40 < len(shown) < 200
    # B-frames next to the cut may be missing; every frame returned has its own time.
    assert shown[:-8] == list(range(len(shown) - 8))
    assert shown == [round((t - times[0]) * 24) for t in times]
    assert report.lost_s == pytest.approx(10.0 - len(shown) / 24, abs=0.2)
    assert any("are lost" in note for note in report.notes)
    sampled = decode(path, Sampling("fps", fps=4))
    assert sampled[0] == [max(n for n in shown if n <= 6 * k) for k in range(len(sampled[0]))]
    # There must be no samples after the last decoded frame has left the screen.
    assert len(sampled[0]) == (shown[-1] + 6) // 6
    with pytest.raises(VideoError, match="damaged"):
        list(decode_frames(path, probe_video(path), NATIVE, SMALL, strict=True))


def test_rotten_files_give_what_decodes_and_the_same_each_time(tmp_path):
    path = clips.write_clip(tmp_path / "rotten.webm", 240, codec="libvpx-vp9", options={"cpu-used": "8", "crf": "10"})
    clips.rot(path, first_fraction=0.5)
    info = probe_video(path)
    decoder = decode_frames(path, info, NATIVE, SMALL)
    first, second = ([batch.pixels for batch in decoder], decoder.report), ([b.pixels for b in decoder], decoder.report)
    assert first[1] == second[1] and torch.equal(torch.cat(first[0]), torch.cat(second[0]))
    report = decoder.report
    assert 60 <= report.num_frames_decoded < 240
    assert report.lost_s == pytest.approx((240 - report.num_frames_decoded) / 24, abs=0.2)
    assert any("packets skipped" in note for note in report.notes)
    with pytest.raises(VideoError, match="damaged"):
        list(decode_frames(path, info, NATIVE, SMALL, strict=True))


def test_a_hole_inside_the_clip_is_counted(tmp_path):
    path = clips.write_clip(tmp_path / "hole.mov", 240, codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    clips.blank_payloads(path, slice(100, 110))
    shown, times, *_, report = decode(path)
    assert shown == [*range(100), *range(110, 240)]
    assert shown == [round(t * 24) for t in times]
    assert report.lost_s == pytest.approx((240 - len(shown)) / 24, abs=0.05)
    # As in a player, the last good frame stays until the next one.
    assert decode(path, Sampling("fps", fps=24))[0] == [max(n for n in shown if n <= k) for k in range(240)]


@pytest.mark.parametrize(
    ("sampling", "num_lost"),
    [
        (NATIVE, 96),
        (Sampling("fps", fps=24), 96),
        (Sampling("fps", fps=2), 96),
        (Sampling("count", count=20), 96),
        (Sampling("native", end_s=6.0), 44),
        (Sampling("fps", fps=2, end_s=6.0), 44),
        (Sampling("native", start_s=6.0), 52),
        (Sampling("native", start_s=8.5), 0),
        (Sampling("fps", fps=2, start_s=8.5), 0),
        (Sampling("fps", fps=2, end_s=4.0), 0),
    ],
)
def test_a_hole_is_lost_however_the_clip_is_sampled(tmp_path, sampling, num_lost):
    path = clips.write_clip(tmp_path / "hole.mov", 240, codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    clips.blank_payloads(path, slice(100, 196))
    assert decode(path, sampling)[4].lost_s == pytest.approx(num_lost / 24)


def test_frames_that_are_timed_by_their_order_keep_their_times_after_a_hole(tmp_path):
    path = clips.blank_payloads(clips.write_pts_equal_dts(tmp_path / "blind.mp4"), slice(10, 11))
    shown, times, *_ = decode(path)
    assert len(shown) == 47
    # At the hole itself, the decoder holds frames back.
    assert all(round(time * 24) == number for number, time in zip(shown, times, strict=True) if abs(number - 9) > 3)


def _decode_on_one_thread(path: Path) -> list[Fraction | None]:
    """Times of the frames that PyAV decodes from a damaged file without threads."""
    times = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            with contextlib.suppress(av.error.FFmpegError):
                times += [None if f.pts is None else f.pts * f.time_base for f in packet.decode()]
    return times


HEVC = {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3:keyint=24"}}


@pytest.mark.skipif(not clips.has_encoder("libx265"), reason="no HEVC encoder in this build")
@pytest.mark.parametrize("blanked", [slice(239, 240), slice(238, 240), slice(100, 110)])
def test_damage_costs_no_frame_that_one_thread_can_decode(tmp_path, blanked):
    path = clips.blank_payloads(clips.write_clip(tmp_path / "blanked.mp4", 240, **HEVC), blanked)
    times = [t for batch in decode_frames(path, probe_video(path), NATIVE, SMALL) for t in batch.pts_seconds]
    expected = _decode_on_one_thread(path)
    assert len(times) == len(expected) < 240
    assert times == pytest.approx([float(stamp) for stamp in expected])


def test_frames_that_damage_left_without_a_time_get_the_next_one(plain_clip, monkeypatch):
    real = decode_module.iterate_frames

    def without_some_times(*given):
        for number, frame in enumerate(real(*given)):
            frame.pts = None if number in (10, 11, 47) else frame.pts
            yield frame

    expected = decode(plain_clip)[1]
    monkeypatch.setattr(decode_module, "iterate_frames", without_some_times)
    assert decode(plain_clip)[1] == expected


def test_a_cut_between_packets_is_seen_in_the_index(tmp_path):
    path = clips.write_clip(tmp_path / "clean_cut.mp4", 240, container_options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        end = next(p.pos + p.size for number, p in enumerate(container.demux(video=0)) if number == 119)
    path.write_bytes(path.read_bytes()[:end])
    assert decode(path)[4].lost_s == pytest.approx(5.0, abs=0.2)


def test_damage_after_the_window_does_not_matter(tmp_path):
    path = clips.write_clip(tmp_path / "cut.mp4", 240, container_options={"movflags": "faststart"})
    clips.cut(path, 0.6)
    report = decode(path, Sampling("fps", fps=4, end_s=1.0), strict=True)[4]
    assert (report.num_frames_sampled, report.lost_s) == (4, 0)


def test_nothing_is_written_to_stderr(tmp_path, capfd):
    path = clips.rot(clips.write_clip(tmp_path / "rotten.mp4", 120, container_options={"movflags": "faststart"}))
    capfd.readouterr()
    with contextlib.suppress(VideoError):
        decoder = decode_frames(path, probe_video(path), NATIVE, SMALL)
        list(decoder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("index_first.mp4", {"container_options": {"movflags": "faststart"}}),
        ("short.mkv", {}),
        ("sound.mkv", {"audio": "last"}),
        ("short.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}),
        ("old.avi", {"codec": "mpeg4"}),
        ("flash.flv", {}),
    ],
)
def test_a_short_clip_cut_by_a_tenth_is_not_whole(tmp_path, name, options):
    """The loss is far below half a second, and the cut is between two packets, so nothing fails to decode."""
    path = clips.write_clip(tmp_path / name, 72, fps=30, **options)
    assert decode(path, strict=True)[4].lost_s == 0
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[64]])
    shown, *_, report = decode(path)
    assert len(shown) < 66 and report.lost_s == pytest.approx(8 / 30, abs=0.05)
    assert any("are lost" in note for note in report.notes)
    assert any("promises" in note for note in probe_video(path).notes)
    with pytest.raises(VideoError, match="damaged"):
        list(decode_frames(path, probe_video(path), NATIVE, SMALL, strict=True))


@pytest.mark.parametrize("name", ["slides.mkv", "slides.mp4", "slides.avi"])
def test_a_last_frame_that_stays_long_is_no_loss(tmp_path, name):
    """Few containers store how long the last frame is shown."""
    path = clips.write_clip(tmp_path / name, 6, fps=2, codec="mpeg4")
    assert decode(path, strict=True)[4].lost_s == 0


@pytest.mark.parametrize("made", [{"options": clips.X264_P_FRAMES}, {"codec": "mpeg4", "options": {"qmax": "3"}}])
def test_a_picture_that_is_damaged_inside_is_told_and_refused_if_strict(tmp_path, made):
    path = clips.write_clip(tmp_path / "inside.mp4", 48, **made)
    with av.open(str(path)) as container:
        at, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][20]
    data, part = bytearray(path.read_bytes()), slice(at + size * 2 // 5, at + size * 9 // 10)
    data[part] = bytes(part.stop - part.start)
    path.write_bytes(data)
    decoder = decode_frames(path, probe_video(path), NATIVE, SMALL)
    assert sum(len(batch.source_index) for batch in decoder) == 48
    assert decoder.report.lost_s == 0 and "damaged frames: 1" in decoder.report.notes
    with pytest.raises(VideoError, match=r"the frame at 0\.833 s is broken"):
        list(decode_frames(path, probe_video(path), NATIVE, SMALL, strict=True))


def test_frames_that_cannot_be_decoded_are_not_said_to_be_absent(tmp_path):
    path = clips.write_clip(tmp_path / "hole.mov", 48, codec="mjpeg", pix_fmt="yuvj420p", color_range=2)
    clips.blank_payloads(path, slice(24, 48))
    notes = decode(path, Sampling("count", count=8))[4].notes
    assert "8 frames requested, 4 returned: the others cannot be decoded" in notes
    whole = clips.write_clip(tmp_path / "short.mp4", 4)
    assert "8 frames requested, 4 returned: the clip has no more" in decode(whole, Sampling("count", count=8))[4].notes
