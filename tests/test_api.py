"""The Python API, as users call it."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from freres_cli import Compressor, Query, Sampling, Session, VideoTokens, load_bundle
from freres_cli.backbones import batches
from freres_cli.bundle.store import read_bundle
from freres_cli.bundle.version_4 import tensors_of
from freres_cli.errors import BundleError, PresetError, UsageError, VideoError
from freres_cli.pipeline.models import Models, make_source
from freres_cli.pipeline.session import AskRequest, open_session
from freres_cli.pipeline.tokens import load_tokens
from freres_cli.world.bundled_model import bundled_model_dir
from tests.clips import write_clip
from tests.runner import run_freres

BUDGET = 60
QUESTION, CHOICES = "What moves first?", ["a cat", "a dog"]


@pytest.fixture(scope="module")
def models():
    loaded = Models(make_source("bundled", "cpu"))
    return Models(loaded.source, loaded.encoder, loaded.language_model)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("api") / "clip.mp4", 12, fps=6)


@pytest.fixture(scope="module")
def black_bundle(models):
    return Compressor(budget_tokens=10, models=models).compress(np.zeros((2, 32, 32, 3), np.uint8), seconds=[0.0, 1.0])


def test_compress_save_load_ask(clip, tmp_path):
    compressor = Compressor(model="bundled", preset="bundled", budget_tokens=BUDGET, device="cpu")
    bundle = compressor.compress(str(clip))
    assert bundle.path is None and bundle.num_visual_tokens <= BUDGET and bundle.method == "adaptive"
    assert set(bundle.timings_s) >= {"probe", "load", "decode", "encode", "compress", "total"}
    saved = bundle.save(tmp_path / "bundle.pt")
    assert saved.path == tmp_path / "bundle.pt"
    tokens = saved.tokens()
    assert isinstance(tokens, VideoTokens)
    assert tokens.latents.shape == (bundle.num_visual_tokens, 192)
    assert tokens.positions.shape == (bundle.num_visual_tokens, 3) and tokens.seconds.dtype == torch.float64
    session = load_bundle(str(tmp_path / "bundle.pt")).open(device="cpu")
    assert isinstance(session, Session)
    answer = session.ask(QUESTION, choices=CHOICES)
    assert answer.text in CHOICES and sum(answer.choices.values()) == pytest.approx(1.0)
    assert session.ask(QUESTION, max_new_tokens=2).num_new_tokens <= 2


def test_a_bundle_read_back_is_the_bundle_written(clip, models, tmp_path):
    made = Compressor(budget_tokens=BUDGET, models=models).compress(clip)
    read = load_bundle(made.save(tmp_path / "b.pt").path)
    assert {k: v for k, v in read.manifest.items() if k != "tensors"} == made.manifest
    tensors = tensors_of(read.content)
    for name, tensor in tensors_of(made.content).items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(made.tokens().latents, read.tokens().latents)


def test_the_api_and_the_command_write_the_same_bytes(clip, models, tmp_path):
    made = Compressor(budget_tokens=BUDGET, models=models, method="fre-res", variant="idct").compress(clip)
    values = {key: {"value": s["value"], "source": "flag"} for key, s in made.manifest["settings"].items()}
    assert (
        run_freres(
            *("compress", clip, "--method", "fre-res", "--budget", BUDGET, "--variant", "idct"),
            *("--device", "cpu", "-o", tmp_path / "c.pt"),
        ).status
        == 0
    )
    theirs = read_bundle(tmp_path / "c.pt")
    assert {key: s["value"] for key, s in theirs.manifest["settings"].items()} == {
        k: s["value"] for k, s in values.items()
    }
    for name, tensor in made.content.tensors().items():
        assert torch.equal(tensor, getattr(theirs.content, name)), name


def test_sessions_of_bundle_and_command_answer_alike(clip, models, tmp_path):
    bundle = Compressor(budget_tokens=BUDGET, models=models).compress(clip).save(tmp_path / "b.pt")
    mine = bundle.open(models=models)
    theirs = open_session(AskRequest(tmp_path / "b.pt", models.source.device), models)
    assert mine.ask(QUESTION, choices=CHOICES).choices == theirs.ask(QUESTION, choices=CHOICES).choices
    assert mine.full_tokens == theirs.full_tokens and mine.notes == theirs.notes


def test_tokens_need_no_language_model(clip, models, tmp_path):
    """Not even transformers: whoever has an engine of their own takes the tokens from here."""
    paths = [
        Compressor(budget_tokens=BUDGET, models=models, method=name).compress(clip).save(tmp_path / f"{name}.pt").path
        for name in ("adaptive", "fre-res")
    ]
    code = (
        "import sys; from freres_cli import load_bundle\n"
        f"counts = [len(load_bundle(path).tokens()) for path in {list(map(str, paths))!r}]\n"
        "assert 'transformers' not in sys.modules\n"
        "print(*counts)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for path, count in zip(paths, run.stdout.split(), strict=True):
        loaded = load_tokens(read_bundle(path))
        assert int(count) == len(loaded.tokens)
        assert torch.equal(loaded.tokens.latents, load_bundle(path).tokens().latents)
    # The adapter that ships is for Fre-Res.
    assert not torch.equal(loaded.tokens.latents, load_bundle(path).tokens("none").latents)


def test_a_compressor_loads_its_tower_once(clip, models):
    class Counting(Models):
        loads = 0

        @property
        def encoder(self):
            Counting.loads += self._encoder is None
            self._encoder = self._encoder or models.encoder
            return self._encoder

    compressor = Compressor(budget_tokens=BUDGET, models=Counting(models.source))
    for _ in range(3):
        compressor.compress(clip)
    assert Counting.loads == 1


def test_both_halves_are_loaded_once():
    loaded = Models(make_source("bundled", "cpu"))
    assert not loaded.has_encoder
    assert loaded.encoder is loaded.encoder and loaded.language_model is loaded.language_model
    assert loaded.identify_encoder() == Models(loaded.source).identify_encoder()


def test_frames_already_decoded(models):
    """With every token kept, the tokens are the tower's own latents of these frames, at the times given."""
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    seconds = [0.0, 0.5, 0.7, 2.0, 2.1]
    bundle = Compressor(budget_tokens=10_000, models=models).compress(frames, seconds=seconds)
    tokens = bundle.tokens()
    expected = models.encoder.encode(torch.from_numpy(frames))
    assert torch.equal(tokens.latents, expected.flatten(0, 2))
    assert tokens.frame_seconds.tolist() == seconds
    assert tokens.seconds.tolist() == [second for second in seconds for _ in range(36)]
    source = bundle.manifest["source"]
    assert source["file"] is None and source["bytes"] == frames.nbytes and source["width_px"] == 96
    as_tensor = Compressor(budget_tokens=10_000, models=models).compress(
        torch.from_numpy(frames), seconds=torch.tensor(seconds, dtype=torch.float64)
    )
    assert as_tensor.manifest == bundle.manifest


