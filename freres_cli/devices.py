"""Choose where a model runs, its precision and its attention kernel, and say why.

torch is imported inside the functions, so that ``freres --help`` starts fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from freres_cli.errors import ResourceError, UsageError, count_of, is_out_of_memory

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
ATTENTION_NAMES = ("auto", "sdpa", "eager", "flash")
STORAGE_NAMES = ("auto", "int8", "fp8")

# Below this size float32 costs little memory, and CPUs without bfloat16 instructions are slow in bfloat16.
SMALL_MODEL_BYTES = 2**30

# M_ARENA_MAX and M_MMAP_THRESHOLD of mallopt(3).
GLIBC_ARENA_MAX, GLIBC_MMAP_THRESHOLD = -8, -3
RETURNED_BYTES = 2**20

_GIB = 2**30


def use_one_heap() -> None:
    """Let all threads allocate from one heap. With a heap each, as glibc gives them, memory that the decoder's threads have
    freed is of no use to the others, and a process of hours grows. Elsewhere, nothing happens."""
    _tell_malloc(GLIBC_ARENA_MAX, 1)


def return_large_memory() -> None:
    """Let the process give memory of 1 MiB or more back as soon as it is freed.

    Otherwise glibc keeps up to 32 MiB pieces for later, and what lives long comes to lie between them: the peak grows with
    the hours of a video. It takes more CPU time, most with small towers, so it is for long videos only. Elsewhere, nothing
    happens.
    """
    _tell_malloc(GLIBC_MMAP_THRESHOLD, RETURNED_BYTES)


def _tell_malloc(parameter: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


@dataclass(frozen=True)
class Device:
    """The device a model runs on.

    ``name`` is torch's name for it (``cpu``, ``cuda:0``); ``description`` names the hardware. ``attention`` is the
    attention kernel for models whose precision allows it (see ``fit_attention``). ``note`` and ``attention_note`` tell
    the user what was chosen and why. ``is_attention_named``: the user named the kernel, so no other may replace it.
    """

    name: str
    description: str
    attention: str
    note: str
    attention_note: str = ""
    is_attention_named: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


@dataclass(frozen=True)
class Storage:
    """In which 8-bit numbers a language half keeps its KV cache (``kv``) and the weights of its linear layers
    (``weights``): int8 or fp8, or ``None`` for the precision that it computes in. Both lose accuracy."""

    kv: str | None = None
    weights: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before a model is loaded."""
        named = (("KV cache", self.kv), ("weights of the decoder's linear layers", self.weights))
        return tuple(f"{what} in {name}: rounded, so answers may change" for what, name in named if name is not None)

    def describe(self, dtype: torch.dtype) -> dict[str, str]:
        """The numbers of both, as the JSON documents have them. ``dtype``: the model's precision."""
        own = str(dtype).removeprefix("torch.")
        return {"kv_dtype": self.kv or own, "weight_dtype": self.weights or own}


AS_COMPUTED = Storage()


def choose_storage(kv: str | None = None, weights: str | None = None) -> Storage:
    """Turn two of ``STORAGE_NAMES`` into a storage. ``auto`` (or None) is the model's precision.

    Raises UsageError for an unknown name, and for weights if torchao is not installed.
    """
    for flag, name in (("--kv-dtype", kv), ("--weight-dtype", weights)):
        if name not in (None, *STORAGE_NAMES):
            raise UsageError(f"{flag}: expected one of {', '.join(STORAGE_NAMES)}, got {name}")
    chosen = Storage(*(None if name == "auto" else name for name in (kv, weights)))
    if chosen.weights is not None and find_spec("torchao") is None:
        raise UsageError(
            f"--weight-dtype {weights}: needs torchao, which is not installed", "run: pip install 'freres[quant]'"
        )
    return chosen


