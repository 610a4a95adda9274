"""Settings that eval must apply as freres compress and freres ask do, and adapters and models that it must refuse."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from freres_cli.baselines.registry import METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.adapter import write_adapter
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.cli.compress import make_options
from freres_cli.devices import choose_device
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.session import AskRequest, open_session
from freres_cli.workflows.compress import compress_file
from tests.clips import write_clip
from tests.evaluations import run_eval, write_rows
from tests.loaded_models import loaded_models, models_with
from tests.runner import fails
from tests.tiny_families import FAMILY_CASES, HIDDEN

CASE = next(case for case in FAMILY_CASES if case.name == "qwen3_vl")
WHOLE = HIDDEN * (1 + CASE.num_deep)
SETTINGS = {"deepstack": "drop", "grid": "4x5", "sample_count": 6}
BUDGET = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    CASE.make(folder / "model")
    write_clip(folder / "clip.mp4", 6, fps=10)
    row = {"id": "1", "video": "clip.mp4", "category": "c", "question": "q?", "choices": ["a", "b"], "answer": "a"}
    write_rows(folder / "q.jsonl", [row])
    return folder


@pytest.fixture(scope="module")
def options(folder):
    return make_options({**SETTINGS, "method": "fre-res"}, None, str(folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def models(options):
    return Models(options.model)


@pytest.fixture(scope="module")
def clip(folder, options, models):
    return EncodedClip(VideoSource(folder / "clip.mp4"), options, models.encoder, StageTimer(torch.device("cpu")))


@pytest.fixture(scope="module")
def bundle(folder, options, models):
    with_budget = replace(options, settings=options.settings.with_values("flag", budget_tokens=BUDGET))
    compress_file(Compressor.from_options(with_budget, models), folder / "clip.mp4", folder / "b.pt")
    return folder / "b.pt"


def test_a_clip_without_deep_rows_gives_the_bundle_that_compress_writes(clip, bundle, models, tmp_path):
    write_bundle(tmp_path / "b.pt", *clip.make_bundle(BUDGET, models.language_model))
    assert (tmp_path / "b.pt").read_bytes() == bundle.read_bytes()
    assert read_bundle(bundle).tracks.anchor_latents.shape[1] == HIDDEN


def test_only_the_model_as_it_is_keeps_the_deep_rows(clip):
    budgets = {"full": clip.full_tokens, "blind": 0}
    channels = {name: clip.build_tokens(name, budgets.get(name, BUDGET)).latents.shape[1] for name in METHODS}
    assert channels == {**dict.fromkeys(channels, HIDDEN), "full": WHOLE}
    kept = clip.with_settings({"deepstack": "keep"})
    for name in ("uniform", "lowres", "evs", "dtd", "fre-res"):
        whole, dropped = kept.build_tokens(name, BUDGET), clip.build_tokens(name, BUDGET)
        assert whole.latents.shape[1] == WHOLE and torch.equal(whole.positions, dropped.positions)
        # Fre-Res adds and multiplies fewer channels in another order.
        bound = {"rtol": 1e-5, "atol": 1e-5} if name == "fre-res" else {"rtol": 0, "atol": 0}
        assert torch.allclose(whole.latents[:, :HIDDEN], dropped.latents, **bound)
        assert torch.allclose(whole.energy, dropped.energy, **bound)


def test_eval_without_deep_rows_answers_as_ask_does(folder, bundle, models, tmp_path):
    output, methods = tmp_path / "answers.jsonl", ("full", "uniform", "lowres", "fre-res", "blind")
    flags = {"settings": SETTINGS, "model": str(folder / "model"), "output": output}
    result = run_eval(folder / "q.jsonl", ",".join(methods), str(BUDGET), models=models, **flags)
    assert any("full keeps the DeepStack rows" in note for note in result.notes)
    row = json.loads(output.read_text().splitlines()[1])
    assert row["status"] == "ok" and [cell["method"] for cell in row["cells"]] == list(methods)
    session = open_session(AskRequest(bundle, choose_device("cpu")), models)
    assert row["cells"][3]["visual_tokens"] == len(session.tokens)
    assert row["cells"][3]["answers"]["1"][0] == session.ask("q?", choices=["a", "b"]).text


def test_nothing_to_drop_is_said(folder):
    notes = run_eval(folder / "q.jsonl", "blind", settings={"deepstack": "drop"}).notes
    assert any("deepstack has no effect" in note for note in notes)


def test_an_adapter_of_too_few_bands_is_refused_before_any_video(folder):
    def run(max_coefficients, adapter=None):
        settings = {"anchors": 2, "max_coefficients": max_coefficients}
        return run_eval(folder / "q.jsonl", "fre-res", "0.5", settings=settings, adapter=adapter)

    with fails(5, "adapter bands: expected at least 12, got 5") as failure:
        run(12)
    assert "max_coefficients=5" in failure.value.hint
    assert run(5).summary["failed"] == []
    assert run(12, adapter="none").summary["failed"] == []


def test_an_adapter_of_another_width_is_refused(folder, tmp_path):
    path, modules = tmp_path / "a.safetensors", FreResModules(ModuleShape(8, 2, 5))
    header = {"model": loaded_models().facts, "shape": modules.shape.to_dict()}
    write_adapter(path, modules.state_dict(), header)
    with fails(5, "adapter width: expected"):
        run_eval(folder / "q.jsonl", "full,uniform,fre-res", adapter=str(path))


def test_scores_that_are_not_numbers_are_not_answers(folder):
    model = copy.deepcopy(loaded_models().language_model)
    weights = dict(model.half.named_parameters())
    name = next(name for name in weights if name.endswith("layers.5.mlp.down_proj.weight"))
    weights[name].detach().fill_(float("inf"))
    with fails(5, "not finite"):
        run_eval(folder / "q.jsonl", "blind", models=models_with(language_model=model))
