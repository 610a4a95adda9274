"""``--weights random``: the released sizes, without weights or a network, through the same loading as stored weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from freres_cli.backbones import hub
from freres_cli.backbones.drawn import DRAWN_STD, draw_checkpoint
from freres_cli.backbones.registry import KNOWN_CHECKPOINTS
from freres_cli.backbones.released import RELEASED_CONFIGS, write_weightless
from freres_cli.errors import BackboneError, UsageError
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.query import Query, check_query
from tests.family_contract import one_thread  # noqa: F401
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU

KNOWN = {known.model_id: known for known in KNOWN_CHECKPOINTS}


@pytest.mark.parametrize("name", RELEASED_CONFIGS)
def test_a_released_config_has_the_published_number_of_parameters(name, tmp_path):
    config = AutoConfig.for_model(**json.loads(json.dumps(RELEASED_CONFIGS[name])))
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config)
    known = KNOWN[name]
    assert 2 * sum(parameter.numel() for parameter in stock.parameters()) == known.weight_bytes
    folder = write_weightless(name.partition("/")[2].removesuffix("-Instruct"), tmp_path)
    models = Models(ModelSource(str(folder), CPU, is_random=True))
    # The same sizes that are listed, and every weight of the stock model is drawn for one half or the other.
    assert models.checkpoint.weight_bytes == known.weight_bytes
    model = models.prompt_counter
    model.half.to(torch.bfloat16)
    assert model.kv_bytes_per_token == known.kv_bytes_per_token and model.width == known.width
    assert model.num_deep_layers == known.num_deep_layers


def test_the_stand_in_tokenizer_has_the_ids_of_the_config_and_loses_nothing(tmp_path):
    folder = write_weightless("Qwen3-VL-8B", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("video_pad", "image_pad", "vision_start", "vision_end"):
        key = f"{name.replace('pad', 'token') if name.endswith('pad') else f'{name}_token'}_id"
        assert tokenizer.convert_tokens_to_ids(f"<|{name}|>") == config[key]
    text = "<1.5 seconds>Ünïcödé 1\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("<1.5 seconds>", add_special_tokens=False)["input_ids"]) == 6  # < 1 . 5 seconds >
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [config["text_config"]["eos_token_id"]]


def test_a_word_that_the_stand_in_tokenizer_knows_as_a_whole_may_be_asked_about(tmp_path):
    folder = write_weightless("Qwen3-VL-4B", tmp_path)
    model = Models(ModelSource(str(folder), CPU, is_random=True)).prompt_counter
    check_query(Query("What happens after 5 seconds?"), model)
    with pytest.raises(UsageError, match="as a command"):
        check_query(Query("What happens<|im_end|>?"), model)


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_every_family_can_be_drawn_whole_from_its_config(case, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    stock = case.make(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    models = Models(ModelSource(str(tmp_path), CPU, is_random=True))
    shapes = models.checkpoint.shapes
    assert sum(shape.numel() for shape in shapes.values()) == sum(p.numel() for p in stock.parameters())
    latents, model = models.encoder.encode(case.frames(2)), models.language_model
    assert latents.shape[1:3] == case.grid and latents.isfinite().all() and latents.std() > 0
    assert model.fingerprint == models.encoder.fingerprint and "random" in model.fingerprint["model_id"]
    rows = model.text_rows(model.prompt("what?").prefix, 0, 0.0)
    logits = model.logits(model.decode(rows, model.new_cache()))
    assert logits.isfinite().all() and logits.std() > 0


def test_weights_are_the_same_each_time_and_of_one_width(tmp_path):
    FAMILY_CASES[0].make(tmp_path)
    first, again = (draw_checkpoint(str(tmp_path), "cpu") for _ in range(2))
    keys = sorted(first.shapes)
    one, two = dict(first.tensors(keys)), dict(again.tensors(keys[::-1]))
    assert all(torch.equal(one[key], two[key]) for key in keys)
    large = [key for key in keys if one[key].ndim > 1]
    assert len({float(one[key].flatten()[0]) for key in large}) == len(large)
    drawn = torch.cat([one[key].flatten() for key in large])
    assert abs(float(drawn.std()) / DRAWN_STD - 1) < 0.05 and abs(float(drawn.mean())) < DRAWN_STD / 20


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="Qwen3-VL-8B"):
        write_weightless("Qwen9-VL", tmp_path)
    table = ("profile", "--table", "dense-30fps", "--weights", "random", "--device", "cpu")
    check_failure(run_freres(*table, "--model", "Qwen9-VL"), 5, "config is not known here")
    check_failure(run_freres(*table), 2, "expected --model")
    check_failure(run_freres("profile", "--weights", "some"), 2, "expected one of stored, random")
    check_failure(run_freres(*table, "--model", tmp_path), 5, "expected config.json")
    assert not list(tmp_path.iterdir())
