"""The Spatial-Guided Absorber: local masked cross-attention from tokens to the coefficients around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEIGHBOURHOOD = 3  # paper section 3.4 gives a spatial neighbourhood mask; 3x3 cells is ours
QUERIES_AT_ONCE = 1024  # bounds the memory of the gathered keys


def neighbour_table(
    gop: Tensor, cell: Tensor, band: Tensor, num_gops: int, pooled_grid: tuple[int, int], num_bands: int
) -> Tensor:
    """Return which coefficient stands in each (gop, cell, band), -1 where none was kept: (G, P, K) int64."""
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
    """Adds to each token what the kept coefficients of its GoP say within its 3x3 cells (paper section 3.4, H.2).

    ``output = token + gamma * CrossAttention(token; coefficients, band and offset embeddings)``. ``gamma`` starts at
    zero, so before training tokens pass unchanged (ours). ``dim`` is the width of queries and keys.
    """

    def __init__(self, width: int, dim: int, num_bands: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.value = nn.Linear(width, dim, bias=False)
        self.output = nn.Linear(dim, width, bias=False)
        self.band = nn.Parameter(torch.zeros(num_bands, dim))
        self.offset = nn.Parameter(torch.zeros(NEIGHBOURHOOD**2, dim))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, coefficients: Tensor, slots: Tensor) -> Tensor:
        """``tokens``: (n, D); ``coefficients``: (m, D); ``slots``: (n, 9, K) row of each neighbour, -1 = masked.

        Returns (n, D). A token without any neighbour passes unchanged.
        """
        return tokens + self.attend(tokens, coefficients, slots)[0]

    def attend(self, tokens: Tensor, coefficients: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to each token, (n, D), and the attention it came by, (n, 9, K); as ``forward``.

        The weights of a token sum to 1 over its kept neighbours and are 0 where masked; all are 0 without a neighbour.
        """
        keyed = self.key_norm(coefficients)
        keys, values = self.key(keyed), self.value(keyed)
        queries = self.query(self.query_norm(tokens))
        chunks = [
            self._attend(q, keys, values, s)
            for q, s in zip(queries.split(QUERIES_AT_ONCE), slots.split(QUERIES_AT_ONCE), strict=True)
        ]
        added: Tensor = self.gamma * self.output(torch.cat([heard for heard, _ in chunks]))
        return added, torch.cat([weights for _, weights in chunks]).view(slots.shape)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        num_bands = slots.shape[2]
        place = self.offset[:, None, :] + self.band[None, :num_bands, :]
        rows = slots.clamp(min=0).flatten(1)
        near = keys[rows] + place.flatten(0, 1)
        scores = torch.einsum("nd,nsd->ns", queries, near) / queries.shape[-1] ** 0.5
        masked = slots.flatten(1) < 0
        weights = scores.masked_fill(masked, -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("ns,nsd->nd", weights, values[rows]), weights
