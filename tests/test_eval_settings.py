"""Settings that eval must carry as freres compress and freres ask do, and models that it must refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.adapter import write_adapter
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.cli.compress import make_request
from freres_cli.devices import choose_device
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.presets import Setting
from freres_cli.workflows.ask import AskRequest, open_session
from freres_cli.workflows.clips import BASELINES, EncodedClip
from freres_cli.workflows.compress import compress_video, load_encoder
from freres_cli.world.bundled_model import bundled_model_dir
from tests.clips import write_clip
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES, HIDDEN

CASE = next(case for case in FAMILY_CASES if case.name == "qwen3_vl")
WHOLE = HIDDEN * (1 + CASE.num_deep)
FLAGS = {"deepstack": "drop", "grid": "4x5", "sample_count": 6}
BUDGET = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    CASE.make(folder / "model")
    write_clip(folder / "clip.mp4", 6, fps=10)
    row = {"id": "1", "video": "clip.mp4", "category": "c", "question": "q?", "choices": ["a", "b"], "answer": "a"}
    (folder / "q.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def request_to_drop(folder):
    return make_request(folder / "clip.mp4", FLAGS, None, str(folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def clip(request_to_drop):
    return EncodedClip(request_to_drop, load_encoder(request_to_drop), StageTimer(torch.device("cpu")))


@pytest.fixture(scope="module")
def bundle(folder, request_to_drop):
    settings = {**request_to_drop.settings, "budget_tokens": Setting(BUDGET, "flag")}
    compress_video(replace(request_to_drop, settings=settings), folder / "b.pt")
    return folder / "b.pt"


def test_a_clip_without_deep_rows_gives_the_bundle_that_compress_writes(clip, bundle, tmp_path):
    write_bundle(tmp_path / "b.pt", *clip.make_bundle(BUDGET))
    assert (tmp_path / "b.pt").read_bytes() == bundle.read_bytes()
    assert read_bundle(bundle).tracks.anchor_latents.shape[1] == HIDDEN


def test_only_the_model_as_it_is_keeps_the_deep_rows(clip, request_to_drop):
    budgets = {"full": clip.full_tokens, "blind": 0}
    channels = {
        name: clip.build_tokens(name, budgets.get(name, BUDGET)).latents.shape[1] for name in (*BASELINES, "fre-res")
    }
    assert channels == {**dict.fromkeys(channels, HIDDEN), "full": WHOLE}
    kept = clip.with_settings([("deepstack", "keep")])
    for name in ("uniform", "lowres", "fre-res"):
        whole, dropped = kept.build_tokens(name, BUDGET), clip.build_tokens(name, BUDGET)
        assert whole.latents.shape[1] == WHOLE and torch.equal(whole.latents[:, :HIDDEN], dropped.latents)
        assert torch.equal(whole.energy, dropped.energy)


def test_eval_without_deep_rows_answers_as_ask_does(folder, bundle, tmp_path):
    output, methods = tmp_path / "answers.jsonl", ("full", "uniform", "lowres", "fre-res", "blind")
    run = run_freres(
        *("eval", folder / "q.jsonl", "--model", folder / "model", "--methods", ",".join(methods), "-o", output),
        *("--budgets", BUDGET, *[part for key, value in FLAGS.items() for part in ("--set", f"{key}={value}")]),
    )
    assert run.status == 0 and "full keeps the DeepStack rows" in run.err, run.err
    row = json.loads(output.read_text().splitlines()[1])
    assert row["status"] == "ok" and [cell["method"] for cell in row["cells"]] == list(methods)
    session = open_session(AskRequest(bundle, choose_device("cpu")))
    assert row["cells"][3]["visual_tokens"] == len(session.tokens)
    assert row["cells"][3]["answers"]["1"][0] == session.ask("q?", choices=["a", "b"]).text


def test_nothing_to_drop_is_said(folder):
    run = run_freres("eval", folder / "q.jsonl", "--methods", "blind", "--set", "deepstack=drop")
    assert run.status == 0 and "deepstack has no effect" in run.err, run.err


def test_an_adapter_of_too_few_bands_is_refused_before_any_video(folder):
    flags = ("eval", folder / "q.jsonl", "--methods", "fre-res", "--budgets", "0.5", "--set", "anchors=2")
    run = run_freres(*flags, "--set", "max_coefficients=12")
    check_failure(run, 5, "adapter bands: expected at least 12, got 5")
    assert "max_coefficients=5" in run.err
    assert run_freres(*flags, "--set", "max_coefficients=5").status == 0
    assert run_freres(*flags, "--set", "max_coefficients=12", "--adapter", "none").status == 0


def test_an_adapter_of_another_width_is_refused(folder, tmp_path):
    request = make_request(folder / "clip.mp4", {}, None, None, device="cpu")
    path, modules = tmp_path / "a.safetensors", FreResModules(ModuleShape(8, 2, 5))
    header = {"model": dict(load_encoder(request).fingerprint), "shape": modules.shape.to_dict()}
    write_adapter(path, modules.state_dict(), header)
    check_failure(run_freres("eval", folder / "q.jsonl", "--adapter", path), 5, "adapter width: expected")


def test_scores_that_are_no_numbers_are_no_answers(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled_model_dir(), model)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.5.mlp.down_proj.weight") and "visual" not in name)
    weights[name].fill_(float("inf"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    check_failure(run_freres("eval", folder / "q.jsonl", "--methods", "blind", "--model", model), 3, "not finite")
