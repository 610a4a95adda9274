"""Attention kernels: which is chosen and why, that all give the same results, and that towers do not call one per frame."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from freres_cli import devices
from freres_cli.backbones import attention
from freres_cli.backbones.attention import (
    CAUSAL_NO_MASK,
    PACKED_FRAMES,
    WHOLE_FRAMES,
    packed_frames_attention,
    use_attention,
)
from freres_cli.backbones.engine import prefill
from freres_cli.backbones.square_vision import SquareVisionEncoder
from freres_cli.bench.report import describe_environment
from freres_cli.bundle.store import read_bundle
from freres_cli.devices import choose_device, fit_attention
from freres_cli.errors import ResourceError, UsageError
from freres_cli.world.clip import make_clip
from tests.largest_made import LargestMade
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, make_qwen2_vl, open_checkpoint, video_tokens

T = 6


@pytest.fixture(autouse=True)
def forget_packages():
    devices._import_flash.cache_clear()
    yield
    devices._import_flash.cache_clear()


@pytest.fixture
def cuda(monkeypatch):
    """Pretend a CUDA device of this capability, with or without flash kernels in torch."""

    def pretend(capability=(9, 0), torch_has_flash=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        properties = SimpleNamespace(name="a GPU", total_memory=2**35)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _ordinal: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _name: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: torch_has_flash)

    return pretend


class FlashByHand:
    """The interface of the flash_attn package in plain torch: (n, length, heads, d), a causal mask aligned to the last
    key, and packed segments given by their boundaries. Counts its calls."""

    def __init__(self, version="2.7.4"):
        self.__version__ = version
        self.num_calls = 0

    def flash_attn_func(self, query, key, value, *, softmax_scale=None, causal=False):
        self.num_calls += 1
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        mask = mask.tril(k.shape[2] - q.shape[2]) if causal else mask
        options = {"attn_mask": mask, "scale": softmax_scale, "enable_gqa": True}
        return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    def flash_attn_varlen_func(self, query, key, value, cu_q, cu_k, longest_q, longest_k, *, softmax_scale=None):
        self.num_calls += 1
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.diff().max() == longest_q == longest_k
        stretch = torch.bucketize(torch.arange(len(query)), cu_q[1:].long(), right=True)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        mask = stretch[:, None] == stretch[None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)[0].transpose(0, 1)


@pytest.fixture
def flash(monkeypatch):
    package = FlashByHand()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return package


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_cpu_takes_sdpa_and_flash_there_is_an_error():
    for name in (None, "auto"):
        device = choose_device("cpu", name)
        assert device.attention == "sdpa" and "exact on the CPU" in device.attention_note
    assert choose_device("cpu", "eager").attention == "eager"
    with pytest.raises(ResourceError, match="attention flash: expected a CUDA device, got cpu"):
        choose_device("cpu", "flash")
    with pytest.raises(UsageError, match="--attn: expected one of auto, sdpa, eager, flash, got fast"):
        choose_device("cpu", "fast")


def test_auto_takes_the_package_on_cuda(cuda, flash):
    cuda()
    for name in (None, "auto", "flash"):
        device = choose_device("cuda", name)
        assert device.attention == "flash" and "flash_attn 2.7.4" in device.attention_note
    assert choose_device("cuda", "sdpa").attention == "sdpa"


def test_without_the_package_pytorch_has_kernels_of_its_own(cuda):
    cuda()
    device = choose_device("cuda")
    assert device.attention == "sdpa"
    assert "PyTorch's own flash kernels where they fit; flash_attn is not installed" in device.attention_note
    named = choose_device("cuda", "flash")
    assert named.attention == "flash" and "PyTorch's own flash kernels" in named.attention_note


@pytest.mark.parametrize("version", ["2.0.9", "1.0", "odd"])
def test_a_package_whose_mask_begins_at_the_first_key_is_not_used(cuda, monkeypatch, version):
    cuda(torch_has_flash=False)
    monkeypatch.setitem(sys.modules, "flash_attn", FlashByHand(version))
    assert choose_device("cuda").attention == "sdpa"
    with pytest.raises(ResourceError, match=f"flash_attn: expected 2.1 or newer, got {version}, and this torch has no"):
        choose_device("cuda", "flash")


def test_a_package_that_cannot_be_imported_is_reported(cuda, monkeypatch, tmp_path):
    cuda()
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: x\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    device = choose_device("cuda")
    assert device.attention == "sdpa"
    assert device.attention_note.endswith("flash_attn cannot be imported: undefined symbol: x")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"capability": (7, 5)}, "expected compute capability 8.0 or newer, got 7.5"),
        ({"torch_has_flash": False}, "flash_attn is not installed, and this torch has no flash kernels"),
    ],
)
def test_flash_that_cannot_run_is_never_replaced_in_silence(cuda, facts, reason):
    cuda(**facts)
    with pytest.raises(ResourceError, match=f"attention flash: {reason}") as caught:
        choose_device("cuda", "flash")
    assert caught.value.hint == "use --attn sdpa, or leave --attn out"
    device = choose_device("cuda")
    assert device.attention == "sdpa" and reason in device.attention_note


def test_flash_takes_16_bit_models_only(cuda, flash):
    cuda()
    for dtype in (torch.bfloat16, torch.float16):
        assert fit_attention(choose_device("cuda"), dtype)[0] == "flash"
    kernel, note = fit_attention(choose_device("cuda"), torch.float32)
    assert kernel == "sdpa" and note == "attention sdpa: auto, flash kernels do not take float32"
    assert describe_environment(choose_device("cuda"), torch.float32)["attention"] == "sdpa"
    assert describe_environment(choose_device("cuda"), torch.bfloat16)["attention"] == "flash"
    with pytest.raises(ResourceError, match="expected a model in bfloat16 or float16, got float32"):
        fit_attention(choose_device("cuda", "flash"), torch.float32)


# --- every kernel gives the same results -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILY_CASES, ids=lambda case: case.name)
def tiny(request, tmp_path_factory):
    """The two halves of a family. Each test restores the default attention."""
    case, folder = request.param, tmp_path_factory.mktemp("model") / "model"
    case.make(folder)
    checkpoint = open_checkpoint(folder)
    vision, model = (half.load(checkpoint, CPU) for half in (case.vision_class, case.language_class))
    return SimpleNamespace(case=case, vision=vision, model=model)


def use_in_tower(vision, kernel):
    use_attention(vision.tower, WHOLE_FRAMES if isinstance(vision, SquareVisionEncoder) else PACKED_FRAMES, kernel)


@pytest.mark.parametrize("kernel", ["eager", "flash"])
def test_towers_mean_the_same_with_every_kernel(tiny, flash, kernel):
    frames = tiny.case.frames(T)
    expected = tiny.vision.encode(frames)
    use_in_tower(tiny.vision, kernel)
    try:
        got = tiny.vision.encode(frames)
    finally:
        use_in_tower(tiny.vision, "sdpa")
    assert (flash.num_calls > 0) == (kernel == "flash")
    assert float((got - expected).abs().max()) < 1e-4
    assert torch.equal(tiny.vision.encode(frames), expected)


def logits_of(tiny, chunk_tokens, kernel):
    """Logits after a prompt with a third of the tokens left out, and the rest at fractional positions."""
    use_attention(tiny.model.decoder, CAUSAL_NO_MASK, kernel)
    latents = tiny.vision.encode(tiny.case.frames(T))
    video = video_tokens(latents, width=tiny.vision.width)
    keep = torch.arange(len(video)) % 3 > 0
    video = video_tokens(latents, keep.nonzero()[:, 0], tiny.vision.width)
    video.positions[:, 0] += torch.linspace(0, 0.4, len(video))
    ids = tiny.model.prompt("What moves?")
    rows = tiny.model.splice(ids.prefix, video)
    rows = rows.then(tiny.model.text_rows(ids.suffix, len(rows), rows.next_position))
    cache = tiny.model.new_cache()
    last = tiny.model.logits(prefill(tiny.model, rows, cache, chunk_tokens))
    use_attention(tiny.model.decoder, CAUSAL_NO_MASK)
    return last


@pytest.mark.parametrize("kernel", ["eager", "flash"])
@pytest.mark.parametrize("chunk_tokens", [4096, 13])
def test_decoders_mean_the_same_with_every_kernel(tiny, flash, kernel, chunk_tokens):
    """Fractional positions with gaps, and later chunks of the prefill: no kernel looks at positions or needs a mask."""
    expected = logits_of(tiny, 4096, "sdpa")
    got = logits_of(tiny, chunk_tokens, kernel)
    assert (flash.num_calls > 0) == (kernel == "flash")
    assert float(expected.abs().max()) > 1
    assert float((got - expected).abs().max()) < 2e-4


def test_pytorchs_flash_kernel_or_an_error(monkeypatch):
    """Without the package, flash is PyTorch's flash kernel and nothing else."""
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8)
    plain = attention._attend_eager(query, key, key, None, True)
    assert torch.allclose(attention._attend_flash(query, key, key, None, True), plain, atol=1e-5)

    def find_none(*_, **__):
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", find_none)
    with pytest.raises(
        ResourceError, match="attention flash: no flash kernel takes heads of width 8 in float32 on cpu"
    ):
        attention._attend_flash(query, key, key, None, True)
    assert torch.backends.cuda.math_sdp_enabled()


