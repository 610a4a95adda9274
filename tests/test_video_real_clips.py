"""Decoding real files, if the folder of clips exists."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from freres_cli.errors import VideoError
from freres_cli.records import FrameSize
from freres_cli.video.decode import decode_frames
from freres_cli.video.opening import hash_file
from freres_cli.video.packets import read_packet_table
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling, num_sampled_frames

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "videos"
NOT_VIDEOS = {
    "bunny_audio_only.m4a": "has no video stream, only audio",
    "empty.mp4": "the file is empty",
    "not_a_video.mp4": "not a video",
}
SIZE = FrameSize(32, 32, 1, 1)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no folder of real clips")


def _names() -> list[str]:
    kinds = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".h264"}
    files = [f for f in sorted(FOLDER.rglob("*")) if f.suffix in kinds and f.name not in NOT_VIDEOS]
    return [str(f.relative_to(FOLDER)) for f in files]


def _ffprobe_times(path: Path) -> list[float]:
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries"]
    command += ["frame=best_effort_timestamp_time", "-of", "json", str(path)]
    frames = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["frames"]
    return [float(f["best_effort_timestamp_time"]) for f in frames if "best_effort_timestamp_time" in f]


# The longest by far takes as long as all others.
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "screen.mp4" else ()) for name in _names()]


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_is_given_with_its_time(name):
    path = FOLDER / name
    info = probe_video(path)
    decoder = decode_frames(path, info, Sampling("native"), SIZE, strict=True)
    times, indices = [], []
    for batch in decoder:
        times += batch.pts_seconds
        indices += batch.source_index
    assert indices == list(range(info.num_packets))
    assert all(a < b for a, b in pairwise(times))
    assert times[0] == 0 and times[-1] < info.duration_s
    assert decoder.report.lost_s == 0
    if shutil.which("ffprobe") and info.has_timestamps:
        assert [info.start_s + t for t in times] == pytest.approx(_ffprobe_times(path), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_frames_are_those_on_screen(name):
    path = FOLDER / name
    info = probe_video(path)
    stamps = read_packet_table(str(path), info.stream_index, info.num_bytes).stamps_s
    sampling = Sampling("fps", fps=3)
    decoder = decode_frames(path, info, sampling, SIZE)
    indices = [i for batch in decoder for i in batch.source_index]
    expected = [
        max((i for i, t in enumerate(stamps) if t <= info.start_s + k / 3 + 1e-3), default=0)
        for k in range(num_sampled_frames(sampling, info.start_s, info.duration_s, info.num_packets))
    ]
    assert indices == expected


def test_frame_counts_and_hashes_are_those_of_the_manifest():
    for entry in json.loads((FOLDER / "manifest.json").read_text()):
        path = FOLDER / entry["file"]
        assert probe_video(path).num_packets == entry["frames_decoded"], entry["file"]
        assert hash_file(path) == entry["sha256"], entry["file"]


@pytest.mark.parametrize("name", NOT_VIDEOS)
def test_files_that_are_not_videos_are_refused(name):
    with pytest.raises(VideoError, match=NOT_VIDEOS[name]):
        probe_video(FOLDER / "tech" / name)


def test_known_oddities_are_reported():
    assert "header promises 444 frames, the file holds 68" in probe_video(FOLDER / "tree.avi").notes
    assert probe_video(FOLDER / "stove_dog.mp4").rotation_deg == 180
    assert probe_video(FOLDER / "screen.mp4").start_s == pytest.approx(0.3)
    assert probe_video(FOLDER / "tech" / "real_non_zero_start.mp4").start_s == pytest.approx(8.33, abs=0.01)
    carphone = probe_video(FOLDER / "carphone.mp4")
    assert (carphone.width_px, carphone.coded_width_px) == (193, 176)
