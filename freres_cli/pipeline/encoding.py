"""Frames -> latents: the one way every verb encodes a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from freres_cli.backbones.base import VisionEncoder
from freres_cli.bench.clock import StageTimer
from freres_cli.errors import BackboneError
from freres_cli.pipeline.planning import CompressOptions, CompressPlan
from freres_cli.records import Frames
from freres_cli.video.decode import DecodeReport, decode_frames
from freres_cli.video.frames import FrameArray
from freres_cli.video.opening import hash_file
from freres_cli.video.probe import probe_video
from freres_cli.world.make import is_world_clip

# Tokens encoded at a time: bounds the tower's memory whatever the grid; the result does not depend on it.
ENCODE_BATCH_TOKENS = 4608
MAX_BATCH_FRAMES = 64


class FrameStream(Protocol):
    """Sampled frames in batches. ``report`` is available after the last one."""

    @property
    def report(self) -> DecodeReport: ...

    def __iter__(self) -> Iterator[Frames]: ...


class VideoSource:
    """A video to compress: a file, or frames already decoded. Of a file that grows, what it holds at first.

    ``video``: its path or its frames. ``title``: what a bundle calls the file; by default its name. Raises ``VideoError`` if
    it cannot be read.
    """

    def __init__(self, video: Path | FrameArray, title: str | None = None) -> None:
        self.video = video
        self.title = None if isinstance(video, FrameArray) else title or video.name
        self._written_ns = self._read_clock()
        self.info = video.info if isinstance(video, FrameArray) else probe_video(video)

    @property
    def name(self) -> str:
        """Its name in messages."""
        return "frames" if isinstance(self.video, FrameArray) else str(self.video)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, or of the frames."""
        return self.video.sha256 if isinstance(self.video, FrameArray) else hash_file(self.video, self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of the file, or of the pixels, in bytes."""
        return self.info.num_bytes

    @property
    def is_from_world(self) -> bool:
        """Whether ``freres world make`` made it."""
        return not isinstance(self.video, FrameArray) and is_world_clip(self.video)

    def describe_change(self) -> Iterator[str]:
        """Yield a note if the file was written to since it was opened."""
        if self._read_clock() == self._written_ns:
            return
        assert isinstance(self.video, Path)
        if self.video.stat().st_size > self.num_bytes:
            yield f"the file grew while it was read: its first {self.num_bytes} bytes, {self.info.duration_s:.2f} s, are used"
        else:
            yield "the file was written to while it was read: frames may be of before and after"

    def _read_clock(self) -> int:
        """When the file was last written to, 0 if it is gone or there is none."""
        with suppress(OSError):
            return self.video.stat().st_mtime_ns if isinstance(self.video, Path) else 0
        return 0

    def open(self, plan: CompressPlan, options: CompressOptions) -> FrameStream:
        """Return the plan's frames, in batches for the tower."""
        size, levels = count_batch_frames(plan), options.settings.still_levels
        if isinstance(self.video, FrameArray):
            return self.video.open(plan.size, size, levels)
        return decode_frames(self.video, plan.info, plan.sampling, plan.size, size, options.strict, levels)


def count_batch_frames(plan: CompressPlan) -> int:
    """Return how many frames are decoded and encoded at a time."""
    return max(1, min(MAX_BATCH_FRAMES, ENCODE_BATCH_TOKENS // plan.size.num_tokens))


class LatentStream:
    """Encodes frames batch by batch. A picture that is shown again does not pass the tower again.

    ``encoder``: the tower. ``timer``: records the stages ``decode`` and ``encode``. ``model``: its name, for messages.
    ``keeps_all``: keep the latents of all frames, on the CPU, for later streams of the same clip; else only those of the
    last frame.
    """

    def __init__(self, encoder: VisionEncoder, timer: StageTimer, model: str, keeps_all: bool = False) -> None:
        self._encoder, self._timer, self._model, self._keeps_all = encoder, timer, model, keeps_all
        self._known: dict[int, Tensor] = {}

    @property
    def known(self) -> dict[int, Tensor]:
        """The latents that are kept, by the numbers of their pictures; set them to go on from there."""
        return self._known

    @known.setter
    def known(self, latents: dict[int, Tensor]) -> None:
        self._known = latents

    def encode(self, batches: Iterable[Frames]) -> Iterator[tuple[Frames, Tensor]]:
        """Yield each batch with its latents (n, H, W, C). Raises ``BackboneError`` for latents that are not finite."""
        for frames in self._timed(batches):
            fresh = {n: i for i, n in enumerate(frames.picture_index) if n not in self._known}
            with self._timer.stage("encode"):
                if fresh:
                    latents = self._encoder.encode(frames.pixels[list(fresh.values())])
                    self._check_finite(latents)
                    self._known.update(zip(fresh, latents.cpu() if self._keeps_all else latents, strict=True))
                rows = torch.stack([self._known[n] for n in frames.picture_index])
            if self._keeps_all:
                self.share_storage(frames.picture_index, rows)
            else:
                # A row of the batch would keep the whole batch alive.
                self._known = {frames.picture_index[-1]: rows[-1].clone()}
            yield frames, rows

    def share_storage(self, indices: Iterable[int], latents: Tensor) -> None:
        """Make the kept latents of these pictures rows of ``latents``, so a clip is in memory only once."""
        self._known.update(zip(indices, latents, strict=True))

    def _timed(self, batches: Iterable[Frames]) -> Iterator[Frames]:
        iterator = iter(batches)
        while True:
            with self._timer.stage("decode"):
                frames = next(iterator, None)
            if frames is None:
                return
            yield frames

    def _check_finite(self, latents: Tensor) -> None:
        if not bool(torch.isfinite(latents).all()):
            raise BackboneError(
                f"{self._model}: latents are not finite in {latents.dtype}", "use --dtype float32 or bfloat16"
            )
