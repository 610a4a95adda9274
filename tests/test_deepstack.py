"""The extra rows that DeepStack families store with each token: kept to the bit, or dropped with a note on the cost."""

from __future__ import annotations

import pytest
import torch

from freres_cli.backbones.engine import prefill_video
from freres_cli.bundle.store import read_bundle
from freres_cli.bundle.version_4 import tensors_of
from freres_cli.cli.compress import make_options
from freres_cli.devices import choose_device
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models, make_source
from freres_cli.pipeline.session import AskRequest, open_session
from freres_cli.presets import KEYS
from freres_cli.world.clip import make_clip
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import make_qwen2_vl

CASE = next(case for case in FAMILY_CASES if case.name == "qwen3_vl")
NUM_DEEP = CASE.num_deep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    CASE.make(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=1.0)


@pytest.fixture(scope="module")
def models(folder):
    return Models(make_source(str(folder), "cpu"))


def latents_of(content):
    """The tokens that a bundle stores as the tower made them, or as means of those."""
    stored = tensors_of(content)
    return stored["anchor_latents"] if "anchor_latents" in stored else stored["latents"]


def compress(clip, models, output, **settings):
    """Write a bundle, and return it with its notes."""
    source = models.source
    settings = {"sample_count": 8, "grid": "4x5", "budget_tokens": 60, **settings}
    options = make_options(settings, None, source.name, device="cpu", dtype=source.dtype)
    return Compressor.from_options(options, models).compress(clip).save(output)


@pytest.fixture(scope="module", params=["adaptive", pytest.param("fre-res", marks=pytest.mark.slow)])
def bundles(request, models, clip, tmp_path_factory):
    """The same clip with the rows, without them, and with them dropped later."""
    method = request.param
    place = tmp_path_factory.mktemp("bundles")
    paths = {name: place / f"{name}.pt" for name in ("keep", "drop", "later")}
    compress(clip, models, paths["keep"], method=method)
    compress(clip, models, paths["drop"], method=method, deepstack="drop")
    run = run_freres("repack", paths["keep"], "--deepstack", "drop", "-o", paths["later"])
    assert run.status == 0 and f"{1 + NUM_DEEP} times smaller" in run.err, run.err
    return paths


def test_dropping_leaves_the_tokens_themselves_as_they_are(bundles):
    content = read_bundle(bundles["keep"]).content
    kept, width, latents = tensors_of(content), content.width, latents_of(content)
    assert latents.shape[1] == width * (1 + NUM_DEEP) and bool(latents[:, width:].any())
    for name in ("drop", "later"):
        dropped = read_bundle(bundles[name]).content
        for key, tensor in tensors_of(dropped).items():
            whole = kept[key]
            expected = whole if whole.shape == tensor.shape else whole[..., :width]
            if name == "later" or not tensor.is_floating_point() or key in ("anchor_latents", "frame_seconds"):
                assert torch.equal(tensor, expected), (name, key)
            else:  # fewer channels are added and multiplied in another order
                assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-5), (name, key)
        assert latents_of(dropped).shape[1] == width


def test_a_bundle_without_the_rows_is_smaller_by_them(bundles):
    stored = {
        name: sum(
            t.nbytes
            for t in tensors_of(read_bundle(path).content).values()
            if t.shape[-1] % CASE_WIDTH == 0 and t.ndim > 1
        )
        for name, path in bundles.items()
    }
    assert stored["keep"] == (1 + NUM_DEEP) * stored["drop"] == (1 + NUM_DEEP) * stored["later"]


CASE_WIDTH = 48


def first_logits(bundle, models):
    """Of the answer's first token, after the whole prompt."""
    session = open_session(AskRequest(bundle, choose_device("cpu")), models)
    ids = session.model.prompt("What moves?")
    prefix = prefill_video(session.model, (*ids.prefix,), session.tokens, session.text_after)
    rows = session.model.text_rows(ids.suffix, prefix.num_tokens, prefix.next_position)
    return session, session.model.logits(session.model.decode(rows, prefix.cache))[-1]


