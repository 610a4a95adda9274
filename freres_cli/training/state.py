"""Training state on disk, so that a stopped run can resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freres_cli.errors import UsageError
from freres_cli.files import write_atomically


def save_state(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], **facts: Any) -> None:
    """Write weights, optimizer states and ``facts``. The write is atomic: an interrupted one leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"module": module.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    write_atomically(path, lambda file: torch.save({**state, **facts}, file), force=True)


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``save_state`` wrote, without restoring anything, or ``{}`` if there is no such file. Raises
    ``UsageError`` for a file that ``save_state`` did not write."""
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if not {"module", "optimizers"} <= set(state):
            raise ValueError("no training state")
    except Exception as error:  # torch raises almost anything on a damaged file
        raise UsageError(f"{path}: damaged training state", "remove it to start over") from error
    return state


def put_back(state: dict[str, Any], module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore module and optimizers from what ``read_state`` returned. Return the rest: the facts."""
    if not state:
        return {}
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return {name: value for name, value in state.items() if name not in ("module", "optimizers")}
