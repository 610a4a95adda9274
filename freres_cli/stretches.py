"""What adaptive Fre-Res keeps of a clip: stretches of time of a cell, or of several, each with its mean latent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from freres_cli.records import TOKEN_KINDS
from freres_cli.tracks import COLUMNS, LATENT, Column

if TYPE_CHECKING:
    from torch import Tensor


# The tensors of a bundle that holds stretches.
STRETCH_COLUMNS: dict[str, Column] = {
    "frame_seconds": COLUMNS["frame_seconds"],
    "latents": Column("stretch", LATENT, "mean of each stretch", ("C",)),
    "trends": Column("stretch", LATENT, "its trend; or no channels", ("D",)),
    "boxes": Column("stretch", "int64", "t0, t1, h0, h1, w0, w1; half-open", ("6",)),
    "merges": Column("merge", "int64", "two rows; S + i: result of merge i", ("2",)),
    "merge_loss": Column("merge", "float64", "squared error that the merge adds"),
    "energy": Column("clip", "float64", "of the clip; squared error so far"),
    "curve_tokens": Column("curve", "int64", "numbers of tokens, largest first"),
    "curve_loss": Column("curve", "float64", "squared error at that number"),
    "cut_frame": Column("cut", "int64", "first frame after each cut"),
}


@dataclass(frozen=True)
class Stretches:
    """S stretches in sequence order: by the middle of their time, then of their rows, then of their columns.

    ``latents``: (S, C), each the mean of what it stands for, or a latent as encoded if that is a single one. ``trends``:
    (S, D) how each changes over its time, see ``stretch_means.merge_trends``, or (S, 0) if that is not kept. ``boxes``:
    (S, 6) int64, the sampled frames and the cells each stands for, t0, t1, h0, h1, w0, w1, half-open; together they cover
    the clip once. ``merges``: (S-1, 2) int64, how merging goes on down to a single stretch: two rows, or S + i for the
    result of merge i. ``merge_loss``: (S-1,) float64, the squared error that each merge adds. ``energy``: (2,) float64,
    that of the clip's latents around their mean, and the squared error so far. ``curve_tokens`` (n,) int64,
    ``curve_loss`` (n,) float64: squared error at some numbers of tokens, largest first. ``cut_frame``: (m,) int64, first
    frame after each cut. ``grid``: (T, H, W). ``width``: D. ``frame_seconds``: (T,) float64.
    """

    width: int
    grid: tuple[int, int, int]
    frame_seconds: Tensor
    latents: Tensor
    trends: Tensor
    boxes: Tensor
    merges: Tensor
    merge_loss: Tensor
    energy: Tensor
    curve_tokens: Tensor
    curve_loss: Tensor
    cut_frame: Tensor

    def __post_init__(self) -> None:
        count = self.latents.shape[0]
        shapes = {
            "frame_seconds": (self.grid[0],),
            "latents": (count, self.latents.shape[-1]),
            "trends": (count, self.width if self.has_trends else 0),
            "boxes": (count, 6),
            "merges": (count - 1, 2),
            "merge_loss": (count - 1,),
            "energy": (2,),
            "curve_loss": tuple(self.curve_tokens.shape),
        }
        for name, shape in shapes.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise ValueError(f"{name}: expected {shape}, got {got}")
        if min(*self.grid, self.width, count) < 1:
            raise ValueError("grid, width, latents: expected at least 1")
        if self.latents.shape[1] % self.width or self.curve_tokens.ndim != 1 or self.cut_frame.ndim != 1:
            raise ValueError("latents, curve_tokens, cut_frame: expected (S, C), C a multiple of D, and lists")

    def __len__(self) -> int:
        return int(self.latents.shape[0])

    @property
    def has_trends(self) -> bool:
        """Whether the trends are kept: trained modules need them."""
        return self.trends.shape[-1] > 0

    @property
    def quality(self) -> float:
        """Share of the latents' energy that the stretches hold, in [0, 1]; 1 where there is none."""
        return self.quality_at(float(self.energy[1]))

    def quality_at(self, lost: float) -> float:
        """Return the share of the energy that is left when ``lost`` of it, a squared error, is gone."""
        return share_kept(lost, float(self.energy[0]))

    @property
    def kind(self) -> Tensor:
        """(S,) uint8 index into ``TOKEN_KINDS``: ``anchor`` if every latent of the clip is kept as encoded, else
        ``dynamic`` for a stretch of one cell, ``summary`` for one of several cells."""
        sides = self.boxes[:, 1::2] - self.boxes[:, ::2]
        if len(self) == math.prod(self.grid):
            return sides.new_zeros(len(self)).byte()
        is_single = sides[:, 1] * sides[:, 2] == 1
        return is_single.byte() * TOKEN_KINDS.index("dynamic") + (~is_single).byte() * TOKEN_KINDS.index("summary")

    def without_deep_rows(self) -> Stretches:
        """Return the same stretches with the main channels only."""
        return replace(self, latents=self.latents[:, : self.width].contiguous())


def share_kept(lost: float, energy: float) -> float:
    """Return the share of ``energy`` that is left when ``lost`` of it is gone, in [0, 1]; 1 where there is none."""
    return min(1.0, max(0.0, 1.0 - lost / energy)) if energy > 0 else 1.0
