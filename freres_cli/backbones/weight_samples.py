"""Samples of a half's weights as a digest: reading all of a large model would take longer than a prefill."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freres_cli.backbones.checkpoint import Checkpoint, find_stored
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
            digest.update(bytes_of(_sample(part)))


def digest_stored(checkpoint: Checkpoint, prefixes: Mapping[str, tuple[str, ...]]) -> str:
    """A SHA-256 of the names, dtypes, shapes and sampled values of a half's weights as ``checkpoint`` stores them.

    It is the same in whatever precision the half runs, and whatever prefixes its names have in the file. ``prefixes``: as for
    ``checkpoint.load_submodule``. No module is made; only the pages of the samples are read.
    """
    names = {key: name for name, key in find_stored(checkpoint, prefixes).items()}
    parts = {}
    for key, tensor in checkpoint.tensors(sorted(names)):
        part = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        part.update(bytes_of(_sample(tensor)))
        parts[names[key]] = part.hexdigest()
    return hashlib.sha256("".join(f"{name} {parts[name]} " for name in sorted(parts)).encode()).hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // SAMPLED_VALUES)]


def bytes_of(tensor: Tensor) -> Any:
    """The values of a tensor, wherever it is, as bytes to hash."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
