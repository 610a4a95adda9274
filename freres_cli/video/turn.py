"""How a player turns a picture before it shows it: quarter turns, mirrored or not, from the file's display matrix."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type

# Of the nine numbers of a display matrix, in its file's order: [a b u; c d v; x y w], p' = a p + c q, q' = b p + d q.
MATRIX = struct.Struct("=9i")
ROUNDING = 1e-3  # of sines and cosines that were written as fractions of 65536


@dataclass(frozen=True)
class Turn:
    """``rotation_deg``: 0, 90, 180 or 270 counterclockwise, after left and right are swapped if ``is_mirrored``.
    ``is_exact``: whether that is all that the file asks for."""

    rotation_deg: int = 0
    is_mirrored: bool = False
    is_exact: bool = True

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Return a picture (height, width, 3) as a player shows it."""
        return np.rot90(picture[:, ::-1] if self.is_mirrored else picture, self.rotation_deg // 90)


def read_turn(frame: av.VideoFrame) -> Turn:
    """Return how a decoded frame is to be turned. A matrix that turns nothing upright counts as none."""
    try:
        data = bytes(cast(Mapping[Type, SideData], frame.side_data)[Type.DISPLAYMATRIX])
        a, b, _, c, d, *_ = MATRIX.unpack(data)
    except (KeyError, struct.error):
        return Turn()
    size = np.hypot(a, b) or 1.0
    is_mirrored = a * d - b * c < 0
    # Mirrored first: M = R F with F = diag(-1, 1), so R = M F, whose first column is that of M, negated.
    cos, sin = (-a / size, -b / size) if is_mirrored else (a / size, b / size)
    # Screen rows grow downwards, so a positive sine turns clockwise.
    degrees = float(np.degrees(np.arctan2(-sin, cos)))
    rotation = round(degrees / 90) * 90
    is_exact = abs(degrees - rotation) < np.degrees(ROUNDING)
    return Turn(rotation % 360, is_mirrored, bool(is_exact))
