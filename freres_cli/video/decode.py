"""Stream the sampled frames of a video: decode, resize, turn upright, pack into batches.

Only sampled frames are converted to RGB, by a few threads, and only a few decoded frames are held at a time, so memory use
does not grow with the length of the clip, but for 8 bytes for the time of each frame.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import av
import numpy as np
import torch

from freres_cli.errors import VideoError
from freres_cli.records import Frames, FrameSize, VideoInfo
from freres_cli.video.ending import DAMAGED, ENDS_INSIDE, SKIPPED, UNNOTICED
from freres_cli.video.nvdec import REFUSED, choose_gpu, take_decoded
from freres_cli.video.oddities import OddFrames
from freres_cli.video.opening import iterate_frames, open_video, video_stream
from freres_cli.video.packets import PacketTable, read_packet_table
from freres_cli.video.reading import DecodeReport, Position, Tally
from freres_cli.video.resizing import Resizer
from freres_cli.video.sampling import TOLERANCE_S, Sampling, num_shown_frames, sampling_instants, sampling_window
from freres_cli.video.seeking import find_entry, frames_from
from freres_cli.video.still import StillDetector, describe_still, read_planes
from freres_cli.video.turn import Turn

# Of other codecs, a packet may hold a field, or a picture that is never shown.
NEVER_HIDES = ("hevc",)


@dataclass(frozen=True)
class _Shown:
    """A decoded frame and when it is on screen, in seconds on the file's clock. ``is_last``: nothing follows."""

    frame: av.VideoFrame
    index: int
    start_s: float
    end_s: float
    is_last: bool = False


@dataclass(frozen=True)
class _Picture:
    """A picture that differs from the one before, while it is resized. ``number``: of pictures up to it. The others are as
    in ``Position``."""

    pixels: Future[np.ndarray]
    number: int
    index: int
    start_s: float
    slot: int
    odd: OddFrames

    def locate(self, tally: Tally) -> Position:
        """Where reading is, at a frame that shows this picture. Damage that was met since counts as well."""
        is_clean = not (tally.is_read_again or tally.num_restamped or tally.num_damaged)
        facts = self.number, self.index, self.start_s, self.slot, self.odd
        return Position(tally.num_sampled, *facts, is_clean)


@dataclass(frozen=True)
class _Resized:
    """A sampled frame. ``repeats``: the instants at which it is on screen."""

    picture: _Picture
    start_s: float
    index: int
    repeats: int


def _own_time(frame: av.VideoFrame) -> float | None:
    """The frame's own timestamp in seconds, if it has one."""
    if frame.pts is None:
        return None
    assert frame.time_base is not None
    return float(frame.pts * frame.time_base)


def decode_frames(
    path: str | Path,
    info: VideoInfo,
    sampling: Sampling,
    size: FrameSize,
    batch_frames: int = 16,
    strict: bool = False,
    still_levels: int = 0,
    gpu: int | None = None,
) -> Decoder:
    """An iterable of ``Frames``, at most ``batch_frames`` at a time, resized to ``size`` and upright.

    ``path`` is the file and ``info`` what ``probe_video`` returned for it; ``sampling`` says which frames to return.
    Damaged files give whatever can be decoded, and ``Decoder.report`` says what was lost; with ``strict`` they raise
    ``VideoError`` instead. ``still_levels``: a frame that differs by no more from the last picture is that picture, as in
    ``StillDetector``. ``gpu``: the number of the GPU that decodes what it can, by default none. Iterating raises
    ``VideoError``, ``UsageError`` if the window is outside the clip, or ``ResourceError`` if that GPU does not decode.
    """
    return Decoder(str(path), info, sampling, size, batch_frames, strict, still_levels, gpu)