def test_towers_do_not_loop_over_frames(tiny, monkeypatch):
    """As many attention calls for twelve frames as for four, and one per window size in each layer."""
    calls = []
    real = attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or real(*a, **k))
    counts = []
    for num_frames in (4, 12):
        calls.clear()
        tiny.vision.encode(tiny.case.frames(num_frames))
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    config = tiny.vision.tower.config
    config = getattr(config, "vision_config", config)
    num_layers = getattr(config, "depth", None) or config.num_hidden_layers
    # Two layers over whole frames, two over windows of four sizes; MiniCPM-V's first merger attends as well.
    expected = {"qwen2_5_vl": 2 * 1 + 2 * 4, "minicpmv4_6": num_layers + 1, "minicpmv4_7": num_layers + 1}
    assert counts[0] == expected.get(tiny.case.name, num_layers)


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_flag_goes_all_the_way(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", seconds=0.5)
    make_qwen2_vl(tmp_path / "model")
    flags = ("--model", tmp_path / "model", "--grid", "4x5", "--budget", 40)
    logits = {}
    for name in ("auto", "eager"):
        path = tmp_path / f"{name}.pt"
        run = run_freres("compress", clip, *flags, "--attn", name, "-o", path, "--json")
        expected = "sdpa" if name == "auto" else name
        assert run.json["model"]["attention"] == expected == run.json["environment"]["attention"]
        assert any(note.startswith(f"attention {expected}: ") for note in run.json["notes"])
        assert read_bundle(path).manifest["model"]["attention"] == expected
        asked = run_freres("ask", path, "what?", "--choices", "a|b", "--attn", name, "--json")
        assert asked.json["environment"]["attention"] == expected
        assert any(note.startswith(f"attention {expected}: ") for note in asked.json["notes"])
        logits[name] = asked.json["choices"]
    # Each was compressed and asked with its own kernel, with the same result.
    assert logits["eager"] == pytest.approx(logits["auto"], abs=1e-3)
    profiled = run_freres("profile", tmp_path / "auto.pt", "--attn", "eager", "--repeat", 1, "--warmup", 0, "--json")
    assert {row["attention"] for row in profiled.json["rows"]} == {"eager"}


@pytest.mark.parametrize("verb", ["compress", "ask", "profile"])
def test_flash_on_the_cpu_is_exit_6(tmp_path, verb):
    clip = make_clip(tmp_path / "clip.mp4", seconds=0.2)
    question = ["what?"] if verb == "ask" else []
    run = run_freres(verb, clip, *question, "--device", "cpu", "--attn", "flash")
    check_failure(run, 6, "attention flash: expected a CUDA device, got cpu")
    check_failure(run_freres(verb, clip, *question, "--attn", "no"), 2, "--attn: expected one of")


def test_uneven_segments_are_looked_up_once_for_all_layers(monkeypatch):
    """Looking them up waits for the device. Every layer of a pass has the same boundaries."""
    counts, unique = [], torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", lambda own: counts.append(len(own)) or unique(own))
    bounds = torch.tensor([0, 4, 6, 10, 12])
    for seed, own in ((0, bounds), (1, bounds), (2, torch.tensor([0, 2, 6, 12]))):
        query, key, value = torch.randn(3, 1, 2, 12, 8, generator=torch.Generator().manual_seed(seed))
        got, _ = packed_frames_attention(nn.Module(), query, key, value, None, None, own, own.diff().max())
        for low, high in pairwise(own.tolist()):
            part = (tensor[:, :, low:high] for tensor in (query, key, value))
            torch.testing.assert_close(got[:, low:high].transpose(1, 2), scaled_dot_product_attention(*part))
    assert counts == [4, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("num_rows", [attention.LEAST_ROWS_IN_PARTS, 1100, 1299])
@torch.no_grad()
def test_a_later_chunk_on_the_cpu_is_the_end_of_the_whole_and_holds_no_mask(dtype, num_kv_heads, num_rows):
    drawn = torch.Generator().manual_seed(num_rows)
    query, key, value = (
        torch.randn(2, heads, 1300, 24, dtype=dtype, generator=drawn) for heads in (4, num_kv_heads, num_kv_heads)
    )
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5, enable_gqa=True)
    with LargestMade() as made:
        part, _ = attention.batch_attention(nn.Module(), query[:, :, -num_rows:], key, value, None, 0.5)
    bound = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 2**-5}[dtype]
    assert part.dtype == dtype
    assert (part.transpose(1, 2) - whole[:, :, -num_rows:]).abs().max() < bound
    assert made.numel <= query.numel()


