"""A video encoded once, from which every method makes its tokens at every budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.base import VisionEncoder
from freres_cli.baselines.blind import keep_nothing
from freres_cli.baselines.full import keep_every_token
from freres_cli.baselines.lowres import pool_frames
from freres_cli.baselines.uniform import sample_uniform_frames
from freres_cli.bench.clock import StageTimer
from freres_cli.method.compress import StreamingCompressor
from freres_cli.method.fusion import FreResModules
from freres_cli.method.tokens import build_tokens
from freres_cli.presets import Setting
from freres_cli.records import Tracks, VideoTokens
from freres_cli.video.decode import DecodeReport
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from freres_cli.workflows.compress import (
    CompressPlan,
    CompressRequest,
    batch_frames,
    build_manifest,
    check_any,
    check_finite,
    open_decoder,
    plan_compression,
    start_compressor,
    timed_batches,
)

FULL_BUDGET = 2**31 - 1  # every token of the clip
FRE_RES = "fre-res"

Baseline = Callable[[Tensor, Tensor, int, int], VideoTokens]
BASELINES: dict[str, Baseline] = {
    "full": keep_every_token,
    "uniform": sample_uniform_frames,
    "lowres": pool_frames,
    "blind": keep_nothing,
}


@dataclass(frozen=True)
class View:
    """The frames of one sampling: ``latents`` (T, H, W, C) on the CPU, the time of each in seconds, and how decoding
    went."""

    latents: Tensor
    pts_seconds: tuple[float, ...]
    report: DecodeReport


class EncodedClip:
    """The latents of a video, made as ``freres compress`` makes them, kept for all methods.

    No source frame passes the tower twice. The preset's own frames are read at once; where ``track_density`` is above
    1, Fre-Res reads denser ones below the full budget, and the file is decoded once more for them.
    """

    def __init__(
        self,
        request: CompressRequest,
        encoder: VisionEncoder,
        timer: StageTimer,
    ) -> None:
        self._request, self._encoder, self._timer = request, encoder, timer
        self._info = probe_video(request.video)
        self._known: dict[int, Tensor] = {}
        self._views: dict[Sampling, View] = {}
        self._baseline = self._view(self._plan(FULL_BUDGET))

    @property
    def full_tokens(self) -> int:
        """Every token of the preset's frames."""
        return self._baseline.latents.shape[:3].numel()

    @property
    def num_frames(self) -> int:
        return len(self._baseline.pts_seconds)

    def with_settings(self, settings: Iterable[tuple[str, Any]]) -> EncodedClip:
        """The same clip under other settings; latents are shared, and the baseline's frames stay."""
        clip = copy.copy(self)
        changed = {key: Setting(value, "eval") for key, value in settings}
        clip._request = replace(self._request, settings={**self._request.settings, **changed})
        return clip

    def build_tokens(self, method: str, budget_tokens: int, modules: FreResModules | None = None) -> VideoTokens:
        """Return the tokens of a method; stage ``compress`` of the timer is the time from latents to tokens.
        ``modules``: what Fre-Res was trained with.

        With ``deepstack: drop`` tokens have D channels, as a bundle would store them: the other methods are compared
        with Fre-Res at equal cost. Only ``full``, the model as it is, keeps the rows.
        """
        if method == FRE_RES:
            plan = self._plan(budget_tokens)
            self._view(plan)
            with self._timer.stage("compress"), torch.no_grad():
                return build_tokens(self._compress(plan)[1], self._request.value("variant"), modules)
        with self._timer.stage("compress"):
            latents, width = self._baseline.latents, self._encoder.width
            if self._drops_deep_rows and method != "full":
                latents = latents[..., :width]
            seconds = torch.tensor(self._baseline.pts_seconds, dtype=torch.float64)
            return BASELINES[method](latents, seconds, budget_tokens, width)

    def make_bundle(self, budget_tokens: int) -> tuple[Tracks, dict[str, Any]]:
        """Return the tracks and the manifest of the bundle that ``freres compress`` writes at a budget."""
        request, plan = self._request_for(budget_tokens), self._plan(budget_tokens)
        compressor, tracks = self._compress(plan)
        return tracks, build_manifest(request, plan, self._encoder, tracks, compressor, self._view(plan).report)

    @property
    def _drops_deep_rows(self) -> bool:
        return bool(self._request.value("deepstack") == "drop")

    def _request_for(self, budget_tokens: int) -> CompressRequest:
        budget = {"budget_tokens": Setting(budget_tokens, "flag")}
        return replace(self._request, settings={**self._request.settings, **budget})

    def _plan(self, budget_tokens: int) -> CompressPlan:
        return plan_compression(self._request_for(budget_tokens), self._encoder, self._info)

    def _compress(self, plan: CompressPlan) -> tuple[StreamingCompressor, Tracks]:
        """Stream the latents through the method as if they came from the tower."""
        view, size = self._view(plan), batch_frames(plan)
        compressor = start_compressor(self._request, plan, self._encoder)
        for start in range(0, len(view.pts_seconds), size):
            latents = view.latents[start : start + size].to(self._encoder.device)
            compressor.push(latents, view.pts_seconds[start : start + size])
        tracks = compressor.finish()
        return compressor, tracks.without_deep_rows() if self._drops_deep_rows else tracks

    def _view(self, plan: CompressPlan) -> View:
        if plan.sampling not in self._views:
            self._views[plan.sampling] = self._read_view(plan)
        return self._views[plan.sampling]

    def _read_view(self, plan: CompressPlan) -> View:
        """Decode the plan's frames and encode those not seen before."""
        indices: list[int] = []
        seconds: list[float] = []
        decoder = open_decoder(self._request, plan)
        for frames in timed_batches(decoder, self._timer):
            fresh = {n: i for i, n in enumerate(frames.source_index) if n not in self._known}
            if fresh:
                with self._timer.stage("encode"):
                    latents = self._encoder.encode(frames.pixels[list(fresh.values())])
                check_finite(latents, self._request)
                self._known.update(zip(fresh, latents.cpu(), strict=True))
            indices += frames.source_index
            seconds += frames.pts_seconds
        check_any(len(indices), self._request)
        latents = torch.stack([self._known[n] for n in indices])
        # The stack replaces the batches, so that the clip is in memory once.
        self._known.update(zip(indices, latents, strict=True))
        return View(latents, tuple(seconds), decoder.report)