class Decoder:
    """The sampled frames of one video. See ``decode_frames`` for the arguments.

    Each iteration decodes the file again; ``report`` describes the last complete one.
    """

    def __init__(
        self,
        path: str,
        info: VideoInfo,
        sampling: Sampling,
        size: FrameSize,
        batch_frames: int,
        strict: bool,
        still_levels: int,
        gpu: int | None,
    ) -> None:
        if batch_frames < 1:
            raise ValueError(f"batch_frames: expected at least 1, got {batch_frames}")
        self._path, self._info, self._sampling, self._size = path, info, sampling, size
        self._batch_frames, self._strict, self._still_levels = batch_frames, strict, still_levels
        self._gpu = gpu
        self._turn = Turn(info.rotation_deg, info.is_mirrored)
        self._report: DecodeReport | None = None
        self._begin = Position(0, 0, 0, float("-inf"), 0, OddFrames.of(info), True)
        self._odd = self._begin.odd
        self._position = self._begin

    @property
    def report(self) -> DecodeReport:
        """The outcome of decoding, available after the last batch."""
        if self._report is None:
            raise RuntimeError("the report is available after the last batch")
        return self._report

    @property
    def position(self) -> Position:
        """How far reading has come, at the end of a full batch."""
        return self._position

    def resume(self, position: Position) -> None:
        """Let the next iteration go on after ``position`` of another decoder with the same arguments."""
        self._begin = position

    def __iter__(self) -> Iterator[Frames]:
        self._report, self._odd = None, replace(self._begin.odd)
        table = read_packet_table(self._path, self._info.stream_index, self._info.num_bytes)
        tally = Tally(num_sampled=self._begin.picture_slot, num_pictures=max(0, self._begin.num_pictures - 1))
        with closing(self._pick(table, tally)) as picked:
            yield from self._pack(picked, tally)
        self._report = self._sum_up(table, tally)

    @contextmanager
    def _open(self, table: PacketTable, tally: Tally, threads: str) -> Iterator[Iterator[av.VideoFrame | None]]:
        """Frames from where the requested part begins, if the file leads there exactly, else from the beginning."""
        first, _ = sampling_window(self._sampling, self._info.start_s, self._info.duration_s)
        entry = find_entry(table, max(first, self._begin.picture_s)) if self._begin.is_clean else None
        gpu = None if self._gpu is None or threads == "NONE" else choose_gpu(self._gpu)
        for accelerator, place in product(dict.fromkeys((gpu, None)), dict.fromkeys((entry, None))):
            try:
                container = open_video(self._path, self._info.num_bytes, accelerator)
            except VideoError:
                if accelerator is None:
                    raise
                continue  # each file takes memory of the GPU, which may have none left
            with container:
                stream = video_stream(container, self._info.stream_index)
                stream.thread_type = threads
                if threads == "NONE" or accelerator is not None:
                    # Each thread would hold surfaces of the GPU, of which there are few.
                    stream.codec_context.thread_count = 1
                frames = iterate_frames(container, stream) if place is None else frames_from(container, stream, place)
                if frames is not None and accelerator is not None:
                    frames = take_decoded(stream, frames)
                if frames is not None:
                    tally.num_before = 0 if place is None else place.first_index
                    tally.is_on_gpu |= accelerator is not None
                    yield frames
                    return

    def _decode(self, table: PacketTable, tally: Tally) -> Generator[tuple[av.VideoFrame, int], None, None]:
        """Frames in display order, with their numbers. Packets that cannot be decoded are counted and skipped."""
        with self._open(table, tally, "AUTO") as frames:
            for frame in frames:
                if frame is None or frame.is_corrupt:
                    break
                tally.num_decoded += 1
                yield frame, tally.num_before + tally.num_decoded - 1
            else:
                if tally.num_before + tally.num_decoded >= self._info.num_packets:
                    return
        # Damage seen by one thread spoils frames of the others; which ones varies by machine and by run, and at the end of
        # the file there is no error. So a file that seems damaged is read again on a single thread, skipping the frames
        # already delivered: every run then gives the same frames.
        tally.is_read_again = True
        next_index = tally.num_before + tally.num_decoded
        with self._open(table, tally, "NONE") as frames:
            index = tally.num_before
            for frame in frames:
                tally.ends_badly = frame is None
                if frame is None:
                    self._refuse_if_strict("a packet cannot be decoded")
                    tally.num_failed += 1
                    continue
                if index >= next_index:
                    tally.num_decoded += 1
                    yield frame, index
                index += 1

    def _refuse_if_strict(self, trouble: str) -> None:
        if self._strict:
            raise VideoError(
                f"{self._path}: the video is damaged: {trouble}", hint="omit --strict to use what can be decoded"
            )

    def _stamp(self, table: PacketTable, tally: Tally) -> Generator[tuple[av.VideoFrame, int, float], None, None]:
        """Each decoded frame with its number and its time. Times never run backwards.

        If timestamps are missing, run backwards, or do not say when a B-frame is shown, the k-th frame from the decoder
        gets the k-th smallest timestamp: the decoder's order is right, and sorting the frames would scramble it.
        """
        by_rank, previous = table.is_order_blind, float("-inf")
        with closing(self._decode(table, tally)) as frames:
            for frame, index in frames:
                own = _own_time(frame)
                by_rank = by_rank or (own is not None and own < previous)
                # A frame whose time was lost to damage is assumed to follow the previous frame directly.
                rank = index + tally.num_failed if by_rank else bisect_right(table.stamps_s, previous + TOLERANCE_S)
                stamp = table.stamps_s[min(rank, len(table.stamps_s) - 1)]
                time = max(stamp, previous) if by_rank or own is None else own
                time = max(time, self._info.start_s)
                tally.num_restamped += table.has_timestamps and time != own
                if frame.is_corrupt:
                    self._refuse_if_strict(f"the frame at {self._info.count_s(time):.3f} s is broken")
                    tally.num_damaged += 1
                previous = time
                yield frame, index, time

    def _show(self, table: PacketTable, tally: Tally) -> Generator[_Shown, None, None]:
        """Each frame with the time it leaves the screen, which is when the next one appears."""
        held: tuple[av.VideoFrame, int, float] | None = None
        with closing(self._stamp(table, tally)) as stamped:
            for frame, index, time in stamped:
                missing = self._count_missing(table, tally, held and held[2], time)
                tally.num_missing += missing
                tally.num_missing_first += missing if held is None else 0
                if held is not None:
                    yield _Shown(*held, end_s=time)
                held = (frame, index, time)
        if held is not None:
            following = bisect_right(table.stamps_s, held[2] + TOLERANCE_S)
            tally.covered_s = table.stamps_s[following] if following < len(table.stamps_s) else table.end_s
            yield _Shown(*held, end_s=tally.covered_s, is_last=following == len(table.stamps_s))
        tally.is_exhausted = True

    def _pick(self, table: PacketTable, tally: Tally) -> Generator[tuple[_Shown, int], None, None]:
        """The sampled frames, each with the number of instants at which it is on screen."""
        clip = self._info.start_s, self._info.duration_s
        first, last = sampling_window(self._sampling, *clip)
        has_window = self._sampling.start_s is not None or self._sampling.end_s is not None
        instants = sampling_instants(self._sampling, *clip, num_shown_frames(self._sampling, *clip, table.stamps_s))
        position = self._begin.picture_slot
        with closing(self._show(table, tally)) as frames:
            for shown in frames:
                if shown.index < self._begin.picture_index:
                    continue
                if instants is None:
                    if has_window and shown.start_s >= last - TOLERANCE_S:
                        return
                    if not has_window or shown.end_s > first + TOLERANCE_S:
                        yield shown, 1
                    continue
                following = bisect_left(instants, shown.end_s - (0 if shown.is_last else TOLERANCE_S), lo=position)
                if following > position:
                    yield shown, following - position
                position = following
                if position == len(instants):
                    return

    def _resize(self, picked: Iterator[tuple[_Shown, int]], tally: Tally) -> Generator[_Resized, None, None]:
        """The sampled frames with their pixels, in order. Several are resized at once, each by one thread, so the pixels
        are those that a single thread makes."""
        detector = StillDetector(self._still_levels)
        waiting: deque[_Resized] = deque()
        slot = tally.num_sampled
        with Resizer(self._path, self._size, self._turn) as resizer:
            for shown, repeats in picked:
                if not detector.is_still(*read_planes(shown.frame, self._still_levels)):
                    odd = replace(self._odd)
                    self._odd.look_at(shown.frame, self._info.count_s(shown.start_s))
                    tally.num_pictures += 1
                    pixels = resizer.submit(shown.frame)
                    picture = _Picture(pixels, tally.num_pictures, shown.index, shown.start_s, slot, odd)
                waiting.append(_Resized(picture, shown.start_s, shown.index, repeats))
                slot += repeats
                if len(waiting) > resizer.most_waiting:
                    yield waiting.popleft()
            yield from waiting

    def _pack(self, picked: Iterator[tuple[_Shown, int]], tally: Tally) -> Iterator[Frames]:
        shape = (self._batch_frames, self._size.height_px, self._size.width_px, 3)
        pixels = torch.empty(shape, dtype=torch.uint8)
        times: list[float] = []
        indices: list[int] = []
        picture_indices: list[int] = []
        with closing(self._resize(picked, tally)) as resized:
            for frame in resized:
                for _ in range(frame.repeats):
                    if tally.num_sampled < self._begin.num_sampled:
                        tally.num_sampled += 1
                        continue
                    # torch would start a thread pool for this copy, which would compete with the decoder's threads.
                    pixels.numpy()[len(times)] = frame.picture.pixels.result()
                    times.append(self._info.count_s(frame.start_s))
                    indices.append(frame.index)
                    picture_indices.append(frame.picture.index)
                    tally.num_sampled += 1
                    if len(times) == self._batch_frames:
                        self._position = frame.picture.locate(tally)
                        yield Frames(pixels, tuple(times), tuple(indices), tuple(picture_indices))
                        pixels, times, indices, picture_indices = torch.empty(shape, dtype=torch.uint8), [], [], []
        if times:
            yield Frames(pixels[: len(times)], tuple(times), tuple(indices), tuple(picture_indices))

    def _sum_up(self, table: PacketTable, tally: Tally) -> DecodeReport:
        if tally.num_sampled == 0:
            raise VideoError(
                f"{self._path}: no frame of the requested part can be decoded",
                hint="the file is damaged: try to play it, or download it again",
            )
        lost = self._measure_loss(table, tally)
        if lost > 0:
            self._refuse_if_strict(f"{lost:.2f} s of video are lost")
        notes = list(self._describe(tally, lost))
        _, last = sampling_window(self._sampling, self._info.start_s, self._info.duration_s)
        if table.is_cut and lost == 0 and last > table.end_s - TOLERANCE_S:
            self._refuse_if_strict(ENDS_INSIDE)
            notes.append(ENDS_INSIDE)
        return DecodeReport(tally.num_decoded, tally.num_sampled, tally.num_pictures, lost, tuple(notes))

    def _measure_loss(self, table: PacketTable, tally: Tally) -> float:
        """Seconds of the requested part that no decoded frame covers."""
        end = table.end_s + (table.missing_s if table.is_cut or tally.ends_badly else 0.0)
        if self._sampling.end_s is not None:
            end = min(end, self._info.start_s + self._sampling.end_s)
        tail = end - (tally.covered_s if tally.is_exhausted else table.end_s)
        # A gap inside the clip does not show in the times: the frame before it simply stays on screen longer.
        if tally.num_failed or self._info.codec in NEVER_HIDES:
            missing = tally.num_missing
        else:
            missing = min(tally.num_missing_first, table.num_headless)
        return missing * table.gap_s + (tail if tail > TOLERANCE_S else 0.0)

    def _count_missing(self, table: PacketTable, tally: Tally, before: float | None, after: float) -> int:
        """How many frames of the requested part come between two decoded ones, or before the first."""
        first, last = sampling_window(self._sampling, self._info.start_s, self._info.duration_s)
        stamps = table.stamps_s
        low = tally.num_before if before is None else bisect_right(stamps, before + TOLERANCE_S)
        low = max(low, bisect_right(stamps, first + TOLERANCE_S) - 1)
        return max(0, bisect_left(stamps, min(after, last) - TOLERANCE_S) - low)

    def _describe(self, tally: Tally, lost: float) -> Iterator[str]:
        if self._gpu is not None:
            yield UNNOTICED if tally.is_on_gpu else REFUSED
        yield from describe_still(self._still_levels, tally.num_pictures, tally.num_sampled)
        yield from self._odd.describe()
        if self._sampling.count is not None and tally.num_sampled < self._sampling.count:
            why = "the clip has no more" if lost == 0 and not tally.num_failed else "the others cannot be decoded"
            yield f"{self._sampling.count} frames requested, {tally.num_sampled} returned: {why}"
        if tally.num_restamped:
            yield f"timestamps run backwards or are missing; frames timed by their order: {tally.num_restamped}"
        if tally.num_failed:
            yield f"{SKIPPED}: {tally.num_failed}"
        if tally.num_damaged:
            yield f"{DAMAGED}: {tally.num_damaged}"
        if lost > 0:
            yield f"{lost:.2f} s of video are lost"
