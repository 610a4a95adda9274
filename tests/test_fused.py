"""Where kernels stand in for passes over memory: which layers take them, and that what they compute is the layers' own.

The kernels themselves run in ``test_cuda.py``. Here PyTorch's own operations are in their place.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from freres_cli.backbones import fused, fused_layers
from freres_cli.backbones.fused import Written, compare_kernels, find_kernels
from freres_cli.backbones.fused_layers import replace_passes, use_kernels
from freres_cli.devices import choose_device
from tests.family_contract import CASES
from tests.family_contract import folders as folders
from tests.family_contract import one_thread as one_thread
from tests.tiny_models import CPU, open_checkpoint, video_tokens


class Counting:
    """What ``Written`` computes, counted."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] = self.calls.get(name, 0) + 1
            return getattr(Written, name)(*arguments)

        return call


@pytest.fixture
def on_cpu(monkeypatch):
    """Have layers on the CPU take kernels, as those on a GPU do."""
    monkeypatch.setattr(fused_layers, "_takes", lambda *tensors: not torch.is_grad_enabled())


# What each family's tower and decoder have; a layer of experts, or one that keeps a state, has its own.
OF_TOWER = {
    "qwen2_vl": {"rotate", "quick_gelu"},
    "qwen2_5_vl": {"rotate", "norm", "gate"},
    "qwen3_vl": {"rotate"},
    "qwen3_vl_moe": {"rotate"},
    "qwen3_5": {"rotate"},
}
OF_DECODER = {
    "qwen3_vl_moe": {"rotate", "norm"},
    "qwen3_5": {"gate"},
    "minicpmv4_6": {"gate"},
    "minicpmv4_7": {"gate"},
}


@pytest.mark.parametrize("name", CASES)
def test_layers_give_the_same_to_the_bit_when_their_passes_are_replaced(folders, on_cpu, name, monkeypatch):
    monkeypatch.setattr(fused_layers, "_patches_of", lambda *_: None)  # a product adds up in another order
    case, checkpoint = CASES[name], open_checkpoint(folders(name))
    halves, seen = [], []
    for is_replaced in (False, True):
        vision = case.vision_class.load(checkpoint, CPU)
        model = case.language_class.load(checkpoint, CPU)
        for half in (vision.tower, model.decoder):
            seen.append(Counting())
            if is_replaced:
                replace_passes(half, seen[-1])
                seen[-1].calls.clear()  # of the comparison
        latents = vision.encode(case.frames(3))
        rows = model.splice(model.prompt("What moves?").prefix, video_tokens(latents, width=vision.width))
        with torch.no_grad():
            halves.append((latents, model.decode(rows, model.new_cache(), is_long=True)))  # as engine.prefill has it
    for plain, replaced in zip(*halves, strict=True):
        assert torch.equal(plain, replaced)
    assert set(seen[2].calls) == OF_TOWER.get(name, set())
    assert set(seen[3].calls) == OF_DECODER.get(name, {"rotate", "norm", "gate"})
    before = dict(seen[3].calls)
    model.decode(rows, model.new_cache())  # gradients need every step
    assert seen[3].calls == before


def test_a_stock_model_in_the_same_process_keeps_its_own(folders, on_cpu):
    case, checkpoint = CASES["qwen3_vl"], open_checkpoint(folders("qwen3_vl"))
    counting = Counting()
    replaced, other = (case.language_class.load(checkpoint, CPU) for _ in range(2))
    replace_passes(replaced.decoder, counting)
    counting.calls.clear()
    with torch.no_grad():
        other.decode(other.text_rows([1, 2, 3], 0, 0.0), other.new_cache())
    assert not counting.calls


def test_a_norm_of_another_formula_is_left_alone(on_cpu):
    layers, counting = nn.ModuleList([Qwen3VLTextRMSNorm(8), Qwen3_5RMSNorm(8)]), Counting()
    replace_passes(layers, counting)
    counting.calls.clear()
    with torch.no_grad():
        for layer in layers:
            layer(torch.randn(3, 8))
    assert counting.calls == {"norm": 1} and type(layers[1]) is Qwen3_5RMSNorm


def test_a_copy_of_a_model_has_weights_of_its_own(folders, on_cpu):
    counting = Counting()
    model = CASES["qwen3_vl"].language_class.load(open_checkpoint(folders("qwen3_vl")), CPU)
    decoder = model.decoder
    replace_passes(decoder, counting)
    copies = [copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))]
    embeds = torch.randn(1, 4, model.width)

    def run(own):
        return own(inputs_embeds=embeds, use_cache=False).last_hidden_state

    with torch.no_grad():
        before = run(decoder)
        for own in copies:
            assert torch.equal(run(own), before)
            for module in own.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.weight.zero_()
            counting.calls.clear()
            assert not run(own).any() and set(counting.calls) == {"norm", "rotate", "gate"}
        assert torch.equal(run(decoder), before)


def test_replaced_layers_share_their_kind_and_are_freed_at_once(on_cpu):
    layers, others = (nn.ModuleList([Qwen3VLTextRMSNorm(width)]) for width in (8, 16))
    for own in (layers, others, others):
        replace_passes(own, Written)
    assert type(layers[0]) is type(others[0]) is not Qwen3VLTextRMSNorm
    gone = weakref.ref(layers[0])
    gc.disable()
    try:
        del layers
        assert gone() is None
    finally:
        gc.enable()


