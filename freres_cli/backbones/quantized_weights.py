"""The weights of a decoder's linear layers in 8 bits, by torchao: weight-only, one scale for each row of a matrix.

Activations, embeddings, norms, the head and the experts of mixture models, which are no linear layers, stay as they are.
torchao turns a matrix back into the model's precision for the moment of its product, so this saves memory, not work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freres_cli.errors import BackboneError
from freres_cli.imports import quiet_torchao

# What torchao keeps beside a row: a scale in float32, and with int8 a zero point in 8 bits.
ROW_BYTES = {"int8": 5, "fp8": 4}


def quantize_linears(decoder: nn.Module, weights: str | None, device: torch.device) -> str | None:
    """Quantize the linear layers of ``decoder``, one at a time, each on ``device``, and return a note on it.

    ``weights``: as in ``devices.Storage``; with ``None`` nothing happens. Raises BackboneError if torchao cannot be used.
    """
    if weights is None:
        return None
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    before = sum(linear.weight.nbytes for linear in linears)
    try:
        with quiet_torchao():
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_
        made: Any = Int8WeightOnlyConfig if weights == "int8" else Float8WeightOnlyConfig
        # It would change settings of torch.compile for the whole process.
        config = made(granularity=PerRow(), set_inductor_config=False)
    except (ImportError, TypeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"--weight-dtype {weights}: torchao cannot be used: {reason}", "run: pip install 'torchao>=0.18'"
        ) from error
    for linear in linears:
        quantize_(linear, config, device=device)
    return describe_weights(
        weights, sum(part.nbytes for linear in linears for part in plain_tensors(linear.weight)), before
    )


def describe_weights(weights: str, num_bytes: int, before: int) -> str:
    """A note on what quantized weights lose and save. ``num_bytes``: of those that are quantized; ``before``: without."""
    return (
        f"weights of the decoder's linear layers in {weights}, {num_bytes} bytes in place of {before}: they are rounded, so "
        "answers may change"
    )


def plain_tensors(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight consists of: itself, or if it is quantized, its codes and scales."""
    if not is_traceable_wrapper_subclass(weight):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(weight, name))