def test_dropping_moves_the_logits_and_says_so(bundles, models):
    whole_session, whole = first_logits(bundles["keep"], models)
    session, dropped = first_logits(bundles["drop"], models)
    _, later = first_logits(bundles["later"], models)
    moved = float((whole - dropped).abs().max())
    assert moved > 0.1, moved  # the weights are random: no figure for a real model
    assert torch.allclose(dropped, later, atol=1e-4)
    assert not session.tokens.latents[:, CASE_WIDTH:].any()
    ours, theirs = (s.tokens.latents[:, :CASE_WIDTH] for s in (session, whole_session))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    cost = f"{1 + NUM_DEEP} times smaller"
    assert any(cost in note for note in session.notes)
    assert not any("DeepStack" in note for note in whole_session.notes)


def test_the_manifest_and_inspect_report_the_setting(bundles):
    for name, (value, source) in {
        "keep": ("keep", "default"),
        "drop": ("drop", "flag"),
        "later": ("drop", "flag"),
    }.items():
        manifest = read_bundle(bundles[name]).manifest
        assert manifest["settings"]["deepstack"] == {"value": value, "source": source}
        assert manifest["model"]["num_deep_layers"] == NUM_DEEP
        shown = run_freres("inspect", bundles[name])
        assert ("DeepStack layers were dropped" in shown.out) == (value == "drop")
        assert f"rows of {NUM_DEEP} DeepStack layers" in shown.out
        channels = CASE_WIDTH * (1 + NUM_DEEP * (value == "keep"))
        assert run_freres("inspect", bundles[name], "--json").json["channels"] == channels
    assert read_bundle(bundles["later"]).manifest["history"][-1]["deepstack"] == "drop"


def test_dropped_rows_do_not_come_back(bundles, tmp_path):
    run = run_freres("repack", bundles["drop"], "--deepstack", "keep", "-o", tmp_path / "b.pt")
    check_failure(run, 2, "cannot come back")
    check_failure(run_freres("repack", bundles["keep"], "-o", tmp_path / "b.pt"), 2, "expected at least one, got none")
    check_failure(run_freres("repack", bundles["keep"], "--deepstack", "no", "-o", tmp_path / "b.pt"), 2, "keep, drop")
    both = run_freres(
        "repack", bundles["keep"], "--deepstack", "drop", "--budget", 30, "-o", tmp_path / "b.pt", "--json"
    )
    assert both.status == 0 and both.json["visual_tokens"] <= 30
    assert latents_of(read_bundle(tmp_path / "b.pt").content).shape[1] == CASE_WIDTH


def test_a_family_without_the_rows_has_nothing_to_drop(clip, tmp_path):
    make_qwen2_vl(tmp_path / "model")
    models = Models(make_source(str(tmp_path / "model"), "cpu"))
    whole = compress(clip, models, tmp_path / "a.pt")
    cut = compress(clip, models, tmp_path / "b.pt", deepstack="drop")
    assert "deepstack" not in " ".join(whole.notes)
    assert any("deepstack has no effect" in note for note in cut.notes)
    tensors = [tensors_of(read_bundle(tmp_path / name).content) for name in ("a.pt", "b.pt")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    asked = run_freres("ask", tmp_path / "b.pt", "what moves?", "--max-new-tokens", 2)
    assert asked.status == 0 and "DeepStack" not in asked.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_latents_are_stored_as_the_tower_ran(folder, clip, tmp_path, dtype):
    compress(clip, Models(make_source(str(folder), "cpu", dtype)), tmp_path / "b.pt")
    bundle = read_bundle(tmp_path / "b.pt")
    assert bundle.manifest["model"]["dtype"] == dtype
    for name, tensor in tensors_of(bundle.content).items():
        if name.endswith(("latents", "values", "base", "spectrum")):
            assert tensor.dtype == getattr(torch, dtype), name


@pytest.mark.slow
def test_profile_takes_the_setting(folder, clip):
    run = run_freres(
        *("profile", clip, "--model", folder, "--set", "deepstack=drop", "--set", "grid=4x5", "--repeat", 1),
        *("--warmup", 0, "--max-new-tokens", 2, "--budget", 60, "--json"),
    )
    assert run.status == 0, run.err
    assert {row["status"] for row in run.json["rows"]} == {"ok"} and run.json["rows"][0]["attention"] == "sdpa"
    assert KEYS["deepstack"].default == "keep"
