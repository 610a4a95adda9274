"""Small pictures of a video: the same ones wherever reading begins."""

from __future__ import annotations

import itertools

import pytest

from freres_cli.video import thumbnails
from freres_cli.video.probe import probe_video
from tests import clips

COUNT, FPS = 120, 24
X264 = {"bf": "2", "g": "12", "preset": "ultrafast", "threads": "1"}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Five seconds, in which decoding can begin twice a second."""
    return clips.write_clip(tmp_path_factory.mktemp("video") / "v.mp4", COUNT, fps=FPS, options=X264)


@pytest.fixture
def num_read(monkeypatch):
    """How many frames the last call read."""
    counted, real = [0], thumbnails.decode_frames

    def counting(*arguments):
        counted[0] = 0
        for batch in real(*arguments):
            counted[0] += len(batch.pts_seconds)
            yield batch

    monkeypatch.setattr(thumbnails, "decode_frames", counting)
    return counted


def test_pictures_are_the_same_wherever_reading_begins(video, num_read):
    info = probe_video(video)
    seconds = [place / 7 for place in range(35)]
    whole = thumbnails.make_thumbnails(video, info, seconds)
    assert len(set(whole)) == len(seconds) and num_read[0] > COUNT - FPS
    for first in (1, 6, 17, 30, 34):
        assert thumbnails.make_thumbnails(video, info, seconds[first:]) == whole[first:]
        assert num_read[0] <= COUNT - int(seconds[first] * FPS)


def test_times_between_before_and_after_frames_have_the_one_on_screen(video):
    info = probe_video(video)
    times = [number / FPS for number in range(COUNT)]
    frames = thumbnails.make_thumbnails(video, info, times)
    for number in (0, 1, 50, COUNT - 1):
        for offset in (0.0, 0.0005, 0.5 / FPS):
            assert thumbnails.make_thumbnails(video, info, [times[number] + offset]) == [frames[number]]
    assert thumbnails.make_thumbnails(video, info, [-1.0, 99.0]) == [frames[0], frames[-1]]
    assert thumbnails.make_thumbnails(video, info, [98.0, 99.0]) == [frames[-1]] * 2
    assert all(one != other for one, other in itertools.pairwise(frames))
