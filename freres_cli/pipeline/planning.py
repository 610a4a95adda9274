"""The plan for a video, made before any frame is encoded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from freres_cli.backbones.base import VisionEncoder
from freres_cli.baselines.declaration import Method
from freres_cli.baselines.registry import ADAPTIVE, FRE_RES, METHODS
from freres_cli.errors import UsageError
from freres_cli.method.budget import BudgetPlan, MethodSettings, plan_budget
from freres_cli.pipeline.models import ModelSource
from freres_cli.presets import FULL, REFERENCE, RESIDUAL_GRIDS, Settings, parse_grid
from freres_cli.records import FrameSize, VideoInfo
from freres_cli.video.packets import read_packet_table
from freres_cli.video.sampling import Sampling, num_sampled_frames, num_shown_frames

# The settings that change nothing in any other method.
FRE_RES_KEYS = sorted({*(knob.name for knob in fields(MethodSettings)), "residual_grid"} - {REFERENCE})
CPU, GPU = DECODERS = ("cpu", "gpu")
FULL_BUDGET = 2**31 - 1  # every token of the clip


@dataclass(frozen=True)
class CompressOptions:
    """How to compress videos, the same for all of them.

    ``model``: its tower encodes the frames. ``method``: a name in ``baselines.registry``. ``start_s``, ``end_s``: the
    part of each video to read, in seconds after its first frame. ``strict``: refuse a video if what is read of it is damaged.
    ``decode``: one of ``DECODERS``, what decodes files; the samples are the same.

    Raises ``UsageError`` if the settings name a quality and the method has none, for another decoder, and for one that
    cannot be strict.
    """

    model: ModelSource
    settings: Settings
    method: str
    start_s: float | None = None
    end_s: float | None = None
    strict: bool = False
    decode: str = CPU

    def __post_init__(self) -> None:
        if self.decode not in DECODERS:
            raise UsageError(f"decode: expected one of {', '.join(DECODERS)}, got {self.decode}")
        if self.strict and self.decode == GPU:
            raise UsageError(
                "strict: the GPU does not notice all damage inside a picture", "decode on the CPU, or be less strict"
            )
        if self.settings.quality is not None and not METHODS[self.method].has_quality:
            able = ", ".join(name for name, method in METHODS.items() if method.has_quality)
            raise UsageError(
                f"{self.settings.name_of('quality')}: method {self.method} has none: expected method {able}",
                f"choose method {able}, or name a budget in its place",
            )

    @property
    def decoding_gpu(self) -> int | None:
        """The number of the GPU that decodes, if one does: that of the model, or else the first."""
        return int(self.model.device.name.partition(":")[2] or 0) if self.decode == GPU else None

    def check_settings(self) -> None:
        """Refuse settings of Fre-Res that change nothing, because the method is another.

        They are those that were named, and those of a preset if nothing names a method: it was written when Fre-Res was the
        default. Raises ``UsageError``.
        """
        settings = self.settings
        is_python = "argument" in settings.sources.values()
        as_given = f'method="{FRE_RES}"' if is_python else f"--method {FRE_RES}"
        hint = f"choose that method as well: {as_given}" if settings.quality is None else "leave it out"
        refuse_lost_settings(settings, (self.method,), hint)
        own = [key for key in FRE_RES_KEYS if settings.sources[key] != "default"]
        if self.method != FRE_RES and settings.sources["method"] == "default" and own:
            raise UsageError(
                f"{settings.name_of(own[0])}: a setting of method {FRE_RES}; the preset names no method, and the default is "
                f"{self.method}",
                f"add a line to the preset: method: {FRE_RES}",
            )

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """The files that these options come from, as ``InputFiles`` takes them: the preset, and those of a local model."""
        return (("preset", self.settings.file), *self.model.files)

    @property
    def has_budget(self) -> bool:
        """Whether the settings' budget limits the tokens. It does not if the method keeps every token, or where the budget
        comes with the preset, or by default, and the quality was named apart from it: it was not meant for a clip with
        that quality."""
        settings, sources = self.settings, self.settings.sources
        is_meant = settings.is_named("budget_tokens") or sources["budget_tokens"] == sources["quality"]
        return METHODS[self.method].has_budget and (settings.quality is None or is_meant)

    @property
    def recorded_settings(self) -> Settings:
        """The settings, with the method that is used."""
        same = self.settings.method == self.method
        return self.settings if same else self.settings.with_values("flag", method=self.method)


@dataclass(frozen=True)
class CompressPlan:
    """The plan for one video.

    ``num_shown``: frames that the clip shows in the part to be read. ``num_frames``: frames that will be read.
    ``baseline_frames``: frames that the full-token model would read.
    ``budget``: how Fre-Res allocates the budget; ``None`` for other methods. ``quality``: share of the latents' energy to
    keep in as few tokens as possible; ``None`` to use the budget. ``residual_size``: that of frames that are no anchors, if
    it is smaller. ``line_levels``: how far a frame may lie off the line between two others and not be encoded, in levels
    of 255; 0 if every frame is encoded.
    """

    info: VideoInfo
    sampling: Sampling
    size: FrameSize
    num_shown: int
    num_frames: int
    baseline_frames: int
    budget_tokens: int
    budget: BudgetPlan | None
    quality: float | None = None
    residual_size: FrameSize | None = None
    line_levels: int = 0

    @property
    def full_tokens(self) -> int:
        """Tokens of the uncompressed clip."""
        return self.baseline_frames * self.size.num_tokens

    @property
    def is_lossless(self) -> bool:
        """Whether the budget fits every token, so all are kept unchanged."""
        if self.budget is not None:
            return self.budget.is_lossless
        return self.quality is None and self.budget_tokens >= self.full_tokens

    @property
    def most_tokens(self) -> int:
        """The most tokens that the bundle can hold. With a quality, and frames denser than the full-token model would read,
        that can be more than ``full_tokens``."""
        return min(self.budget_tokens, self.num_frames * self.size.num_tokens)

    @property
    def bound_tokens(self) -> int:
        """As many as the bundle will hold at most. Of Fre-Res, cuts may add tokens to what is expected."""
        if self.budget is None:
            return self.most_tokens
        expected = self.budget.expected.total
        return max(expected, self.most_tokens) if self.budget.max_events else expected


def refuse_lost_settings(settings: Settings, methods: Collection[str], hint: str) -> None:
    """Refuse named settings of Fre-Res if it is none of the methods: what they were meant to change would stay as it is.

    ``hint``: what to do. Raises ``UsageError``.
    """
    named = [key for key in FRE_RES_KEYS if settings.is_named(key)]
    if named and FRE_RES not in methods:
        raise UsageError(
            f"{settings.name_of(named[0])}: a setting of method {FRE_RES}, got method {', '.join(methods)}", hint
        )


def method_settings(settings: Settings) -> MethodSettings:
    """Return the settings that Fre-Res uses."""
    return MethodSettings(**{knob.name: getattr(settings, knob.name) for knob in fields(MethodSettings)})


def plan_compression(options: CompressOptions, encoder: VisionEncoder, info: VideoInfo) -> CompressPlan:
    """Choose frames and frame size, and allocate the budget. Raises ``UsageError``."""
    settings = options.settings
    size = encoder.frame_size(info.width_px, info.height_px, parse_grid(settings.grid), settings.tokens_per_frame)
    quality = settings.quality
    budget_tokens = settings.budget_tokens if options.has_budget else FULL_BUDGET
    sampling = choose_sampling(options, 1)
    num_shown = _count_shown(sampling, info)
    num_frames = baseline = num_sampled_frames(sampling, info.start_s, info.duration_s, num_shown)
    if options.method not in (FRE_RES, ADAPTIVE):
        budget_tokens = _budget_of(METHODS[options.method], options, baseline * size.num_tokens)
        return CompressPlan(info, sampling, size, num_shown, num_frames, baseline, budget_tokens, None)
    # A budget for every token of the named frames leaves nothing for a denser track to add.
    is_reduced = quality is not None or budget_tokens < baseline * size.num_tokens
    if is_reduced and settings.track_density > 1:
        sampling = choose_sampling(options, settings.track_density)
        num_frames = num_sampled_frames(sampling, info.start_s, info.duration_s, num_shown)
    if options.method == ADAPTIVE:
        levels = settings.line_levels if is_reduced else 0
        return CompressPlan(
            info, sampling, size, num_shown, num_frames, baseline, budget_tokens, None, quality, line_levels=levels
        )
    residual_size = _choose_residual_size(settings, encoder, info, size) if is_reduced else None
    residual_grid = None if residual_size is None else (residual_size.grid_h, residual_size.grid_w)
    grid = size.grid_h, size.grid_w
    budget = plan_budget(num_frames, grid, method_settings(settings), budget_tokens, residual_grid)
    frames = (num_shown, num_frames, baseline)
    return CompressPlan(info, sampling, size, *frames, budget_tokens, budget, None, residual_size)


def _choose_residual_size(
    settings: Settings, encoder: VisionEncoder, info: VideoInfo, size: FrameSize
) -> FrameSize | None:
    """Return the size of frames that are no anchors; ``None`` if it is that of anchors."""
    if settings.residual_grid == FULL:
        return None
    grid = parse_grid(settings.residual_grid, words=RESIDUAL_GRIDS)
    rows, columns = grid or ((size.grid_h + 1) // 2, (size.grid_w + 1) // 2)
    name = settings.name_of("residual_grid")
    if rows > size.grid_h or columns > size.grid_w:
        raise UsageError(
            f"{name}: expected at most the grid of the anchors, {size.grid_h}x{size.grid_w}, got {rows}x{columns}",
            "choose a smaller one, or half",
        )
    small = encoder.frame_size(info.width_px, info.height_px, (rows, columns))
    if (small.grid_h, small.grid_w) != (rows, columns):
        raise UsageError(
            f"{name}: {encoder.family} takes frames of one size only, {small.grid_h}x{small.grid_w} tokens",
            "leave it out, or choose a model that takes frames of any size",
        )
    return None if small == size else small


def _count_shown(sampling: Sampling, info: VideoInfo) -> int:
    if sampling.start_s is None and sampling.end_s is None:
        return info.num_packets
    # Of a file: decoded frames have no window.
    stamps_s = read_packet_table(info.path, info.stream_index, info.num_bytes).stamps_s
    return num_shown_frames(sampling, info.start_s, info.duration_s, stamps_s)


def _budget_of(method: Method, options: CompressOptions, full_tokens: int) -> int:
    """Return the budget of a method other than Fre-Res. A method without a budget keeps every token."""
    budget_tokens = options.settings.budget_tokens
    if method.has_budget:
        return budget_tokens
    if budget_tokens < full_tokens and options.settings.is_named("budget_tokens"):
        raise UsageError(
            f"{options.settings.name_of('budget_tokens')}: method {method.name} keeps all {full_tokens} tokens: expected at "
            f"least that many, got {budget_tokens}",
            "leave it out, or choose another method",
        )
    return max(budget_tokens, FULL_BUDGET)


def choose_sampling(options: CompressOptions, density: int) -> Sampling:
    """Return which frames to read: those that the settings name, or ``density`` times as many for the residual track."""
    settings = options.settings
    return Sampling(
        settings.sample,
        fps=settings.sample_fps * density if settings.sample == "fps" and settings.sample_fps else None,
        count=settings.sample_count * density if settings.sample == "count" and settings.sample_count else None,
        start_s=options.start_s,
        end_s=options.end_s,
    )
