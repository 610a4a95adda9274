"""The Spatial-Guided Absorber: local masked cross-attention from tokens to the coefficients, or trends, around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEIGHBOURHOOD = 3  # paper section 3.4 asks for a spatial neighbourhood mask; the 3x3 size is ours
QUERIES_AT_ONCE = 1024  # bounds the memory of the gathered keys
# What a coefficient brings once it is attended to: itself in units of a token (``amplitude``), or only its direction
# (``normed``). Adapters of earlier releases were trained with the second, which adds as much for a tremor as for a jump.
VALUES = ("normed", "amplitude")
NORMED, AMPLITUDE = VALUES


def neighbour_table(
    gop: Tensor, cell: Tensor, band: Tensor, num_gops: int, pooled_grid: tuple[int, int], num_bands: int
) -> Tensor:
    """Return the row of the coefficient kept at each (gop, cell, band), -1 where none was kept: (G, P, K) int64.

    ``gop``, ``cell``, ``band``: (m,) int64, the place of each coefficient. ``num_gops``, the cells of ``pooled_grid``
    (rows, columns) and ``num_bands`` are the sizes G, P and K of the table.
    """
    cells = pooled_grid[0] * pooled_grid[1]
    table = torch.full((num_gops, cells, num_bands), -1, dtype=torch.int64, device=gop.device)
    table[gop, cell, band] = torch.arange(gop.shape[0], device=gop.device)
    return table


def neighbours_of(cell: Tensor, pooled_grid: tuple[int, int]) -> Tensor:
    """Return the 3x3 cells around each cell in raster order, -1 outside the grid: (n, 9) int64."""
    rows, columns = pooled_grid
    reach = torch.arange(NEIGHBOURHOOD, device=cell.device) - NEIGHBOURHOOD // 2
    h = (cell // columns)[:, None, None] + reach[:, None]
    w = (cell % columns)[:, None, None] + reach[None, :]
    inside = (h >= 0) & (h < rows) & (w >= 0) & (w < columns)
    return torch.where(inside, h * columns + w, -1).flatten(1)


class SpatialGuidedAbsorber(nn.Module):
    """Adds to each token what it reads from the kept coefficients of its GoP in the 3x3 cells around it.

    ``output = token + gamma * CrossAttention(token; coefficients, band and offset embeddings)`` (paper section 3.4,
    H.2). ``gamma`` starts at zero, so untrained tokens pass through unchanged (ours). Keys are normed, so a token looks
    for a kind of motion. Values are not: what is added goes to zero with the motion, as in the paper's Figure 4 (the form
    is ours). In adaptive Fre-Res trends take the place of coefficients, and orders in time that of bands.

    ``width``: D. ``dim``: width of queries and keys. ``num_bands``: bands with an embedding. ``values``: one of
    ``VALUES``.
    """

    def __init__(self, width: int, dim: int, num_bands: int, values: str = AMPLITUDE) -> None:
        super().__init__()
        self.values = values
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.value = nn.Linear(width, dim, bias=False)
        self.output = nn.Linear(dim, width, bias=False)
        self.band = nn.Parameter(torch.zeros(num_bands, dim))
        self.offset = nn.Parameter(torch.zeros(NEIGHBOURHOOD**2, dim))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(
        self, tokens: Tensor, coefficients: Tensor, scale: Tensor, slots: Tensor, places: Tensor | None = None
    ) -> Tensor:
        """Return the tokens after absorption, (n, D). A token without neighbours passes through unchanged.

        ``tokens``: (n, D). ``coefficients``: (m, D). ``scale``: (m,), what makes each an amplitude in units of a token.
        ``slots``: (n, 9, K), row of each neighbouring coefficient, -1 = masked. ``places``: with ``slots`` (n, s), where each
        neighbour lies: (n, s), offset times the number of bands plus band.
        """
        return tokens + self.attend(tokens, coefficients, scale, slots, places)[0]

    def attend(
        self, tokens: Tensor, coefficients: Tensor, scale: Tensor, slots: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what is added to each token, (n, D), and its attention weights, in the shape of ``slots``.

        ``tokens``, ``coefficients``, ``scale``, ``slots``, ``places``: as in ``forward``. A token's weights sum to 1 over
        its kept neighbours and are 0 where masked. Without neighbours all are 0.
        """
        num_bands = self.band.shape[0] if places is not None else slots.shape[2]
        table = (self.offset[:, None, :] + self.band[None, :num_bands, :]).flatten(0, 1)
        keyed = self.key_norm(coefficients)
        keys = self.key(keyed)
        values = self.value(keyed if self.values == NORMED else coefficients * scale[:, None])
        queries = self.query(self.query_norm(tokens))
        chunks = []
        for part in torch.arange(slots.shape[0], device=slots.device).split(QUERIES_AT_ONCE):
            place = table if places is None else table[places[part]]
            chunks.append(self._attend(queries[part], keys, values, slots[part].flatten(1), place))
        added: Tensor = self.gamma * self.output(torch.cat([heard for heard, _ in chunks]))
        return added, torch.cat([weights for _, weights in chunks]).view(slots.shape)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = slots.clamp(min=0)
        near = keys[rows] + place
        scores = torch.einsum("nd,nsd->ns", queries, near) / queries.shape[-1] ** 0.5
        weights = scores.masked_fill(slots < 0, -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("ns,nsd->nd", weights, values[rows]), weights
