"""Frames in which nothing moved: they pass neither the resize nor the tower, and nothing else changes."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from freres_cli.records import FrameSize
from freres_cli.video.decode import decode_frames
from freres_cli.video.frames import FrameArray
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from freres_cli.video.still import StillDetector, read_planes
from tests import clips
from tests.runner import run_freres

SIZE = FrameSize(32, 32, 1, 1)
# Not 10 bits: swscale's conversion to them is not the same each time.
LOSSLESS = [("libx264", "yuv420p", {"qp": "0"}), ("ffv1", "yuv444p", {}), ("ffv1", "bgr0", {})]


def slides(repeats, width=64, height=64):
    """Pictures that show 0, 1, 2 and so on, each ``repeats[i]`` times."""
    return [clips.draw_index(i, width, height) for i, count in enumerate(repeats) for _ in range(count)]


def picture_indices(source):
    return [i for batch in source for i in batch.picture_index]


@pytest.mark.parametrize(("codec", "pix_fmt", "options"), LOSSLESS)
def test_equal_frames_count_as_the_first_of_them(tmp_path, codec, pix_fmt, options):
    if not clips.has_encoder(codec):
        pytest.skip(f"no encoder {codec}")
    # 70 samples wide: rows are padded, and what the padding holds is not compared.
    path = clips.write_clip(
        tmp_path / "slides.mkv",
        pictures=slides([3, 1, 4], 70, 64),
        size=(70, 64),
        codec=codec,
        pix_fmt=pix_fmt,
        options=options,
    )
    decoder = decode_frames(path, probe_video(path), Sampling("native"), SIZE, batch_frames=2)
    batches = list(decoder)
    assert [i for b in batches for i in b.picture_index] == [0, 0, 0, 3, 4, 4, 4, 4]
    assert [i for b in batches for i in b.source_index] == list(range(8))
    assert clips.read_indices(torch.cat([b.pixels for b in batches])) == [0, 0, 0, 1, 2, 2, 2, 2]
    assert (decoder.report.num_pictures, decoder.report.notes) == (3, ())


@pytest.mark.parametrize("pix_fmt", ["bgr0", "rgb24", "yuyv422", "yuv420p", "nv12", "gray", "yuv420p10le"])
def test_every_visible_sample_is_compared(pix_fmt):
    """A change of the last pixel is seen in any layout of the samples."""
    picture = np.zeros((16, 38, 3), np.uint8)
    moved = picture.copy()
    moved[-2:, -2:] = 255
    frames = [av.VideoFrame.from_ndarray(each, format="rgb24").reformat(format=pix_fmt) for each in (picture, moved)]
    detector = StillDetector(0)
    assert [detector.is_still(*read_planes(frame)) for frame in (*frames, frames[1])] == [False, False, True]


def test_frames_of_an_array_count_likewise():
    array = FrameArray(np.stack(slides([2, 3])), range(5))
    batches = array.open(SIZE, 2)
    assert picture_indices(batches) == [0, 0, 2, 2, 2] and batches.report.num_pictures == 2
    assert clips.read_indices(torch.cat([b.pixels for b in batches])) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("bits", [8, 10])
def test_the_bound_is_on_the_largest_difference_in_levels_of_eight_bits(bits):
    dtype, level = (np.uint8, 1) if bits == 8 else (np.uint16, 4)
    first = np.full((4, 6), 2 * level, dtype)
    for change, levels, is_still in [(2, 2, True), (3, 2, False), (-2, 2, True), (-2, 1, False), (0, 0, True)]:
        detector = StillDetector(levels)
        moved = first.copy()
        moved[1, 2] = int(first[1, 2]) + change * level
        assert not detector.is_still([first], bits)
        assert detector.is_still([moved], bits) == is_still


def test_slow_drift_is_seen():
    detector = StillDetector(2)
    still = [detector.is_still([np.full((2, 2), level, np.uint8)]) for level in range(9)]
    assert still == [False, True, True, False, True, True, False, True, True]


def test_a_change_of_size_is_no_still_frame():
    detector = StillDetector(64)
    assert not detector.is_still([np.zeros((2, 2), np.uint8)]) and not detector.is_still([np.zeros((2, 3), np.uint8)])


def test_compress_says_how_many_frames_were_encoded(tmp_path):
    """With the bound at 0 the bundle is what it would be if every frame were encoded; above 0 a note says what was not."""
    path = clips.write_clip(tmp_path / "slides.mp4", pictures=slides([6, 6]), options={"qp": "0"})
    for levels, notes in (
        (0, []),
        (8, ["10 of 12 frames moved by at most 8 levels and were not encoded"]),
    ):
        run = run_freres("compress", path, "-o", tmp_path / f"{levels}.pt", "--set", f"still_levels={levels}", "--json")
        made = run.json
        assert run.status == 0 and made["encoded_tokens"] * 6 == made["full_tokens"]
        assert [note for note in made["notes"] if "not encoded" in note] == notes


def test_frames_from_python_say_so_too():
    frames = FrameArray(np.stack([np.full((64, 64, 3), level, np.uint8) for level in (0, 1, 2, 9)]), [0, 0.1, 0.2, 0.3])
    notes = {levels: frames.open(SIZE, 2, levels).report.notes for levels in (0, 2)}
    assert notes == {0: (), 2: ("2 of 4 frames moved by at most 2 levels and were not encoded",)}


def test_a_palette_is_compared_by_the_colours_it_stands_for():
    grey = np.stack([np.arange(256, dtype=np.uint8)] * 3 + [np.full(256, 255, np.uint8)], axis=1)
    pictures = [np.zeros((16, 38), np.uint8), np.zeros((16, 38), np.uint8)]
    pictures[1][-1, -1] = 200
    faded = grey.copy()
    faded[0, :3] = 9
    frames = [av.VideoFrame.from_ndarray(each, format="pal8") for each in ((pictures[0], grey), (pictures[1], grey))]
    frames.append(av.VideoFrame.from_ndarray((pictures[1], faded), format="pal8"))
    detector = StillDetector(0)
    assert [detector.is_still(*read_planes(frame)) for frame in (*frames, frames[2])] == [False, False, False, True]


def test_rows_stored_from_the_bottom_up(tmp_path):
    """Uncompressed AVI as Windows writes it: the height in its header is above zero, and FFmpeg's rows run backwards."""
    pictures = slides([2, 3])
    path = clips.write_clip(tmp_path / "dib.avi", pictures=pictures, codec="rawvideo", pix_fmt="bgr24")
    content = bytearray(path.read_bytes())
    place = content.index(b"strf") + 8 + 8
    assert int.from_bytes(content[place : place + 4], "little", signed=True) == -64
    content[place : place + 4] = (64).to_bytes(4, "little")
    path.write_bytes(content)
    size = FrameSize(64, 64, 1, 1)
    batches = list(decode_frames(path, probe_video(path), Sampling("native"), size, batch_frames=2))
    assert picture_indices(batches) == [0, 0, 2, 2, 2]
    for pixels, picture in zip(torch.cat([b.pixels for b in batches]), pictures, strict=True):
        assert np.abs(pixels.numpy().astype(int) - picture[::-1].astype(int)).max() <= 1


