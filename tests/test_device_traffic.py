"""What the method takes from the device: a count of every copy and read, with CPU tensors labelled ``cuda:0``."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from freres_cli.method import adaptive, merging
from freres_cli.method.adaptive import StretchCompressor, build_stretch_tokens
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import StreamingCompressor, compress_latents
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.merging import Merger
from freres_cli.method.stretch_modules import StretchModules
from freres_cli.method.tokens import build_tokens
from freres_cli.stretches import STRETCH_COLUMNS
from tests.compressed_clips import compress, make_settings, smooth_clip
from tests.labelled_device import LabelledTensor, count_waits, labelled_device
from tests.live_bytes import DeviceBytes


@pytest.fixture
def device(monkeypatch):
    with labelled_device(monkeypatch) as found:
        yield found.name


def count_by_batch(compressor, latents):
    """Waits of each batch of eight frames."""
    found = []
    for first in range(0, len(latents), 8):
        with count_waits() as waits:
            compressor.push(latents[first : first + 8], range(first, first + 8))
        found.append(sum(waits.values()))
    return found


def make_clip():
    """Three shots: cuts in the middle of a batch, and right after a uniform anchor."""
    shots = [smooth_clip(length, (6, 6), seed=seed) for seed, length in ((1, 45), (2, 37), (3, 38))]
    return torch.cat(shots)


def test_a_batch_costs_at_most_one_copy_to_the_host(device):
    settings = make_settings(events=True)
    plan = plan_budget(120, (6, 6), settings, 300)
    compressor = StreamingCompressor(plan, settings, 16)
    found = count_by_batch(compressor, make_clip().to(device))
    assert compressor.num_cuts_found == 2 and plan.num_anchors > 3, "cuts are found, and GoPs close"
    assert found == [1] * 15
    with count_waits() as waits:
        tracks = compressor.finish()
    assert sum(waits.values()) == 1, "the last GoP"
    assert not any(isinstance(tensor, LabelledTensor) for tensor in tracks.tensors().values())


def test_the_device_gives_the_same_tracks(device):
    """GoPs packed in one copy come out as they went in, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        latents, settings = make_clip().to(dtype), make_settings(events=True)
        plan = plan_budget(120, (6, 6), settings, 300)
        ours, theirs = (
            compress_latents(clip, range(120), plan, settings, 16).tensors() for clip in (latents.to(device), latents)
        )
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name


def test_a_flash_costs_one_more_read(device):
    settings, latents = make_settings(events=True), smooth_clip(40, (6, 6)) - 3.0
    latents[20] += 5 * torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(11))
    compressor = StreamingCompressor(plan_budget(40, (6, 6), settings, 100), settings, 16)
    assert count_by_batch(compressor, latents.to(device)) == [1, 1, 2, 1, 1] and compressor.num_cuts_found == 2


@pytest.mark.slow
def test_adaptive_costs_one_copy_a_batch_and_one_a_round_of_merges(device, monkeypatch):
    """Latents stay on the device: the host learns where cuts are, and how far apart the stretches of new pairs are."""
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 300)
    rounds, choose = [], Merger._choose
    monkeypatch.setattr(Merger, "_choose", lambda *args: rounds.append(1) or choose(*args))
    compressor, spent = StretchCompressor((6, 6), 16, 100), []
    clip = make_clip()[:88].to(device)
    for first in range(0, len(clip), 8):
        rounds.clear()
        with count_waits() as waits:
            compressor.push(clip[first : first + 8], range(first, first + 8))
        spent.append((sum(waits.values()), len(rounds)))
    assert all(waits == 1 + num_rounds for waits, num_rounds in spent)
    assert any(num_rounds for _, num_rounds in spent) and compressor.num_cuts_found == 2
    rounds.clear()
    with count_waits() as waits:
        compressor.finish()
    assert sum(waits.values()) == len(rounds) + 1 and 20 < len(rounds) < 100, "the last one reads the result"


