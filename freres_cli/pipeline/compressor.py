"""The compressor: one model and one set of settings for any number of videos."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freres_cli.bench.clock import PeakMemory, StageTimer
from freres_cli.devices import Device, memory_errors_as, return_large_memory
from freres_cli.errors import BackboneError, UsageError
from freres_cli.pipeline.beside import BesideTower
from freres_cli.pipeline.between import LineStream
from freres_cli.pipeline.bundle import Bundle
from freres_cli.pipeline.checkpoints import Checkpoints, State
from freres_cli.pipeline.choices import as_number, as_path, as_whole, choose_method, choose_preset
from freres_cli.pipeline.encoding import LatentStream, VideoSource
from freres_cli.pipeline.manifest import build_manifest
from freres_cli.pipeline.models import Models, make_source, refuse_beside
from freres_cli.pipeline.notes import describe_fit, describe_limits, describe_plan
from freres_cli.pipeline.planning import CPU, CompressOptions, CompressPlan, plan_compression
from freres_cli.pipeline.prompt_text import PromptText, describe_context, read_prompt_text
from freres_cli.pipeline.reduction import LatentBatch, Reduction, make_reducer, reduce_latents
from freres_cli.pipeline.torch_state import plain_torch
from freres_cli.presets import BUNDLED, load_settings
from freres_cli.records import Frames
from freres_cli.video.decode import Decoder
from freres_cli.video.frames import FrameArray
from freres_cli.video.reading import DecodeReport, Position

Progress = Callable[[int, int], None]
LONG_FRAMES = 2048  # more frames than that are a long video: peak memory then matters more than CPU time
Video = str | os.PathLike[str] | Tensor | np.ndarray | Sequence[Tensor | np.ndarray]


class Compressor:
    """Compresses videos with one model and one set of settings. The vision tower is loaded once, when first needed.

    ``model``: ``bundled``, a folder, or a hub id. ``preset``: settings to start from, a name or a .yaml file; the default
    is that of ``freres compress``. ``budget_tokens``: maximum visual tokens of a bundle. ``method``: a name that
    ``freres methods`` lists; by default the preset's. ``device``, ``dtype``, ``revision``, ``attention``: as
    ``models.make_source`` takes them. ``strict``: refuse a video if what is read of it is damaged. ``decode``: ``cpu``, or
    ``gpu`` for files, see freres-compress(1). ``models``: a model that is already loaded. Further keyword arguments are
    settings by name, see freres-preset(5), such as ``quality``.

    Raises ``PresetError`` for an unknown or illegal setting, ``UsageError`` or ``ResourceError`` for a method or a device
    that cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        preset: str | Path | None = None,
        budget_tokens: int | None = None,
        method: str | None = None,
        device: str | torch.device | Device | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        attention: str | None = None,
        strict: bool = False,
        decode: str = CPU,
        models: Models | None = None,
        **settings: Any,
    ) -> None:
        given = (
            settings
            if budget_tokens is None
            else {**settings, "budget_tokens": as_whole(budget_tokens, "budget_tokens")}
        )
        if models is not None:
            refuse_beside(models, model, device=device, dtype=dtype, revision=revision, attention=attention)
        place = BUNDLED if model is None else model
        source = models.source if models else make_source(place, device, dtype, revision, attention)
        chosen = load_settings(str(preset or choose_preset(source.name)), given, "argument")
        if method is not None:
            chosen = chosen.with_values("argument", method=method)
        self.options = CompressOptions(source, chosen, choose_method(chosen), strict=strict, decode=decode)
        self.options.check_settings()
        self.models = models or Models(source)

    @classmethod
    def from_options(cls, options: CompressOptions, models: Models | None = None) -> Compressor:
        """Return a compressor for existing options. ``models``: a model that is already loaded."""
        compressor = cls.__new__(cls)
        compressor.options = options
        compressor.models = models or Models(options.model)
        return compressor

    @plain_torch()
    def plan(
        self, video: Video | FrameArray, seconds: Sequence[float] | Tensor | np.ndarray | None = None
    ) -> CompressPlan:
        """Return what ``compress`` would do, without encoding anything. Arguments and errors as there."""
        source = VideoSource(_as_video(video, seconds))
        return plan_compression(self._options_for(source), self.models.encoder, source.info)

    @plain_torch()
    def compress(
        self,
        video: Video | FrameArray,
        *,
        seconds: Sequence[float] | Tensor | np.ndarray | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        progress: Progress | None = None,
        checkpoints: Checkpoints | None = None,
        title: str | None = None,
    ) -> Bundle:
        """Compress one video, and return a bundle that is not saved yet.

        ``video``: a file, or frames already decoded, (n, h, w, 3) uint8 RGB, all of which are used; ``seconds`` then
        holds the time of each. ``start_s``, ``end_s``: the part of a file to read, in seconds after its first frame.
        ``progress``: called with the number of frames done and the number of all frames. ``checkpoints``: keeps the state
        of long work, and gives back that of work that was stopped; the bundle is the same, bit for bit. ``title``: what
        the bundle calls the file; by default its name. Raises ``VideoError``, ``UsageError``, ``BackboneError`` or
        ``ResourceError``.
        """
        start = time.perf_counter()
        options = self.options
        if title is not None and not isinstance(title, str):
            raise UsageError(f"title: expected text, got {type(title).__name__}")
        if start_s is not None or end_s is not None:
            options = replace(options, start_s=as_number(start_s, "start_s"), end_s=as_number(end_s, "end_s"))
        device = torch.device(options.model.device.name)
        timer, memory = StageTimer(device), PeakMemory(device)
        with timer.stage("probe"):
            source = VideoSource(_as_video(video, seconds), title)  # refuses a bad video before a model is loaded
        options = self._options_for(source, options)
        with timer.stage("load"):
            encoder = self.models.encoder
        plan = plan_compression(options, encoder, source.info)
        with memory_errors_as(f"compressing {source.name}", "lower --budget or --grid, or use a smaller --dtype"):
            reduction, report = self.run_stages(source, options, plan, timer, progress, checkpoints)
        text, untold = self._count_text(reduction)
        manifest = build_manifest(source, options, plan, encoder, reduction, report, text)
        limits = describe_limits(options.model.name, manifest["source"]["made_by_world"])
        fit, planned = describe_fit(plan, encoder, options.settings), describe_plan(plan, options, manifest)
        found = (*limits, *encoder.notes, *fit, *plan.info.notes, *manifest["sampling"]["notes"], *planned, *untold)
        if text is not None:
            found += describe_context(manifest["tokens"]["context_tokens"], self.models.prompt_counter)
        timer.seconds["total"] = time.perf_counter() - start
        return Bundle(
            manifest,
            reduction.content,
            notes=tuple(dict.fromkeys((*found, *source.describe_change()))),
            timings_s=timer.seconds,
            peak_memory_bytes=memory.read_bytes(),
        )

    def run_stages(
        self,
        source: VideoSource,
        options: CompressOptions,
        plan: CompressPlan,
        timer: StageTimer,
        progress: Progress | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> tuple[Reduction, DecodeReport]:
        """Stream decode -> encode -> compress, and time each. If the method streams, frames are never all in memory.

        ``source``, ``options``, ``plan``: what to do. ``timer``: records the stages. ``progress``, ``checkpoints``: as
        ``compress`` takes them.
        """
        encoder = self.models.encoder
        if plan.num_frames > LONG_FRAMES:
            return_large_memory()
        frames = source.open(plan, options)
        stream = LatentStream(encoder, timer, options.model.name, residual_size=plan.residual_size)
        grid = plan.size.grid_h, plan.size.grid_w
        lines = LineStream(stream, grid, plan.line_levels) if plan.line_levels else None
        reducer, total = make_reducer(plan, options, encoder.width), plan.num_frames
        decoder = frames if isinstance(frames, Decoder) else None
        if checkpoints is not None and decoder is not None and reducer is not None:
            state = checkpoints.find(source, options, plan, encoder)
            if state is not None:
                decoder.resume(state.position)
                stream.known, reducer = state.known, state.reducer
                if lines is not None and state.waiting is not None:
                    lines.waiting = state.waiting

        beside = _make_beside(plan, timer.device, checkpoints)
        taken = None if decoder is None else decoder.position
        # The decoder reads ahead: where it was at the end of each batch that is not reduced yet.
        positions: deque[Position] = deque()

        def make_state() -> State:
            assert taken is not None and reducer is not None
            stream.check_finite()
            return State(taken, stream.known, reducer, None if lines is None else lines.waiting)

        def on_batch(done: int) -> None:
            nonlocal taken
            if progress is not None:
                progress(done, max(done, total))
            if checkpoints is None or decoder is None or reducer is None:
                return
            position = positions.popleft()
            # The short batch at the end of a video moves no position: a state after it would take its frames twice.
            if position is not taken:
                taken = position
                if not beside.is_ahead:  # what the streams know is then of later frames
                    checkpoints.offer(make_state)

        is_kept = checkpoints is not None and reducer is not None
        read = _note_positions(decoder, positions) if is_kept and decoder is not None else frames
        with closing(_encode(stream, lines, read, plan)) as batches:
            given = batches, plan, options, encoder.width, timer, on_batch, reducer
            reduction = reduce_latents(*given, beside, stream.check_finite)
        if lines is not None:
            reduction = replace(reduction, num_encoded=lines.waiting.num_encoded)
        return reduction, frames.report

    def _count_text(self, reduction: Reduction) -> tuple[PromptText | None, tuple[str, ...]]:
        """Return the text of a prompt about the clip, or a note that it cannot be counted: that needs the tokenizer."""
        content = reduction.content
        try:
            counter = self.models.prompt_counter
            with counter.lock:
                return read_prompt_text(counter, content.grid, content.frame_seconds), ()
        except BackboneError as error:
            return None, (f"the text in the model's prompt is not counted: {error.message}",)

    def _options_for(self, source: VideoSource, options: CompressOptions | None = None) -> CompressOptions:
        """Return the options for one video. If its frames are already decoded, all of them are used."""
        options = options or self.options
        if not isinstance(source.video, FrameArray):
            return options
        if options.start_s is not None or options.end_s is not None:
            raise UsageError("frames: expected no start_s or end_s with frames already decoded", "cut the frames")
        values = {"sample": "native", "sample_fps": None, "sample_count": None, "track_density": 1}
        return replace(options, settings=options.settings.with_values("frames as given", **values))


def _make_beside(plan: CompressPlan, device: torch.device, checkpoints: Checkpoints | None) -> BesideTower:
    """With two resolutions, frames also pass the tower when the method asks for them: two passes at once would take more
    memory."""
    place = device if plan.residual_size is None else torch.device("cpu")
    return BesideTower(place) if checkpoints is None else BesideTower(place, checkpoints.is_due)


def _encode(
    stream: LatentStream, lines: LineStream | None, frames: Iterable[Frames], plan: CompressPlan
) -> Generator[LatentBatch, None, None]:
    if lines is not None:
        with closing(lines.encode(frames)) as drawn:
            for seconds, latents in drawn:
                yield LatentBatch(seconds, latents)
        return
    with closing(stream.encode(frames)) as encoded:
        for batch, latents in encoded:
            whole = None if plan.residual_size is None else partial(stream.encode_whole, batch)
            yield LatentBatch(batch.pts_seconds, latents, whole)


def _note_positions(decoder: Decoder, positions: deque[Position]) -> Iterator[Frames]:
    for batch in decoder:
        positions.append(decoder.position)
        yield batch


def _as_video(video: Video | FrameArray, seconds: Any) -> Path | FrameArray:
    if isinstance(video, FrameArray):
        return video
    if isinstance(video, str | os.PathLike):
        if seconds is not None:
            raise UsageError("seconds: expected none with a video file: it has its own times", "leave seconds out")
        return as_path(video, "video")
    is_listed = isinstance(video, Sequence) and not isinstance(video, bytes | bytearray | memoryview)
    is_array = any(hasattr(video, name) for name in ("__array__", "__array_interface__"))
    if not (is_listed or is_array or (isinstance(video, memoryview) and video.ndim > 1)):
        got = type(video).__name__
        raise UsageError(f"video: expected a path or frames, got {got}", "save an encoded video to a file first")
    if seconds is None:
        raise UsageError("frames: expected seconds, the time of each frame, got none", "pass seconds=[...]")
    return FrameArray(video, seconds)
