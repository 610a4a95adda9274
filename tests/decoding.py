"""Shared by the decoding tests: a plain clip, and decoding a whole file into the numbers that its frames show."""

from __future__ import annotations

import pytest
import torch

from freres_cli.records import FrameSize
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from tests import clips

SMALL = FrameSize(32, 32, 1, 1)
NATIVE = Sampling("native")


def decode(path, sampling=NATIVE, size=SMALL, stream=None, **options):
    """All frames of a file: numbers shown, times, source indices, pixels, report."""
    decoder = decode_frames(path, probe_video(path, stream), sampling, size, **options)
    batches = list(decoder)
    pixels = torch.cat([batch.pixels for batch in batches])
    times = [t for batch in batches for t in batch.pts_seconds]
    indices = [i for batch in batches for i in batch.source_index]
    return clips.read_indices(pixels), times, indices, pixels, decoder.report


@pytest.fixture(scope="module")
def plain_clip(tmp_path_factory):
    """48 frames at 24 fps, H.264 with B-frames."""
    return clips.write_clip(tmp_path_factory.mktemp("clips") / "plain.mp4")
