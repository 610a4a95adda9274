"""Where a GPU runs one kernel for what PyTorch does in several passes over memory.

The layers of transformers stay, with their names and weights; only what lies between their matrix products is replaced, in
16 bits and without gradients. What a layer computes is tried before: a layer of another kind is left as it is. A prefill
of 46,102 tokens takes 0.84 times as long, the tower of Qwen2-VL 0.68 times (H200; ``cuda.json``).
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

# The functions of transformers by which attention layers turn queries and keys.
ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
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
        whole.lerp_(part.float(), torch.sigmoid(part_sums - sums)[..., None])
        torch.logaddexp(sums, part_sums, out=sums)


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
            _PROBLEMS[device, dtype] = _try_kernels(device, dtype)
        problem = _PROBLEMS[device, dtype]
    if problem is None:
        from freres_cli.backbones import kernels

        return kernels, None
    return None, f"towers and prefills take longer: {problem}; PyTorch's own kernels are used"


def start_compiling_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Have a thread call ``find_kernels``, so that what Triton compiles is there once the weights are."""
    if device.type == "cuda" and dtype.itemsize == 2:
        threading.Thread(target=find_kernels, args=(device, dtype)).start()


def _try_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from freres_cli.backbones import kernels

        with torch.no_grad(), torch.cuda.device(device):
            return compare_kernels(kernels, device, dtype)
    except Exception as error:  # whatever a compiler that is not there, or another release, may raise
        return f"Triton's kernels failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def compare_kernels(kernels: Kernels, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why some kernel gives something else than PyTorch, ``None`` if none does. The device's queue is waited for."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    sums = draw(2, 1, 3, 5, dtype=torch.float32)
    angles = {kind: draw(2, 1, 5, 24, dtype=kind) for kind in (dtype, torch.float32)}
    tries: dict[str, Callable[[Any], Tensor]] = {
        "norm": partial(_call, "norm", draw(5, 3, 24), draw(24), 1e-6),
        **{
            f"rotate in {kind}": partial(_call, "rotate", draw(1, 5, 3, 24).transpose(1, 2), *pair)
            for kind, pair in angles.items()
        },
        "gate": partial(_call, "gate", draw(3, 24), draw(3, 24)),
        "quick_gelu": partial(_call, "quick_gelu", draw(3, 24)),
        "blend": partial(_blended, draw(1, 3, 5, 24, dtype=torch.float32), sums[0], draw(1, 3, 5, 24), sums[1]),
    }
    far = [name for name, run in tries.items() if not _is_near(run(kernels), run(Written))]
    return f"kernels give something else than PyTorch: {', '.join(far)}" if far else None


def _call(name: str, *arguments: Any) -> Any:
    *given, kernels = arguments
    return getattr(kernels, name)(*given)


def _blended(whole: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor, kernels: Kernels) -> Tensor:
    whole, sums = whole.clone(), sums.clone()
    kernels.blend(whole, sums, part, part_sums)
    return torch.cat([whole.flatten(), sums.flatten()])


