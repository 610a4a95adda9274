"""Find the kernels of ``kernels.py`` for a GPU, and compare them with PyTorch's own operations before they are used."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from freres_cli.errors import is_out_of_memory

QUICK_GELU_FACTOR = 1.702
# Of values around 1 in 16 bits, how far kernels may be from PyTorch: two steps of bfloat16.
TOLERANCE = 2**-6


class Kernels(Protocol):
    """``kernels.py``, or what a test has in its place."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``kernels.norm``."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See ``kernels.rotate``."""

    def gate(self, gates: Tensor, up: Tensor) -> Tensor:
        """See ``kernels.gate``."""

    def quick_gelu(self, x: Tensor) -> Tensor:
        """See ``kernels.quick_gelu``."""

    def blend(self, whole: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
        """See ``kernels.blend``."""


class Written:
    """The same in PyTorch, as the layers of transformers have it: what kernels and layers are compared with."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``kernels.norm``."""
        values = x.float()
        return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See ``kernels.rotate``."""
        values, half = x.to(cos.dtype), x.shape[-1] // 2
        turned = torch.cat([-values[..., half:], values[..., :half]], dim=-1)
        return (values * cos[:, None] + turned * sin[:, None]).to(x.dtype)

    @staticmethod
    def gate(gates: Tensor, up: Tensor) -> Tensor:
        """See ``kernels.gate``."""
        return silu(gates) * up

    @staticmethod
    def quick_gelu(x: Tensor) -> Tensor:
        """See ``kernels.quick_gelu``."""
        return x * torch.sigmoid(QUICK_GELU_FACTOR * x)

    @staticmethod
    def blend(whole: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
        """See ``kernels.blend``."""
        whole.lerp_(part.to(whole.dtype), torch.sigmoid(part_sums - sums)[..., None])
        torch.logaddexp(sums, part_sums, out=sums)


SHORT_MEMORY = "out of memory"
# Why there are no kernels for a device and a dtype, None if there are. The lock is held while they are tried.
_PROBLEMS: dict[tuple[torch.device, torch.dtype], str | None] = {}
_TRYING = threading.Lock()


def find_kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str | None]:
    """The kernels for a device and a dtype; or none, and, if it could have had some, a note that says why it has not.

    The first call for both has Triton compile them, and compares them with PyTorch.
    """
    if device.type != "cuda" or dtype.itemsize != 2 or not torch.cuda.is_available():
        return None, None
    with _TRYING:
        if (device, dtype) not in _PROBLEMS:
            problem = _try_kernels(device, dtype)
            if problem == SHORT_MEMORY:  # there may be more the next time
                return None, tell_problem(problem)
            _PROBLEMS[device, dtype] = problem
        problem = _PROBLEMS[device, dtype]
    if problem is None:
        from freres_cli.backbones import kernels

        return kernels, None
    return None, tell_problem(problem)


def tell_problem(problem: str) -> str:
    """The note that kernels are not used."""
    return f"towers and prefills take longer: {problem}; PyTorch's own kernels are used"


def start_compiling_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Have a thread call ``find_kernels``, so that much of what Triton compiles is there once the weights are."""
    if device.type == "cuda" and dtype.itemsize == 2:
        threading.Thread(target=find_kernels, args=(device, dtype)).start()


def _try_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    with failures_told() as told, torch.no_grad(), torch.cuda.device(device):
        from freres_cli.backbones import kernels

        told += compare_kernels(kernels, device, dtype)
    return told[0] if told else None


@contextmanager
def failures_told() -> Iterator[list[str]]:
    """Whatever a compiler that is not there, or another release of it, may raise, as a text in the list; ``SHORT_MEMORY`` if
    memory ran out."""
    told: list[str] = []
    try:
        yield told
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        told.append(SHORT_MEMORY if is_out_of_memory(error) else f"Triton's kernels failed: {reason}")


def compare_kernels(kernels: Kernels, device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Say if some kernels give something else than PyTorch. The device's queue is waited for."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # All sizes are multiples of 16, as those of models are: Triton compiles others apart.
    sums = draw(2, 1, 2, 16, dtype=torch.float32)
    angles = {kind: draw(2, 1, 16, 128, dtype=kind) for kind in (dtype, torch.float32)}
    tries: dict[str, Callable[[Any], Tensor]] = {
        "norm": partial(_call, "norm", draw(4, 4, 128), draw(128), 1e-6),
        **{
            f"rotate in {kind}": partial(_call, "rotate", draw(1, 16, 16, 128).transpose(1, 2), *pair)
            for kind, pair in angles.items()
        },
        "gate": partial(_call, "gate", draw(4, 128), draw(4, 128)),
        "quick_gelu": partial(_call, "quick_gelu", draw(4, 128)),
        "blend": partial(_blended, draw(1, 2, 16, 128, dtype=torch.float32), sums[0], draw(1, 2, 16, 128), sums[1]),
    }
    far = [name for name, run in tries.items() if not is_near(run(kernels), run(Written))]
    return [f"kernels give something else than PyTorch: {', '.join(far)}"] if far else []


def _call(name: str, *arguments: Any) -> Any:
    *given, kernels = arguments
    return getattr(kernels, name)(*given)


def _blended(whole: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor, kernels: Kernels) -> Tensor:
    whole, sums = whole.clone(), sums.clone()
    kernels.blend(whole, sums, part, part_sums)
    return torch.cat([whole.flatten(), sums.flatten()])


def is_near(mine: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    scale = max(1.0, float(other.float().abs().max()))
    return mine.shape == other.shape and float((mine.float() - other.float()).abs().max()) <= TOLERANCE * scale
