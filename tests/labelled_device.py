"""CPU tensors that say they are on ``cuda:0``: an operation that mixes them with others fails, and what waits is counted.

Numbers come from the CPU's kernels, so this shows nothing about those of CUDA, its memory or its speed. ``count_waits``
counts the same operations on a real device.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from freres_cli.backbones import attention
from freres_cli.devices import Device

# Marks of a test that only a real device can run.
cuda = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))

NAME = "cuda:0"
LABELLED = Device(NAME, "CPU labelled cuda:0", "sdpa", "device cuda:0: a label on the CPU, for a test")
# The size of their result depends on values, so the host waits for the device.
OF_UNKNOWN_SIZE = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
COPIES = {"_to_copy", "copy_"}
# Of each copy to the device: whether the host goes on before it is done. Where not, it waits for the whole queue.
SENT: list[bool] = []
# PyTorch moves indices itself.
MOVES_INDICES = {"index", "index_put_", "index_put", "_index_put_impl_"}


class Waits(Counter):
    """How often the host waits for the device, by the name of the operation."""


class LabelledTensor(torch.Tensor):
    """A CPU tensor, ``elem``, that tells Python that it is elsewhere. To C++ it stays on the CPU, which a build without CUDA
    needs."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> LabelledTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
        )

    def __init__(self, elem: torch.Tensor) -> None:
        self.elem = elem

    def __repr__(self, **_: Any) -> str:
        return f"{self.elem!r} labelled {NAME}"

    device = property(lambda self: torch.device(NAME))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            # It picks its kernel below the level where a label can be followed.
            refuse_mix("scaled_dot_product_attention", args[:3])
            return LabelledTensor(func(*map(strip, args), **tree_map(strip, kwargs)))
        if func is torch.Tensor.numpy:
            raise TypeError(f"can't convert {NAME} tensor to numpy")
        if func in LEAVES_THE_DEVICE:
            waits_now()["copy to the host"] += 1
            return func(args[0].elem.clone(), *args[1:], **kwargs)
        if func is torch.Tensor.to:
            return move(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_labelled(func, args, kwargs or {})


LEAVES_THE_DEVICE = (torch.Tensor.cpu, torch.Tensor.tolist)


def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``, which in C++ would see that a labelled tensor is on the CPU already."""
    place = kwargs.pop("device", None)
    if place is None and args and isinstance(args[0], str | torch.device | torch.Tensor):
        place, *args = args
    if isinstance(place, torch.Tensor):
        kwargs.setdefault("dtype", place.dtype)
        place = place.device
    if place is not None and torch.device(place).type == "cpu":
        tensor = tensor.cpu()
    elif place is not None and not isinstance(tensor, LabelledTensor):
        kwargs["device"] = place
    rest = dict(zip(("dtype", "non_blocking", "copy"), args, strict=False)) | kwargs
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.to(**{"dtype": tensor.dtype} | {name: value for name, value in rest.items() if value is not None})


def strip(value: Any) -> Any:
    return value.elem if isinstance(value, LabelledTensor) else value


def refuse_mix(name: str, args: Any) -> None:
    tensors = [value for value in tree_flatten(args)[0] if isinstance(value, torch.Tensor)]
    is_labelled = [isinstance(tensor, LabelledTensor) for tensor in tensors]
    if any(is_labelled) and any(not yes and tensor.ndim for yes, tensor in zip(is_labelled, tensors, strict=True)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {NAME} and cpu")


def run_labelled(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    if name not in COPIES:
        refuse_mix(name, args[:1] if name in MOVES_INDICES else (args, kwargs))
    count_wait(name, args, kwargs, waits_now())
    inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, LabelledTensor)]
    device = kwargs.get("device")
    goes_there = bool(inputs) if device is None else torch.device(device).type == "cuda"
    own = {**kwargs, "device": torch.device("cpu")} if device is not None and goes_there else kwargs
    args_here = tree_map(strip, args)
    if name == "histc":  # takes whole numbers on CUDA alone
        args_here = (args_here[0].float(), *args_here[1:])
    out = func(*args_here, **tree_map(strip, own))
    if not goes_there:
        return out
    wrapped = tree_map(lambda value: LabelledTensor(value) if isinstance(value, torch.Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if inputs else wrapped


def is_there(device: torch.device | None) -> bool:
    """Whether a copy of a tensor on the device, to ``device`` or where it is, is on the device."""
    return device is None or torch.device(device).type == "cuda"


def count_wait(name: str, args: Any, kwargs: dict[str, Any], waits: Waits) -> None:
    """Count an operation after which the host knows a value of the device."""
    on_device = [
        value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor) and value.is_cuda
    ]
    if not on_device:
        if name == "_to_copy" and kwargs.get("device") is not None and is_there(kwargs["device"]):
            SENT.append(bool(kwargs.get("non_blocking")))
        return
    if name in OF_UNKNOWN_SIZE | READS:
        waits[name] += 1
    elif name in MOVES_INDICES and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        waits["index by a mask"] += 1
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        waits[name] += 1
    elif name == "copy_" and (kwargs.get("non_blocking") or args[2:3] == (True,)) and args[0].ndim == 0:
        return  # of a flag to pinned memory, which a CPU lacks; whoever reads it waits for an event
    elif name in COPIES and not (args[0].is_cuda if name == "copy_" else is_there(kwargs.get("device"))):
        waits["copy to the host"] += 1


class _Labels(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_labelled(func, args, kwargs or {})


class _MadeOnDevice(TorchFunctionMode):
    """``torch.tensor`` copies to its device below the level where a label can be followed. There is no pinned memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs.pop("pin_memory", None)
        if func is torch.Tensor.new_tensor and "device" not in kwargs:
            kwargs["device"] = args[0].device
        if func not in (torch.tensor, torch.Tensor.new_tensor) or "cuda" not in str(kwargs.get("device")):
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return torch.tensor(args[-1], **kwargs).to(device)


class _Counts(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        count_wait(func.overloadpacket.__name__, args, kwargs or {}, self.waits)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_waits() -> Iterator[Waits]:
    """Count what waits inside the block, on a real device or under ``labelled_device``."""
    if _ACTIVE:
        _ACTIVE[-1].clear()
        yield _ACTIVE[-1]
        return
    found, bias = Waits(), attention._causal_lower_right
    attention._causal_lower_right = _outside_modes(bias)
    try:
        with _Counts(found):
            yield found
    finally:
        attention._causal_lower_right = bias


_ACTIVE: list[Waits] = []


def waits_now() -> Waits:
    return _ACTIVE[-1] if _ACTIVE else Waits()


def _outside_modes(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor of a class of its own cannot be made while a mode is on."""

    def made(*args: Any) -> torch.Tensor:
        with _disable_current_modes():
            return make(*args)

    return made


class _Event:
    """A ``torch.cuda.Event``: on the CPU whatever came before it is done. ``stream``: where it was recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0
        self.stream: Any = None

    def record(self, stream: Any) -> None:
        self.stream, self.seconds = stream, time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return 1000 * (later.seconds - self.seconds)


class _Stream:
    """A ``torch.cuda.Stream``: on the CPU nothing waits. ``log``: what it was told to wait for."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.log: list[Any] = []

    def wait_event(self, event: _Event) -> None:
        self.log.append(event)

    def wait_stream(self, stream: _Stream) -> None:
        self.log.append(stream)


@contextlib.contextmanager
def labelled_device(monkeypatch: Any) -> Iterator[Device]:
    """Inside the block, ``cuda:0`` is a label for tensors on the CPU."""
    waits = Waits()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    # Too old for kernels that a CPU lacks, such as grouped products for experts.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    streams = [_Stream()]

    @contextlib.contextmanager
    def into(stream: _Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    monkeypatch.setattr(torch.cuda, "stream", into)
    monkeypatch.setattr("freres_cli.pipeline.beside._queue_of", functools.cache(lambda device: _Stream()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(attention, "_causal_lower_right", _outside_modes(attention._causal_lower_right))
    _ACTIVE.append(waits)
    try:
        with _MadeOnDevice(), _Labels():
            yield LABELLED
    finally:
        _ACTIVE.pop()
