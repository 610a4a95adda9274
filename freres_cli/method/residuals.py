"""Spatial pooling of latents to cells, and the residual trajectory of one GoP in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Most time bins of a GoP. Up to this many residual frames the trajectory is exact; a longer GoP halves its time
# resolution, so an hour needs no more memory than a minute. Ours: with K << 128 the low coefficients of the binned
# trajectory differ from the exact ones by (pi K / 256)^2 / 6, less than 0.1 % at K = 5.
MAX_TIME_BINS = 128


def cell_edges(size: int, num_cells: int) -> list[int]:
    """Return the ``num_cells + 1`` edges that split ``size`` tokens into disjoint, nearly equal cells."""
    if not 1 <= num_cells <= size:
        raise ValueError(f"num_cells: expected 1..{size}, got {num_cells}")
    return [(i * size) // num_cells for i in range(num_cells + 1)]


def pool_to_cells(latents: Tensor, rows: int, columns: int) -> Tensor:
    """Return area means over the cells of the token grid (paper F.2; pooling is linear, so it comes before the DCT).

    ``latents``: (..., H, W, C). Returns (..., P, C) float32 in raster order, ``P = rows * columns``. With as many cells
    as tokens the latents are unchanged.
    """
    h_edges, w_edges = cell_edges(latents.shape[-3], rows), cell_edges(latents.shape[-2], columns)
    x = latents.to(torch.float32)
    x = torch.stack([x[..., a:b, :, :].sum(-3) for a, b in zip(h_edges, h_edges[1:], strict=False)], dim=-3)
    x = torch.stack([x[..., a:b, :].sum(-2) for a, b in zip(w_edges, w_edges[1:], strict=False)], dim=-2)
    return x.flatten(-3, -2) / cell_areas(latents.shape[-3], latents.shape[-2], rows, columns).to(x.device)[:, None]


def cell_areas(grid_h: int, grid_w: int, rows: int, columns: int) -> Tensor:
    """Return the number of tokens in each of ``rows`` x ``columns`` cells of a ``grid_h`` x ``grid_w`` grid: (P,) float32."""
    heights = torch.tensor(cell_edges(grid_h, rows), dtype=torch.float32).diff()
    widths = torch.tensor(cell_edges(grid_w, columns), dtype=torch.float32).diff()
    return (heights[:, None] * widths[None, :]).reshape(-1)


def cell_weights(grid_h: int, grid_w: int, rows: int, columns: int) -> Tensor:
    """Return the area of each cell over the mean area: (P,) float32, all one where cells are equal.

    Ours: a cell of twice the tokens stands for twice the energy, so energies of cells are weighted before they are compared
    or added. Arguments as in ``cell_areas``: ``grid_h``, ``grid_w``, ``rows``, ``columns``.
    """
    areas = cell_areas(grid_h, grid_w, rows, columns)
    return areas / areas.mean()


def cell_centres(grid_h: int, grid_w: int, rows: int, columns: int) -> Tensor:
    """Return the centre (h, w) of each of ``rows`` x ``columns`` cells on a ``grid_h`` x ``grid_w`` token grid.

    (P, 2) float32. A coordinate ends in one half where the cell spans an even number of tokens.
    """
    h = torch.tensor(cell_edges(grid_h, rows), dtype=torch.float32)
    w = torch.tensor(cell_edges(grid_w, columns), dtype=torch.float32)
    h_mid, w_mid = (h[:-1] + h[1:] - 1) / 2, (w[:-1] + w[1:] - 1) / 2
    return torch.stack(torch.meshgrid(h_mid, w_mid, indexing="ij"), dim=-1).reshape(-1, 2)


class ResidualTrajectory:
    """The pooled residuals of one GoP, in at most ``max_bins`` time bins of equal width.

    A bin holds the mean of ``bin_frames`` consecutive residual frames. ``bin_frames`` starts at 1 and doubles whenever
    the bins run out. Energies are summed frame by frame, so they stay exact.
    """

    def __init__(self, max_bins: int = MAX_TIME_BINS) -> None:
        self._max_bins = max_bins
        self._sums: list[Tensor] = []
        self._energies: list[Tensor] = []
        self._counts: list[int] = []
        self.bin_frames = 1
        self.num_frames = 0

    def append(self, residual: Tensor, energy: Tensor) -> None:
        """Add the next residual frame, (P, C) float32, and its energy over the main channels, () float64."""
        if self._counts and self._counts[-1] < self.bin_frames:
            self._sums[-1] = self._sums[-1] + residual
            self._energies[-1] = self._energies[-1] + energy
            self._counts[-1] += 1
        else:
            if len(self._sums) == self._max_bins:
                self._halve()
            self._sums.append(residual)
            self._energies.append(energy)
            self._counts.append(1)
        self.num_frames += 1

    def _halve(self) -> None:
        pairs = range(0, len(self._sums), 2)
        self._sums = [self._sums[i] + self._sums[i + 1] for i in pairs]
        self._energies = [self._energies[i] + self._energies[i + 1] for i in pairs]
        self._counts = [self._counts[i] + self._counts[i + 1] for i in pairs]
        self.bin_frames *= 2

    def bins(self) -> Tensor:
        """Return the mean residual of each bin: (B, P, C) float32."""
        return torch.stack([total / count for total, count in zip(self._sums, self._counts, strict=True)])

    def bin_counts(self) -> Tensor:
        """Return how many frames each bin holds: (B,) float32. The last may hold fewer than ``bin_frames``."""
        return torch.tensor(self._counts, dtype=torch.float32)

    def bin_energies(self) -> Tensor:
        """Return the exact pooled residual energy of the frames in each bin: (B,) float32."""
        return torch.stack(self._energies).to(torch.float32)

    def num_bins(self) -> int:
        return len(self._sums)
