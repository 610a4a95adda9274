"""Frames -> latents: the one way every verb encodes a video."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from freres_cli.backbones.base import VisionEncoder
from freres_cli.bench.clock import StageTimer
from freres_cli.devices import read_later
from freres_cli.errors import BackboneError, UsageError, VideoError
from freres_cli.pipeline.ahead import read_ahead
from freres_cli.pipeline.beside import MOST_BEGUN
from freres_cli.pipeline.planning import CompressOptions, CompressPlan
from freres_cli.records import Frames, FrameSize
from freres_cli.video.decode import decode_frames
from freres_cli.video.frames import FrameArray
from freres_cli.video.opening import hash_file
from freres_cli.video.probe import probe_video
from freres_cli.video.reading import DecodeReport
from freres_cli.world.make import is_world_clip

# Tokens encoded at a time: bounds the tower's memory whatever the grid; the result does not depend on it.
ENCODE_BATCH_TOKENS = 4608
MAX_BATCH_FRAMES = 64
# Batches read while one is encoded: enough that the tower need not wait, and as few as bound the memory.
BATCHES_AHEAD = 2


class FrameStream(Protocol):
    """Sampled frames in batches. ``report`` is available after the last one."""

    @property
    def report(self) -> DecodeReport: ...

    def __iter__(self) -> Iterator[Frames]: ...


class VideoSource:
    """A video to compress: a file, or frames already decoded. Of a file that grows, what it holds at first.

    ``video``: its path or its frames. ``title``: what a bundle calls the file; by default its name. Raises ``VideoError`` if
    it cannot be read, ``UsageError`` for frames with a title.
    """

    def __init__(self, video: Path | FrameArray, title: str | None = None) -> None:
        if title is not None and isinstance(video, FrameArray):
            raise UsageError("frames: expected no title: a bundle names only files", "leave title out")
        self.video = video
        self.title = None if isinstance(video, FrameArray) else title or video.name
        self._written_ns, _ = self._read_clock()
        self.info = video.info if isinstance(video, FrameArray) else probe_video(video)

    @property
    def name(self) -> str:
        """Its name in messages."""
        return "frames" if isinstance(self.video, FrameArray) else str(self.video)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, or of the frames. Raises ``VideoError`` if the file is no longer there."""
        if isinstance(self.video, FrameArray):
            return self.video.sha256
        try:
            return hash_file(self.video, self.num_bytes)
        except VideoError as error:
            if self._read_clock()[1] is None:
                raise VideoError(f"{self.name}: was removed while it was read", "bring it back") from error
            raise

    @property
    def num_bytes(self) -> int:
        """Size of the file, or of the pixels, in bytes."""
        return self.info.num_bytes

    @property
    def is_from_world(self) -> bool:
        """Whether ``freres world make`` made it."""
        return not isinstance(self.video, FrameArray) and is_world_clip(self.video)

    def describe_change(self) -> Iterator[str]:
        """Yield a note if the file was written to, or removed, since it was opened."""
        written_ns, num_bytes = self._read_clock()
        if written_ns == self._written_ns:
            return
        if num_bytes is None:
            yield "the file was removed while it was read"
        elif num_bytes > self.num_bytes:
            yield f"the file grew while it was read: its first {self.num_bytes} bytes, {self.info.duration_s:.2f} s, are used"
        else:
            yield "the file was written to while it was read: frames may be of before and after"

    def _read_clock(self) -> tuple[int, int | None]:
        """When the file was last written to, and how many bytes it has; of the latter ``None`` if it is gone or there is
        none."""
        with suppress(OSError):
            if isinstance(self.video, Path):
                found = self.video.stat()
                return found.st_mtime_ns, found.st_size
        return 0, None

    def open(self, plan: CompressPlan, options: CompressOptions) -> FrameStream:
        """Return the plan's frames, in batches for the tower."""
        size, levels = count_batch_frames(plan), options.settings.still_levels
        if isinstance(self.video, FrameArray):
            return self.video.open(plan.size, size, levels)
        facts = plan.info, plan.sampling, plan.size, size, options.strict, levels
        return decode_frames(self.video, *facts, options.decoding_gpu)


