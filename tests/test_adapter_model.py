"""An adapter is for one model: other weights in the same folder, with the same config and projector, are another one."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from freres_cli.bundle.adapter import write_adapter
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.errors import BackboneError
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.stretch_modules import StretchModules
from freres_cli.pipeline import adapters
from freres_cli.pipeline.adapters import TRAINED_METHODS, load_adapter, load_modules_for
from freres_cli.pipeline.bundle import load_bundle
from freres_cli.pipeline.models import Models, make_source
from freres_cli.workflows import training_data
from freres_cli.world.bundled_model import bundled_adapter, bundled_model_dir
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres

CHANGED = {"tower_sha256": "blocks.3.mlp.fc1.weight", "decoder_sha256": "layers.2.mlp.up_proj.weight"}


@pytest.fixture(scope="module", params=sorted(CHANGED))
def other(request, tmp_path_factory):
    """What differs, and the folder of a model that differs from the bundled one in nothing else."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(bundled_model_dir(), folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(CHANGED[request.param]))
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return request.param, folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path, modules = tmp_path_factory.mktemp("adapter") / "a.safetensors", FreResModules(ModuleShape(192, 2, 5))
    write_adapter(path, modules.state_dict(), {"model": loaded_models().facts, "shape": modules.shape.to_dict()})
    return path


def test_an_adapter_for_other_weights_is_refused(other, adapter):
    changed, folder = other
    with pytest.raises(BackboneError, match=rf"adapter for another model: .*\(differs in {changed}\)") as failure:
        load_adapter(adapter, Models(make_source(str(folder), "cpu")).facts)
    assert "--adapter none" in failure.value.hint


def test_where_no_adapter_is_named_the_one_that_ships_is_left_out_for_another_decoder(other, bundle):
    """Of a model that ``freres world train --tower-steps 0`` wrote, which reads the bundles of the bundled tower."""
    changed, folder = other
    asked = ("ask", bundle, "what?", "--choices", "a|b", "--model", folder, "--json")
    run = run_freres(*asked)
    plain = run_freres(*asked, "--adapter", "none")
    assert run.status == plain.status == 0, run.err
    note = f"opened without an adapter: the one that ships does not fit the language half of {folder}"
    is_out = changed == "decoder_sha256"
    assert (note in run.err) == is_out and "without an adapter" not in plain.err
    assert (run.json["choices"] == plain.json["choices"]) == is_out


def test_what_is_exported_are_the_tokens_that_this_model_reads(other, bundle, tmp_path):
    changed, folder = other
    if changed == "tower_sha256":
        pytest.skip("the decoder is the bundle's")
    flags = ("--model", folder, "-o", tmp_path / "v.safetensors")
    run = run_freres("export", bundle, "--to", "vllm", *flags)
    assert run.status == 0 and "opened without an adapter: the one that ships does not fit" in run.err
    expected = load_bundle(bundle).open(model=folder, device="cpu").tokens.latents
    assert torch.equal(load_file(tmp_path / "v.safetensors")["latents"], expected)
    assert not torch.equal(expected, load_bundle(bundle).tokens().latents)


def test_an_adapter_that_records_no_weights_is_to_be_trained_again(adapter, tmp_path):
    """The message names no model: both would have the same name."""
    facts, path = loaded_models().facts, tmp_path / "early.safetensors"
    modules = FreResModules(ModuleShape(192, 2, 5))
    early = {key: value for key, value in facts.items() if key not in CHANGED}
    write_adapter(path, modules.state_dict(), {"model": early, "shape": modules.shape.to_dict()})
    with pytest.raises(BackboneError, match=r"early\.safetensors: does not record the weights") as failure:
        load_adapter(path, facts)
    assert "train it again" in failure.value.hint
    with pytest.raises(BackboneError, match=r"adapter for another model: .*differs in projector_sha256, tower"):
        load_adapter(path, {**facts, "projector_sha256": "0"})


def test_eval_and_compare_compare_both_halves_and_ask_the_one_that_it_loads(other, adapter, bundle):
    changed, folder = other
    models = Models(make_source(str(folder), "cpu"))
    settings = make_options({}, None, None, device="cpu").settings.values()
    with pytest.raises(BackboneError, match=changed):
        load_modules_for(adapter, "fre-res", models, settings)
    run = run_freres("ask", bundle, "what?", "--choices", "a|b", "--model", folder, "--adapter", adapter)
    if changed == "decoder_sha256":
        check_failure(run, 5, f"differs in {changed}")
    else:
        assert run.status == 0, run.err


def test_the_cache_of_training_is_not_shared_with_other_weights(other):
    folder = other[1]
    options = at_budgets(make_options({}, None, None, device="cpu"), "train", trains=TRAINED_METHODS)
    keys = {training_data._key(options, Models(make_source(name, "cpu"))) for name in ("bundled", str(folder))}
    assert len(keys) == 2


def test_the_precision_and_the_place_of_a_model_do_not_matter(tmp_path):
    facts = loaded_models().facts
    copy = shutil.copytree(bundled_model_dir(), tmp_path / "copy")
    for dtype in ("float32", "bfloat16"):
        assert Models(make_source(str(copy), "cpu", dtype)).facts == {**facts, "model_id": "copy"}
    assert load_adapter(bundled_adapter(), facts).training["steps"] == 200


@pytest.mark.parametrize("method", TRAINED_METHODS)
def test_a_header_that_asks_for_large_modules_takes_no_memory(tmp_path, monkeypatch, method):
    """Of 2 KB, which asked for gibibytes before they were compared with its weights."""
    kind, made = (StretchModules if method == "adaptive" else FreResModules), []

    def make(shape):
        made.append(kind(shape))
        return made[-1]

    monkeypatch.setattr(adapters, kind.__name__, make)
    path, shape = tmp_path / "a.safetensors", {**ModuleShape(192, 100_000, 5).to_dict()}
    write_adapter(path, {"gates": torch.ones(2)}, {"model": {}, "method": method, "shape": shape})
    with pytest.raises(BackboneError, match=r"damaged adapter: .*: expected shape \(.*\), got none"):
        load_adapter(path, {})
    assert [{parameter.device.type for parameter in one.parameters()} for one in made] == [{"meta"}]


def test_weights_of_other_sizes_than_the_header_says_are_named(tmp_path):
    path, modules = tmp_path / "a.safetensors", FreResModules(ModuleShape(8, 2, 5))
    header = {"model": {}, "shape": ModuleShape(8, 3, 5).to_dict()}
    write_adapter(path, modules.state_dict(), header)
    with pytest.raises(BackboneError, match=r"absorber.band: expected shape \(5, 3\), got \(5, 2\)"):
        load_adapter(path, {})
    more = {**modules.state_dict(), "more": torch.ones(1)}
    write_adapter(path, more, {**header, "shape": modules.shape.to_dict()}, force=True)
    with pytest.raises(BackboneError, match=r"more: expected shape none, got \(1,\)"):
        load_adapter(path, {})


def test_modules_are_float32_whatever_their_file_holds(tmp_path):
    path, modules = tmp_path / "a.safetensors", FreResModules(ModuleShape(8, 2, 5))
    stored = {name: weight.bfloat16() for name, weight in modules.state_dict().items()}
    write_adapter(path, stored, {"model": {}, "shape": modules.shape.to_dict()})
    loaded = load_adapter(path, {}).modules
    assert {(p.dtype, p.device.type, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, "cpu", False)}
    assert all(torch.equal(weight.float(), loaded.state_dict()[name]) for name, weight in stored.items())
