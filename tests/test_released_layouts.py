"""Layouts that released repositories have, and models saved by today's transformers do not: what is read is the same."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from freres_cli.backbones.registry import identify_vision_encoder, load_prompt_counter, load_vision_encoder
from freres_cli.backbones.stock_processors import stock_prompt_ids
from freres_cli.errors import BackboneError
from freres_cli.pipeline.models import find_model
from tests.test_reasoning import MAY
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, make_qwen2_vl, open_checkpoint

CASES = {case.name: case for case in FAMILY_CASES}


def change(folder, name="config.json", **values):
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    for key, value in values.items():
        if callable(value):
            value(config[key])
        elif value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
    return folder


def test_reading_a_config_does_not_change_what_identifies_the_model(tmp_path):
    """transformers writes into the dictionaries of a config in the layout of releases before 5."""
    make_qwen2_vl(tmp_path)

    def as_before(text):
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", **rope}}
        for key in ("rope_theta", "rope_type"):
            text["rope_scaling"].pop(key)

    change(tmp_path, text_config=as_before)
    checkpoint = open_checkpoint(tmp_path)
    before = copy.deepcopy(checkpoint.config)
    loaded = load_vision_encoder(str(tmp_path), CPU).fingerprint
    assert identify_vision_encoder(str(tmp_path), CPU).fingerprint == loaded
    CASES["qwen2_vl"].language_class.load(checkpoint, CPU)
    assert checkpoint.config == before


def test_a_head_that_is_stored_is_used_whatever_the_config_says(tmp_path):
    """The configs of InternVL 3 do not say that its head is its own, and transformers takes it for tied."""
    case = CASES["internvl"]
    case.make(tmp_path)
    change(tmp_path, tie_word_embeddings=True, text_config=lambda text: text.update(tie_word_embeddings=False))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("lm_head.weight"))
    model = case.language_class.load(open_checkpoint(tmp_path), CPU)
    assert torch.equal(model.head_weight, tensors[name])
    assert not torch.equal(model.head_weight, model.decoder.embed_tokens.weight)
    same = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    save_file(tensors | {name: tensors[same].clone()}, path, {"format": "pt"})
    assert case.language_class.load(open_checkpoint(tmp_path), CPU).half.lm_head is None
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, {"format": "pt"})
    assert case.language_class.load(open_checkpoint(tmp_path), CPU).half.lm_head is None
    change(tmp_path, tie_word_embeddings=False)
    with pytest.raises(BackboneError, match="missing weights"):
        case.language_class.load(open_checkpoint(tmp_path), CPU)


def test_settings_of_pixels_inside_those_of_the_processor(tmp_path):
    case = CASES["llava_onevision"]
    case.make(tmp_path)
    nested = {"image_mean": [0.25, 0.5, 0.75], "image_std": [0.5, 0.5, 0.5]}
    change(tmp_path, "processor_config.json", image_processor=nested)
    vision = case.vision_class.load(open_checkpoint(tmp_path), CPU)
    assert vision.pixel_rule.mean == (0.25, 0.5, 0.75) and not any(
        "mean and deviation" in note for note in vision.notes
    )
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    vision = case.vision_class.load(open_checkpoint(tmp_path), CPU)
    assert vision.pixel_rule.mean == case.vision_class.default_rule.mean
    assert any("no mean and deviation of pixels" in note for note in vision.notes)


@pytest.mark.parametrize("half", ["vision_class", "language_class"])
def test_a_decoder_that_would_compute_something_else_is_refused_before_the_video(tmp_path, half):
    case = CASES["internvl"]
    case.make(tmp_path)
    load = getattr(case, half).load
    num_layers = json.loads((tmp_path / "config.json").read_text())["text_config"]["num_hidden_layers"]
    kinds = ["sliding_attention", *["full_attention"] * (num_layers - 1)]
    change(tmp_path, text_config=lambda text: text.update(layer_types=kinds))
    with pytest.raises(BackboneError, match="layers of kind sliding_attention are not supported"):
        load(open_checkpoint(tmp_path), CPU)
    change(tmp_path, text_config=lambda text: text.pop("layer_types"))
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(BackboneError, match="experts that are stored one by one"):
        load(open_checkpoint(tmp_path), CPU)


def test_the_stock_prompt_of_verify_asks_for_no_reasoning_either(tmp_path):
    case = CASES["qwen3_5"]
    case.make(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(MAY)
    counter = load_prompt_counter(str(tmp_path), CPU)
    stock = stock_prompt_ids(open_checkpoint(tmp_path), counter.config, counter.tokenizer, (2, 2, 2), 0.5, "what?")
    end = list(counter.prompt("what?").suffix)
    assert stock[-len(end) :] == end and counter.tokenizer.decode(end).endswith("<think>\n\n</think>\n\n")


def test_another_repository_has_other_commits():
    recorded = {"model_id": "org/name", "folder": None, "revision": "abc"}
    assert find_model(recorded, "bundle", CPU).revision == "abc"
    assert find_model(recorded, "bundle", CPU, "org/mirror").revision is None
    assert find_model(recorded, "bundle", CPU, "org/mirror", "v1").revision == "v1"


@pytest.mark.parametrize(("facts", "size"), [(None, None), ({"total_size": 12.0}, 12), ([], None)])
def test_an_index_without_a_size(tmp_path, facts, size):
    make_qwen2_vl(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    index = {"metadata": facts, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    object.__setattr__(checkpoint, "is_remote", True)
    assert checkpoint.weight_bytes == (size or (tmp_path / "model.safetensors").stat().st_size)
