"""The nouns handed from stage to stage: video -> Frames -> Latents -> Tracks -> VideoTokens -> Answer.

Each is frozen and checks its own shapes. Axis letters are those of the method: ``T`` sampled frames, ``H W`` token
grid of a frame, ``C`` stored channels of a visual token, ``D <= C`` its width in the language model (the other channels
are DeepStack rows where a family has them), ``G`` GoPs, ``P = g*g`` pooled cells, ``S`` visual tokens given to the LM.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself, after rotation and sample aspect ratio.

    ``None`` means that the file does not say. ``num_packets`` and ``duration_s`` come from reading all packets, not
    from the header, which may be wrong. ``width_px height_px`` are what a viewer shows: rotated, with square pixels.
    """

    path: str
    container: str
    codec: str
    width_px: int
    height_px: int
    coded_width_px: int
    coded_height_px: int
    rotation_deg: int
    sample_aspect_ratio: float
    source_fps: float | None
    num_packets: int
    start_s: float
    duration_s: float
    stream_index: int
    num_video_streams: int
    has_timestamps: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frames:
    """A batch of consecutive sampled frames.

    ``pixels``: (n, height, width, 3) uint8 RGB. ``pts_seconds``: presentation time of each, in seconds of the file's
    own clock. ``source_index``: ordinal of the frame in the file, in display order, from 0. A source frame that is on
    screen at several sampled instants is given once for each of them, with the same ``source_index``.
    """

    pixels: Tensor
    pts_seconds: tuple[float, ...]
    source_index: tuple[int, ...]

    def __post_init__(self) -> None:
        n = self.pixels.shape[0]
        _require(
            self.pixels.ndim == 4 and self.pixels.shape[-1] == 3,
            f"pixels: expected (n, h, w, 3), got {tuple(self.pixels.shape)}",
        )
        _require(len(self.pts_seconds) == n and len(self.source_index) == n, "one time and one index for each frame")


@dataclass(frozen=True)
class FrameSize:
    """Pixels a frame is resized to, and the token grid they become."""

    height_px: int
    width_px: int
    grid_h: int
    grid_w: int

    @property
    def num_tokens(self) -> int:
        return self.grid_h * self.grid_w

    def fit(self, width_px: int, height_px: int) -> str:
        """How a frame of this shape goes in: ``exact``, its aspect ratio kept to within one token, or ``squeezed``."""
        aspect = width_px / height_px
        return "exact" if abs(self.grid_w - aspect * self.grid_h) < max(1.0, aspect) else "squeezed"


TOKEN_KINDS = ("anchor", "dynamic", "static", "summary")
GOP_STARTS = ("uniform", "event", "demoted")
# Columns of the GoP table that hold whole numbers, and columns of any table that hold more than one number a row.
GOP_COUNTS = ("anchor_frame", "num_residuals", "num_bins", "bin_frames", "start")
WIDE_COLUMNS = ("latents", "values", "base", "segments", "band_energy", "segment_energy")


