"""The records passed from stage to stage: video -> Frames -> Latents -> Tracks -> VideoTokens -> Answer.

Each is frozen and checks its own shapes. Axis letters are those of the method: ``T`` sampled frames, ``H W`` token
grid of a frame, ``C`` stored channels of a visual token, ``D <= C`` its width in the language model (the other channels
are DeepStack rows, in families that have them), ``G`` GoPs, ``P = g*g`` pooled cells, ``S`` visual tokens given to the
LM.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


TIME_DIGITS = 6  # of a time in seconds that is the difference of two


def require(condition: bool, what: str) -> None:
    """Raise ``ValueError`` with ``what`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(what)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself, after rotation and sample aspect ratio.

    ``None`` means that the file does not say. ``num_packets`` and ``duration_s`` come from reading all packets, not
    from the header, which may be wrong. ``width_px`` and ``height_px`` are what a player shows: rotated, with square
    pixels. ``rotation_deg`` (0, 90, 180 or 270): how far a player turns the picture counterclockwise, after it has swapped
    left and right if ``is_mirrored``. ``num_bytes``: of the file, or of decoded frames.

    ``start_s``: when the first frame is shown, on the file's own clock. ``zero_s``: the time on that clock that all other
    times of a clip count from: ``start_s``, or 0 for frames that were given with times of their own.
    """

    path: str
    container: str | None
    codec: str | None
    width_px: int
    height_px: int
    coded_width_px: int
    coded_height_px: int
    rotation_deg: int
    is_mirrored: bool
    sample_aspect_ratio: float
    source_fps: float | None
    num_packets: int
    start_s: float
    zero_s: float
    duration_s: float
    stream_index: int
    num_video_streams: int
    has_timestamps: bool
    num_bytes: int
    notes: tuple[str, ...] = ()

    def count_s(self, time_s: float) -> float:
        """Return a time on the file's own clock as seconds after the first frame, to the microsecond."""
        # Rounded, or a frame a second after the first would be at 0.9999999 s.
        return round(time_s - self.zero_s, TIME_DIGITS) if self.zero_s else time_s


@dataclass(frozen=True)
class Frames:
    """A batch of consecutive sampled frames.

    ``pixels``: (n, height, width, 3) uint8 RGB. ``pts_seconds``: when each is shown, in seconds after the first
    frame of the file. ``source_index``: index of the frame in the file, in display order, from 0. A source frame that is on
    screen at several sampled instants appears once for each of them, with the same ``source_index``. ``picture_index``:
    ``source_index`` of the first frame that shows the same picture; equal indices mean equal ``pixels``.
    """

    pixels: Tensor
    pts_seconds: tuple[float, ...]
    source_index: tuple[int, ...]
    picture_index: tuple[int, ...]

    def __post_init__(self) -> None:
        n = self.pixels.shape[0]
        require(
            self.pixels.ndim == 4 and self.pixels.shape[-1] == 3,
            f"pixels: expected (n, h, w, 3), got {tuple(self.pixels.shape)}",
        )
        require(
            len(self.pts_seconds) == len(self.source_index) == len(self.picture_index) == n,
            "pts_seconds, source_index, picture_index: expected one for each frame",
        )


@dataclass(frozen=True)
class FrameSize:
    """The size a frame is resized to, and the token grid it becomes."""

    height_px: int
    width_px: int
    grid_h: int
    grid_w: int

    @property
    def num_tokens(self) -> int:
        return self.grid_h * self.grid_w

    def fit(self, width_px: int, height_px: int) -> str:
        """Return ``exact`` if a frame of this size keeps its aspect ratio to within one token, otherwise ``squeezed``."""
        aspect = width_px / height_px
        return "exact" if abs(self.grid_w - aspect * self.grid_h) < max(1.0, aspect) else "squeezed"


TOKEN_KINDS = ("anchor", "dynamic", "static", "summary")


def nearest_frames(t: Tensor, num_frames: int) -> Tensor:
    """Return the nearest of ``num_frames`` frames for positions on the frame axis: (S,) -> (S,) int64. Of a tie, the
    later frame."""
    return (t + 0.5).floor().long().clamp(0, num_frames - 1)


def are_in_order(positions: Tensor, may_coincide: bool) -> bool:
    """Return whether tokens at ``positions``, (S, 3), come by time, then row, then column. ``may_coincide``: two may be at
    the same place."""
    t, h, w = positions.diff(dim=0).unbind(1)
    is_later = (t > 0) | ((t == 0) & ((h > 0) | ((h == 0) & ((w > 0) | ((w == 0) & may_coincide)))))
    return bool(is_later.all())


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """Visual tokens ready for the language model, in sequence order.

    ``latents``: (S, C). ``positions``: (S, 3) float32, (t, h, w) on the sampled-frame axis and the token grid; may be
    fractional. ``seconds``: (S,) float64. ``kind``: (S,) uint8 index into ``TOKEN_KINDS``. ``gop``: (S,) int64.
    ``energy``: (S,) float32, squared L2 norm of what the token carries (0 where that is meaningless). ``grid``: (T, H, W)
    of the full sequence that these tokens stand for. ``width``: D. ``frame_seconds``: (T,) float64, time of every
    sampled frame, including those without a token: some families write it in the prompt.

    ``boxes``: (S, 6) int64, what each token stands for: [t0, t1, h0, h1, w0, w1), half-open, in sampled frames and cells
    of the grid; ``None`` if each token stands for its own cell at its own frame. ``stretches``: (S, 2) float32, where only
    the time that each token stands for is known, [from, to) on the frame axis. The language model sees neither, and bundles
    do not hold them.
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
    boxes: Tensor | None = None
    stretches: Tensor | None = None

    def __post_init__(self) -> None:
        s = self.latents.shape[0]
        require(
            self.latents.ndim == 2 and self.latents.shape[1] % self.width == 0,
            "latents: expected (S, C), C a multiple of D",
        )
        require(
            tuple(self.positions.shape) == (s, 3), f"positions: expected ({s}, 3), got {tuple(self.positions.shape)}"
        )
        for name in ("seconds", "kind", "gop", "energy"):
            require(tuple(getattr(self, name).shape) == (s,), f"{name}: expected ({s},)")
        require(tuple(self.frame_seconds.shape) == self.grid[:1], f"frame_seconds: expected {self.grid[:1]}")
        if self.boxes is not None:
            self._check_boxes(self.boxes)
        require(self.stretches is None or tuple(self.stretches.shape) == (s, 2), f"stretches: expected ({s}, 2)")

    @property
    def spans(self) -> Tensor | None:
        """The time that each token stands for, (S, 2) [from, to) on the frame axis; ``None`` if it is not known."""
        return self.stretches if self.boxes is None else self.boxes[:, :2]

    def _check_boxes(self, boxes: Tensor) -> None:
        s = self.latents.shape[0]
        require(tuple(boxes.shape) == (s, 6), f"boxes: expected ({s}, 6), got {tuple(boxes.shape)}")
        require(str(boxes.dtype) == "torch.int64", f"boxes: expected int64, got {boxes.dtype}")
        first, stop = boxes[:, 0::2], boxes[:, 1::2]
        inside = (first >= 0) & (first < stop) & (stop <= boxes.new_tensor(self.grid))
        require(bool(inside.all()), "boxes: expected at least one cell each, on the grid")

    def __len__(self) -> int:
        return int(self.latents.shape[0])

    def pick(self, keep: Tensor) -> VideoTokens:
        """Return some of the tokens, each unchanged. ``keep``: (n,) their indices, increasing."""
        return replace(
            self,
            latents=self.latents[keep],
            positions=self.positions[keep],
            seconds=self.seconds[keep],
            kind=self.kind[keep],
            gop=self.gop[keep],
            energy=self.energy[keep],
            boxes=None if self.boxes is None else self.boxes[keep],
            stretches=None if self.stretches is None else self.stretches[keep],
        )


@dataclass(frozen=True)
class Answer:
    """What the language model answered. ``choices``: the probability of each option, if options were given.

    ``ttft_s``: seconds from submission to the first token. ``tpot_s``: mean seconds per further token. Both are ``None``
    if several questions were answered together, and ``tpot_s`` also if there was no further token.
    """

    text: str
    num_visual_tokens: int
    num_context_tokens: int
    num_new_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    finish_reason: str
    choices: dict[str, float] | None = None
    notes: tuple[str, ...] = field(default=())