def test_boundaries_of_two_passes_are_told_apart_whatever_their_number():
    packed = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for cuts in ([0, 2, 5, 9], [0, 4, 5, 9]):
        bounds = torch.tensor(cuts)
        got, _ = packed_frames_attention(nn.Module(), *packed, None, None, bounds, bounds.diff().max())
        alone = [scaled_dot_product_attention(*(x[:, :, a:b] for x in packed)) for a, b in pairwise(cuts)]
        torch.testing.assert_close(got, torch.cat(alone, 2).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_query_are_those_of_scores_that_were_never_rounded(dtype):
    """A bias of the keys, as Qwen2 has, takes all scores far from 0, where 16 bits know no fractions."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, 64, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, 40, 64, generator=generator).to(dtype) for _ in range(2))
    query[..., 0], key[..., 0] = 8.0, 60.0  # 60 once they are scaled
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT / 8
    expected = scores.softmax(-1)
    assert torch.allclose(attention.attend_last(query, key, None), expected[0, :, 0].float(), rtol=1e-4)
    out = expected @ value.double().repeat_interleave(2, 1)
    made = attention.attend_row(query, key, value, None, torch.zeros(40))
    assert torch.allclose(made[0, 0].double(), out[0, :, 0], atol=1e-5 if dtype == torch.float32 else 0.02)
