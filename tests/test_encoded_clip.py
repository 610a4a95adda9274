"""One encode for all methods and budgets, and one prefill for all questions about a video."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from freres_cli.baselines.registry import METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.store import read_bundle
from freres_cli.cli.compress import make_options
from freres_cli.devices import choose_device
from freres_cli.evaluation.cells import parse_budgets
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.session import AskRequest, open_session
from freres_cli.workflows.compress import compress_file
from tests import clips
from tests.evaluations import FRAMES, run_eval, write_clips, write_questions
from tests.loaded_models import CountingEncoder, CountingLanguageModel, loaded_models, models_with
from tests.runner import run_freres
from tests.token_checks import same_tokens


class CountingSource(VideoSource):
    """A video that counts how often it is opened for decoding."""

    num_opened = 0

    def open(self, plan, options):
        self.num_opened += 1
        return super().open(plan, options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def questions(folder):
    return write_questions(folder)


def options_for(**settings):
    return make_options({"method": "fre-res", **settings}, None, None, device="cpu")


def encode_clip(video, options, encoder=None):
    source = video if isinstance(video, VideoSource) else VideoSource(video)
    return EncodedClip(source, options, encoder or loaded_models().encoder, StageTimer(torch.device("cpu")))


def compressed_tokens(options, video, path, budget):
    """What the language model gets from ``freres compress`` and ``freres ask``."""
    options = replace(options, settings=options.settings.with_values("flag", budget_tokens=budget))
    compress_file(Compressor.from_options(options, loaded_models()), video, path)
    return build_tokens(read_bundle(path).tracks)


def test_tokens_are_those_of_compress_at_every_budget(folder, tmp_path):
    """Without a file, the same tokens as a bundle written and read back; at the full budget, those of full."""
    options, video = options_for(), folder / "clip1.mp4"
    clip = encode_clip(video, options)
    assert clip.num_frames == FRAMES + 1
    for number, budget in enumerate((clip.full_tokens // 10, clip.full_tokens // 2, clip.full_tokens)):
        tokens = clip.build_tokens("fre-res", budget)
        assert 0.98 * budget <= len(tokens) <= budget
        same_tokens(tokens, compressed_tokens(options, video, tmp_path / f"{number}.pt", budget))
    same_tokens(clip.build_tokens("full", clip.full_tokens), tokens)


def test_denser_tracks_read_the_frames_that_compress_reads(folder, tmp_path):
    """With track_density the sparse frames come first, the denser ones later, and none passes the tower twice."""
    options = options_for(sample="count", sample_count=3, track_density=2, grid="3x3")
    video, encoder = folder / "clip2.mp4", CountingEncoder(loaded_models().encoder)
    clip = encode_clip(video, options, encoder)
    assert clip.full_tokens == 3 * 9 and sum(encoder.num_frames) == 3
    sparse = clip.build_tokens("fre-res", clip.full_tokens)
    tokens = clip.build_tokens("fre-res", 20)
    assert sparse.grid[0] == 3 and tokens.grid[0] == 6
    assert sum(encoder.num_frames) == 6 and len(clip._latents[None].known) == sum(encoder.num_frames)
    same_tokens(tokens, compressed_tokens(options, video, tmp_path / "b.pt", 20))
    same_tokens(clip.build_tokens("full", clip.full_tokens), compressed_tokens(options, video, tmp_path / "f.pt", 27))


def test_each_frame_passes_the_tower_once_for_all_methods_and_budgets(questions):
    encoder = CountingEncoder(loaded_models().encoder)
    run_eval(questions, ",".join(METHODS), "0.25,0.1", models=models_with(encoder), limit=2)  # those of one clip
    assert sum(encoder.num_frames) == FRAMES


def test_a_video_is_decoded_once_for_all_methods_and_budgets(folder):
    for i in range(3):
        source = CountingSource(folder / f"clip{i}.mp4")
        clip = encode_clip(source, options_for())
        own = {"full": clip.full_tokens, "blind": 0}
        for method in METHODS:
            for budget in parse_budgets("0.25,0.1"):
                clip.build_tokens(method, own.get(method, budget.tokens(clip.full_tokens)))
        assert source.num_opened == 1


def test_the_answers_are_those_of_compress_and_ask(folder, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert run_freres("eval", questions, "--methods", "fre-res", "--budgets", "200", "-o", output).status == 0
    row = json.loads(output.read_text().splitlines()[1])
    named = ("--method", "fre-res")
    assert run_freres("compress", folder / "clip0.mp4", *named, "--budget", 200, "-o", tmp_path / "b.pt").status == 0
    session = open_session(AskRequest(tmp_path / "b.pt", choose_device("cpu")), loaded_models())
    answers = row["cells"][0]["answers"]
    assert row["video"] == "clip0.mp4" and row["cells"][0]["visual_tokens"] == len(session.tokens)
    assert answers["q0.0"][0] == session.ask("Which way?", choices=["left", "right"]).text
    assert answers["q0.1"][0] == session.ask("How many?", max_new_tokens=16).text


def test_the_video_is_prefilled_once_for_all_its_questions(questions):
    model = CountingLanguageModel(loaded_models().language_model)
    run_eval(questions, "uniform,blind", "50", models=models_with(language_model=model))
    assert model.num_video_tokens == [50, 0] * 3


def test_a_file_that_is_written_over_is_said_to_be(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 4)
    encoded = encode_clip(path, options_for())
    assert not any("while it was read" in note for note in encoded.notes)
    os.utime(path, ns=(0, 0))  # of the same size
    assert any("was written to while it was read" in note for note in encoded.notes)