def test_all_frames_given_are_used_whatever_the_preset_samples(models, tmp_path):
    frames = np.zeros((9, 40, 60, 3), dtype=np.uint8)
    compressor = Compressor(preset="mvbench-compact", models=models, budget_tokens=BUDGET, grid="2x3")
    bundle = compressor.compress(frames, seconds=np.arange(9) / 3)
    assert bundle.manifest["sampling"]["num_frames"] == 9
    assert bundle.manifest["settings"]["sample"] == {"value": "native", "source": "frames as given"}
    path = bundle.save(tmp_path / "b.pt").path
    shown = run_freres("inspect", path)
    assert shown.status == 0 and "source   frames, decoded 60x40" in shown.out
    assert run_freres("ask", path, "what?", "--max-new-tokens", 1, "--device", "cpu").status == 0


@pytest.mark.parametrize(
    ("frames", "seconds", "error"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), None, UsageError),
        (np.zeros((2, 8, 8, 3), np.uint8), [0.0], VideoError),
        (np.zeros((2, 8, 8, 3), np.uint8), [1.0, 0.0], VideoError),
        (np.zeros((2, 8, 8, 3), np.uint8), [0.0, float("nan")], VideoError),
        (np.zeros((2, 8, 8, 3), np.float32), [0.0, 1.0], VideoError),
        (np.zeros((2, 3, 8, 8), np.uint8), [0.0, 1.0], VideoError),
        (np.zeros((0, 8, 8, 3), np.uint8), [], VideoError),
    ],
)
def test_unusable_frames_are_refused(models, frames, seconds, error):
    with pytest.raises(error, match="frames"):
        Compressor(models=models).compress(frames, seconds=seconds)


def test_seconds_belong_to_frames(models, clip):
    with pytest.raises(UsageError, match="seconds"):
        Compressor(models=models).compress(clip, seconds=[0.0])
    with pytest.raises(UsageError, match="start_s"):
        Compressor(models=models).compress(np.zeros((2, 8, 8, 3), np.uint8), seconds=[0.0, 1.0], start_s=0.5)


def test_a_part_of_the_video(clip, models):
    bundle = Compressor(budget_tokens=BUDGET, models=models).compress(clip, start_s=0.5, end_s=1.5)
    assert bundle.manifest["sampling"]["start_s"] == 0.5 and bundle.manifest["sampling"]["num_frames"] == 6