def choose_device(requested: str | None = None, attention: str | None = None, name: str = "--device") -> Device:
    """Choose the device and the attention kernel. ``auto`` (or None) means CUDA if available, else the CPU. ``name``: what
    ``requested`` was named with, for messages.

    Of several CUDA devices, it is the one of LOCAL_RANK, if no number is named. Raises ResourceError if the CUDA device does
    not exist or cannot run the kernel, and UsageError unless the device is auto, cpu, cuda or cuda:N, the kernel is one of
    ``ATTENTION_NAMES`` and LOCAL_RANK is a number.
    """
    if attention not in (None, *ATTENTION_NAMES):
        raise UsageError(f"--attn: expected one of {', '.join(ATTENTION_NAMES)}, got {attention}")
    return _choose_attention(_choose_place(requested or "auto", name), attention or "auto")


def _choose_place(name: str, named_with: str) -> Device:
    import torch

    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UsageError(f"{named_with}: expected auto, cpu, cuda or cuda:N, got {name}")
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return _cpu_device("asked for")
    if name == "auto" and num_cuda == 0:
        return _cpu_device("auto: torch sees no CUDA device")
    rank = 0 if index else local_rank()
    # A launcher that shows each process a device of its own numbers the processes all the same.
    ordinal = int(index) if index else rank if num_cuda != 1 else 0
    if ordinal >= num_cuda:
        seen = count_of(num_cuda, "CUDA device") if num_cuda else "no CUDA device"
        seen += f", and LOCAL_RANK is {rank}" if rank else ""
        raise ResourceError(
            f"{named_with}: {name} is not available: torch sees {seen}",
            "use --device cpu, or install a CUDA build of torch and check nvidia-smi",
        )
    properties = torch.cuda.get_device_properties(ordinal)
    description = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB"
    why = "auto: CUDA is available" if name == "auto" else "asked for"
    why += "" if rank == 0 else f", LOCAL_RANK {rank}" if ordinal else f", the only one that LOCAL_RANK {rank} sees"
    return Device(f"cuda:{ordinal}", description, "sdpa", f"device cuda:{ordinal} ({description}): {why}")


def local_rank() -> int:
    """Return the number of this process on its machine, as torchrun and accelerate leave it in LOCAL_RANK: 0 without one.
    Raises UsageError for another text."""
    text = os.environ.get("LOCAL_RANK") or "0"
    if not text.isdecimal():
        raise UsageError(f"LOCAL_RANK: expected a whole number, got {text[:40]!r}", "unset it, or use --device cuda:N")
    return int(text)


def _cpu_device(why: str) -> Device:
    import torch

    description = f"CPU, {count_of(torch.get_num_threads(), 'thread')}"
    return Device("cpu", description, "sdpa", f"device cpu ({description}): {why}")


def _choose_attention(device: Device, name: str) -> Device:
    """``auto`` uses the flash_attn package on CUDA, and PyTorch's own kernels everywhere else."""
    if name in ("sdpa", "eager"):
        return replace(device, attention=name, attention_note=f"attention {name}: asked for", is_attention_named=True)
    provider, problem = _find_flash(device)
    if name == "flash":
        if problem is not None:
            raise ResourceError(f"attention flash: {problem}", "use --attn sdpa, or leave --attn out")
        note = f"attention flash: asked for, {provider}"
        return replace(device, attention="flash", attention_note=note, is_attention_named=True)
    if not device.is_cuda:
        return replace(device, attention_note="attention sdpa: auto, exact on the CPU")
    if problem is None and flash_package() is not None:
        return replace(device, attention="flash", attention_note=f"attention flash: auto, {provider}")
    reason = problem or f"{provider} where they fit; {_package_problem()}"
    return replace(device, attention_note=f"attention sdpa: auto, {reason}")


def _find_flash(device: Device) -> tuple[str, str | None]:
    """What provides flash kernels for a device, and why none can run there (None if one can)."""
    import torch

    if not device.is_cuda:
        return "", f"expected a CUDA device, got {device.name}"
    capability = torch.cuda.get_device_capability(device.name)
    if capability < (8, 0):
        return "", f"expected compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if (package := flash_package()) is not None:
        return f"flash_attn {package.__version__}", None
    if torch.backends.cuda.is_flash_attention_available():
        return "PyTorch's own flash kernels", None
    return "", f"{_package_problem()}, and this torch has no flash kernels"


