"""Weights of the linear layers in 8 bits, by torchao: which change, by how much, and what they take."""

from __future__ import annotations

import sys

import pytest
import torch

from freres_cli import devices
from freres_cli.backbones.quantized_weights import plain_tensors, quantize_linears
from freres_cli.backbones.saved_prefix import digest_prefix
from freres_cli.backbones.sizes import measure_decoder
from freres_cli.devices import Storage, choose_storage
from freres_cli.errors import UsageError
from tests import family_contract
from tests.runner import fails
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, open_checkpoint

one_thread = family_contract.one_thread
KINDS = ("int8", "fp8")


def test_without_torchao_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert choose_storage("int8", "auto") == Storage("int8")
    with pytest.raises(UsageError, match="--weight-dtype fp8: needs torchao, which is not installed") as raised:
        choose_storage(None, "fp8")
    assert "freres[quant]" in raised.value.hint


def test_a_torchao_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with fails(5, "--weight-dtype int8: torchao cannot be used"):
        quantize_linears(torch.nn.Linear(2, 2), "int8", torch.device("cpu"))


def test_without_a_name_nothing_happens():
    linear = torch.nn.Linear(2, 2)
    weight = linear.weight
    assert quantize_linears(linear, None, torch.device("cpu")) is None and linear.weight is weight
    assert list(plain_tensors(weight)) == [weight]


@pytest.fixture(scope="module", params=FAMILY_CASES, ids=lambda case: case.name)
def checkpoint(request, tmp_path_factory):
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp(request.param.name)
    request.param.make(folder)
    return request.param.language_class, open_checkpoint(folder)


@torch.no_grad()
@pytest.mark.parametrize("weights", KINDS)
def test_only_linear_layers_of_the_decoder_change_and_by_half_a_step(checkpoint, weights):
    language_class, opened = checkpoint
    plain, small = (language_class.load(opened, CPU, storage=Storage(None, name)) for name in (None, weights))
    linears = {
        f"{name}.weight" for name, module in plain.decoder.named_modules() if isinstance(module, torch.nn.Linear)
    }
    found = dict(small.decoder.named_parameters())
    held = 0
    for name, weight in plain.decoder.named_parameters():
        if name not in linears:
            assert torch.equal(found[name], weight)
            continue
        parts = list(plain_tensors(found[name]))
        assert len(parts) > 1 and parts[0].element_size() == 1
        held += sum(part.nbytes for part in parts)
        exact, largest = weight.abs(), weight.abs().amax(-1, keepdim=True)
        steps = largest / 127 if weights == "int8" else torch.maximum(exact / 8, largest / 448 / 512)
        off = (found[name].dequantize() - weight).abs()
        assert (off <= steps * 0.51).all() and (off > 0).any()
    assert torch.equal(small.head_weight, plain.head_weight)
    sizes = measure_decoder(language_class.load_without_weights(opened))
    assert held == sizes.linear_bytes(weights)
    assert sizes == measure_decoder(small), "the sizes of a quantized model are those of its config"
    everything = sum(part.nbytes for weight in small.half.parameters() for part in plain_tensors(weight))
    assert everything == sizes.weight_bytes(4, Storage(None, weights))
    assert any(f"in {weights}, {held} bytes in place of" in note for note in small.notes)
    rows = plain.text_rows(list(range(20)), 0, 0.0)
    mine, theirs = (model.decode(rows, model.new_cache()) for model in (small, plain))
    assert 0 < (mine - theirs).norm() < 0.5 * theirs.norm()
    assert digest_prefix(small, rows) != digest_prefix(plain, rows)
