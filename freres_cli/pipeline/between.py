"""Frames -> latents, where the frames that lie between two others need not pass the tower."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from freres_cli.pipeline.ahead import read_ahead
from freres_cli.pipeline.encoding import BATCHES_AHEAD, LatentStream
from freres_cli.records import Frames
from freres_cli.video.lines import KeyFinder, draw_line, measure_colours


@dataclass
class Waiting:
    """What is known of the frames since the last key frame. ``finder``: looks for the next one. ``seconds``: their times.
    ``last``: the last of them. ``latents``: (H, W, C) of the key frame; ``picture``: its ``picture_index``.
    ``num_encoded``: pictures of key frames so far."""

    finder: KeyFinder
    seconds: list[float] = field(default_factory=list)
    last: Frames | None = None
    latents: Tensor | None = None
    picture: int = -1
    num_encoded: int = 0


class LineStream:
    """Encodes key frames, and draws the latents of the frames between on the line from each to the next.

    ``stream``: encodes. ``grid``: (H, W). ``levels``: as ``KeyFinder`` takes them. ``waiting``: set it to go on from a
    checkpoint. Besides a batch, at most ``MOST_APART`` frames are waited for; the result does not depend on the batches.
    """

    def __init__(self, stream: LatentStream, grid: tuple[int, int], levels: float) -> None:
        self._stream, self._grid = stream, grid
        self.waiting = Waiting(KeyFinder(levels))

    def encode(self, batches: Iterable[Frames]) -> Generator[tuple[tuple[float, ...], Tensor], None, None]:
        """For each batch, yield times and latents (n, H, W, C) of the frames up to its last key frame; there may be none.

        The next batches are read in another thread, until this generator is closed. Raises ``BackboneError`` as
        ``LatentStream.encode`` does.
        """
        with closing(read_ahead(self._stream.read(batches), BATCHES_AHEAD)) as ahead:
            frames = next(ahead, None)
            while frames is not None:
                following = next(ahead, None)
                yield self._take(frames, is_last=following is None)
                frames = following
        self._stream.check_early()

    def _take(self, frames: Frames, is_last: bool) -> tuple[tuple[float, ...], Tensor]:
        with self._stream.timer.stage("encode"):
            waiting, count = self.waiting, len(frames.pts_seconds)
            # Rows of the batch; -1 is the frame before it.
            keys = [] if waiting.last is not None else [0]
            colours = measure_colours(frames.pixels, self._grid)
            # A row of the batch would keep the whole batch alive.
            keys += [row - 1 for row, own in enumerate(colours) if waiting.finder.observe(own.clone())]
            if is_last and count - 1 not in keys:
                keys.append(count - 1)
            key_frames = _pick(frames, keys, waiting.last)
            # With the frame before it, there may be one more than a batch, which the tower's memory is planned for.
            rows = [[0], list(range(1, len(keys)))] if len(keys) > count else [list(range(len(keys)))]
            latents = self._fill(keys, [_pick(key_frames, own) for own in rows])
        waiting.last = _pick(frames, [count - 1])
        seconds = [*waiting.seconds, *frames.pts_seconds]
        waiting.seconds = seconds[len(latents) :]
        return tuple(seconds[: len(latents)]), latents

    def _fill(self, keys: list[int], batches: list[Frames]) -> Tensor:
        """Return the latents of all frames after the last key frame, up to the last of these. ``keys``: their rows.
        ``batches``: the key frames, as they are encoded."""
        waiting = self.waiting
        if not keys:
            assert waiting.latents is not None  # the first frame is a key frame
            return waiting.latents[None][:0]
        at, parts = -1 - len(waiting.seconds), []
        encoded = chain.from_iterable(self._stream.encode_batch(frames) for frames in batches)
        pictures = chain.from_iterable(frames.picture_index for frames in batches)
        for key, latents, picture in zip(keys, encoded, pictures, strict=True):
            start = latents if waiting.latents is None else waiting.latents
            parts.append(draw_line(start, latents, key - at))
            at = key
            waiting.num_encoded += picture != waiting.picture
            waiting.latents, waiting.picture = latents, picture
        waiting.latents = parts[-1][-1].clone()
        return torch.cat(parts)


def _pick(frames: Frames, rows: list[int], before: Frames | None = None) -> Frames:
    """Return some frames of a batch, copied. ``before``: the frame that row -1 stands for."""
    picked = [(frames, row) if row >= 0 or before is None else (before, 0) for row in rows]
    pixels = torch.stack([own.pixels[row] for own, row in picked]) if rows else frames.pixels[:0]
    return Frames(
        pixels,
        tuple(own.pts_seconds[row] for own, row in picked),
        tuple(own.source_index[row] for own, row in picked),
        tuple(own.picture_index[row] for own, row in picked),
    )