class DeviceWork(TorchDispatchMode):
    """Counts operations on the device that are no mere views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.count += not func.is_view and any(
            isinstance(one, LabelledTensor) for one in tree_flatten((args, kwargs))[0]
        )
        return func(*args, **kwargs)


def test_a_round_of_merges_is_little_work_for_a_device_to_begin(device, monkeypatch):
    """Sorting on the device as well took 137 operations a round."""
    rounds, choose = [], Merger._choose
    monkeypatch.setattr(Merger, "_choose", lambda *args: rounds.append(1) or choose(*args))
    merger = Merger((6, 6), 16, 16, torch.bfloat16, device=device)
    merger.append(make_clip()[:24].to(device), 0, [0] * 24, [0.0] * 24)
    with DeviceWork() as work:
        merger.merge_down(100, 1.0)
        merger.merge_all(1.0)
    assert len(rounds) > 20 and work.count < 25 * len(rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2**26], ids=["one by one", "together"])
def test_the_device_gives_the_same_stretches(device, monkeypatch, dtype, parts):
    """In any parts, though the memory is small, and a cut is in the middle of a batch."""
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 60)
    monkeypatch.setattr(adaptive, "DEVICE_BYTES_AT_ONCE", parts)
    monkeypatch.setattr(merging, "DEVICE_PAIR_BYTES_AT_ONCE", parts if parts > 1 else 8 * 16 * 7)
    found, made = [], make_clip()[36:56, :3, :3].to(dtype)
    for clip in (made.to(device), made):
        compressor = StretchCompressor((3, 3), 16, 40, keeps_trends=True)
        for frames, times in zip(clip.split(5), torch.arange(20.0).split(5), strict=True):
            compressor.push(frames, times.tolist())
        found.append(compressor.finish())
    assert compressor.num_cuts_found == 1
    for name in STRETCH_COLUMNS:
        ours, theirs = (getattr(stretches, name) for stretches in found)
        assert not isinstance(ours, LabelledTensor) and torch.equal(ours, theirs), name


def test_a_result_is_read_by_parts(device, monkeypatch):
    """It needs no second copy of itself on the device."""
    clip = make_clip()[:12]
    mergers = [Merger((6, 6), 16, 16, clip.dtype, device=where) for where in (device, "cpu")]
    for merger in mergers:
        merger.append(clip, 0, [0] * 12, [0.0] * 12)
    slots = torch.arange(12 * 36).flip(0)
    monkeypatch.setattr(merging, "DEVICE_PAIR_BYTES_AT_ONCE", 8 * 16 * 10)  # ten rows
    with DeviceBytes() as live:
        ours, _ = mergers[0].read(slots)
    assert live.peak == 10 * (16 * 4 + 8), "their numbers and where they are"
    assert torch.equal(ours, mergers[1].read(slots)[0])
    assert torch.equal(ours, clip.flatten(0, 2)[slots])


def put_on(modules, device):
    """``Module.to`` keeps the label off parameters."""
    for part in modules.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, torch.nn.Parameter(value.detach().to(device), requires_grad=False))
    return modules


@torch.no_grad()
@pytest.mark.parametrize("variant", ["absorber", "concat", "idct"])
def test_trained_modules_on_a_device_take_tracks_from_the_host(device, variant):
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300, variant=variant)
    torch.manual_seed(0)
    modules = FreResModules(ModuleShape(16, 4, 4))
    for value in modules.parameters():
        value.copy_(torch.randn(value.shape))
    wanted = build_tokens(tracks, variant, modules)
    found = build_tokens(tracks, variant, put_on(modules, device))
    assert not isinstance(found.latents, LabelledTensor)
    assert torch.equal(found.latents, wanted.latents)


@torch.no_grad()
def test_trained_modules_on_a_device_take_stretches_from_the_host(device):
    compressor = StretchCompressor((8, 8), 16, 300, keeps_trends=True)
    compressor.push(smooth_clip(40, (8, 8)), range(40))
    stretches, modules = compressor.finish(), StretchModules(ModuleShape(16, 4, 3))
    wanted = build_stretch_tokens(stretches, modules)
    found = build_stretch_tokens(stretches, put_on(modules, device))
    assert not isinstance(found.latents, LabelledTensor)
    assert torch.equal(found.latents, wanted.latents)
