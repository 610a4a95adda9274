"""What a training run needs to go on where it was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freres_cli.errors import UsageError
from freres_cli.files import write_atomically


def save_state(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], **facts: Any) -> None:
    """Write weights, optimizers and ``facts``; the file is whole or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"module": module.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    write_atomically(path, lambda file: torch.save({**state, **facts}, file), force=True)


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``save_state`` wrote, with nothing put back; ``{}`` where there is no such file. Raises
    ``UsageError`` for a file that it did not write."""
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if not {"module", "optimizers"} <= set(state):
            raise ValueError("no training state")
    except Exception as error:  # torch lets damage surface as whatever it trips over
        raise UsageError(f"{path}: damaged training state", "remove it to begin anew") from error
    return state


def put_back(state: dict[str, Any], module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Give module and optimizers what ``read_state`` read, and return the rest: the facts."""
    if not state:
        return {}
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return {name: value for name, value in state.items() if name not in ("module", "optimizers")}
