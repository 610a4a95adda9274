"""What a user of the Python API may pass by mistake: each is refused in one line that names it."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import freres_cli
from freres_cli import Compressor, Sampling, load_bundle
from freres_cli.errors import BackboneError, FreresError, PresetError, UsageError, VideoError
from freres_cli.pipeline.models import Models, make_source
from freres_cli.world.bundled_model import bundled_model_dir

FRAMES, SECONDS = np.zeros((2, 32, 32, 3), np.uint8), [0.0, 1.0]
ANY = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
NO_TIMES = (np.array([0, 250], "m8[ms]"), np.array([0, 1], "M8[s]"), ["0", "1"], [False, True])


@pytest.fixture(scope="module")
def compressor():
    loaded = Models(make_source("bundled", "cpu"))
    return Compressor(budget_tokens=10, models=Models(loaded.source, loaded.encoder, loaded.language_model))


@pytest.fixture(scope="module")
def bundle(compressor):
    return compressor.compress(FRAMES, seconds=SECONDS)


@pytest.fixture(scope="module")
def session(compressor, bundle):
    return bundle.open(models=compressor.models)


def refuses(call, named, kind=FreresError):
    with pytest.raises(kind) as refused:
        call()
    assert named in refused.value.message and "\n" not in refused.value.message, refused.value.message


@pytest.mark.parametrize(
    "frames",
    [
        [FRAMES[0], np.zeros((8, 8, 3), np.uint8)],
        [[1], [1, 2]],
        [[[1], [1, 2]], [[1], [1, 2]]],
        ["a", "b"],
        [],
        ANY.to(torch.bfloat16),
        ANY.to_sparse(),
        ANY.to("meta"),
        [ANY[0].to(torch.bfloat16)] * 2,
    ],
    ids=["sizes", "ragged", "ragged inside", "words", "none", "bfloat16", "sparse", "meta", "list of bfloat16"],
)
def test_frames_that_are_none(compressor, frames):
    refuses(lambda: compressor.compress(frames, seconds=SECONDS), "frames: expected", VideoError)


@pytest.mark.parametrize("video", [None, b"\0\0\0 ftyp", bytearray(3), memoryview(b"a"), 3, io.BytesIO(), {}])
@pytest.mark.parametrize("seconds", [None, SECONDS], ids=["alone", "with seconds"])
def test_videos_that_are_none(compressor, video, seconds):
    got = type(video).__name__
    refuses(lambda: compressor.compress(video, seconds=seconds), f"expected a path or frames, got {got}", UsageError)


@pytest.mark.parametrize(
    "seconds", [[0j, 1j], np.zeros(2, np.complex64), torch.zeros(2, dtype=torch.complex64), 3, *NO_TIMES]
)
def test_times_that_are_none(compressor, seconds):
    refuses(lambda: compressor.compress(FRAMES, seconds=seconds), "frames: expected", VideoError)


def test_frames_have_no_title(compressor):
    refuses(lambda: compressor.compress(FRAMES, seconds=SECONDS, title="a"), "frames: expected no title", UsageError)


@pytest.mark.parametrize("number", [1j, np.complex64(1), torch.zeros(2), torch.tensor(1j), 10**400, "soon", "1", True])
def test_numbers_that_are_none(compressor, bundle, number):
    refuses(lambda: compressor.compress("clip.mp4", start_s=number), "start_s: expected a number", UsageError)
    refuses(lambda: bundle.repack(quality=number), "quality: expected a number", UsageError)


@pytest.mark.parametrize("count", [True, "5", 5.0])
def test_counts_that_are_none(compressor, bundle, count):
    refuses(lambda: Compressor(budget_tokens=count), "budget_tokens: expected a whole number", UsageError)
    refuses(lambda: bundle.repack(count), "budget_tokens: expected a whole number", UsageError)
    refuses(lambda: Compressor(anchors=str(count)), "anchors: expected a whole number", PresetError)


def test_an_argument_is_named_as_in_python(compressor):
    refuses(lambda: Compressor(sample_fps=0), "sample_fps: expected 1e-06 to 1000", PresetError)
    refuses(
        lambda: Compressor(sample="native", sample_fps=2), "sample_fps and sample: expected sample fps", PresetError
    )
    refuses(lambda: compressor.compress("clip.mp4", start_s=2, end_s=1), "clip.mp4: no such file", VideoError)


@pytest.mark.parametrize("path", ["a\0b", "", "\ud800", b"a", 3, None])
def test_paths_that_are_none(compressor, bundle, path):
    refuses(lambda: bundle.save(path), "path: expected a path", UsageError)
    refuses(lambda: load_bundle(path), "path: expected a path", UsageError)
    if isinstance(path, str):
        refuses(lambda: compressor.compress(path), "video: expected a path", UsageError)


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": [1]}, "top_p"),
        ({"seed": 0.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"temperature": True}, "temperature"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_samplings_that_are_none(sampling, named):
    refuses(lambda: Sampling(**sampling), f"{named}: expected", UsageError)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.ask("?", choices=5), "choices: expected a list of texts, got 5"),
        (lambda s: s.ask("?", sampling={"temperature": 1.0}), "sampling: expected a Sampling, got dict"),
        (lambda s: s.ask_many(5), "queries: expected a list, got int"),
        (lambda s: s.ask_many([5]), "expected a question or a Query, got int"),
        (lambda s: s.find_evidence(5), "expected a question or a Query, got int"),
        (lambda s: s.ask("?", max_new_tokens=2, on_text=lambda _: s.ask("?")), "another question"),
    ],
)
def test_calls_of_a_session_that_are_none(session, call, named):
    refuses(partial(call, session), named, UsageError)


def test_a_question_is_enough_to_find_evidence(session):
    assert float(session.find_evidence("What moves?").shares.sum()) == pytest.approx(1.0)


def test_a_title_is_text(compressor):
    refuses(lambda: compressor.compress(FRAMES, seconds=SECONDS, title=3), "title: expected text, got int", UsageError)


def test_the_place_of_the_text_is_checked_before_a_model_is_loaded(bundle):
    refuses(lambda: bundle.open(text_after="nope", device="cpu", model="none-such"), "text_after", UsageError)


@pytest.mark.parametrize("quality", [np.float32(0.9), np.float64(0.9), 1])
def test_settings_are_numbers_of_any_library(compressor, quality):
    settings = Compressor(models=compressor.models, quality=quality, still_levels=np.int64(3)).options.settings
    assert (type(settings.quality), type(settings.still_levels)) == (float, int) and settings.quality == pytest.approx(
        quality
    )


def test_types_of_other_libraries_are_taken(compressor, bundle, tmp_path):
    """Frames as a list, paths as paths, a device as torch's, planned as they are compressed."""
    pixels, times = [ANY[0], FRAMES[1]], np.asarray(SECONDS)
    assert compressor.plan(pixels, torch.from_numpy(times)).num_frames == 2
    assert torch.equal(compressor.compress(pixels, seconds=times).tokens().latents, bundle.tokens().latents)
    folder = bundled_model_dir()
    source = Compressor(folder, device=torch.device("cpu")).options.model
    assert (source.name, source.device.name) == (str(folder.absolute()), "cpu")
    for model in (folder, str(folder)):
        assert Compressor(model, models=Models(source)).options.model is source
    refuses(lambda: Compressor(tmp_path, models=Models(source)), "model: expected none or", UsageError)
    refuses(
        lambda: bundle.open(model=folder, device=torch.device("cpu"), adapter=Path("none")), "none: ", BackboneError
    )
    refuses(lambda: bundle.tokens(Path("none")), "none: ", BackboneError)
    assert torch.equal(bundle.tokens("none").latents, bundle.tokens().latents)


