"""The orthonormal DCT-II basis along time, at whole and fractional instants."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def null_energy_share(length: int, num_coefficients: int) -> float:
    """Return the share of residual energy in the first coefficients when frames are independent noise.

    Independent frames minus one shared anchor have covariance ``I + 11'`` along time: of ``2 L`` parts, DC holds
    ``1 + L`` and every other band one. Spectra are shown beside this null (method section 12, ours): only the excess
    over it means anything.
    """
    if length < 1:
        return 1.0
    return min(1.0, (length + min(num_coefficients, length)) / (2.0 * length))
