"""New embedded weights: what was made with earlier ones is refused by name, and opens with a folder of those."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from freres_cli.backbones.registry import identify_vision_encoder
from freres_cli.bundle.adapter import read_adapter, write_adapter
from freres_cli.bundle.store import read_bundle
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.pipeline import models
from freres_cli.pipeline.models import Models, check_model, make_source
from freres_cli.world import bundled_model
from freres_cli.world.bundled_model import EMBEDDED_WEIGHTS, bundled_adapter, bundled_model_dir, bundled_model_info
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, fails, run_freres
from tests.tiny_models import CPU

ASKED = ("what moves?", "--choices", "a|b", "--json")
NOW = bundled_model_info()["weights"]
OLD = "drawn-0"


def identify(name):
    return identify_vision_encoder(name, CPU, bundled_directory=bundled_model_dir()).fingerprint


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder of earlier weights: today's with another projector."""
    folder = tmp_path_factory.mktemp("weights") / "earlier"
    shutil.copytree(bundled_model_dir(), folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if "merger" in key and key.endswith("bias"))
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def old_bundle(clip, old, tmp_path_factory):
    """A bundle made while these weights were the embedded ones, and the answer given then without an adapter."""
    path = tmp_path_factory.mktemp("old") / "old.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "bundled_model_dir", lambda: old)
        assert run_freres("compress", clip, "--method", "fre-res", "--budget", 100, "-o", path).status == 0
        answer = run_freres("ask", path, *ASKED, "--adapter", "none").json["choices"]
    assert read_bundle(path).manifest["model"]["model_id"] == "bundled"
    return path, answer


@pytest.fixture
def named(old, monkeypatch):
    """A release that knows the earlier weights."""
    monkeypatch.setitem(EMBEDDED_WEIGHTS, identify(str(old))["projector_sha256"], OLD)


def test_todays_weights_have_a_name_and_an_adapter_of_their_own():
    facts = identify("bundled")
    assert EMBEDDED_WEIGHTS.get(facts["projector_sha256"]) == NOW, f"{bundled_model.__name__} lacks a row for {facts}"
    assert len(set(EMBEDDED_WEIGHTS.values())) == len(EMBEDDED_WEIGHTS)
    read_adapter(bundled_adapter(), facts)


def test_a_bundle_of_earlier_weights_is_refused_by_name(old_bundle, named):
    run = run_freres("ask", old_bundle[0], *ASKED)
    check_failure(run, 5)
    assert run.errors == [f"error: {old_bundle[0]}: made with embedded weights {OLD}, these are {NOW}"]
    hints = [line for line in run.err.splitlines() if line.startswith("hint:")]
    assert len(hints) == 1 and "--model FOLDER" in hints[0] and "compress the video again" in hints[0]


def test_weights_without_a_name_are_refused_as_well(old_bundle):
    text = f"made with embedded weights unknown to this release, these are {NOW}"
    check_failure(run_freres("ask", old_bundle[0], *ASKED), 5, text)


def test_another_config_around_the_same_weights_is_refused_as_another_model(bundle):
    model = loaded_models().language_model
    recorded = {**read_bundle(bundle).manifest["model"], "config_sha256": "0"}
    text = f"expected embedded weights {NOW}, got embedded weights {NOW} (differs in config_sha256)"
    with fails(5, text):
        check_model(recorded, model.width, model, "bundle.pt")


def test_a_folder_of_the_earlier_weights_opens_the_bundle(old_bundle, old, named):
    run = run_freres("ask", old_bundle[0], *ASKED, "--model", old)
    assert run.status == 0, run.err
    assert run.json["choices"] == pytest.approx(old_bundle[1], abs=1e-6)
    assert f"the one that ships does not fit embedded weights {OLD}" in run.err
    plain = run_freres("ask", old_bundle[0], *ASKED, "--model", old, "--adapter", "none")
    assert plain.status == 0 and "does not fit" not in plain.err


def test_a_folder_of_other_weights_does_not(bundle, old_bundle, old, named, tmp_path):
    copy = shutil.copytree(bundled_model_dir(), tmp_path / "copy")
    text = f"made for another model: expected embedded weights {OLD}, got copy (differs in projector_sha256)"
    check_failure(run_freres("ask", old_bundle[0], *ASKED, "--model", copy), 5, text)
    text = f"expected embedded weights {NOW}, got earlier"
    check_failure(run_freres("ask", bundle, *ASKED, "--model", old), 5, text)
    # Where weights are does not matter.
    assert run_freres("ask", bundle, *ASKED, "--model", copy).status == 0


def test_an_adapter_of_earlier_weights_is_refused_by_name(bundle, old_bundle, old, named, tmp_path):
    facts = {**Models(make_source(str(old), "cpu")).facts, "model_id": "bundled"}
    width = read_bundle(old_bundle[0]).manifest["model"]["width"]
    modules, path = FreResModules(ModuleShape(width, 8, 8)), tmp_path / "old.safetensors"
    write_adapter(path, modules.state_dict(), {"model": facts, "shape": modules.shape.to_dict()})
    text = f"adapter for another model: expected embedded weights {NOW}, got embedded weights {OLD}"
    check_failure(run_freres("ask", bundle, *ASKED, "--adapter", path), 5, text)
    fitting = run_freres("ask", old_bundle[0], *ASKED, "--model", old, "--adapter", path)
    assert fitting.json["choices"] == pytest.approx(old_bundle[1], abs=1e-6) and "does not fit" not in fitting.err
    text = f"expected embedded weights {OLD}, got embedded weights {NOW}"
    check_failure(run_freres("ask", old_bundle[0], *ASKED, "--model", old, "--adapter", bundled_adapter()), 5, text)
