"""Decoding on a GPU gives the frames that decoding on the CPU gives, or says why it did not.

Without a GPU, a stand-in gives pictures as NVDEC does: those of the CPU's decoder, with their colours in one plane.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorTrc

from freres_cli.errors import ResourceError, UsageError, VideoError
from freres_cli.pipeline.checkpoints import _digest
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.records import FrameSize
from freres_cli.video import decode as decoding
from freres_cli.video import nvdec
from freres_cli.video.decode import decode_frames
from freres_cli.video.ending import UNNOTICED, tells_damage
from freres_cli.video.nvdec import REFUSED
from freres_cli.video.opening import open_video
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from freres_cli.video.still import read_planes
from tests import clips
from tests.decoding import NATIVE
from tests.runner import check_failure, run_freres

SIZE = FrameSize(48, 40, 1, 1)
SEMIPLANAR = {planar: written for written, planar in nvdec.PLANAR.items()} | {"yuvj420p": "nv12"}
GPU = 0


def as_nvdec(frame):
    """A picture of the CPU's decoder as NVDEC would have given it."""
    if frame is None:
        return None
    written = frame.reformat(format=SEMIPLANAR[frame.format.name], dst_color_range=frame.color_range, threads=1)
    written.time_base = frame.time_base
    return written


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that takes every video. Gives the videos that it was opened for."""
    opened = []

    def open_there(path, num_bytes=None, accelerator=None):
        if accelerator is not None:
            opened.append(accelerator)
        return open_video(path, num_bytes)

    monkeypatch.setattr(decoding, "choose_gpu", lambda ordinal: f"GPU {ordinal}")
    monkeypatch.setattr(decoding, "open_video", open_there)
    monkeypatch.setattr(decoding, "take_decoded", lambda _, frames: map(nvdec._with_planes, map(as_nvdec, frames)))
    return opened


def read(path, sampling=NATIVE, **options):
    """All batches of a file, and the report."""
    decoder = decode_frames(path, probe_video(path), sampling, SIZE, **options)
    return list(decoder), decoder.report


def check_same(path, notes=(UNNOTICED,), **options):
    """Frames, times and pixels of both are equal; the report as well, but for ``notes``."""
    (own, report), (others, other) = read(path, gpu=GPU, **options), read(path, **options)
    for mine, theirs in zip(own, others, strict=True):
        assert torch.equal(mine.pixels, theirs.pixels)
        assert (mine.pts_seconds, mine.source_index) == (theirs.pts_seconds, theirs.source_index)
        assert mine.picture_index == theirs.picture_index
    assert report.notes == (*notes, *other.notes)
    assert (report.num_pictures, report.num_frames_sampled, report.lost_s) == (
        other.num_pictures,
        other.num_frames_sampled,
        other.lost_s,
    )


KINDS = {
    "h264": {},
    "full range": {"pix_fmt": "yuvj420p", "color_range": 2},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_the_cpu(tmp_path, gpu, kind):
    check_same(clips.write_clip(tmp_path / "clip.mp4", **KINDS[kind]))
    assert gpu == ["GPU 0"]


@pytest.mark.parametrize(
    "sampling", [Sampling("native", start_s=1.4), Sampling("count", count=5), Sampling("fps", fps=3)]
)
def test_sampled_frames_are_those_of_the_cpu(tmp_path, gpu, sampling):
    options = {**clips.X264_B_FRAMES, "g": "8"}
    check_same(clips.write_clip(tmp_path / "clip.mp4", options=options), sampling=sampling, still_levels=2)


def test_a_turned_picture_is_turned(tmp_path, gpu):
    check_same(clips.rotate_mp4(clips.write_clip(tmp_path / "turned.mp4"), 90))


@pytest.mark.parametrize(("planar", "largest"), [("yuv420p", 255), ("yuv422p", 255), ("yuv420p10le", 1023)])
@pytest.mark.parametrize("color_range", [0, 1, 2])
def test_samples_are_moved_and_not_changed_and_keep_their_tags(planar, largest, color_range):
    frame = av.VideoFrame(322, 178, planar)
    drawn = np.random.default_rng(0)
    for plane in frame.planes:
        dtype = np.uint8 if largest == 255 else np.uint16
        samples = drawn.integers(0, largest + 1, plane.buffer_size // dtype().itemsize, dtype=dtype)
        plane.update(samples.tobytes())
    frame.pts, frame.time_base, frame.color_range = 7, Fraction(1, 24), color_range
    frame.color_trc, frame.color_primaries, frame.colorspace = ColorTrc.SMPTE2084, ColorPrimaries.BT2020, 9
    back = nvdec._with_planes(as_nvdec(frame))
    (mine, bits), (theirs, others) = read_planes(back), read_planes(frame)
    assert bits == others and back.pts == 7 and back.color_range == color_range
    assert (back.time_base, back.color_trc, back.color_primaries, back.colorspace) == (
        frame.time_base,
        ColorTrc.SMPTE2084,
        ColorPrimaries.BT2020,
        9,
    )
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("numbers", [slice(20, 22), slice(0, 2)])
def test_damage_that_is_noticed_is_treated_as_on_the_cpu(tmp_path, gpu, numbers):
    path = clips.write_clip(tmp_path / "clip.mp4", options=clips.X264_P_FRAMES)
    check_same(clips.blank_payloads(path, numbers))
    assert gpu == ["GPU 0"], "what is read again is read on the CPU"


def test_a_video_that_the_gpu_refuses_is_decoded_on_the_cpu_and_told(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(decoding, "take_decoded", nvdec.take_decoded)
    path = clips.write_clip(tmp_path / "clip.mp4", options={**clips.X264_B_FRAMES, "g": "8"})
    check_same(path, (REFUSED,))
    assert gpu == ["GPU 0"]
    check_same(path, (REFUSED,), sampling=Sampling("native", start_s=1.4))


def stream_with(codec="h264", name=nvdec.KIND, width=64, height=48, is_hwaccel=True):
    context = SimpleNamespace(
        codec=SimpleNamespace(canonical_name=codec),
        format=SimpleNamespace(name=name),
        width=width,
        height=height,
        is_hwaccel=is_hwaccel,
    )
    return SimpleNamespace(codec_context=context)


@pytest.mark.parametrize(
    ("stream", "first", "is_taken"),
    [
        (stream_with(), av.VideoFrame(64, 48, "nv12"), True),
        (stream_with(), av.VideoFrame(64, 48, "yuv444p"), True),
        (stream_with("mpeg4"), av.VideoFrame(64, 48, "nv12"), False),
        (stream_with(name="yuv420p"), av.VideoFrame(64, 48, "yuv420p"), False),
        (stream_with(is_hwaccel=False), av.VideoFrame(64, 48, "nv12"), False),
        (stream_with(), av.VideoFrame(64, 48, "p016le"), False),
        (stream_with(width=60), av.VideoFrame(64, 48, "nv12"), False),
        (stream_with(), None, False),
    ],
    ids=["8 bits", "4:4:4", "inexact codec", "refused", "no decoder", "other samples", "cropped", "damaged"],
)
def test_only_what_equals_the_cpu_is_taken(stream, first, is_taken):
    later = av.VideoFrame(64, 48, "nv12")
    later.time_base = Fraction(1, 24)
    if first is not None:
        first.time_base = Fraction(1, 24)
    taken = nvdec.take_decoded(stream, iter([first, later, None]))
    assert (taken is not None) == is_taken
    if taken is not None:
        formats = [frame and frame.format.name for frame in taken]
        assert formats == ["yuv444p" if first.format.name == "yuv444p" else "yuv420p", "yuv420p", None]


# How film grain is to be drawn, as a message of H.264 (SEI, payload 19): additive, of the luma alone.
GRAIN = bytes.fromhex("0000000106130a00a00200ff019010082880")


def grainy_frames(**options):
    """Decoded pictures of one grey, before each of which the stream describes grain."""
    writer = av.CodecContext.create("libx264", "w")
    writer.width, writer.height, writer.pix_fmt, writer.time_base = 320, 256, "yuv420p", Fraction(1, 25)
    writer.options = {"bf": "0", "x264-params": "log-level=none:repeat-headers=0"}
    writer.flags |= av.codec.context.Flags.global_header
    picture = av.VideoFrame.from_ndarray(np.full((384, 320), 128, np.uint8), format="yuv420p")
    packets = []
    for number in range(3):
        picture.pts, picture.time_base = number, writer.time_base
        packets += writer.encode(picture)
    packets += writer.encode(None)
    reader = av.CodecContext.create("h264", "r")
    reader.options = options
    headers = bytes(writer.extradata)
    frames = [frame for packet in packets for frame in reader.decode(av.Packet(headers + GRAIN + bytes(packet)))]
    return [*frames, *reader.decode(None)]


def test_grain_that_only_the_cpu_adds_is_left_to_the_cpu():
    added, described = grainy_frames(), grainy_frames(export_side_data="film_grain")
    assert len(added) == len(described) == 3
    assert [bool(np.ptp(read_planes(frame)[0][0])) for frame in added] == [True] * 3
    assert not any(np.ptp(read_planes(frame)[0][0]) for frame in described), "FFmpeg leaves it out beside a GPU"
    assert [nvdec._with_planes(frame) for frame in described] == [None] * 3
    for frame, is_taken in ((described[0], False), (added[0], True)):
        first = SimpleNamespace(format=SimpleNamespace(name="nv12"), width=320, height=256, side_data=frame.side_data)
        assert (nvdec.take_decoded(stream_with(width=320, height=256), iter([first])) is not None) == is_taken


def test_a_gpu_that_cannot_take_another_file_is_no_fault_of_the_file(tmp_path, gpu, monkeypatch):
    def open_there(path, num_bytes=None, accelerator=None):
        if accelerator is not None:
            gpu.append(accelerator)
            raise VideoError(f"{path}: not a video that FFmpeg can read: Operation not permitted")
        return open_video(path, num_bytes)

    monkeypatch.setattr(decoding, "open_video", open_there)
    check_same(clips.write_clip(tmp_path / "clip.mp4"), (REFUSED,))
    assert gpu == ["GPU 0"]


def test_what_was_decoded_is_in_the_bundle_and_the_bundle_is_else_the_same(tmp_path, gpu):
    path = clips.write_clip(tmp_path / "clip.mp4", size=(96, 96))
    made = [Compressor(budget_tokens=64, decode=name).compress(path) for name in ("gpu", "cpu")]
    assert torch.equal(*(bundle.tokens().latents for bundle in made))
    assert UNNOTICED in made[0].notes and UNNOTICED not in made[1].notes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_an_error(tmp_path):
    path, out = clips.write_clip(tmp_path / "clip.mp4"), tmp_path / "x.pt"
    with pytest.raises(ResourceError, match="cannot decode on GPU 0"):
        nvdec.choose_gpu(0)
    result = run_freres("compress", str(path), "--decode", "gpu", "-o", str(out))
    check_failure(result, 6, "cannot decode on GPU 0")
    assert "decode on the CPU" in result.err
    assert not list(tmp_path.glob("*x.pt*"))
    # Of many videos, one line: not one for each.
    for verb in ("compress", "batch"):
        result = run_freres(verb, str(path), str(path), "--decode", "gpu", "-o", str(tmp_path / verb))
        assert result.status == 6 and len(result.errors) == 1 and "cannot decode on GPU 0" in result.errors[0], (
            result.err
        )
        assert not list((tmp_path / verb).glob("*.pt"))


def test_other_names_and_strictness_are_refused():
    with pytest.raises(UsageError, match="expected one of cpu, gpu, got tpu"):
        Compressor(decode="tpu")
    with pytest.raises(UsageError, match="strict: the GPU does not notice"):
        Compressor(decode="gpu", strict=True)


def test_the_gpu_of_the_model_decodes_or_else_the_first():
    options = Compressor(decode="gpu").options
    assert options.decoding_gpu == 0 and Compressor().options.decoding_gpu is None
    there = replace(options.model, device=replace(options.model.device, name="cuda:3"))
    assert replace(options, model=there).decoding_gpu == 3


def test_a_bundle_or_a_state_of_the_gpu_is_not_taken_for_a_strict_one(tmp_path, gpu):
    path = clips.write_clip(tmp_path / "clip.mp4")
    compressor = Compressor(budget_tokens=64, decode="gpu")
    bundle = compressor.compress(path)
    assert tells_damage(bundle.notes)
    source, encoder = VideoSource(path), compressor.models.encoder
    plan = compressor.plan(path)
    digests = {_digest(source, options, plan, encoder) for options in (compressor.options, Compressor().options)}
    assert len(digests) == 2


REAL_KINDS = {
    **KINDS,
    "odd size": {"size": (322, 178)},
    "hevc, 10 bits": {**KINDS["hevc"], "pix_fmt": "yuv420p10le"},
    "vp8": {"codec": "libvpx"},
    "vp9": {"codec": "libvpx-vp9"},
    "grey": {"pix_fmt": "gray"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", REAL_KINDS)
@pytest.mark.parametrize("start_s", [None, 1.4])
def test_a_real_gpu_gives_the_frames_of_the_cpu(tmp_path, kind, start_s):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        ctypes.CDLL(nvdec.DECODER)
    except OSError as error:
        pytest.skip(f"the driver cannot decode: {error}")
    nvdec.choose_gpu(GPU)
    # No GPU takes pictures as small as those of the other tests.
    suffix = "mkv" if kind.startswith("vp") else "mp4"
    path = clips.write_clip(tmp_path / f"clip.{suffix}", **{"size": (320, 256), **REAL_KINDS[kind]})
    sampling = Sampling("native", start_s=start_s)
    is_taken = read(path, gpu=GPU)[1].notes[0] == UNNOTICED
    # Some kinds are not of every GPU. These are.
    assert is_taken or kind not in KINDS
    check_same(path, (UNNOTICED,) if is_taken else (REFUSED,), sampling=sampling)
