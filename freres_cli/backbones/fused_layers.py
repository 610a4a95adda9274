"""Where a GPU runs one kernel for what PyTorch does in several passes over memory.

The layers of transformers stay, with their names and weights; only what lies between their matrix products is replaced, in
16 bits and without gradients. A layer whose own result is another formula's is left as it is. The embedding of patches
becomes one matrix product. A prefill of 46,102 tokens takes 0.84 times as long, the tower of Qwen2-VL 0.68 times (H200;
``cuda.json``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from freres_cli.backbones.fused import Kernels, Written, failures_told, find_kernels, is_near, tell_problem

# The functions of transformers by which attention layers turn queries and keys.
IN_DECODER, IN_TOWER = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"
MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")

# A forward pass of a kind of layer, in place of its own.
Forward = Callable[..., Any]


def use_kernels(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Let the layers of a tower or a decoder use kernels, where there are any for its device. Returns a note if it could have
    had some and has not."""
    kernels, note = find_kernels(device, dtype)
    if kernels is None:
        return note
    with failures_told() as told:
        replace_passes(model, kernels)
    return tell_problem(told[0]) if told else None


def replace_passes(model: nn.Module, kernels: Kernels) -> None:
    """Replace norms, rotations, gates and patch embeddings of the layers of ``model`` whose results are known to be those.

    A layer gets a class below its own, so that it can be copied, and its weights be moved, as before. Kernels are compared
    with PyTorch at the sizes of the model. Raises ``ValueError`` if one gives something else; then nothing is replaced.
    """
    known: dict[Any, type[nn.Module] | None] = {}
    replaced = []
    with torch.no_grad():
        for module in model.modules():
            key = _shape_of(module)
            if key not in known:
                forward = _find_forward(module, kernels)
                known[key] = None if forward is None else _kind_below(type(module), forward, kernels)
            if (kind := known[key]) is not None:
                replaced.append((module, kind))
    for module, kind in replaced:
        module.__class__ = kind


def _shape_of(module: nn.Module) -> Any:
    """What tells apart layers that may compute different things, or kernels that are compiled apart."""
    own = [tuple(tensor.shape) for tensor in module.parameters(recurse=False)]
    names = ("head_dim", "variance_epsilon", "kernel_size", "stride", "padding", "dilation", "groups")
    return type(module), *own, *(getattr(module, name, None) for name in names)


# By kind of layer and kernels, which are kept, so no others have their id.
_KINDS: dict[str, type[nn.Module]] = {}


def _kind_below(kind: type[nn.Module], forward: Forward, kernels: Kernels) -> type[nn.Module]:
    """The kind of layer with another forward pass, one for all models."""
    name = f"{kind.__module__}.{kind.__qualname__} {id(kernels)}"

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _make_again, (kind, name), self.__dict__

    facts = {"forward": forward, "__reduce_ex__": reduce, "_kernels": kernels}
    return _KINDS.setdefault(name, type(kind.__name__, (kind,), facts))


def _make_again(kind: type[nn.Module], name: str) -> nn.Module:
    """An empty layer of a kind made here, or in another process of the one below which it was made."""
    own = _KINDS.get(name, kind)
    return own.__new__(own)


def _find_forward(module: Any, kernels: Kernels) -> Forward | None:
    kind = type(module)
    if kind in _KINDS.values():
        return None
    if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return _norm_of(module, kernels)
    if all(hasattr(module, name) for name in MLP_PARTS) and isinstance(module.gate_proj, nn.Linear):
        return _mlp_of(module, kernels)
    if kind.__name__ == "QuickGELUActivation":
        return _activation_of(module, kernels)
    if isinstance(module, nn.Conv3d):
        return _patches_of(module)
    return _attention_of(module, kernels) if kind.__name__.endswith("Attention") else None


def _takes(*tensors: Tensor) -> bool:
    """Whether kernels take these: without gradients, of one dtype, on one GPU."""
    first = tensors[0]
    return (
        not torch.is_grad_enabled()
        and first.is_cuda
        and first.dtype.itemsize == 2
        and all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
    )


def _probe(module: nn.Module, width: int) -> Tensor:
    parameter = next(module.parameters())
    return torch.linspace(-2, 2, 16 * width).view(16, width).to(parameter.device, parameter.dtype)


def _check(name: str, mine: Tensor, other: Tensor) -> None:
    if not is_near(mine, other):
        raise ValueError(f"{name} {tuple(mine.shape)} differs from PyTorch's")


def _norm_of(module: Any, kernels: Kernels) -> Forward | None:
    plain = type(module).forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _takes(hidden_states, self.weight):
            return plain(self, hidden_states)
        return kernels.norm(hidden_states.contiguous(), self.weight, self.variance_epsilon)

    rows = _probe(module, module.weight.shape[0])
    own = module(rows)
    if not torch.equal(own, Written.norm(rows, module.weight, module.variance_epsilon)):
        return None
    _check("norm", forward(module, rows), own)
    return forward


