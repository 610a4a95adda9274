"""Samples of a module's weights as a digest: reading all of a large model would take longer than a prefill."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from freres_cli.backbones.quantized_weights import plain_tensors

SAMPLED_VALUES = 256  # of each tensor, at least; evenly spread


def digest_weights(module: nn.Module) -> str:
    """A SHA-256 of the names, shapes and sampled values of all weights of ``module``."""
    digest = hashlib.sha256()
    add_weights(digest, module)
    return digest.hexdigest()


def add_weights(digest: Any, module: nn.Module) -> None:
    """Add what ``digest_weights`` reads to a digest of hashlib that goes on."""
    for name, weight in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        for part in plain_tensors(weight.detach()):
            flat = part.flatten()
            digest.update(bytes_of(flat[:: max(1, len(flat) // SAMPLED_VALUES)]))


def bytes_of(tensor: Tensor) -> Any:
    """The values of a tensor, wherever it is, as bytes to hash."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
