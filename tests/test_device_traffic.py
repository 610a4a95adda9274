"""What the method takes from the device: CPU tensors that say they are on another one, and a count of every copy and read."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import StreamingCompressor, compress_latents
from tests.compressed_clips import make_settings, smooth_clip

# Torch without CUDA knows no other device by name. No tensor here is a real meta tensor.
DEVICE = torch.device("meta")
# These wait for the device, as their result is a number or a shape on the host.
READS = ("_local_scalar_dense", "nonzero", "equal", "unique_consecutive", "_unique2", "masked_select")


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on ``DEVICE``. Only ``Traffic`` can work with it."""

    @staticmethod
    def __new__(cls, inner):
        shape = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        shape.inner = inner
        return shape

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: outside of the count")


class Traffic(TorchDispatchMode):
    """Runs everything on the CPU. Counts what comes to the host, and refuses tensors of two devices in one operation."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, given = dict(kwargs or {}), []
        tree_map(lambda x: given.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
        name = func.overloadpacket.__name__
        ours = [isinstance(x, OnDevice) for x in given]
        # A number on the host may meet tensors of any device; ``copy_`` and ``_to_copy`` are how tensors travel.
        mixed = {is_ours for is_ours, x in zip(ours, given, strict=True) if x.dim() or is_ours}
        assert len(mixed) < 2 or name == "copy_", f"{func}: tensors of two devices"
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        goes = any(ours) if target is None else torch.device(target) == DEVICE
        if any(ours) and (name in READS or (name == "_to_copy" and not goes)):
            self.counts[name] += 1
        if name == "copy_":
            self.counts[name] += ours[0] is not ours[1] and not ours[0]
            goes = ours[0]
        plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if name.endswith("_") and not name.startswith("_") and isinstance(out, torch.Tensor):
            return args[0]
        return tree_map(lambda x: OnDevice(x) if goes and isinstance(x, torch.Tensor) else x, out)


@pytest.fixture
def traffic():
    with Traffic() as counted:
        yield counted


def make_clip():
    """Three shots: cuts in the middle of a batch, and right after a uniform anchor."""
    shots = [smooth_clip(length, (6, 6), seed=seed) for seed, length in ((1, 45), (2, 37), (3, 38))]
    return torch.cat(shots)


def test_a_batch_costs_at_most_one_copy_to_the_host(traffic):
    latents, settings = make_clip(), make_settings(events=True)
    plan = plan_budget(120, (6, 6), settings, 300)
    compressor, found = StreamingCompressor(plan, settings, 16), []
    for first in range(0, 120, 8):
        before = traffic.counts.total()
        compressor.push(OnDevice(latents[first : first + 8]), range(first, first + 8))
        found.append(traffic.counts.total() - before)
    assert compressor.num_cuts_found == 2 and plan.num_anchors > 3, "cuts are found, and GoPs close"
    assert found == [1] * 15
    before = traffic.counts.total()
    tracks = compressor.finish()
    assert traffic.counts.total() - before == 1, "the last GoP"
    assert not any(isinstance(tensor, OnDevice) for tensor in tracks.tensors().values())


def test_the_device_gives_the_same_tracks(traffic):
    """GoPs packed in one copy come out as they went in, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        latents, settings = make_clip().to(dtype), make_settings(events=True)
        plan = plan_budget(120, (6, 6), settings, 300)
        ours, theirs = (
            compress_latents(clip, range(120), plan, settings, 16).tensors() for clip in (OnDevice(latents), latents)
        )
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name


def test_a_flash_costs_one_more_read(traffic):
    latents, settings = smooth_clip(40, (6, 6)) - 3.0, make_settings(events=True)
    latents[20] += 5 * torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(11))
    plan = plan_budget(40, (6, 6), settings, 100)
    compressor, found = StreamingCompressor(plan, settings, 16), []
    for first in range(0, 40, 8):
        before = traffic.counts.total()
        compressor.push(OnDevice(latents[first : first + 8]), range(first, first + 8))
        found.append(traffic.counts.total() - before)
    assert found == [1, 1, 2, 1, 1] and compressor.num_cuts_found == 2