def _is_near(mine: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for rounding, and laid out for the same use."""
    scale = max(1.0, float(other.float().abs().max()))
    return mine.shape == other.shape and float((mine.float() - other.float()).abs().max()) <= TOLERANCE * scale


def use_kernels(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Let the layers of a tower or a decoder use kernels, where there are any for its device. Returns a note if it could have
    had some and has not."""
    kernels, note = find_kernels(device, dtype)
    if kernels is not None:
        replace_passes(model, kernels)
    return note


def replace_passes(model: nn.Module, kernels: Kernels) -> None:
    """Replace norms, rotations, gates and patch embeddings of the layers of ``model`` whose results are known to be those."""
    known: dict[Any, bool] = {}

    def agrees(key: Any, check: Callable[[], bool]) -> bool:
        if key not in known:
            known[key] = check()
        return known[key]

    with torch.no_grad():
        for module in model.modules():
            kind = type(module)
            for find in (_norm_of, _mlp_of, _activation_of, _patches_of):
                found = find(module, kernels)
                if found is not None and agrees((kind, find), found[0]):
                    module.forward = found[1]
            for name in _rotations_in(kind):
                rotation = inspect.unwrap(kind.forward).__globals__[name]
                if agrees((rotation, name), partial(_is_rotation, rotation, name)):
                    module.forward = MethodType(_with_rotation(kind.forward, name, rotation, kernels), module)


Replacement = tuple[Callable[[], bool], Callable[..., Tensor]]


def _takes(*tensors: Tensor) -> bool:
    """Whether kernels take these: without gradients, of one dtype, on one GPU."""
    first = tensors[0]
    return (
        not torch.is_grad_enabled()
        and first.is_cuda
        and first.dtype.itemsize == 2
        and all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
    )


def _probe(model: nn.Module, width: int) -> Tensor:
    parameter = next(model.parameters())
    return torch.linspace(-2, 2, 3 * width).view(3, width).to(parameter.device, parameter.dtype)


def _norm_of(module: Any, kernels: Kernels) -> Replacement | None:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    plain, weight, eps = module.forward, module.weight, module.variance_epsilon

    def forward(hidden_states: Tensor) -> Tensor:
        if not _takes(hidden_states, weight):
            return plain(hidden_states)
        return kernels.norm(hidden_states.contiguous(), weight, eps)

    rows = _probe(module, weight.shape[0])
    return lambda: torch.equal(plain(rows), Written.norm(rows, weight, eps)), forward


def _mlp_of(module: Any, kernels: Kernels) -> Replacement | None:
    if not all(hasattr(module, name) for name in MLP_PARTS) or not isinstance(module.gate_proj, nn.Linear):
        return None
    plain = module.forward

    def run(kernels: Any, rows: Tensor) -> Tensor:
        return module.down_proj(kernels.gate(module.gate_proj(rows), module.up_proj(rows)))

    def forward(rows: Tensor) -> Tensor:
        return run(kernels, rows) if _takes(rows) else plain(rows)

    rows = _probe(module, module.gate_proj.in_features)
    return lambda: torch.equal(plain(rows), run(Written, rows)), forward


def _activation_of(module: Any, kernels: Kernels) -> Replacement | None:
    if type(module).__name__ != "QuickGELUActivation":
        return None
    plain = module.forward

    def forward(rows: Tensor) -> Tensor:
        return kernels.quick_gelu(rows.contiguous()) if _takes(rows) else plain(rows)

    rows = torch.linspace(-4, 4, 64)
    return lambda: torch.equal(plain(rows), Written.quick_gelu(rows)), forward


def _patches_of(module: Any, kernels: Kernels) -> Replacement | None:
    """A convolution over patches that do not overlap, as one matrix product: cuDNN takes ten times as long for it."""
    if not isinstance(module, nn.Conv3d) or module.kernel_size != module.stride or module.groups != 1:
        return None
    plain = module.forward

    def forward(patches: Tensor) -> Tensor:
        if not _takes(patches, module.weight) or patches.shape[1:] != module.weight.shape[1:]:
            return plain(patches)
        rows = linear(patches.flatten(1), module.weight.flatten(1), module.bias)
        return rows.view(*rows.shape, 1, 1, 1)

    return lambda: not any(module.padding) and set(module.dilation) == {1}, forward


def _rotations_in(kind: type[Any]) -> Iterator[str]:
    """The functions by which a kind of layer turns queries and keys."""
    plain = inspect.unwrap(kind.forward) if kind.__name__.endswith("Attention") else None
    if isinstance(plain, FunctionType):
        yield from (name for name in ROTATIONS if name in plain.__code__.co_names and name in plain.__globals__)


def _is_rotation(rotation: Callable[..., tuple[Tensor, Tensor]], name: str) -> bool:
    """Whether a function of transformers turns pairs as ``Written.rotate`` does."""
    kinds = (torch.bfloat16, torch.float32) if name == ROTATIONS[1] else (torch.bfloat16, torch.bfloat16)
    query = torch.linspace(-2, 2, 48).view(3, 2, 8).to(kinds[0])
    angles = torch.linspace(-1, 1, 48).view(2, 3, 8).to(kinds[1])
    heads = query.transpose(0, 1)[None]
    turned = Written.rotate(heads, *angles[:, None])
    if name == ROTATIONS[1]:
        return torch.equal(rotation(query, query, *angles)[0], turned[0].transpose(0, 1))
    return torch.equal(rotation(heads, heads, *angles[:, None])[1], turned)


def _with_rotation(
    forward: Callable[..., Any], name: str, plain: Callable[..., tuple[Tensor, Tensor]], kernels: Kernels
) -> FunctionType:
    """The forward pass of a kind of layer, which calls kernels in place of ``plain``, a function of its module.

    A copy of the function, because stock models in the same process must keep theirs.
    """

    def in_decoder(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if options or not _takes(q, k, cos, sin) or cos.shape[-1] != q.shape[-1] or cos.ndim != 3:
            return plain(q, k, cos, sin, **options)
        cos, sin = cos.contiguous(), sin.contiguous()
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)

    def in_tower(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not _takes(q, k) or cos.shape[-1] != q.shape[-1] or cos.ndim != 2 or q.ndim != 3:
            return plain(q, k, cos, sin)
        cos, sin = (angles.float().contiguous()[None] for angles in (cos, sin))
        turned = (kernels.rotate(heads.transpose(0, 1)[None], cos, sin) for heads in (q, k))
        query, key = (heads[0].transpose(0, 1) for heads in turned)
        return query, key

    own = inspect.unwrap(forward)
    assert isinstance(own, FunctionType)
    rotation = in_tower if name == ROTATIONS[1] else in_decoder
    names = {**own.__globals__, name: rotation}
    copied = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    return copied
