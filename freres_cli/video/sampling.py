"""Choose the instants of a clip to sample: pure arithmetic, no video library.

Sampling an instant returns the frame on screen at that time: the last one whose timestamp is not after it, or the first
frame if the instant comes before all of them. A frame on screen at several instants is returned once for each, because
the temporal DCT and the language model's time axis both assume a uniform grid.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from freres_cli.errors import UsageError

MODES = ("fps", "count", "native")

# Containers with millisecond clocks store 2/30 s as 0.067: a timestamp may be this much later than the true time.
TOLERANCE_S = 1e-3
# 92 hours at 30 fps. A rate that was meant for a film would read each frame of a time lapse thousands of times.
MOST_INSTANTS = 10_000_000


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen, by ``mode``: ``fps`` per second, ``count`` in all, or every frame (``native``).

    ``start_s`` and ``end_s`` restrict sampling to a window, in seconds after the first frame of the clip.
    """

    mode: str
    fps: float | None = None
    count: int | None = None
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"sampling mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if (self.fps is not None) != (self.mode == "fps") or (self.count is not None) != (self.mode == "count"):
            raise UsageError(
                f"sampling mode {self.mode}: got fps={self.fps}, count={self.count}",
                hint="give fps with mode fps, count with mode count, and neither with mode native",
            )
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise UsageError(f"fps: expected a finite number above 0, got {self.fps}")
        if self.count is not None and self.count < 1:
            raise UsageError(f"number of frames: expected at least 1, got {self.count}")
        check_window(self.start_s, self.end_s)


def check_window(start_s: float | None, end_s: float | None, names: tuple[str, str] = ("start_s", "end_s")) -> None:
    """Refuse a part of a clip that cannot be. ``start_s``, ``end_s``: in seconds, ``None`` for the clip's own. ``names``: of
    both in messages. Raises ``UsageError``."""
    start = 0.0 if start_s is None else _as_float(start_s)
    end_s = None if end_s is None else _as_float(end_s)
    if not (math.isfinite(start) and start >= 0):
        raise UsageError(f"{names[0]}: expected a number of seconds, 0 or more, got {start}")
    if end_s is not None and not (math.isfinite(end_s) and end_s > start):
        raise UsageError(
            f"{names[1]}: expected a number of seconds above the start, {start:g}, got {end_s:g}",
            "choose an earlier start or a later end",
        )


def _as_float(number: float) -> float:
    """A whole number from a file may be larger than any float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def sampling_window(sampling: Sampling, start_s: float, duration_s: float) -> tuple[float, float]:
    """Start and end of the window on the file's own clock, in seconds. The end is not part of the window.

    Raises ``UsageError`` if the window starts after the end of the clip, or is too short to hold a frame.
    """
    end = duration_s if sampling.end_s is None else min(duration_s, sampling.end_s)
    start = sampling.start_s or 0.0
    if start > 0 and start >= duration_s - TOLERANCE_S:
        raise UsageError(
            f"the window starts at {start:g} s: the clip lasts {duration_s:.3f} s",
            hint="times count from the first frame of the clip",
        )
    if sampling.end_s is not None and end - start <= TOLERANCE_S:
        raise UsageError(
            f"the window from {start} to {sampling.end_s} s: expected more than {TOLERANCE_S:g} s",
            hint="choose an earlier start or a later end",
        )
    return start_s + start, start_s + end


def sampling_instants(sampling: Sampling, start_s: float, duration_s: float, num_shown: int) -> Sequence[float] | None:
    """The instants to sample, ascending, in seconds on the file's own clock; ``None`` means every frame.

    ``sampling`` is applied to a clip that starts at ``start_s`` on that clock, lasts ``duration_s`` and shows
    ``num_shown`` frames in the window. A count above the number of frames is reduced to it.
    """
    if sampling.mode == "native":
        return None
    first, last = sampling_window(sampling, start_s, duration_s)
    span = last - first
    count = num_sampled_frames(sampling, start_s, duration_s, num_shown)
    # Each instant is computed from its index: adding up steps of 1/fps drifts by a frame per hour.
    if sampling.fps is not None:
        return array("d", (first + k / sampling.fps for k in range(count)))
    return array("d", (first + (i + 0.5) * span / count for i in range(count)))


def num_sampled_frames(sampling: Sampling, start_s: float, duration_s: float, num_shown: int) -> int:
    """How many frames ``sampling`` will return, at least 1, computed without decoding; exact if every packet decodes.

    ``start_s``, ``duration_s`` and ``num_shown`` describe the clip, as in ``sampling_instants``. Raises ``UsageError`` for
    more than ``MOST_INSTANTS`` instants, and as ``sampling_window`` does.
    """
    if sampling.fps is not None:
        first, last = sampling_window(sampling, start_s, duration_s)
        # An instant within the tolerance of the end would show a frame that is already over.
        count = max(1, math.ceil((last - first - TOLERANCE_S) * sampling.fps - 1e-6))
        if count > MOST_INSTANTS:
            raise UsageError(
                f"{sampling.fps:g} frames a second of {last - first:.0f} s: expected at most {MOST_INSTANTS} frames, "
                f"got {count}",
                "set a lower sample_fps, or read a part of the video",
            )
        return count
    num_shown = max(1, num_shown)
    return num_shown if sampling.count is None else min(sampling.count, num_shown)


def num_shown_frames(sampling: Sampling, start_s: float, duration_s: float, stamps_s: Sequence[float]) -> int:
    """How many frames are on screen in the window of ``sampling``.

    ``stamps_s``: when each frame of the clip appears, ascending, in seconds on the file's own clock; it stays until the next
    one does. ``start_s``, ``duration_s``: as in ``sampling_instants``.
    """
    first, last = sampling_window(sampling, start_s, duration_s)
    if sampling.start_s is None and sampling.end_s is None:
        return len(stamps_s)
    num_over = max(0, bisect_right(stamps_s, first + TOLERANCE_S) - 1)
    return bisect_left(stamps_s, last - TOLERANCE_S) - num_over
