"""The orthonormal DCT-II basis along time, at whole and fractional instants."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIE = 1e-6  # waves are float32


def dct_basis_at(instants: Tensor, length: int, bands: Tensor) -> Tensor:
    """Return the orthonormal DCT-II basis functions of ``bands`` at ``instants``.

    ``instants``: (...,) in samples, may be fractional; 0 is the centre of the first of ``length`` samples. ``bands``:
    (...,), broadcast against ``instants``; 0 is DC. At whole instants these are the rows of the orthonormal DCT matrix
    (paper section 3.3), in between its smooth continuation (method section 5, ours).
    """
    scale = torch.where(bands == 0, math.sqrt(1.0 / length), math.sqrt(2.0 / length)).to(torch.float64)
    phase = math.pi * bands.to(torch.float64) * (2.0 * instants.to(torch.float64) + 1.0) / (2.0 * length)
    return (scale * torch.cos(phase)).to(torch.float32)


def dct_basis(length: int, num_coefficients: int, device: torch.device | None = None) -> Tensor:
    """Return the first rows of the orthonormal DCT-II matrix: (num_coefficients, length), float32."""
    instants = torch.arange(length, device=device)
    bands = torch.arange(num_coefficients, device=device)
    return dct_basis_at(instants[None, :], length, bands[:, None])


def choose_instants(bands: Tensor) -> Tensor:
    """Return which m of n evenly spaced instants show the waves of m ``bands``: (m,) int64, increasing.

    ``bands``: (m,) int64, increasing; n is the highest of them plus one. Ours, because m evenly spaced instants can all
    lie where a wave is zero: in the middle, band 1 adds nothing. At n instants the waves are rows of an orthogonal matrix,
    so m of the n give an m x m matrix of full rank. Each instant is taken where most of the waves is not yet told by those
    taken before (QR with column pivoting). Ties take the later instant, farther from the anchor. If no band below the
    highest is missing, all n are taken.
    """
    count = int(bands[-1]) + 1
    left = dct_basis_at(torch.arange(count)[None, :], count, bands[:, None]).to(torch.float64)
    taken: list[int] = []
    for _ in range(bands.shape[0]):
        size = left.square().sum(0)
        best = int((size > size.max() - TIE).nonzero()[-1])
        taken.append(best)
        direction = left[:, best] / size[best].sqrt()
        left = left - direction[:, None] * (direction @ left)[None, :]
    return torch.tensor(sorted(taken))


def null_energy_share(length: int, num_coefficients: int) -> float:
    """Return the share of residual energy in the first coefficients when frames are independent noise.

    Independent frames minus one shared anchor have covariance ``I + 11'`` along time: of ``2 L`` parts, DC holds
    ``1 + L`` and every other band one. Spectra are shown beside this null (method section 12, ours): only the excess
    over it means anything.
    """
    if length < 1:
        return 1.0
    return min(1.0, (length + min(num_coefficients, length)) / (2.0 * length))