def test_the_types_are_told_to_type_checkers():
    assert (Path(freres_cli.__file__).parent / "py.typed").read_bytes() == b""


def test_a_path_is_no_model_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    compressor = Compressor(Path("organisation/name"), device="cpu")
    refuses(lambda: compressor.compress(FRAMES, seconds=SECONDS), "no such model", BackboneError)


@pytest.mark.parametrize("setting", [{"anchors": np.float32(3)}, {"anchors": True}, {"quality": 1j}, {"events": 1}])
def test_settings_of_another_kind_are_refused(compressor, setting):
    refuses(lambda: Compressor(models=compressor.models, **setting), next(iter(setting)), PresetError)


class Interface:
    """An array as older libraries give one."""

    __array_interface__ = FRAMES.__array_interface__


@pytest.mark.parametrize("frames", [memoryview(FRAMES), Interface(), list(FRAMES)], ids=["memory", "interface", "list"])
def test_frames_of_any_kind_of_array_are_taken(compressor, bundle, frames):
    assert torch.equal(compressor.compress(frames, seconds=SECONDS).tokens().latents, bundle.tokens().latents)


def test_a_file_that_is_named_none_is_a_file(bundle):
    assert len(bundle.tokens(adapter="none")) == len(bundle.tokens())
    for adapter in ("./none", Path("none")):
        refuses(lambda adapter=adapter: bundle.tokens(adapter=adapter), "none")


def test_the_folder_of_a_loaded_model_may_be_named_by_a_link(tmp_path, bundle):
    folder, link = bundled_model_dir(), tmp_path / "link"
    link.symlink_to(folder)
    models = Models(make_source(str(link), "cpu"))
    for model in (str(link), link, folder):
        Compressor(models=models, model=model, budget_tokens=4)
    refuses(lambda: Compressor(models=models, model=tmp_path, budget_tokens=4), "model: expected none or")