@dataclass(frozen=True)
class Tracks:
    """What compression keeps, before any adapter; each kind is ordered by importance, so a prefix is a smaller clip.

    ``width``: D; ``grid``: (T, H, W); ``pooled_grid``: cells (rows, columns); ``frame_seconds``: (T,) float64.

    GoP table, G rows: ``gop_anchor_frame``, ``gop_num_residuals`` (L), ``gop_num_bins``, ``gop_bin_frames``,
    ``gop_start`` (index into ``GOP_STARTS``), ``gop_event_distance``, ``gop_residual_energy`` (all tokens),
    ``gop_pooled_energy`` (cells), ``gop_band_energy`` (G, B) of the first bands, ``gop_segment_energy`` (G, 8) of
    eighths of the GoP.

    Anchor tokens ``anchor_latents`` (n, C) with ``anchor_gop``, ``anchor_cell`` (raster index in the grid).
    Coefficients ``coefficient_values`` (n, C) with ``_gop _cell _band _energy`` and ``_segments`` (n, 8), the inner
    product with the residual in each eighth. ``base_latents`` (n, C) with ``base_gop base_cell``: pooled anchor of
    every cell that kept a coefficient. ``static_latents`` (n, C) with ``static_gop static_cell``: time means.
    ``summary_base`` (n, C) and ``summary_spectrum`` (n, K, C) with ``summary_gop``: means over the cells.
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
        _require(min(t, h, w, rows, columns, self.width) >= 1, "grid, pooled grid and width: expected at least 1")
        _require(
            tuple(self.frame_seconds.shape) == (t,),
            f"frame_seconds: expected ({t},), got {tuple(self.frame_seconds.shape)}",
        )
        _require(rows <= h and columns <= w, "pooled_grid: expected no more cells than the grid has tokens")
        self._check_shapes()
        self._check_gops()

    def _check_shapes(self) -> None:
        """Every column has the type, the rows and the range that its name promises."""
        _, h, w = self.grid
        num_gops, cells = self.gop_anchor_frame.shape[0], self.pooled_grid[0] * self.pooled_grid[1]
        channels = self.anchor_latents.shape[-1]
        for name, tensor in self.tensors().items():
            kind, _, column = name.partition("_")
            is_real = column not in ("gop", "cell", "band") and not (kind == "gop" and column in GOP_COUNTS)
            _require(
                tensor.is_floating_point() == is_real, f"{name}: expected {'real' if is_real else 'whole'} numbers"
            )
            expected = {"frame": self.grid[0], "gop": num_gops}.get(kind)
            expected = getattr(self, f"{kind}_gop").shape[0] if expected is None else expected
            ndim = 3 if column == "spectrum" else 2 if column in WIDE_COLUMNS else 1
            shape = tuple(tensor.shape)
            _require(
                len(shape) == ndim and shape[0] == expected,
                f"{name}: expected {expected} rows in {ndim}-D, got {shape}",
            )
            if column in ("segments", "band_energy", "segment_energy"):
                _require(shape[1] == 8, f"{name}: expected 8 columns, got {shape[1]}")
            elif ndim > 1:
                _require(
                    shape[-1] == channels and channels % self.width == 0 and channels > 0,
                    f"{name}: expected {channels} channels, a multiple of {self.width}",
                )
            elif not is_real and kind != "gop" and tensor.numel():
                limit = {"gop": num_gops, "cell": h * w if kind == "anchor" else cells, "band": 1 << 16}[column]
                inside = int(tensor.min()) >= 0 and int(tensor.max()) < limit
                _require(inside, f"{name}: expected 0..{limit - 1}")

    def _check_gops(self) -> None:
        """GoPs follow one another inside the clip, and what the coefficients need of them is there."""
        frame, length = self.gop_anchor_frame, self.gop_num_residuals
        bins, width = self.gop_num_bins, self.gop_bin_frames
        _require(frame.shape[0] >= 1 and int(frame.min()) >= 0, "gop_anchor_frame: expected 0 or more")
        _require(bool((frame.diff() > 0).all()), "gop_anchor_frame: expected rising frames")
        _require(int(length.min()) >= 0, "gop_num_residuals: expected 0 or more")
        _require(
            int((frame + length).max()) < self.grid[0], f"gop_num_residuals: expected to end before {self.grid[0]}"
        )
        covered = (bins >= 0) & (bins <= length) & (width >= 1) & (width <= self.grid[0]) & (bins * width >= length)
        _require(bool(covered.all()), "gop_num_bins: expected bins that cover the residual frames")
        starts = self.gop_start
        _require(int(starts.min()) >= 0 and int(starts.max()) < len(GOP_STARTS), "gop_start: expected 0..2")
        within = self.coefficient_band < bins[self.coefficient_gop]
        _require(bool(within.all()), "coefficient_band: expected less than the bins of its GoP")
        cells = self.pooled_grid[0] * self.pooled_grid[1]
        base = self.base_gop * cells + self.base_cell
        _require(bool((base.diff() > 0).all()), "base_cell: expected rows by GoP, then cell")
        needed = self.coefficient_gop * cells + self.coefficient_cell
        places = needed * (1 << 16) + self.coefficient_band
        _require(places.unique().shape == places.shape, "coefficient_band: expected each coefficient once")
        _require(
            set(needed.tolist()) <= set(base.tolist()), "base_latents: expected one for each cell with coefficients"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("width", "grid", "pooled_grid")}

    def without_deep_rows(self) -> Tracks:
        """Return the same tracks with the first D channels of every latent only, the rows of DeepStack left out."""
        latents = [name for name in self.tensors() if name.endswith(("_latents", "_values", "_base", "_spectrum"))]
        return replace(self, **{name: getattr(self, name)[..., : self.width].contiguous() for name in latents})

    def num_tokens_by_kind(self) -> dict[str, int]:
        """Return how many tokens of each kind these tracks give, whatever the variant."""
        counts = (self.anchor_gop, self.coefficient_gop, self.static_gop, self.summary_gop)
        return {kind: int(rows.shape[0]) for kind, rows in zip(TOKEN_KINDS, counts, strict=True)}


@dataclass(frozen=True)
class VideoTokens:
    """Visual tokens ready for the language model, in sequence order.

    ``latents``: (S, C). ``positions``: (S, 3) float32, (t, h, w) on the sampled-frame axis and the token grid; may be
    fractional. ``seconds``: (S,) float64. ``kind``: (S,) uint8 index into ``TOKEN_KINDS``. ``gop``: (S,) int64.
    ``energy``: (S,) float32, squared L2 norm of what the token carries (0 where it means nothing).
    ``grid``: (T, H, W) of the full-token sequence these tokens stand for. ``width``: D. ``frame_seconds``: (T,)
    float64, time of every sampled frame, also of those without a token: some families write it in the prompt.
    """

    latents: Tensor
    positions: Tensor
    seconds: Tensor
    kind: Tensor
    gop: Tensor
    energy: Tensor
    grid: tuple[int, int, int]
    width: int
    frame_seconds: Tensor

    def __post_init__(self) -> None:
        s = self.latents.shape[0]
        _require(
            self.latents.ndim == 2 and self.latents.shape[1] % self.width == 0,
            "latents: expected (S, C), C a multiple of D",
        )
        _require(
            tuple(self.positions.shape) == (s, 3), f"positions: expected ({s}, 3), got {tuple(self.positions.shape)}"
        )
        for name in ("seconds", "kind", "gop", "energy"):
            _require(tuple(getattr(self, name).shape) == (s,), f"{name}: expected ({s},)")
        _require(tuple(self.frame_seconds.shape) == self.grid[:1], f"frame_seconds: expected {self.grid[:1]}")

    def __len__(self) -> int:
        return int(self.latents.shape[0])


@dataclass(frozen=True)
class Answer:
    """What the language model said. ``choices`` maps each option to its probability where options were given."""

    text: str
    num_visual_tokens: int
    num_context_tokens: int
    num_new_tokens: int
    ttft_s: float
    tpot_s: float | None
    finish_reason: str
    choices: dict[str, float] | None = None
    notes: tuple[str, ...] = field(default=())