@cache
def _import_flash() -> tuple[Any, str]:
    """The flash_attn package, or None, and in that case why it cannot be used."""
    try:
        import flash_attn
    except ModuleNotFoundError:
        return None, "flash_attn is not installed"
    except (ImportError, OSError) as error:  # usually because it was built for another torch
        return None, f"flash_attn cannot be imported: {str(error).strip().partition(chr(10))[0]}"
    found = str(getattr(flash_attn, "__version__", "0"))
    # Before 2.1 the causal mask was aligned to the first key, which is wrong for every chunk but the first.
    numbers = [int(part) if part.isdecimal() else 0 for part in found.split(".")[:2]]
    return (None, f"flash_attn: expected 2.1 or newer, got {found}") if numbers < [2, 1] else (flash_attn, "")


def flash_package() -> Any:
    """The flash_attn package if it can be used, else None."""
    return _import_flash()[0]


def _package_problem() -> str:
    return _import_flash()[1]


def fit_attention(device: Device, dtype: torch.dtype) -> tuple[str, str]:
    """The attention kernel for a model of this precision, and a note saying why.

    Flash kernels only take 16-bit numbers. For other models sdpa replaces them if ``auto`` chose them; if the user named
    them, this raises ResourceError.
    """
    if device.attention == "flash" and dtype.itemsize != 2:
        got = str(dtype).removeprefix("torch.")
        if device.is_attention_named:
            hint = "use --dtype bfloat16, or --attn sdpa"
            raise ResourceError(f"attention flash: expected a model in bfloat16 or float16, got {got}", hint)
        return "sdpa", f"attention sdpa: auto, flash kernels do not take {got}"
    return device.attention, device.attention_note


def choose_dtype(
    requested: str | None, device: Device, checkpoint_dtype: torch.dtype, weight_bytes: int
) -> tuple[torch.dtype, str]:
    """The precision to run a model in, and a note saying why.

    ``requested`` is one of ``DTYPE_NAMES``; ``auto`` (or None) means float32 for models below 1 GiB on the CPU, and the
    precision of the checkpoint, ``checkpoint_dtype``, otherwise. ``device`` is where the model will run;
    ``weight_bytes`` is the size of the stored weights. Raises UsageError for an unknown name.
    """
    import torch

    name = requested or "auto"
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {name}")
    if name != "auto":
        return getattr(torch, name), f"dtype {name}: asked for"
    if not device.is_cuda and weight_bytes < SMALL_MODEL_BYTES:
        return torch.float32, "dtype float32: auto, a model below 1 GiB on the CPU"
    stored = str(checkpoint_dtype).removeprefix("torch.")
    note = f"dtype {stored}: auto, as the checkpoint is stored"
    if checkpoint_dtype == torch.bfloat16 and device.is_cuda and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device.name)
        if capability < (8, 0):  # not float16 by itself: Qwen2-VL and Qwen2.5-VL overflow in it
            note += f", and slow on a GPU of compute capability {capability[0]}.{capability[1]}; --dtype float16 is faster, "
            note += "but models may overflow in it"
    return checkpoint_dtype, note


def set_seed(seed: int) -> None:
    """Seed Python's random generator, and torch's on every device."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


# Held by a thread that waits for a device, or that records its work: no thread may wait while another one records.
WAITING = threading.Lock()


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a device, so that timings taken afterwards are correct. Does nothing on the CPU."""
    import torch

    if device.type == "cuda":
        with WAITING:
            torch.cuda.synchronize(device)


def read_later(flag: torch.Tensor) -> Callable[[], bool]:
    """Return a function that reads ``flag``, a tensor of one bool, and waits only for what its device was given so far."""
    import torch

    if not flag.is_cuda:
        return lambda: bool(flag)
    here = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    here.copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        copied.synchronize()
        return bool(here)

    return read


@contextmanager
def memory_errors_as(what: str, hint: str) -> Iterator[None]:
    """Turn out-of-memory errors from torch or Python inside the block into a ResourceError that names ``what``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"{what}: out of memory", hint) from error
