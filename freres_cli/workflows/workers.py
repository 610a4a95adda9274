"""The processes that ``torchrun`` or ``accelerate launch`` started together; one alone without them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class Workers:
    """``rank`` of ``count``; what they share. Gradients are summed, so that n processes take the step of one."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Let the first process work, then the others: they find on disk what it left there."""
        if self.count == 1:
            return work()
        done = work() if self.is_first else None
        dist.barrier()
        result = work() if done is None else done
        dist.barrier()
        return result

    def sum_gradients(self, modules: nn.Module, loss: float) -> float:
        """Give every process the sum of all gradients; return the sum of the losses."""
        if self.count == 1:
            return loss
        for parameter in modules.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        total = torch.tensor(loss, dtype=torch.float64, device=next(modules.parameters()).device)
        dist.all_reduce(total)
        return float(total)