@pytest.mark.parametrize("pix_fmt", ["monob", "monow"])
def test_the_last_samples_of_a_row_that_fills_no_byte(pix_fmt):
    picture = np.zeros((16, 38, 3), np.uint8)
    moved = picture.copy()
    moved[-1, -1] = 255
    frames = [av.VideoFrame.from_ndarray(each, format="rgb24").reformat(format=pix_fmt) for each in (picture, moved)]
    detector = StillDetector(0)
    assert [detector.is_still(*read_planes(frame)) for frame in (*frames, frames[1])] == [False, False, True]


def test_given_frames_at_other_times_are_another_video():
    pixels = np.zeros((2, 8, 4, 3), np.uint8)
    others = [(pixels, [0, 1]), (pixels, [0, 2]), (pixels + 1, [0, 1]), (pixels.reshape(2, 4, 8, 3), [0, 1])]
    assert len({FrameArray(*own).sha256 for own in others}) == 4


# Colours that are far apart, and whose bytes are near each other where they are no samples.
APART = {
    **dict.fromkeys(
        ["gray", "yuv420p", "yuv420p10le", "gbrp16le", "gbrpf32le", "rgb48be", "x2rgb10le"], (255, 255, 255)
    ),
    "rgb565le": (0, 64, 0),
    "rgb8": (0, 0, 85),
    "bgr8": (85, 0, 0),
}


@pytest.mark.parametrize("pix_fmt", APART)
def test_the_bound_is_one_of_levels_in_every_layout(pix_fmt):
    dark, light = (
        av.VideoFrame.from_ndarray(np.full((16, 32, 3), colour, np.uint8), format="rgb24").reformat(format=pix_fmt)
        for colour in ((0, 0, 0), APART[pix_fmt])
    )
    detector = StillDetector(2)
    assert [detector.is_still(*read_planes(frame, 2)) for frame in (dark, light, light, dark)] == [
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("pix_fmt", "byte"), [("monob", 0x01), ("gray16be", 0x01)])
def test_the_bound_is_one_of_levels_where_one_bit_is_a_change(pix_fmt, byte):
    """The last pixel of each eight; the upper byte of each sample, which comes first, one level of 255."""
    frames = []
    for value in (0, byte):
        frame = av.VideoFrame(32, 16, pix_fmt)
        row = bytes([value]) * frame.planes[0].line_size if pix_fmt == "monob" else bytes([8 * value, 0]) * 32
        frame.planes[0].update(row.ljust(frame.planes[0].line_size, b"\0") * 16)
        frames.append(frame)
    detector = StillDetector(2)
    assert [detector.is_still(*read_planes(frame, 2)) for frame in frames] == [False, False]
