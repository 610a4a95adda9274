"""Decoding, resizing and the tower run at the same time: same results, bounded memory, and no thread is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
import torch

from freres_cli.errors import BackboneError, VideoError
from freres_cli.pipeline import compressor
from freres_cli.pipeline.ahead import read_ahead
from freres_cli.pipeline.compressor import Compressor
from freres_cli.records import FrameSize
from freres_cli.video import resizing
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from tests import clips
from tests.loaded_models import Wrapped, loaded_models, models_with


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.write_clip(tmp_path_factory.mktemp("overlap") / "clip.mp4", 200)


def running():
    """The threads of the pipeline. Those of pytest and of torch are not ours."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "resize"))]


def test_items_come_in_order_and_an_error_in_its_place():
    def items():
        yield from range(3)
        raise VideoError("broken")

    seen = []
    with pytest.raises(VideoError, match="broken"):
        for item in read_ahead(items(), 2):
            time.sleep(0.02)  # the error is known long before the items in front of it are used
            seen.append(item)
    assert seen == [0, 1, 2] and not running()
    assert list(read_ahead(range(50), 3)) == list(range(50)) and list(read_ahead([], 1)) == []


def test_no_more_items_than_allowed_are_made_ahead():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    with closing(read_ahead(items(), 3)) as ahead:
        for number in ahead:
            time.sleep(0.02)  # a slow consumer
            assert len(made) <= number + 4
    assert len(made) == 20


def test_closing_ends_the_thread_and_closes_the_items():
    closed = []

    def items():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 0 and len(running()) == 1
    ahead.close()
    assert closed == [True] and not running()


@pytest.mark.parametrize(
    "options", [{}, {"pix_fmt": "yuv420p10le"}, {"size": (90, 52)}], ids=["8 bit", "10 bit", "odd"]
)
def test_threads_do_not_change_a_pixel(tmp_path, monkeypatch, options):
    path = clips.write_clip(tmp_path / "c.mp4", 40, **options)

    def read(num_threads):
        monkeypatch.setattr(resizing, "MOST_RESIZE_THREADS", num_threads)
        monkeypatch.setattr(resizing.os, "cpu_count", lambda: num_threads)
        return list(decode_frames(path, probe_video(path), Sampling("native"), FrameSize(34, 50, 1, 1), 7))

    one, many = read(1), read(4)
    assert [len(batch.pts_seconds) for batch in one] == [7] * 5 + [5]
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert (a.pts_seconds, a.source_index, a.picture_index) == (b.pts_seconds, b.source_index, b.picture_index)


class StoppingTower(Wrapped):
    """Stops at its second batch, while the next ones are being read."""

    def __init__(self, inner, error):
        super().__init__(inner)
        self.error, self.num_batches = error, 0

    def encode(self, pixels):
        self.num_batches += 1
        if self.num_batches == 2:
            raise self.error
        return self.inner.encode(pixels)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), BackboneError("the tower")], ids=type)
def test_a_tower_that_stops_leaves_no_thread(clip, error):
    models = models_with(encoder=StoppingTower(loaded_models().encoder, error))
    with pytest.raises(type(error)):
        Compressor(models=models).compress(clip)
    assert not running()


@pytest.mark.parametrize("method", ["fre-res", "adaptive", "uniform"])
def test_a_reader_that_fails_gives_its_own_error_and_leaves_no_thread(clip, monkeypatch, method):
    convert, count = resizing.Resizer.convert, []

    def fail(self, frame):
        count.append(1)
        if len(count) > 100:
            raise VideoError("a frame cannot be converted")
        return convert(self, frame)

    monkeypatch.setattr(resizing.Resizer, "convert", fail)
    with pytest.raises(VideoError, match="cannot be converted"):
        Compressor(models=loaded_models(), method=method).compress(clip)
    assert not running()


def test_a_method_that_fails_leaves_no_thread(clip, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("freres_cli.method.adaptive.StretchCompressor.push", fail)
    with pytest.raises(Exception, match="out of memory"):
        Compressor(models=loaded_models()).compress(clip)
    assert not running()


@pytest.mark.parametrize(("long_frames", "calls"), [(7, 1), (8, 0)])
def test_only_a_long_video_gives_freed_memory_back(clip, monkeypatch, long_frames, calls):
    found = []
    monkeypatch.setattr(compressor, "LONG_FRAMES", long_frames)
    monkeypatch.setattr(compressor, "return_large_memory", lambda: found.append(1))
    Compressor(models=loaded_models(), sample_count=8).compress(clip)
    assert len(found) == calls


INTERRUPTED = """
import os, signal, sys
name = sys.argv.pop()
from freres_cli.cli.app import main
from freres_cli.backbones.vision import FrameEncoder
encode, count = FrameEncoder.encode, []
def stop(self, pixels):
    count.append(1)
    if len(count) == 2:
        os.kill(os.getpid(), getattr(signal, name))
    return encode(self, pixels)
FrameEncoder.encode = stop
# A shell starts jobs in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["freres", "compress", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_encoding_ends_the_run(clip, tmp_path, name, status):
    command = [sys.executable, "-c", INTERRUPTED, str(clip), "-q", "-o", str(tmp_path / "b.pt"), name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (status, "") and not list(tmp_path.iterdir())
