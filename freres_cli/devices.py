"""Where a model runs and in what precision, and the reason for each choice. torch is imported inside the functions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from freres_cli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")

# Below this size float32 costs little memory, and CPUs without bfloat16 units are slow in bfloat16.
SMALL_MODEL_BYTES = 2**30

_GIB = 2**30
_OUT_OF_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class Device:
    """A place to run a model.

    ``name`` is what torch calls it (``cpu``, ``cuda:0``); ``description`` names the hardware; ``attention`` the kernel
    family the models are run with; ``note`` says what was chosen and why, for the user to read.
    """

    name: str
    description: str
    attention: str
    note: str

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


def choose_device(requested: str | None = None) -> Device:
    """The device to run on: ``auto`` (or None) takes CUDA where there is one, else the CPU, and says so.

    Raises ResourceError for a CUDA device that is not there, UsageError for any other name than these and cpu,
    cuda, cuda:N.
    """
    import torch

    name = requested or "auto"
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {name}")
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return _cpu_device("asked for")
    if name == "auto" and num_cuda == 0:
        return _cpu_device("auto: torch sees no CUDA device")
    ordinal = int(index or 0)
    if ordinal >= num_cuda:
        raise ResourceError(
            f"device: {name} is not there: expected one of {num_cuda} CUDA devices",
            "use --device cpu, or install a CUDA build of torch and check nvidia-smi",
        )
    properties = torch.cuda.get_device_properties(ordinal)
    description = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB"
    why = "auto: CUDA is available" if name == "auto" else "asked for"
    return Device(f"cuda:{ordinal}", description, "sdpa", f"device cuda:{ordinal} ({description}): {why}")


def _cpu_device(why: str) -> Device:
    import torch

    description = f"CPU, {torch.get_num_threads()} threads"
    return Device("cpu", description, "sdpa", f"device cpu ({description}): {why}")


def choose_dtype(
    requested: str | None, device: Device, checkpoint_dtype: torch.dtype, weight_bytes: int
) -> tuple[torch.dtype, str]:
    """The precision to run a model in, and a note saying why.

    ``auto`` (or None): float32 on the CPU for models below 1 GiB of weights, in every other case the checkpoint's own.
    ``weight_bytes``: bytes of the weights as stored. Raises UsageError for an unknown name.
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
    return checkpoint_dtype, f"dtype {stored}: auto, as the checkpoint is stored"


def set_seed(seed: int) -> None:
    """Seed the random generators of Python and of torch on every device."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the work queued on a device is done, so that a clock read after it is true. No-op on the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def memory_errors_as(what: str, hint: str) -> Iterator[None]:
    """Turn torch's and Python's out-of-memory failures inside the block into one ResourceError naming ``what``."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and not any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS):
            raise
        raise ResourceError(f"{what}: out of memory", hint) from error
