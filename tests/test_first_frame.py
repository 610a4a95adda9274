"""Times count from the first frame of a file, whatever its own clock says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freres_cli.backbones.qwen3_vl import TimestampLanguageModel
from freres_cli.backbones.smolvlm import SmolVLMLanguageModel
from freres_cli.bundle.store import read_bundle
from freres_cli.pipeline.compressor import Compressor
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.thumbnails import make_thumbnails
from tests import clips
from tests.decoding import NATIVE, SMALL
from tests.loaded_models import loaded_models
from tests.runner import run_freres

START = 26000.3
FLAGS = ("--fps", 4, "--budget", 60, "--json")
CHOICES = ("--choices", "a|b", "--where", "--json")


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """A file whose clock starts late. The same packets without that are beside it."""
    return clips.write_shifted(tmp_path_factory.mktemp("shifted") / "late.mkv", START)


@pytest.fixture(scope="module")
def plain(shifted):
    return shifted.with_name("source_late.mp4")


@pytest.fixture(scope="module")
def shown(shifted, plain, tmp_path_factory):
    """What inspect and ask --where say of each, and the times in each bundle."""
    folder, said = tmp_path_factory.mktemp("bundles"), {}
    for name, video in (("late", shifted), ("plain", plain)):
        bundle = folder / f"{name}.pt"
        assert run_freres("compress", video, "--method", "fre-res", *FLAGS, "-o", bundle).status == 0
        inspected = run_freres("inspect", bundle, "--tokens", "--json").json
        said[name] = (
            inspected,
            run_freres("ask", bundle, "where?", *CHOICES).json["where"]["spans"],
            read_bundle(bundle),
        )
    return said


def prompt_lines(model, seconds):
    """The text that a family writes around frames at these times."""
    lines: list[str] = []

    def take(texts):
        lines.extend([texts] if isinstance(texts, str) else texts)
        return [[0]] * len(texts)

    stub = SimpleNamespace(ids_of_each=take, ids_of=take, config=SimpleNamespace(vision_start_token_id=1))
    stub.config.vision_end_token_id = 2
    model.frame_texts(stub, SimpleNamespace(frame_seconds=torch.tensor(seconds, dtype=torch.float64)))
    return lines


def test_a_late_clock_changes_no_time_that_is_told(shown):
    (late, where, bundle), (plain, plain_where, plain_bundle) = shown["late"], shown["plain"]
    assert bundle.manifest["source"]["start_s"] == pytest.approx(START, abs=2e-3)
    ends, expected = ([span["end_s"] for span in spans] for spans in (where, plain_where))
    assert where[0]["start_s"] == 0 and ends == pytest.approx(expected, abs=2e-3)
    assert late["over_time"]["edges_s"] == pytest.approx(plain["over_time"]["edges_s"], abs=2e-3)
    for table, time in (("gops", "start_s"), ("tokens", "seconds")):
        told, expected = ([row[time] for row in document[table]] for document in (late, plain))
        assert told == pytest.approx(expected, abs=2e-3)
    assert bundle.content.frame_seconds.tolist() == pytest.approx(plain_bundle.content.frame_seconds.tolist(), abs=2e-3)


@pytest.mark.parametrize("model", [TimestampLanguageModel, SmolVLMLanguageModel])
def test_a_prompt_has_no_clock_of_the_file(shown, model):
    lines = [prompt_lines(model, shown[name][2].content.frame_seconds.tolist()) for name in ("late", "plain")]
    assert lines[0] == lines[1]


def test_whole_seconds_are_whole_whatever_the_clock(tmp_path):
    """1.4 - 0.4 is below 1 in binary, and a family that writes whole seconds would write 0."""
    pts = [400 + 1000 * k for k in range(4)]
    path = clips.write_clip(tmp_path / "late.mkv", 4, pts=pts, time_base=clips.Fraction(1, 1000))
    times = [t for batch in decode_frames(path, probe_video(path), NATIVE, SMALL) for t in batch.pts_seconds]
    assert times == [0, 1, 2, 3]


def test_a_window_counts_from_the_first_frame_too(shifted):
    bundle = Compressor(models=loaded_models(), sample_fps=4, budget_tokens=60).compress(shifted, start_s=1.0)
    assert float(bundle.content.frame_seconds[0]) == pytest.approx(1, abs=2e-3)


def test_frames_keep_the_times_they_are_given():
    frames = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    bundle = Compressor(models=loaded_models(), budget_tokens=20).compress(frames, seconds=[10.0, 11.0, 12.0])
    assert bundle.content.frame_seconds.tolist() == [10, 11, 12]
    assert bundle.manifest["source"]["zero_s"] == 0 and bundle.manifest["source"]["start_s"] == 10


def test_thumbnails_are_of_times_after_the_first_frame(shifted, plain):
    for seconds in ([0.0, 0.5, 1.9], [1.5]):
        late, expected = (make_thumbnails(path, probe_video(path), seconds) for path in (shifted, plain))
        assert late == expected