def _mlp_of(module: Any, kernels: Kernels) -> Forward | None:
    plain = type(module).forward

    def run(self: Any, kernels: Any, rows: Tensor) -> Tensor:
        return self.down_proj(kernels.gate(self.gate_proj(rows), self.up_proj(rows)))

    def forward(self: Any, rows: Tensor) -> Tensor:
        return run(self, kernels, rows) if _takes(rows) else plain(self, rows)

    rows = _probe(module, module.gate_proj.in_features)
    own = module(rows)
    return forward if torch.equal(own, run(module, Written, rows)) else None


def _activation_of(module: Any, kernels: Kernels) -> Forward | None:
    plain = type(module).forward

    def forward(self: Any, rows: Tensor) -> Tensor:
        return kernels.quick_gelu(rows.contiguous()) if _takes(rows) else plain(self, rows)

    rows = torch.linspace(-4, 4, 64)
    return forward if torch.equal(plain(module, rows), Written.quick_gelu(rows)) else None


def _patches_of(module: nn.Conv3d) -> Forward | None:
    """A convolution over patches that do not overlap, as one matrix product: cuDNN takes ten times as long for it."""
    if module.kernel_size != module.stride or module.groups != 1 or any(module.padding) or set(module.dilation) != {1}:
        return None
    plain = type(module).forward

    def forward(self: Any, patches: Tensor) -> Tensor:
        if not _takes(patches, self.weight) or patches.shape[1:] != self.weight.shape[1:]:
            return plain(self, patches)
        rows = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return rows.view(*rows.shape, 1, 1, 1)

    return forward


def _attention_of(module: Any, kernels: Kernels) -> Forward | None:
    """The forward pass of an attention layer that turns queries and keys by kernels.

    A copy of its function, because stock models in the same process must keep theirs.
    """
    own = inspect.unwrap(type(module).forward)
    if not isinstance(own, FunctionType):
        return None
    rotations = {
        name: (_in_tower if name == IN_TOWER else _in_decoder)(own.__globals__[name], kernels)
        for name in _rotations_in(own)
    }
    if not rotations:
        return None
    if (width := getattr(module, "head_dim", None)) is not None:
        _check_rotation(module, width, kernels)
    copied = FunctionType(
        own.__code__, {**own.__globals__, **rotations}, own.__name__, own.__defaults__, own.__closure__
    )
    copied.__kwdefaults__ = own.__kwdefaults__
    return copied


def _rotations_in(own: FunctionType) -> Iterator[str]:
    """The functions by which a layer turns queries and keys as ``Written.rotate`` does."""
    for name in (IN_DECODER, IN_TOWER):
        if name not in own.__code__.co_names or name not in own.__globals__:
            continue
        rotation = own.__globals__[name]
        query = torch.linspace(-2, 2, 48).view(3, 2, 8).to(torch.bfloat16)
        heads = query.transpose(0, 1)[None]
        angles = torch.linspace(-1, 1, 48).view(2, 3, 8).to(torch.float32 if name == IN_TOWER else torch.bfloat16)
        turned = Written.rotate(heads, *angles[:, None])
        if name == IN_TOWER:
            agrees = torch.equal(rotation(query, query, *angles)[0], turned[0].transpose(0, 1))
        else:
            agrees = torch.equal(rotation(heads, heads, *angles[:, None])[1], turned)
        if agrees:
            yield name


def _check_rotation(module: nn.Module, width: int, kernels: Kernels) -> None:
    for num_heads in _heads_of(module):  # a kernel is compiled for each number
        rows = _probe(module, num_heads * width).view(1, 16, num_heads, width).transpose(1, 2)
        for dtype in (rows.dtype, torch.float32):
            angles = torch.linspace(-1, 1, 2 * 16 * width).view(2, 1, 16, width).to(rows.device, dtype)
            _check("rotation", kernels.rotate(rows, *angles), Written.rotate(rows, *angles))


def _heads_of(module: nn.Module) -> list[int]:
    """The numbers of query and key heads that an attention layer, or its config, names; 8 if there is none."""
    holders, names = (
        (module, getattr(module, "config", None)),
        ("num_heads", "num_attention_heads", "num_key_value_heads"),
    )
    found = {getattr(holder, name, None) for holder in holders for name in names}
    return sorted(count for count in found if isinstance(count, int)) or [8]


def _in_decoder(plain: Callable[..., tuple[Tensor, Tensor]], kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if options or not _takes(q, k, cos, sin) or cos.shape[-1] != q.shape[-1] or cos.ndim != 3:
            return plain(q, k, cos, sin, **options)
        cos, sin = cos.contiguous(), sin.contiguous()
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)

    return rotation


def _in_tower(plain: Callable[..., tuple[Tensor, Tensor]], kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not _takes(q, k) or cos.shape[-1] != q.shape[-1] or cos.ndim != 2 or q.ndim != 3:
            return plain(q, k, cos, sin)
        cos, sin = (angles.float().contiguous()[None] for angles in (cos, sin))
        query, key = (kernels.rotate(heads.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for heads in (q, k))
        return query, key

    return rotation