def count_batch_frames(plan: CompressPlan) -> int:
    """Return how many frames are decoded and encoded at a time."""
    return max(1, min(MAX_BATCH_FRAMES, ENCODE_BATCH_TOKENS // plan.size.num_tokens))


def shrink_frames(pixels: Tensor, size: FrameSize) -> Tensor:
    """Return frames (n, h, w, 3) uint8 at a smaller ``size``, where they are: bicubic, without aliasing."""
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32)
    shrunk = F.interpolate(channels_first, (size.height_px, size.width_px), mode="bicubic", antialias=True)
    return shrunk.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class LatentStream:
    """Encodes frames batch by batch. A picture that is shown again does not pass the tower again.

    ``encoder``: the tower. ``timer``: records the stages ``decode`` and ``encode``. ``model``: its name, for messages.
    ``keeps_all``: keep the latents of all frames, on the CPU, for later streams of the same clip; else only those of the
    last frame. ``residual_size``: that of frames that are no anchors, if it is smaller; all are then encoded at that size,
    and anchors once more by ``encode_whole``. ``known``: the latents that are kept, by the numbers of their pictures; set it
    to go on from a checkpoint.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        timer: StageTimer,
        model: str,
        keeps_all: bool = False,
        residual_size: FrameSize | None = None,
    ) -> None:
        self._encoder, self.timer, self._model, self._keeps_all = encoder, timer, model, keeps_all
        self._residual_size = residual_size
        self.known: dict[int, Tensor] = {}
        # For each batch that is not checked yet: how to learn whether all of it is finite, and its dtype.
        self._unchecked: deque[tuple[Callable[[], bool], torch.dtype]] = deque()

    def encode(self, batches: Iterable[Frames]) -> Generator[tuple[Frames, Tensor], None, None]:
        """Yield each batch with its latents (n, H, W, C). Raises ``BackboneError`` for latents that are not finite; on a GPU
        call ``check_finite`` for those of the last batches.

        The next batches are read in another thread, until this generator is closed.
        """
        with closing(read_ahead(self.read(batches), BATCHES_AHEAD)) as ahead:
            for frames in ahead:
                with self.timer.stage("encode"):
                    rows = self.encode_batch(frames)
                yield frames, rows
        self.check_early()

    def encode_batch(self, frames: Frames) -> Tensor:
        """Return the latents (n, H, W, C) of a batch. A picture whose latents are kept is not encoded again."""
        fresh = {n: i for i, n in enumerate(frames.picture_index) if n not in self.known}
        if fresh:
            is_new = len(fresh) == len(frames.picture_index)
            pixels = frames.pixels if is_new else frames.pixels[list(fresh.values())]
            if self._residual_size is not None:
                pixels = shrink_frames(pixels.to(self._encoder.device, non_blocking=True), self._residual_size)
            latents = self._encode(pixels)
            if is_new and not self._keeps_all:
                # A row of the batch would keep the whole batch alive.
                self.known = {frames.picture_index[-1]: latents[-1].clone()}
                return latents
            self.known.update(zip(fresh, latents.cpu() if self._keeps_all else latents, strict=True))
        rows = torch.stack([self.known[n] for n in frames.picture_index])
        if self._keeps_all:
            self.share_storage(frames.picture_index, rows)
        else:
            self.known = {frames.picture_index[-1]: rows[-1].clone()}
        return rows

    def encode_whole(self, frames: Frames, indices: list[int]) -> Tensor:
        """Return the latents (k, H, W, C) of some frames of a batch at the size of anchors. ``indices``: which."""
        with self.timer.stage("encode"):
            return self._encode(frames.pixels[indices])

    def _encode(self, pixels: Tensor) -> Tensor:
        self.check_early()
        latents = self._encoder.encode(pixels)
        self._unchecked.append((read_later(torch.isfinite(latents).all()), latents.dtype))
        return latents

    def share_storage(self, indices: Iterable[int], latents: Tensor) -> None:
        """Make the kept latents of these pictures rows of ``latents``, so a clip is in memory only once."""
        self.known.update(zip(indices, latents, strict=True))

    def read(self, batches: Iterable[Frames]) -> Iterator[Frames]:
        """Yield the batches, ready to be copied to the device. This runs in the thread that reads ahead."""
        iterator = iter(batches)
        try:
            while True:
                with self.timer.host_stage("decode"):
                    frames = next(iterator, None)
                    if frames is not None and self.timer.device.type == "cuda":
                        # From pinned memory the host does not wait for the copy.
                        frames = replace(frames, pixels=frames.pixels.pin_memory())
                if frames is None:
                    return
                yield frames
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    def check_early(self) -> None:
        """``check_finite`` without those that a GPU may not be done with: nothing is to wait for them."""
        self.check_finite(num_later=MOST_BEGUN if self.timer.device.type == "cuda" else 0)

    def check_finite(self, num_later: int = 0) -> None:
        """Refuse latents that are not finite. ``num_later``: of how many of the last batches this is left for later."""
        while len(self._unchecked) > num_later:
            is_finite, dtype = self._unchecked.popleft()
            if not is_finite():
                hint = "the weights may be damaged: download the model again"
                if dtype == torch.float16:
                    hint = "use --dtype float32 or bfloat16"
                self.known.clear()  # else they would be taken unchecked when the clip is read again
                raise BackboneError(f"{self._model}: latents are not finite in {dtype}", hint)