def test_repack_is_the_command_s(clip, models, tmp_path):
    bundle = Compressor(budget_tokens=BUDGET, models=models).compress(clip).save(tmp_path / "b.pt")
    small = bundle.repack(20)
    assert run_freres("repack", tmp_path / "b.pt", "--budget", 20, "-o", tmp_path / "s.pt").status == 0
    theirs = load_bundle(tmp_path / "s.pt")
    assert small.num_visual_tokens == theirs.num_visual_tokens <= 20
    assert torch.equal(small.tokens().latents, theirs.tokens().latents)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"anchor": 3}, PresetError),
        ({"anchors": 0}, PresetError),
        ({"preset": "none-such"}, PresetError),
        ({"method": "blind"}, UsageError),
        ({"method": "none-such"}, UsageError),
        ({"device": "tpu"}, UsageError),
        ({"revision": "main"}, UsageError),
    ],
)
def test_illegal_arguments_are_refused(arguments, error):
    with pytest.raises(error):
        Compressor(**arguments)


def test_nothing_is_overwritten_unless_told(clip, models, tmp_path):
    bundle = Compressor(budget_tokens=BUDGET, models=models).compress(clip)
    path = tmp_path / "b.pt"
    path.write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        bundle.save(path)
    assert path.read_text() == "mine"
    assert load_bundle(bundle.save(path, force=True).path).num_visual_tokens == bundle.num_visual_tokens
    with pytest.raises(BundleError):
        load_bundle(tmp_path / "other.pt")


def test_questions_together_are_answered_as_one_at_a_time(clip, models):
    session = Compressor(budget_tokens=BUDGET, models=models).compress(clip).open(models=models)
    queries = [
        Query("What moves?", ("a", "b c")),
        Query("Where is the red ring now?"),
        Query("Why?", ("up", "down", "no")),
    ]
    together = session.ask_many(queries, max_new_tokens=4)
    for query, answer in zip(queries, together, strict=True):
        alone = session.ask(query.question, choices=query.choices, max_new_tokens=4)
        assert (answer.text, answer.num_new_tokens, answer.finish_reason) == (
            *(alone.text, alone.num_new_tokens, alone.finish_reason),
        )
        assert answer.num_context_tokens == alone.num_context_tokens
        if query.choices:
            assert answer.choices == pytest.approx(alone.choices, abs=1e-4)


def test_names_are_imported_when_they_are_used():
    code = "import sys, freres_cli; assert 'torch' not in sys.modules; freres_cli.Compressor; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    import freres_cli

    assert set(freres_cli.__all__) <= set(dir(freres_cli))
    with pytest.raises(AttributeError, match="no attribute 'Compresser'"):
        _ = freres_cli.Compresser


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.ask("?", choices="ab"), "choices"),
        (lambda s: s.ask(None), "question"),
        (lambda s: s.ask("\ud800"), "surrogate"),
        (lambda s: s.ask("?", choices=["a", 3]), "question"),
        (lambda s: s.ask_many([Query("")]), "question"),
        (lambda s: s.ask_many("one text"), "queries"),
        (lambda s: s.ask("?", sampling=Sampling(temperature=1e-300)), "temperature"),
        (lambda s: s.prefill_s, "prefill_s"),
    ],
)
def test_a_session_refuses_what_cannot_be_asked(clip, models, call, named):
    session = Compressor(budget_tokens=BUDGET, models=models).compress(clip).open(models=models)
    with pytest.raises(UsageError, match=named):
        call(session)


