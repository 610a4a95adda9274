"""What the page shows, in plain numbers, text and finished pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Heat:
    """A PNG with a pixel for each cell, and the value of its last colour."""

    png: bytes
    peak: float


@dataclass(frozen=True)
class Piece:
    """A GoP, or a part of the clip where a bundle has no GoPs.

    ``start_s``, ``end_s``: its time. ``label``: why it begins where it does. ``tokens_by_kind``: how many stand for it.
    ``kept``: share of its energy, if known. ``cells``: PNG of the tokens on each cell of the frame. ``thumbnail``: JPEG of
    its first frame, if there is a video.
    """

    start_s: float
    end_s: float
    label: str
    tokens_by_kind: Mapping[str, float]
    kept: float | None
    cells: bytes
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Absorbed:
    """Maps of the absorber: for each GoP its start in seconds, and PNGs of the energy and of what was absorbed. ``gamma``:
    the absorber's. ``num_gops``: of the clip."""

    maps: Sequence[tuple[float, bytes, bytes]]
    energy_peak: float
    absorbed_peak: float
    gamma: float
    num_gops: int


@dataclass(frozen=True)
class PageFacts:
    """Everything on the page.

    ``inspected``: the document of ``freres inspect``. ``name``: the bundle's. ``method``: that made it. ``pieces``: what
    is shown closely, ``piece_word`` what to call it, ``num_pieces`` how many there are. ``bounds_s``: start and end of all
    of them. ``anchors_s``, ``events_s``: for the time line. ``rows``, ``columns``: the tokens of each row and column of
    the frame over time; ``cell_peak``: the last colour of the pieces' cells. ``scale``: PNG of the colours, from none to
    the most. ``quality``: (tokens, share) at several budgets, or why it is not known. ``quality_of``: what the share is
    of. ``absorber``: its maps, or why there are none. ``thumbnails``: what to say about them. ``num_thumbnails``: how
    many there are.
    """

    inspected: Mapping[str, Any]
    name: str
    method: str
    pieces: Sequence[Piece]
    piece_word: str
    num_pieces: int
    bounds_s: Sequence[tuple[float, float]]
    anchors_s: Sequence[float]
    events_s: Sequence[float]
    rows: Heat
    columns: Heat
    cell_peak: float
    scale: bytes
    quality: Sequence[tuple[int, float]] | str
    quality_of: str
    absorber: Absorbed | str
    thumbnails: str
    num_thumbnails: int
