"""The processes that ``torchrun`` or ``accelerate launch`` started together; without them, a single one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from freres_cli.devices import Device

T = TypeVar("T")

# The others wait while the first fills the cache.
LONGEST_WAIT = timedelta(days=7)


def count_processes() -> int:
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


class Workers:
    """Process ``rank`` of ``count`` that train together. Gradients are summed, so n processes take the same step as one."""

    def __init__(self, device: Device) -> None:
        self.count = count_processes()
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1 and not dist.is_initialized():
            if device.is_cuda:
                torch.cuda.set_device(device.name)
            dist.init_process_group("nccl" if device.is_cuda else "gloo", timeout=LONGEST_WAIT)
            atexit.register(dist.destroy_process_group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process gets here."""
        if self.count > 1:
            dist.barrier()

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process, then in the others, which find on disk what the first one left."""
        if self.is_first:
            done = work()
            self.wait()
        else:
            self.wait()
            done = work()
        self.wait()
        return done

    def gather(self, value: T) -> list[T]:
        """Return every process's ``value``, by rank, in all processes."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def sum_gradients(self, modules: nn.Module, loss: float) -> float:
        """Give every process the sum of all gradients, and return the sum of the losses. A parameter that no process used
        gets no gradient, as with a single process."""
        if self.count == 1:
            return loss
        parameters = list(modules.parameters())
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used)
        for parameter, uses in zip(parameters, used.tolist(), strict=True):
            if not uses:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        total = torch.tensor(loss, dtype=torch.float64, device=parameters[0].device)
        dist.all_reduce(total)
        return float(total)