def test_numbers_of_other_libraries_are_numbers(clip, models, tmp_path):
    compressor = Compressor(budget_tokens=np.int64(BUDGET), models=models)
    bundle = compressor.compress(clip, start_s=np.float32(0.5), end_s=torch.tensor(1.5))
    assert load_bundle(bundle.save(tmp_path / "b.pt").path).manifest["sampling"]["start_s"] == 0.5
    assert bundle.repack(np.int64(20)).num_visual_tokens <= 20
    session = bundle.open(models=models)
    assert session.ask("?", choices=None, max_new_tokens=1).num_new_tokens == 1
    assert len(session.ask_many(Query(text) for text in ("a?", "b?"))) == len(session.ask_many(["a?", "b?"])) == 2
    for wrong in ({"start_s": "soon"}, {"end_s": [1]}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            compressor.compress(clip, **wrong)


@pytest.mark.parametrize("seconds", [["a"] * 2, [0.0, 1e308], [[0.0], [1.0]], None])
def test_times_that_are_none(models, seconds):
    with pytest.raises((VideoError, UsageError), match=r"frames|seconds"):
        Compressor(models=models).compress(np.zeros((2, 8, 8, 3), np.uint8), seconds=seconds)


def test_times_that_hardly_differ_are_saved(models, tmp_path):
    frames = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    bundle = Compressor(models=models).compress(frames, seconds=torch.tensor([0.0, 1e-310], requires_grad=True))
    assert load_bundle(bundle.save(tmp_path / "b.pt").path).manifest["source"]["source_fps"] is None


@pytest.mark.parametrize("limit", [0, -1, 1.5, "4", None])
def test_a_limit_is_a_whole_number(black_bundle, models, limit):
    session = black_bundle.open(models=models)
    for call in (
        lambda: session.ask(QUESTION, max_new_tokens=limit),
        lambda: session.ask(QUESTION, choices=CHOICES, max_new_tokens=limit),
        lambda: session.ask_many([QUESTION], max_new_tokens=limit),
        lambda: session.ask_many([], max_new_tokens=limit),
    ):
        with pytest.raises(UsageError, match="max_new_tokens: expected"):
            call()
    assert session.ask(QUESTION, max_new_tokens=np.int64(1)).num_new_tokens == 1


def test_bundles_are_told_apart_by_identity(clip, models):
    bundle = Compressor(budget_tokens=BUDGET, models=models).compress(clip)
    assert bundle != copy.deepcopy(bundle) and len({bundle, bundle}) == 1


def test_a_model_that_is_open_is_not_another_one(models):
    with pytest.raises(UsageError, match="model"):
        Compressor("Qwen/Qwen2-VL-2B-Instruct", models=models)
    with pytest.raises(UsageError, match="dtype"):
        Compressor(dtype="float8")


def test_a_reader_that_stops_early_leaves_the_session_usable(clip, models):
    session = Compressor(budget_tokens=BUDGET, models=models).compress(clip).open(models=models)
    wanted = session.ask("What moves?", max_new_tokens=4).text

    def stop(_):
        raise InterruptedError("enough")

    for _ in range(2):
        with pytest.raises(InterruptedError) as kept:
            session.ask("What moves?", max_new_tokens=4, on_text=stop)
    assert session.ask("What moves?", max_new_tokens=4).text == wanted and kept is not None


def test_many_options_take_no_more_copies_of_the_cache_than_questions(clip, models, monkeypatch):
    monkeypatch.setattr(batches, "can_share", lambda _: False)
    session = Compressor(budget_tokens=BUDGET, models=models).compress(clip).open(models=models)
    words = ("left", "right", "up", "down", "round and round", "not at all", "away")
    queries = [Query("Where does it go?", words), Query("And then?", words)]
    counts, pick = [], batches.Branches.pick
    monkeypatch.setattr(batches.Branches, "pick", lambda own, rows: counts.append(len(rows)) or pick(own, rows))
    together = session.ask_many(queries)
    assert max(counts) == 2 and sum(counts) == 2 + 2 * len(words)
    for query, answer in zip(queries, together, strict=True):
        assert answer.choices == pytest.approx(session.ask(query.question, choices=words).choices, abs=1e-4)


SETTLED = {"device": "cpu", "dtype": "float32", "revision": "main", "attention": "sdpa"}


@pytest.mark.parametrize("name", [*SETTLED, "kv_dtype", "weight_dtype", "model"])
def test_what_an_open_model_has_settled_is_not_ignored(black_bundle, models, name):
    argument = {name: {**SETTLED, "model": "another"}.get(name, "auto")}
    with pytest.raises(UsageError, match=f"{name}: expected none"):
        black_bundle.open(models=models, **argument)
    if name in SETTLED:
        with pytest.raises(UsageError, match=f"{name}: expected none with models"):
            Compressor(models=models, **argument)
    assert black_bundle.open(models=models, model="bundled", adapter="none", text_after="hf").text_after == "hf"


def test_sessions_and_tokens_are_told_apart_by_which_they_are(black_bundle, models):
    """They hold tensors, of which == has no single answer."""
    pool = [black_bundle.open(models=models) for _ in range(2)]
    first, second = pool
    pool.remove(second)
    assert pool[0] is first and len({first, second}) == 2
    assert black_bundle.tokens() != black_bundle.tokens()


def test_a_model_is_found_from_another_folder(models, tmp_path, monkeypatch):
    """A name that leads to a folder from here is no longer one from there."""
    (tmp_path / "weights").symlink_to(bundled_model_dir())
    monkeypatch.chdir(tmp_path)
    compressor = Compressor("weights", budget_tokens=10, device="cpu")
    monkeypatch.chdir("/")
    bundle = compressor.compress(np.zeros((2, 32, 32, 3), np.uint8), seconds=[0.0, 1.0])
    assert bundle.manifest["model"]["folder"] == str(bundled_model_dir().resolve())
    assert bundle.save(tmp_path / "b.pt").open(device="cpu").model.family == "qwen2_vl"
