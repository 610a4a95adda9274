"""The pipeline below the command: injected models, batches of any size, and exactly the tokens of the stock model."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from freres_cli.backbones.engine import prefill_video
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.cli.compress import make_options
from freres_cli.errors import BackboneError, ResourceError, UsageError, VideoError
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline import models as models_module
from freres_cli.pipeline.adapters import NO_ADAPTER
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import (
    ENCODE_BATCH_TOKENS,
    MAX_BATCH_FRAMES,
    LatentStream,
    VideoSource,
    count_batch_frames,
)
from freres_cli.pipeline.manifest import build_manifest
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.planning import plan_compression
from freres_cli.pipeline.prompt_text import read_prompt_text
from freres_cli.pipeline.reduction import LatentBatch, reduce_latents
from freres_cli.pipeline.session import AskRequest, open_session
from freres_cli.records import Frames, FrameSize
from freres_cli.video.decode import decode_frames
from freres_cli.workflows.compress import compress_file
from tests.clips import write_clip
from tests.loaded_models import CountingEncoder, CountingLanguageModel, Wrapped, loaded_models, models_with
from tests.pipeline_fixtures import BUDGET, options_with
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import tiny as tiny
from tests.runner import run_freres
from tests.tiny_models import CPU, stock_inputs

CPU_TIMER = StageTimer(torch.device("cpu"))


@pytest.fixture(scope="module")
def models():
    return loaded_models()


class NoModels(Models):
    """Models that must not be loaded."""

    @property
    def encoder(self):
        raise AssertionError("the vision tower was loaded")

    @property
    def language_model(self):
        raise AssertionError("the language model was loaded")


class MeanTower:
    """Its latents show which frame they are of: the mean of the pixels, in every channel."""

    def encode(self, pixels):
        return pixels.to(torch.float32).mean((1, 2, 3))[:, None, None, None].expand(-1, 2, 2, 4).contiguous()


class InfiniteTower(MeanTower):
    def encode(self, pixels):
        return super().encode(pixels) + float("inf")


class GreedyTower(Wrapped):
    """Needs more memory than there is."""

    def encode(self, pixels):
        return torch.empty(1 << 60)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["encoder", "language_model"])
def test_both_halves_come_from_one_commit_whichever_is_loaded_first(first, monkeypatch):
    """The branch moves between the two."""
    commits, asked = iter(["old", "new"]), []

    def load(place, device, dtype, revision, folder, **options):
        asked.append(revision)
        commit = next(commits) if revision == "main" else revision
        return SimpleNamespace(fingerprint={"revision": commit})

    monkeypatch.setattr(models_module, "load_vision_encoder", load)
    monkeypatch.setattr(models_module, "load_language_model", load)
    models = Models(ModelSource("some/model", CPU, "main"))
    halves = [getattr(models, name) for name in (first, *{"encoder", "language_model"} - {first})]
    assert asked == ["main", "old"] and {half.fingerprint["revision"] for half in halves} == {"old"}


@pytest.mark.parametrize("num_frames", [1, 7, 1000])
def test_batches_do_not_change_the_bundle(clip, bundle, models, tmp_path, num_frames):
    options, encoder, source = options_with(budget_tokens=BUDGET), models.encoder, VideoSource(clip)
    plan = plan_compression(options, encoder, source.info)
    frames = decode_frames(clip, plan.info, plan.sampling, plan.size, num_frames)
    latents = LatentStream(encoder, CPU_TIMER, options.model.name).encode(frames)
    batches = (LatentBatch(batch.pts_seconds, rows) for batch, rows in latents)
    reduction = reduce_latents(batches, plan, options, encoder.width, CPU_TIMER)
    content = reduction.content
    text = read_prompt_text(models.prompt_counter, content.grid, content.frame_seconds)
    manifest = build_manifest(source, options, plan, encoder, reduction, frames.report, text)
    write_bundle(tmp_path / "b.pt", reduction.content, manifest)
    assert (tmp_path / "b.pt").read_bytes() == bundle.read_bytes()


@pytest.mark.parametrize("method", ["fre-res", "uniform", "lowres"])
def test_batches_of_several_sizes_are_reduced_as_one(clip, models, method):
    options = Compressor(budget_tokens=BUDGET, method=method, models=models).options
    source = VideoSource(clip)
    plan = plan_compression(options, models.encoder, source.info)
    frames = decode_frames(clip, plan.info, plan.sampling, plan.size, 1000)
    ((whole, latents),) = LatentStream(models.encoder, CPU_TIMER, options.model.name).encode(frames)
    sizes = [1, 5, 2, 30, 1]
    bounds = [*accumulate(sizes, initial=0), len(latents)]
    parts = [LatentBatch(whole.pts_seconds[a:b], latents[a:b]) for a, b in pairwise(bounds)]
    one, many = (
        reduce_latents(batches, plan, options, models.encoder.width, CPU_TIMER)
        for batches in ([LatentBatch(whole.pts_seconds, latents)], parts)
    )
    assert many.num_frames == one.num_frames == 60
    names = [name for name, value in vars(one.content).items() if isinstance(value, torch.Tensor)]
    assert names and all(torch.equal(getattr(one.content, n), getattr(many.content, n)) for n in names)


@pytest.mark.parametrize("grid", [(1, 1), (6, 6), (24, 24), (68, 68)])
def test_a_batch_is_bounded_in_tokens_and_frames(grid):
    size = FrameSize(8 * grid[0], 8 * grid[1], *grid)
    num_frames = count_batch_frames(SimpleNamespace(size=size))
    assert 1 <= num_frames <= MAX_BATCH_FRAMES
    assert num_frames == 1 or num_frames * size.num_tokens <= ENCODE_BATCH_TOKENS


@pytest.mark.parametrize("keeps_all", [False, True])
def test_a_picture_shown_again_does_not_pass_the_tower_again(keeps_all):
    shown = [[0, 0, 1], [1, 1], [2, 3, 3], [3]]
    tower, first = CountingEncoder(MeanTower()), 0
    batches = []
    for indices in shown:
        pixels = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
        batches.append(
            Frames(pixels, tuple(float(first + i) for i in range(len(indices))), tuple(indices), tuple(indices))
        )
        first += len(indices)
    found = list(LatentStream(tower, CPU_TIMER, "fake", keeps_all).encode(batches))
    assert tower.num_frames == [2, 2], "each of four pictures once"
    for batch, (frames, latents) in zip(batches, found, strict=True):
        assert frames is batch
        assert latents[:, 0, 0, 0].tolist() == list(batch.picture_index)


def test_latents_that_are_not_finite_name_the_model():
    frames = Frames(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (0.0,), (0,), (0,))
    with pytest.raises(BackboneError, match=r"some-model: latents are not finite in torch\.float32") as caught:
        list(LatentStream(InfiniteTower(), CPU_TIMER, "some-model").encode([frames]))
    assert "--dtype" not in caught.value.hint, "a larger dtype does not help"


# --- injected models -------------------------------------------------------------------------------------------------


def test_injected_models_give_the_command_s_bytes(clip, bundle, models, tmp_path):
    compressor = Compressor.from_options(options_with(budget_tokens=BUDGET), models)
    assert compress_file(compressor, clip, tmp_path / "b.pt").bundle_bytes == bundle.stat().st_size
    assert (tmp_path / "b.pt").read_bytes() == bundle.read_bytes()


def test_no_model_is_loaded_for_a_bad_video_or_destination(clip, tmp_path):
    compressor = Compressor.from_options(options_with(), NoModels(ModelSource("bundled", CPU)))
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").touch()
    for name in ("missing.mp4", "text.mp4", "empty.mp4", "."):
        with pytest.raises(VideoError):
            compress_file(compressor, tmp_path / name, tmp_path / "b.pt")
    (tmp_path / "taken.pt").touch()
    for name in ("no/such/folder.pt", "taken.pt", "."):
        with pytest.raises(UsageError):
            compress_file(compressor, clip, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"text.mp4", "empty.mp4", "taken.pt"}
    with pytest.raises(AssertionError, match="was loaded"):
        compress_file(compressor, clip, tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("tower", "error"),
    [(lambda inner: CountingEncoder(inner, stop_at=1), KeyboardInterrupt), (GreedyTower, ResourceError)],
)
def test_a_tower_that_stops_leaves_nothing(clip, models, tmp_path, tower, error):
    broken = models_with(encoder=tower(models.encoder))
    with pytest.raises(error):
        compress_file(Compressor.from_options(options_with(), broken), clip, tmp_path / "b.pt")
    assert not list(tmp_path.iterdir())


def test_options_are_frozen():
    options = make_options({}, None, None)
    with pytest.raises(FrozenInstanceError):
        options.strict = True


# --- exactness --------------------------------------------------------------------------------------------------------


def test_with_all_tokens_kept_answers_and_logits_are_those_of_stock_transformers(clip, tmp_path, tiny):
    folder, stock = tiny
    path = tmp_path / "b.pt"
    flags = ("--model", folder, "--frames", 4, "--grid", "4x5", "--budget", 80)
    run = run_freres("compress", clip, *flags, "-o", path)
    assert run.status == 0 and "all are kept" in run.err
    session = open_session(AskRequest(path, CPU, text_after="hf"))
    tokens = session.tokens
    assert len(tokens) == 80 and tokens.grid == (4, 4, 5)
    ids = session.model.prompt("What moves?")
    inputs = stock_inputs(stock, ids, tokens.grid, _patches_of(clip, folder))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        expected = stock(**inputs, logits_to_keep=1).logits[0, -1]
        greedy = stock.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prefix = prefill_video(session.model, ids.prefix, tokens, "hf")
    rows = session.model.text_rows(ids.suffix, prefix.num_tokens, prefix.next_position)
    whole = session.model.splice(ids.prefix, tokens, "hf").then(rows)
    got = session.model.logits(session.model.decode(whole, session.model.new_cache())[-1:])[0]
    assert (got - expected).abs().max() == 0.0
    answer = session.ask("What moves?", max_new_tokens=24)
    assert answer.text == session.model.tokenizer.decode(greedy, skip_special_tokens=True)


def _patches_of(clip, folder):
    """What the stock model takes: pixel patches of the four frames."""
    options = make_options({"sample_count": 4, "grid": "4x5"}, None, str(folder), device="cpu")
    encoder, source = Models(options.model).encoder, VideoSource(clip)
    frames = source.open(plan_compression(options, encoder, source.info), options)
    return encoder.patches(torch.cat([batch.pixels for batch in frames]))


def test_the_bundle_holds_what_the_answer_uses(bundle, models):
    """Tokens built from the file are those of the session; positions, kinds and seconds come along."""
    session = open_session(AskRequest(bundle, CPU, adapter=NO_ADAPTER), models)
    tokens = build_tokens(read_bundle(bundle).tracks)
    assert torch.equal(session.tokens.latents, tokens.latents)
    assert tokens.seconds.min() >= 0 and tokens.seconds.max() <= 2.0
    assert (tokens.seconds - tokens.positions[:, 0].double() / 30).abs().max() < 1e-5


# --- one prefix, many questions ---------------------------------------------------------------------------------------


def test_a_session_prefills_the_video_once(bundle, models):
    counting = CountingLanguageModel(models.language_model)
    session = open_session(AskRequest(bundle, CPU), models_with(language_model=counting))
    first, other, again = (session.ask(q, max_new_tokens=6).text for q in ("what moves?", "where?", "what moves?"))
    assert counting.num_video_tokens == [BUDGET] and first == again
    alone = open_session(AskRequest(bundle, CPU), models)
    assert alone.ask("where?", max_new_tokens=6).text == other


def test_a_failed_question_leaves_the_prefix_as_it_was(bundle, models):
    """Memory may run out in the middle of the layers; the next answer must not suffer."""
    session = open_session(AskRequest(bundle, CPU), models)
    before = session.ask("what moves?", choices=["a", "b"]).choices

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with session.model.decoder.layers[3].register_forward_pre_hook(fail), pytest.raises(ResourceError):
        session.ask("what moves?", choices=["a", "b"])
    assert session.ask("what moves?", choices=["a", "b"]).choices == before


def test_frames_that_lose_their_shape_are_named(tmp_path):
    """16:9 on a square grid; not with a grid that keeps the shape, nor for a square video."""
    squeezed = "frames of 192x108 px are squeezed to a grid of 6x6 tokens; --grid auto keeps their shape"
    for size, grid, is_squeezed in (((192, 108), "6x6", True), ((192, 108), "auto", False), ((96, 96), "6x6", False)):
        clip = write_clip(tmp_path / f"{size[0]}{grid}.mp4", 4, size=size)
        bundle = Compressor(models=loaded_models(), grid=grid, budget_tokens=20).compress(clip)
        assert any(note.startswith(squeezed) for note in bundle.notes) == is_squeezed
        assert (bundle.manifest["geometry"]["fit"] == "squeezed") == is_squeezed


class LoudTower(Wrapped):
    """Its latents are as far apart as float16 goes: dark ones below zero, bright ones above."""

    def encode(self, pixels):
        sign = torch.where(pixels.float().mean((1, 2, 3)) < 128, -60000.0, 60000.0)
        return torch.ones_like(self.inner.encode(pixels)).mul(sign[:, None, None, None]).half()


def test_a_coefficient_that_overflows_where_no_latent_does_is_refused_by_name():
    frames = np.full((24, 96, 96, 3), 255, np.uint8)
    frames[0] = 0
    models = models_with(LoudTower(loaded_models().encoder))
    compressor = Compressor(models=models, method="fre-res", events=False, budget_tokens=200)
    with pytest.raises(BackboneError, match="overflows in float16") as caught:
        compressor.compress(frames, seconds=range(24))
    assert "--dtype float32 or bfloat16" in caught.value.hint


@pytest.mark.parametrize("keeps_all", [False, True])
def test_latents_that_were_refused_are_not_taken_the_second_time(keeps_all):
    frames = Frames(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (0.0,), (0,), (0,))
    stream = LatentStream(InfiniteTower(), CPU_TIMER, "some-model", keeps_all)
    for _ in range(2):
        with pytest.raises(BackboneError, match="not finite"):
            list(stream.encode([frames]))
