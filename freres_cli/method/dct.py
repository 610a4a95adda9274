"""Orthonormal DCT-II along time, and its basis read at fractional instants."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_basis_at(instants: Tensor, length: int, bands: Tensor) -> Tensor:
    """Return the orthonormal DCT-II basis functions of ``bands`` at ``instants``.

    ``instants``: (...,) in samples, 0 is the centre of the first of ``length`` samples; may be fractional.
    ``bands``: (...,), broadcast against ``instants``; 0 is DC. At whole instants these are the rows of the orthonormal
    DCT matrix, between them its smooth continuation (method section 5, ours).
    """
    scale = torch.where(bands == 0, math.sqrt(1.0 / length), math.sqrt(2.0 / length)).to(torch.float64)
    phase = math.pi * bands.to(torch.float64) * (2.0 * instants.to(torch.float64) + 1.0) / (2.0 * length)
    return (scale * torch.cos(phase)).to(torch.float32)


def dct_basis(length: int, num_coefficients: int, device: torch.device | None = None) -> Tensor:
    """Return the first rows of the orthonormal DCT-II matrix: (num_coefficients, length), float32."""
    instants = torch.arange(length, device=device)
    bands = torch.arange(num_coefficients, device=device)
    return dct_basis_at(instants[None, :], length, bands[:, None])


def temporal_dct(trajectory: Tensor, num_coefficients: int) -> Tensor:
    """Return the first DCT-II coefficients of a trajectory along its first axis (paper section 3.3).

    ``trajectory``: (L, ...). Returns (K, ...) float32, ``K = num_coefficients <= L``. With ``K = L`` the transform
    keeps all energy and ``inverse_temporal_dct`` gives the trajectory back.
    """
    length = trajectory.shape[0]
    if not 1 <= num_coefficients <= length:
        raise ValueError(f"num_coefficients: expected 1..{length}, got {num_coefficients}")
    basis = dct_basis(length, num_coefficients, trajectory.device)
    return (basis @ trajectory.to(torch.float32).reshape(length, -1)).reshape(num_coefficients, *trajectory.shape[1:])


def inverse_temporal_dct(coefficients: Tensor, length: int) -> Tensor:
    """Return the trajectory (length, ...) whose first coefficients are ``coefficients`` (K, ...), the others zero."""
    num_coefficients = coefficients.shape[0]
    basis = dct_basis(length, num_coefficients, coefficients.device)
    flat = coefficients.to(torch.float32).reshape(num_coefficients, -1)
    return (basis.T @ flat).reshape(length, *coefficients.shape[1:])


def null_energy_share(length: int, num_coefficients: int) -> float:
    """Return the share of residual energy that the first coefficients hold when frames are independent noise.

    Independent frames minus one shared anchor have covariance ``I + 11'`` along time: DC holds ``1 + L`` of ``2 L``
    parts, every other band one. Any spectrum is shown beside this (method section 12, ours): only the excess says
    anything.
    """
    if length < 1:
        return 1.0
    return min(1.0, (length + min(num_coefficients, length)) / (2.0 * length))
