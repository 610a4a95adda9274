"""A clip encoded once, from which every method makes its tokens at every budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel, VisionEncoder
from freres_cli.baselines.registry import ADAPTIVE, BLIND, FRE_RES, METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.content import Content
from freres_cli.errors import VideoError
from freres_cli.method.adaptive import MOST_STRETCHES, cut_stretches
from freres_cli.pipeline.adapters import AnyModules
from freres_cli.pipeline.between import LineStream
from freres_cli.pipeline.encoding import LatentStream, VideoSource, count_batch_frames
from freres_cli.pipeline.manifest import build_manifest
from freres_cli.pipeline.notes import describe_repeats
from freres_cli.pipeline.planning import FULL_BUDGET, CompressOptions, CompressPlan, plan_compression
from freres_cli.pipeline.prompt_text import read_prompt_text
from freres_cli.pipeline.reduction import LatentBatch, Reduction, reduce_latents
from freres_cli.pipeline.tokens import make_tokens
from freres_cli.presets import FULL
from freres_cli.records import FrameSize, VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks
from freres_cli.video.reading import DecodeReport
from freres_cli.video.sampling import Sampling


@dataclass(frozen=True)
class View:
    """The frames of one sampling: ``latents`` (T, H, W, C) on the CPU, the time of each in seconds, how decoding went, and
    how many pictures were encoded, if those between others were not."""

    latents: Tensor
    pts_seconds: tuple[float, ...]
    report: DecodeReport
    num_encoded: int | None = None

    def batches(self, num_frames: int, device: torch.device, small: View | None = None) -> Iterator[LatentBatch]:
        """Yield ``num_frames`` at a time, on ``device``. ``small``: the same frames on the grid of residual frames."""
        for start in range(0, len(self.pts_seconds), num_frames):
            part = slice(start, start + num_frames)
            latents = self.latents[part]
            if small is None:
                yield LatentBatch(self.pts_seconds[part], latents.to(device))
            else:
                given = small.latents[part].to(device)
                yield LatentBatch(self.pts_seconds[part], given, partial(_pick_rows, latents, device))


def _pick_rows(latents: Tensor, device: torch.device, rows: list[int]) -> Tensor:
    return latents[rows].to(device)


class EncodedClip:
    """The latents of a video, made as ``freres compress`` makes them, and kept for all methods.

    ``source``: the video. ``options``: how to read it; their method is ignored. ``encoder``: the tower. ``timer``: records
    the stages ``decode``, ``encode`` and ``compress``.

    No picture passes the tower twice. The frames that the settings name are read first. If ``track_density`` is
    above 1, both forms of Fre-Res read denser frames below the full budget, and the file is decoded a second time for them.
    """

    def __init__(
        self, source: VideoSource, options: CompressOptions, encoder: VisionEncoder, timer: StageTimer
    ) -> None:
        self._source, self._encoder, self._timer = source, encoder, timer
        self._options = replace(options, method=FRE_RES)
        # By the size of residual frames, None for that of anchors.
        self._latents: dict[FrameSize | None, LatentStream] = {}
        self._views: dict[tuple[Sampling, FrameSize | None, int], View] = {}
        self._merged: dict[tuple[Sampling, int, str, int], tuple[Reduction, float]] = {}
        plan = self._plan(FULL_BUDGET)
        self._baseline = self._view(plan)
        self._repeats = tuple(describe_repeats(plan))
        # By budget: frames that Fre-Res with two resolutions encodes at that of anchors as well.
        self._num_whole: dict[int, int] = {}

    @property
    def full_tokens(self) -> int:
        """Number of tokens of all frames that the settings name."""
        return self._baseline.latents.shape[:3].numel()

    @property
    def num_frames(self) -> int:
        """Number of frames that the settings name."""
        return len(self._baseline.pts_seconds)

    @property
    def latents(self) -> Tensor:
        """Latents of the frames that the settings name: (T, H, W, C), on the CPU."""
        return self._baseline.latents

    @property
    def pts_seconds(self) -> tuple[float, ...]:
        """Time of each of these frames, in seconds."""
        return self._baseline.pts_seconds

    @property
    def lost_s(self) -> float:
        """Seconds of the requested part that could not be decoded: the most, if the file was decoded more than once."""
        return max(view.report.lost_s for view in self._views.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the file, and how decoding went: the notes of ``freres compress``."""
        found = [note for view in self._views.values() for note in view.report.notes]
        return tuple(dict.fromkeys((*self._source.info.notes, *self._repeats, *found, *self._source.describe_change())))

    def count_frames(self, method: str, budget_tokens: int) -> tuple[int, int]:
        """Return how many frames the tokens of a method are made from, and how many tokens pass the tower for them, as if no
        other method had been there before. It counts what ``build_tokens`` or ``build_tracks`` made at this budget."""
        if method == BLIND:
            return 0, 0
        view, residual_size, num_whole = self._baseline, None, 0
        per_frame = self._baseline.latents.shape[1:3].numel()
        if method in (ADAPTIVE, FRE_RES):
            plan = plan_compression(self._options_for(budget_tokens, method), self._encoder, self._source.info)
            view, residual_size = self._view(plan), plan.residual_size
            num_whole = self._num_whole[plan.budget_tokens] if residual_size is not None else 0
        of_frame = per_frame if residual_size is None else residual_size.num_tokens
        num_encoded = view.report.num_pictures if view.num_encoded is None else view.num_encoded
        return len(view.pts_seconds), num_encoded * of_frame + num_whole * per_frame

    def with_settings(self, changed: Mapping[str, Any]) -> EncodedClip:
        """Return the same clip with other settings. The latents are shared; the baseline keeps its frames."""
        clip = copy.copy(self)
        clip._options = replace(self._options, settings=self._options.settings.with_values("eval", **changed))
        clip._num_whole = {}
        return clip

    def build_tokens(self, method: str, budget_tokens: int, modules: AnyModules | None = None) -> VideoTokens:
        """Return the tokens of a method. The timer's stage ``compress`` is the time from latents to tokens. ``modules``:
        trained modules for this method.

        With ``deepstack: drop`` tokens have D channels, as a bundle would store them, so all methods are compared at
        equal cost. Only ``full``, the unchanged model, keeps the rows. A method that needs the question gets every token:
        see ``method_session``.
        """
        if method == ADAPTIVE:
            clip = self if modules is None else self.with_settings({"trends": "keep"})
            stretches, _ = clip._reduce_stretches(budget_tokens)
            with self._timer.stage("compress"), torch.no_grad():
                return make_tokens(stretches, modules=modules)
        if method == FRE_RES:
            tracks = self.build_tracks(budget_tokens)
            with self._timer.stage("compress"), torch.no_grad():
                return make_tokens(tracks, self._options.settings.variant, modules)
        settings = self._options.settings.with_values("eval", residual_grid=FULL)
        if method == "full":
            settings = settings.with_values("eval", deepstack="keep")
        if not METHODS[method].is_question_blind:
            method, budget_tokens = "full", self.full_tokens
        plan = replace(self._plan(FULL_BUDGET), budget=None, budget_tokens=budget_tokens)
        options = replace(self._options, method=method, settings=settings)
        whole = self._baseline.batches(self.num_frames, torch.device("cpu"))
        tokens = reduce_latents(whole, plan, options, self._encoder.width, self._timer).content
        assert isinstance(tokens, VideoTokens)
        return tokens

    def _reduce_stretches(self, budget_tokens: int) -> tuple[Stretches, Reduction]:
        """Return the stretches of adaptive Fre-Res, and how the clip was reduced to them. It is merged once for all budgets
        that give the same stretches, and the timer gets that time at each of them."""
        options = self._options_for(budget_tokens, ADAPTIVE)
        plan = plan_compression(options, self._encoder, self._source.info)
        most = max(MOST_STRETCHES, budget_tokens)
        key = (plan.sampling, most, options.settings.trends, plan.line_levels)
        if key not in self._merged:
            before = self._timer.seconds.get("compress", 0.0)
            view = self._view(plan)
            batches = view.batches(count_batch_frames(plan), self._encoder.device)
            whole = replace(plan, budget_tokens=most)
            reduction = reduce_latents(batches, whole, options, self._encoder.width, self._timer)
            reduction = replace(reduction, num_encoded=view.num_encoded)
            self._merged[key] = reduction, self._timer.seconds["compress"] - before
            self._timer.seconds["compress"] = before
        reduction, merge_s = self._merged[key]
        assert isinstance(reduction.content, Stretches)
        with self._timer.stage("compress"), torch.no_grad():
            cut = cut_stretches(reduction.content, budget_tokens)
        self._timer.seconds["compress"] += merge_s
        return cut, replace(reduction, content=cut)

    def build_tracks(self, budget_tokens: int) -> Tracks:
        """Return the tracks of Fre-Res. With ``track_density`` above 1 their frames may be denser than ``latents``."""
        return self._reduce_tracks(self._plan(budget_tokens))[0]

    def make_bundle(
        self, budget_tokens: int, model: LanguageModel, method: str = FRE_RES
    ) -> tuple[Content, dict[str, Any]]:
        """Return content and manifest of the bundle that ``freres compress`` would write at this budget.

        ``model``: the language half, with or without weights, to count the text of the prompt. ``method``: a form of
        Fre-Res. The curve of adaptive Fre-Res begins at the clip as it was merged for all budgets.
        """
        options = self._options_for(budget_tokens, method)
        plan = plan_compression(options, self._encoder, self._source.info)
        reduction = (self._reduce_stretches(budget_tokens) if method == ADAPTIVE else self._reduce_tracks(plan))[1]
        content, report = reduction.content, self._view(plan).report
        text = read_prompt_text(model, content.grid, content.frame_seconds)
        return content, build_manifest(self._source, options, plan, self._encoder, reduction, report, text)

    def _options_for(self, budget_tokens: int, method: str = FRE_RES) -> CompressOptions:
        settings = self._options.settings.with_values("flag", budget_tokens=budget_tokens)
        if method != FRE_RES:
            settings = settings.with_values("eval", residual_grid=FULL)
        return replace(self._options, settings=settings, method=method)

    def _plan(self, budget_tokens: int) -> CompressPlan:
        return plan_compression(self._options_for(budget_tokens), self._encoder, self._source.info)

    def _reduce_tracks(self, plan: CompressPlan) -> tuple[Tracks, Reduction]:
        small = None if plan.residual_size is None else self._view(plan, plan.residual_size)
        batches = self._view(plan).batches(count_batch_frames(plan), self._encoder.device, small)
        reduction = reduce_latents(batches, plan, self._options, self._encoder.width, self._timer)
        assert isinstance(reduction.content, Tracks)
        self._num_whole[plan.budget_tokens] = reduction.num_frames_whole
        return reduction.content, reduction

    def _view(self, plan: CompressPlan, residual_size: FrameSize | None = None) -> View:
        key = plan.sampling, residual_size, plan.line_levels
        if key not in self._views:
            self._views[key] = self._draw_view(plan) if plan.line_levels else self._read_view(plan, residual_size)
        return self._views[key]

    def _read_view(self, plan: CompressPlan, residual_size: FrameSize | None) -> View:
        """Decode the plan's frames and encode those not seen before."""
        known = self._stream(residual_size)
        indices: list[int] = []
        seconds: list[float] = []
        parts: list[Tensor] = []
        stream = self._source.open(plan, self._options)
        with closing(known.encode(stream)) as encoded:
            for frames, latents in encoded:
                indices += frames.picture_index
                seconds += frames.pts_seconds
                parts.append(latents)
        known.check_finite()
        if not parts:
            raise VideoError(f"{self._source.name}: no frame could be decoded in the requested part")
        latents = torch.cat(parts)
        known.share_storage(indices, latents)
        return View(latents, tuple(seconds), stream.report)

    def _draw_view(self, plan: CompressPlan) -> View:
        """Decode the plan's frames, and encode the key frames not seen before; those between them are drawn."""
        frames = self._source.open(plan, self._options)
        stream = self._stream(None)
        lines = LineStream(stream, (plan.size.grid_h, plan.size.grid_w), plan.line_levels)
        with closing(lines.encode(frames)) as drawn:
            seconds, parts = zip(*drawn, strict=True)
        stream.check_finite()
        return View(torch.cat(parts), tuple(chain(*seconds)), frames.report, lines.waiting.num_encoded)

    def _stream(self, residual_size: FrameSize | None) -> LatentStream:
        if residual_size not in self._latents:
            encoder, timer, model = self._encoder, self._timer, self._options.model.name
            self._latents[residual_size] = LatentStream(encoder, timer, model, True, residual_size)
        return self._latents[residual_size]
