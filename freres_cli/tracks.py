"""Fre-Res tracks: what compression keeps of a clip, and the one table of its columns.

The checks here, the cutting of bundles, the removal of DeepStack rows and the tables in freres-bundle(5) all read
``COLUMNS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from freres_cli.records import TOKEN_KINDS, require

if TYPE_CHECKING:
    from torch import Tensor

GOP_STARTS = ("uniform", "event", "demoted")
NUM_SEGMENTS = 8  # lost energy is reported for each eighth of a GoP
NUM_REPORTED_BANDS = 8
MAX_BANDS = 1 << 16
MOST_WAVES = 128  # of the most time bins that the method makes; energies take memory for each band up to the highest
# A band from here on is no wave: IMPULSE + b is the residual itself in time bin b, for what lasts a moment (ours, because a
# spike has only K / L of its energy in K of L bands).
IMPULSE = 1 << 15
# Zero is what every bundle of schema version 1 or 2 did: energies of cells ignore their areas, and the tokens of a cell lie
# at evenly spaced instants. Today energies are weighted, and instants are those of ``dct.choose_instants``.
RECIPES = ("plain", "refined")
PLAIN, REFINED = range(len(RECIPES))
LATENT = "E"  # the dtype the frames were encoded in
LATENT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Column:
    """One tensor of the tracks.

    ``table``: the table that it is a column of. ``dtype``: name of a torch dtype, or ``LATENT``. ``text``: what it holds,
    for freres-bundle(5). ``shape``: the axes after the rows: ``C`` channels, ``K`` bands, or a number. ``limit``: upper
    bound of an index, excluded: ``G`` GoPs, ``N`` tokens of a frame, ``P`` cells, or a number.
    """

    table: str
    dtype: str
    text: str = ""
    shape: tuple[str, ...] = ()
    limit: str | None = None

    # A column that is added later needs no change in the readers of earlier schema versions: their bundles have zeros in
    # it. Choose its meaning so that zero is what they did.

    @property
    def is_latent(self) -> bool:
        return self.dtype == LATENT


# The fields of ``Tracks``, in order. Rows of ``frame`` and ``gop`` are in time order, rows of ``base`` by GoP and cell. The
# rows of every other table are ordered by importance, so a prefix of them is a smaller clip.
COLUMNS: dict[str, Column] = {
    "frame_seconds": Column("frame", "float64", "time of each frame read"),
    "gop_anchor_frame": Column("gop", "int64", "index of the anchor frame"),
    "gop_num_residuals": Column("gop", "int64", "residual frames, L"),
    "gop_num_bins": Column("gop", "int64", "time bins of the transform"),
    "gop_bin_frames": Column("gop", "int64", "frames in a bin"),
    "gop_start": Column("gop", "int64", "0 uniform, 1 event, 2 demoted", limit=str(len(GOP_STARTS))),
    "gop_event_distance": Column("gop", "float32", "distance to the frame before"),
    "gop_residual_energy": Column("gop", "float32", "residual energy over all tokens"),
    "gop_pooled_energy": Column("gop", "float32", "the same over cells"),
    "gop_band_energy": Column("gop", "float32", "of the first bands", (str(NUM_REPORTED_BANDS),)),
    "gop_segment_energy": Column("gop", "float32", "of segments", (str(NUM_SEGMENTS),)),
    "gop_recipe": Column("gop", "int64", "0 plain, 1 refined", limit=str(len(RECIPES))),
    "anchor_latents": Column("anchor", LATENT, "anchor tokens", ("C",)),
    "anchor_gop": Column("anchor", "int64", limit="G"),
    "anchor_cell": Column("anchor", "int64", "raster index in H x W", limit="N"),
    "coefficient_values": Column("coefficient", LATENT, "orthonormal DCT-II, or a residual", ("C",)),
    "coefficient_gop": Column("coefficient", "int64", limit="G"),
    "coefficient_cell": Column("coefficient", "int64", "raster index in P", limit="P"),
    "coefficient_band": Column("coefficient", "int64", "0 is DC; 32768 + b: impulse", limit=str(MAX_BANDS)),
    "coefficient_energy": Column("coefficient", "float32", "squared norm over D"),
    "coefficient_segments": Column("coefficient", "float32", "inner product with residual", (str(NUM_SEGMENTS),)),
    "base_latents": Column("base", LATENT, "pooled anchor of the cell", ("C",)),
    "base_gop": Column("base", "int64", limit="G"),
    "base_cell": Column("base", "int64", "raster index in P", limit="P"),
    "static_latents": Column("static", LATENT, "time means of calm cells", ("C",)),
    "static_gop": Column("static", "int64", limit="G"),
    "static_cell": Column("static", "int64", "raster index in P", limit="P"),
    "summary_base": Column("summary", LATENT, "mean of the pooled anchor", ("C",)),
    "summary_spectrum": Column("summary", LATENT, "mean of first coefficients", ("K", "C")),
    "summary_gop": Column("summary", "int64", limit="G"),
}
# The columns of a bundle that holds tokens; ``frame_seconds`` is as above.
TOKEN_COLUMNS: dict[str, Column] = {
    "frame_seconds": COLUMNS["frame_seconds"],
    "latents": Column("token", LATENT, "the visual tokens", ("C",)),
    "positions": Column("token", "float32", "t, h, w; may be fractional", ("3",)),
    "seconds": Column("token", "float64", "time of each token"),
    "kind": Column("token", "uint8", "0 anchor, 1 dynamic, 2 static, 3 summary", limit=str(len(TOKEN_KINDS))),
    "gop": Column("token", "int64", "group or frame, from 0", limit=str(2**63 - 1)),
    "energy": Column("token", "float32", "squared norm over D"),
}
# The tables whose rows are tokens, by token kind.
TABLE_OF_KIND = dict(zip(TOKEN_KINDS, ("anchor", "coefficient", "static", "summary"), strict=True))


@dataclass(frozen=True)
class Tracks:
    """What Fre-Res keeps of a clip, before any adapter.

    ``width``: D. ``grid``: (T, H, W). ``pooled_grid``: cells (rows, columns). Every other field is a column of
    ``COLUMNS``, with one row for each row of its table; the GoP table has G. ``gop_num_residuals`` is L. A GoP's energies
    are over all tokens (``residual``), over cells (``pooled``), of its first bands (G, 8) and of its eighths (G, 8).
    ``gop_recipe``: which rules made its numbers, an index into ``RECIPES``.

    ``anchor_cell`` is the raster index of an anchor token in the grid. Each coefficient has its GoP, cell, band, energy
    and ``coefficient_segments``, its inner product with the residual in each eighth. ``base_latents`` are the pooled
    anchors of all cells that kept a coefficient. ``static_latents`` are means over time; ``summary_base`` (n, C) and
    ``summary_spectrum`` (n, K, C) are means over the cells.

    Raises ``ValueError`` if columns contradict the table or each other.
    """

    width: int
    grid: tuple[int, int, int]
    pooled_grid: tuple[int, int]
    frame_seconds: Tensor
    gop_anchor_frame: Tensor
    gop_num_residuals: Tensor
    gop_num_bins: Tensor
    gop_bin_frames: Tensor
    gop_start: Tensor
    gop_event_distance: Tensor
    gop_residual_energy: Tensor
    gop_pooled_energy: Tensor
    gop_band_energy: Tensor
    gop_segment_energy: Tensor
    gop_recipe: Tensor
    anchor_latents: Tensor
    anchor_gop: Tensor
    anchor_cell: Tensor
    coefficient_values: Tensor
    coefficient_gop: Tensor
    coefficient_cell: Tensor
    coefficient_band: Tensor
    coefficient_energy: Tensor
    coefficient_segments: Tensor
    base_latents: Tensor
    base_gop: Tensor
    base_cell: Tensor
    static_latents: Tensor
    static_gop: Tensor
    static_cell: Tensor
    summary_base: Tensor
    summary_spectrum: Tensor
    summary_gop: Tensor

    def __post_init__(self) -> None:
        t, h, w = self.grid
        rows, columns = self.pooled_grid
        require(min(t, h, w, rows, columns, self.width) >= 1, "grid, pooled grid and width: expected at least 1")
        require(rows <= h and columns <= w, "pooled_grid: expected no more cells than the grid has tokens")
        for name, column in COLUMNS.items():
            self._check_column(name, column)
        self._check_gops()
        self._check_bases()

    @property
    def num_cells(self) -> int:
        """P, the cells of the pooled grid."""
        return self.pooled_grid[0] * self.pooled_grid[1]

    @property
    def is_impulse(self) -> Tensor:
        """Which rows of the coefficient table are impulses: (n,) bool."""
        return self.coefficient_band >= IMPULSE

    @property
    def num_bands(self) -> int:
        """The highest band kept plus one, 0 without any. Impulses have none."""
        waves = self.coefficient_band[~self.is_impulse]
        return int(waves.max()) + 1 if waves.numel() else 0

    def _check_column(self, name: str, column: Column) -> None:
        """A column has the dtype, shape and range that ``COLUMNS`` gives it."""
        tensor: Tensor = getattr(self, name)
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        allowed = LATENT_DTYPES if column.is_latent else (column.dtype,)
        require(dtype in allowed, f"{name}: expected {' or '.join(allowed)}, got {dtype}")
        num_rows = self.grid[0] if column.table == "frame" else self._num_rows(column.table)
        channels = self.anchor_latents.shape[-1]
        sizes = {"C": channels, "K": shape[1] if len(shape) > 1 else 0}
        expected = (num_rows, *(sizes[axis] if axis in sizes else int(axis) for axis in column.shape))
        require(shape == expected, f"{name}: expected shape {expected}, got {shape}")
        if column.is_latent:
            is_multiple = channels > 0 and channels % self.width == 0
            require(is_multiple, f"{name}: expected a multiple of {self.width} channels, got {channels}")
        if name.endswith("_energy"):
            require(not bool((tensor < 0).any()), f"{name}: expected 0 or more")
        if column.limit is not None and tensor.numel():
            limits = {"G": self._num_rows("gop"), "N": self.grid[1] * self.grid[2], "P": self.num_cells}
            limit = limits[column.limit] if column.limit in limits else int(column.limit)
            inside = int(tensor.min()) >= 0 and int(tensor.max()) < limit
            require(inside, f"{name}: expected 0..{limit - 1}")

    def _num_rows(self, table: str) -> int:
        first = self.gop_anchor_frame if table == "gop" else getattr(self, f"{table}_gop")
        return int(first.shape[0])

    def _check_gops(self) -> None:
        """GoPs follow one another within the clip, and their bins cover their residual frames."""
        frame, length = self.gop_anchor_frame, self.gop_num_residuals
        bins, bin_frames = self.gop_num_bins, self.gop_bin_frames
        require(frame.shape[0] >= 1 and int(frame.min()) >= 0, "gop_anchor_frame: expected 0 or more")
        require(bool((frame.diff() > 0).all()), "gop_anchor_frame: expected increasing frames")
        require(int(length.min()) >= 0, "gop_num_residuals: expected 0 or more")
        require(int((frame + length).max()) < self.grid[0], f"gop_num_residuals: expected to end before {self.grid[0]}")
        is_legal = (bins >= 0) & (bins <= length) & (bin_frames >= 1) & (bin_frames <= self.grid[0])
        covers = bins * bin_frames >= length
        require(bool((is_legal & covers).all()), "gop_num_bins: expected bins that cover the residual frames")
        within = self.coefficient_band % IMPULSE < bins[self.coefficient_gop]
        require(bool(within.all()), "coefficient_band: expected less than the bins of its GoP")
        require(self.num_bands <= MOST_WAVES, f"coefficient_band: expected 0..{MOST_WAVES - 1}, or an impulse")

    def _check_bases(self) -> None:
        """Every coefficient occurs once, and its cell has a base."""
        base = self.base_gop * self.num_cells + self.base_cell
        require(bool((base.diff() > 0).all()), "base_cell: expected rows by GoP, then cell")
        needed = self.coefficient_gop * self.num_cells + self.coefficient_cell
        places = needed * MAX_BANDS + self.coefficient_band
        require(places.unique().shape == places.shape, "coefficient_band: expected each coefficient once")
        require(
            set(needed.tolist()) <= set(base.tolist()), "base_latents: expected one for each cell with coefficients"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, in the order of ``COLUMNS``."""
        return {name: getattr(self, name) for name in COLUMNS}

    def without_deep_rows(self) -> Tracks:
        """Return the same tracks without DeepStack rows: only the first D channels of every latent."""
        latents = [name for name, column in COLUMNS.items() if column.is_latent]
        return replace(self, **{name: getattr(self, name)[..., : self.width].contiguous() for name in latents})

    def num_tokens_by_kind(self) -> dict[str, int]:
        """Return how many tokens of each kind these tracks give, whatever the variant."""
        return {kind: self._num_rows(table) for kind, table in TABLE_OF_KIND.items()}


def complete_columns(tensors: Mapping[str, Tensor], columns: Mapping[str, Column] = COLUMNS) -> dict[str, Tensor]:
    """Return the columns of an earlier release with zeros in those that were added since.

    ``tensors``: by name. ``columns``: those there are today. A new column may have no axis ``K``: how many bands there
    were is not known.
    """
    latents = tensors["anchor_latents"]
    dtypes = {str(tensor.dtype).removeprefix("torch."): tensor.dtype for tensor in tensors.values()}
    first = {"frame": "frame_seconds", "gop": "gop_anchor_frame"}
    complete = {}
    for name, column in columns.items():
        if name in tensors:
            complete[name] = tensors[name]
            continue
        num_rows = tensors[first.get(column.table, f"{column.table}_gop")].shape[0]
        shape = [num_rows, *(latents.shape[-1] if axis == "C" else int(axis) for axis in column.shape)]
        complete[name] = latents.new_zeros(shape, dtype=latents.dtype if column.is_latent else dtypes[column.dtype])
    return complete