def test_a_kernel_that_fails_at_a_models_own_size_leaves_all_as_it_was(on_cpu, monkeypatch):
    class Broken(Counting):
        def norm(self, x, weight, eps):
            return Written.norm(x, weight, eps) + (x.shape[-1] == 4096)

    layers = nn.ModuleList([Qwen3VLTextRMSNorm(8), Qwen3VLTextRMSNorm(4096)])
    monkeypatch.setattr(fused_layers, "find_kernels", lambda *_: (Broken(), None))
    note = use_kernels(layers, torch.device("cpu"), torch.float32)
    assert "norm (16, 4096)" in note and "longer" in note
    assert [type(layer) for layer in layers] == [Qwen3VLTextRMSNorm] * 2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_rotations_are_compared_at_every_number_of_heads_that_a_model_turns(folders, on_cpu, name):
    """Each has a kernel of its own."""
    case, checkpoint = CASES[name], open_checkpoint(folders(name))
    shapes = set()

    class Seeing(Counting):
        def rotate(self, rows, cos, sin):
            shapes.add((rows.shape[1], rows.shape[3]))
            return Written.rotate(rows, cos, sin)

    vision, model = case.vision_class.load(checkpoint, CPU), case.language_class.load(checkpoint, CPU)
    for half in (vision.tower, model.decoder):
        replace_passes(half, Seeing())
    compared = set(shapes)
    shapes.clear()
    latents = vision.encode(case.frames(3))
    with torch.no_grad():
        model.decode(
            model.splice(model.prompt("?").prefix, video_tokens(latents, width=vision.width)), model.new_cache()
        )
    assert len(shapes) > 1 and shapes <= compared


def test_patches_that_do_not_overlap_are_one_product(on_cpu):
    torch.manual_seed(0)
    whole, overlapping = nn.Conv3d(3, 6, (2, 4, 4), (2, 4, 4)), nn.Conv3d(3, 6, (2, 4, 4), (2, 2, 2))
    replace_passes(nn.ModuleList([whole, overlapping]), Written)
    assert type(whole) is not nn.Conv3d and type(overlapping) is nn.Conv3d
    with torch.no_grad():
        for patches in (torch.randn(5, 3, 2, 4, 4), torch.randn(5, 3, 4, 8, 4)):
            torch.testing.assert_close(whole(patches), nn.Conv3d.forward(whole, patches))


def test_quick_gelu_is_known(on_cpu):
    counting = Counting()
    layers = nn.ModuleList([ACT2FN["quick_gelu"], ACT2FN["gelu"]])
    replace_passes(layers, counting)
    with torch.no_grad():
        torch.testing.assert_close(layers[0](torch.ones(2)), torch.sigmoid(torch.tensor([1.702] * 2)))
        layers[1](torch.ones(2))
    assert counting.calls == {"quick_gelu": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["norm", "rotate", "gate", "quick_gelu", "blend"])
def test_a_kernel_that_is_off_is_found(dtype, name):
    class Off(Counting):
        def __getattr__(self, own):
            right = getattr(Written, own)

            def call(*arguments):
                if own != name:
                    return right(*arguments)
                if own == "blend":
                    return right(*arguments[:3], arguments[3] + 0.2)
                return right(*arguments) * 1.05

            return call

    assert compare_kernels(Written, "cpu", dtype) == []
    assert name in compare_kernels(Off(), "cpu", dtype)[0]


def test_blending_parts_is_attention_to_all_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8)
    scores = query @ key.mT
    parts = [
        (own.softmax(-1) @ values, own.logsumexp(-1))
        for own, values in zip(scores.split(4, -1), value.split(4, 2), strict=True)
    ]
    whole, sums = parts[0]
    for part in parts[1:]:
        Written.blend(whole, sums, *part)
    torch.testing.assert_close(whole, scores.softmax(-1) @ value)
    torch.testing.assert_close(sums, scores.logsumexp(-1))


def test_without_triton_a_note_says_what_it_costs_and_float32_needs_none(monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(fused, "_PROBLEMS", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    kernels, note = find_kernels(device, torch.bfloat16)
    assert kernels is None and "Triton is not installed" in note and "longer" in note
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.bfloat16)):
        assert find_kernels(place, dtype) == (None, None)


def test_a_compiler_that_fails_is_asked_once(monkeypatch):
    tries = []
    monkeypatch.setattr(fused, "_PROBLEMS", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "_try_kernels", lambda *_: tries.append(1) or "no compiler")
    threads = [threading.Thread(target=find_kernels, args=(torch.device("cuda:0"), torch.bfloat16)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tries) == 1


FULL = [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")]


@pytest.mark.parametrize("failure", FULL, ids=["torch", "triton"])
def test_memory_that_runs_out_while_a_model_tries_its_kernels_is_a_note(monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(fused_layers, "find_kernels", lambda *_: (fused, None))
    monkeypatch.setattr(fused_layers, "replace_passes", fail)
    note = fused_layers.use_kernels(torch.nn.Linear(1, 1), torch.device("cuda:0"), torch.bfloat16)
    assert note is not None and "out of memory" in note


@pytest.mark.parametrize("failure", FULL, ids=["torch", "triton"])
def test_memory_that_ran_out_is_asked_for_again(monkeypatch, failure):
    errors = [failure]

    def compare(*_):
        with fused.failures_told() as told:
            if errors:
                raise errors.pop()
            told.append("no compiler")
        return told[0]

    monkeypatch.setattr(fused, "_PROBLEMS", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "_try_kernels", compare)
    notes = [find_kernels(torch.device("cuda:0"), torch.bfloat16)[1] for _ in range(2)]
    assert "out of memory" in notes[0] and "no compiler" in notes[1]


def test_nothing_is_compiled_for_the_cpu():
    count = threading.active_count()
    fused.start_compiling_kernels(torch.device(choose_device("cpu").name), torch.bfloat16)
    assert threading.active_count() == count
