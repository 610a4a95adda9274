"""What a training run needs to go on where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_state(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], **facts: Any) -> None:
    """Write weights, optimizers and ``facts``; the file is whole or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    state = {"module": module.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    torch.save({**state, **facts}, partial)
    partial.replace(path)


def load_state(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put back what ``save_state`` wrote and return its facts; ``{}`` where there is no such file."""
    if not path.exists():
        return {}
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    module.load_state_dict(state.pop("module"))
    for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
        optimizer.load_state_dict(saved)
    return state
