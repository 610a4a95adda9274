"""The stretches that are being merged, as the few tensors that a device keeps of them beside their latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from freres_cli.method.cell_tree import NONE

FIRST = -(2**63)  # the key of what no merge made


@dataclass
class Rows:
    """One row a stretch, as few tensors as can be: on a GPU each costs a kernel whenever rows move.

    ``ints`` (n, 11): ``slot``, its place in the storage; ``name``, which no other stretch of the clip ever had; ``time``
    t0, t1; ``cell``, its rectangle; ``shots``, first and last; ``partner``, the names of those whose merges with it
    ``floats`` holds, along time and with the sibling cells; ``height``, the largest key of the merges that made it; ``size``,
    the number of latents in it. ``floats`` (n, 6) float64: ``cost`` of these two merges, as far as it depends on latents;
    ``loss``, the squared error that they add; ``seconds``, of the first and the last frame.
    """

    ints: Tensor
    floats: Tensor

    @staticmethod
    def of(slot: Tensor, first_name: int, cell: Tensor, frame: Tensor, shot: Tensor, seconds: Tensor) -> Rows:
        """Return rows of n latents that nothing was merged with. ``slot``: (n,), where they are. ``first_name``: of the
        first. ``cell``, ``frame``, ``shot``: of each, (n,). ``seconds``: of each, (n,) float64."""
        count = slot.shape[0]
        name = torch.arange(first_name, first_name + count, device=slot.device)
        none, height = torch.full_like(slot, NONE), torch.full_like(slot, FIRST)
        size = torch.ones_like(slot)
        ints = torch.stack([slot, name, frame, frame + 1, cell, shot, shot, none, none, height, size], dim=1)
        return Rows(ints, pad(torch.stack([seconds, seconds], dim=1), (4, 0)))

    def pick(self, index: Tensor) -> Rows:
        """Return a copy of some rows, without what is not whole."""
        return Rows(self.ints[index], self.floats[:0])

    @property
    def slot(self) -> Tensor:
        return self.ints[:, 0]

    @property
    def name(self) -> Tensor:
        return self.ints[:, 1]

    @property
    def time(self) -> Tensor:
        return self.ints[:, 2:4]

    @property
    def cell(self) -> Tensor:
        return self.ints[:, 4]

    @property
    def shots(self) -> Tensor:
        return self.ints[:, 5:7]

    @property
    def partner(self) -> Tensor:
        return self.ints[:, 7:9]

    @property
    def height(self) -> Tensor:
        return self.ints[:, 9]

    @property
    def size(self) -> Tensor:
        return self.ints[:, 10]

    @property
    def cost(self) -> Tensor:
        return self.floats[:, :2]

    @property
    def loss(self) -> Tensor:
        return self.floats[:, 2:4]

    @property
    def seconds(self) -> Tensor:
        return self.floats[:, 4:]
