"""The trainable parts of adaptive Fre-Res: absorber, adapters, type embeddings and gates. Untrained, they change nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freres_cli.method.absorber import NEIGHBOURHOOD, QUERIES_AT_ONCE, SpatialGuidedAbsorber
from freres_cli.method.fusion import SMALLEST_UNIT, BottleneckAdapter, ModuleShape, with_main
from freres_cli.method.stretch_means import box_sizes
from freres_cli.records import TOKEN_KINDS
from freres_cli.stretches import Stretches

# Ours. A stretch listens to at most this many others: those around it with the most energy merged away.
MOST_NEIGHBOURS = 16
# The middle of a neighbour lies before that of the stretch, at it, or after it: the absorber's bands.
NUM_ORDERS = 3
KINDS = ("dynamic", "summary")
DYNAMIC, SUMMARY = range(len(KINDS))


class StretchModules(nn.Module):
    """Everything that is trained on top of a frozen backbone for adaptive Fre-Res. Works on the main channels, in float32.

    A stretch first absorbs the trends around it: the Spatial-Guided Absorber of the paper (section 3.4), with what was
    merged away in place of coefficients. Then come the adapter, type embedding and gate of its kind, as in the paper
    (E.1). Ours: ``extent`` tells the language model how many frames and cells a token stands for, which no position does.

    ``shape``: sizes of the modules; ``num_bands`` is ``NUM_ORDERS``.
    """

    def __init__(self, shape: ModuleShape) -> None:
        super().__init__()
        self.shape = shape
        self.adapters = nn.ModuleList(BottleneckAdapter(shape.width, shape.rank) for _ in KINDS)
        self.absorber = SpatialGuidedAbsorber(shape.width, shape.rank, shape.num_bands, shape.values)
        self.extent = nn.Parameter(torch.zeros(2, shape.width))
        self.type_embedding = nn.Parameter(torch.zeros(len(KINDS), shape.width))
        self.gates = nn.Parameter(torch.ones(len(KINDS)))

    def forward(self, stretches: Stretches) -> Tensor:
        """Return the tokens of the stretches, (S, C), of which the main channels change. Raises ``ValueError`` if the
        trends were not kept."""
        if not stretches.has_trends:
            raise ValueError("trends: expected (S, D), got none: they were not kept")
        device = self.gates.device
        slots, places = find_neighbours(stretches.boxes, stretches.trends)
        main, trends = (
            rows.to(device, torch.float32) for rows in (stretches.latents[:, : stretches.width], stretches.trends)
        )
        main = self.absorber(main, trends, _trend_scale(stretches).to(device), slots.to(device), places.to(device))
        main = main + _extents(stretches.boxes).to(device) @ self.extent
        kind = (stretches.kind == TOKEN_KINDS.index(KINDS[SUMMARY])).to(device, torch.int64)
        is_summary = kind[:, None] == SUMMARY
        main = torch.where(is_summary, self.adapters[SUMMARY](main), self.adapters[DYNAMIC](main))
        main = (main + self.type_embedding[kind]) * self.gates[kind][:, None]
        return with_main(stretches.latents, main)


def _extents(boxes: Tensor) -> Tensor:
    """Frames and cells of each box, as powers of two: (S, 2) float32."""
    sides = (boxes[:, 1::2] - boxes[:, ::2]).to(torch.float32)
    return torch.stack([sides[:, 0], sides[:, 1] * sides[:, 2]], dim=1).log2()


def find_neighbours(boxes: Tensor, trends: Tensor, most: int = MOST_NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Return which stretches each one listens to, and where those lie: two (S, ``most``) int64.

    They are those, itself among them, with some of their time and cells within its own time and within one cell of its
    own cells (the paper's 3x3 cells, around a box): of these the ``most`` whose trends have the most energy there.

    ``boxes``: (S, 6). ``trends``: (S, D). ``most``: bounds the cost. The first result holds rows, -1 where there are
    fewer; the second the place of each, ``offset * NUM_ORDERS + order``, with one of 3x3 offsets in space and one of
    ``NUM_ORDERS`` orders in time.
    """
    count = boxes.shape[0]
    edges, energy = boxes.to(torch.float32), trends.to(torch.float32).square().sum(1)
    slots, places = boxes.new_full((count, most), -1), boxes.new_zeros(count, most)
    for rows in torch.arange(count).split(QUERIES_AT_ONCE):
        own = edges[rows]
        may_overlap = (energy > 0) & (edges[:, 0] < own[:, 1].max()) & (edges[:, 1] > own[:, 0].min())
        others = may_overlap.nonzero().squeeze(1)
        heard = energy[others] * _overlap(own, edges[others])
        best, index = heard.topk(min(most, others.shape[0]), dim=1)
        near = others[index]
        slots[rows, : near.shape[1]] = torch.where(best > 0, near, -1)
        places[rows, : near.shape[1]] = _places(own, edges[near])
    return slots, places


def _overlap(own: Tensor, others: Tensor) -> Tensor:
    """Latents of each other box that lie around each own one, (q, c) float32. Boxes are (q, 6) and (c, 6)."""
    sides = []
    for axis, reach in enumerate((0, NEIGHBOURHOOD // 2, NEIGHBOURHOOD // 2)):
        low, high = 2 * axis, 2 * axis + 1
        start = torch.maximum(own[:, None, low] - reach, others[None, :, low])
        stop = torch.minimum(own[:, None, high] + reach, others[None, :, high])
        sides.append((stop - start).clamp(min=0))
    return sides[0] * sides[1] * sides[2]


def _places(own: Tensor, near: Tensor) -> Tensor:
    """Where each of the near boxes, (q, k, 6), lies, seen from each own one, (q, 6): (q, k) int64."""
    own = own[:, None]
    order = (near[..., :2].sum(-1) - own[..., :2].sum(-1)).sign()
    rows, columns = (
        (near[..., low] >= own[..., low + 1]).float() - (near[..., low + 1] <= own[..., low]).float() for low in (2, 4)
    )
    offset = (rows + 1) * NEIGHBOURHOOD + columns + 1
    return (offset * NUM_ORDERS + order + 1).to(torch.int64)


def _trend_scale(stretches: Stretches) -> Tensor:
    """What turns trends into units of a token, (S,) float32: one number for the clip, so that what moves little stays small
    beside what moves much. The unit is the root mean square of a channel of what the stretches stand for."""
    sizes = box_sizes(stretches.boxes).to(torch.float32)
    squares = stretches.latents[:, : stretches.width].to(torch.float32).square().mean(1)
    unit = ((squares * sizes).sum() / sizes.sum()).sqrt()
    return (1.0 / unit.clamp(min=SMALLEST_UNIT)).expand(len(stretches))
