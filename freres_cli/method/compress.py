"""The streaming compressor: latents go in frame by frame, tracks within the budget come out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from torch import Tensor

from freres_cli.method.anchors import EventDetector, anchor_schedule
from freres_cli.method.budget import BudgetPlan, MethodSettings
from freres_cli.method.gop import ClosedGop, OpenGop
from freres_cli.method.residuals import pool_to_cells
from freres_cli.method.select import select_tracks
from freres_cli.tracks import GOP_STARTS, Tracks

UNIFORM, EVENT, DEMOTED = range(len(GOP_STARTS))

# Ours. Cuts beyond the cap still end a GoP, so that no residual crosses them. The strongest of them, at most this many,
# keep their residual tracks; the others keep one summary each. This bounds memory in a film with a thousand cuts.
MAX_DEMOTED_TRACKS = 32
# Ours. A uniform anchor that a cut follows within this share of a GoP moves to the cut: its own frame still belongs to the
# shot before, where it would stand for next to nothing.
MOVE_SHARE = 0.25


class StreamingCompressor:
    """Turns a stream of latents into tracks (method sections 2 to 7).

    Memory grows with the tokens kept, not with the frames, but for 8 bytes for the time of each. The result does not
    depend on how frames are batched.
    """

    def __init__(self, plan: BudgetPlan, settings: MethodSettings, width: int) -> None:
        self._plan = plan
        self._settings = settings
        self._width = width
        self._schedule = set(anchor_schedule(plan.num_frames, plan.num_anchors))
        self._reach = _choose_reach(plan)
        self._detector = EventDetector(settings.tau) if plan.max_events else None
        self._gops: list[ClosedGop] = []
        self._open: OpenGop | None = None
        # The GoP before a uniform anchor that may still move: as it was when it closed, and as it goes on if it does.
        self._held: tuple[OpenGop, ClosedGop] | None = None
        self._events: list[OpenGop | ClosedGop] = []
        self._demoted: list[ClosedGop] = []
        self._seconds = array("d")  # 8 bytes a frame
        self.num_cuts_found = 0
        self.num_cuts_not_honoured = 0

    @property
    def num_frames(self) -> int:
        """Number of frames so far."""
        return len(self._seconds)

    def push(self, latents: Tensor, seconds: Iterable[float]) -> None:
        """Take the next frames: ``latents`` (n, H, W, C) and their times in seconds."""
        if tuple(latents.shape[1:3]) != self._plan.grid:
            raise ValueError(f"latents: expected a grid of {self._plan.grid}, got {tuple(latents.shape[1:3])}")
        cells = pool_to_cells(latents, *self._plan.pooled_grid)
        for frame_latents, frame_cells, second in zip(latents, cells, seconds, strict=True):
            self._push_frame(frame_latents, frame_cells, second)

    def _push_frame(self, latents: Tensor, cells: Tensor, second: float) -> None:
        frame = len(self._seconds)
        self._seconds.append(second)
        distance, is_event = 0.0, False
        if self._detector is not None:
            distance, is_event = self._detector.observe(latents[..., : self._width])
        self.num_cuts_found += is_event
        is_uniform = frame in self._schedule
        if self._open is not None and not (is_uniform or is_event):
            self._append(latents, cells)
            return
        if self._held is not None and not is_uniform:
            # The uniform anchor moves here, and the GoP before it takes the frames that it had.
            self._open, self._held, is_uniform = self._held[0], None, True
        self._close(may_go_on=is_uniform and not is_event)
        if self._held is not None:
            self._held[0].append(latents, cells)
        start = UNIFORM if is_uniform else EVENT
        # A slice of the batch would keep the whole batch alive.
        self._open = OpenGop(frame, latents.clone(), self._width, self._plan.pooled_grid, start, distance)
        if start == EVENT:
            self._honour(self._open)

    def _append(self, latents: Tensor, cells: Tensor) -> None:
        """Add a residual frame to the open GoP, and to the one before while its uniform anchor may still move."""
        assert self._open is not None
        self._open.append(latents, cells)
        if self._held is None:
            return
        self._held[0].append(latents, cells)
        if self._open.num_residuals >= self._reach:
            self._settle()

    def _honour(self, event: OpenGop) -> None:
        """Admit an event. Above the cap the weakest one is demoted, whichever that is (the strongest cuts win)."""
        self._events.append(event)
        if len(self._events) <= self._plan.max_events:
            return
        weakest = min(self._events, key=_strength)
        self._events.remove(weakest)
        self.num_cuts_not_honoured += 1
        if isinstance(weakest, ClosedGop):
            self._demote(weakest)
        else:
            weakest.start = DEMOTED

    def _demote(self, gop: ClosedGop) -> None:
        gop.drop_anchor(DEMOTED)
        self._demoted.append(gop)
        if len(self._demoted) > MAX_DEMOTED_TRACKS:
            weakest = min(self._demoted, key=_strength)
            self._demoted.remove(weakest)
            weakest.drop_residuals()

    def _close(self, may_go_on: bool = False) -> None:
        """Close the open GoP. ``may_go_on``: because of a uniform anchor, which may still move and give it more frames."""
        self._settle()
        if self._open is None:
            return
        self._held = self._open, self._open.close(self._plan.num_coefficients)
        self._open = None
        if not may_go_on or not self._reach:
            self._settle()

    def _settle(self) -> None:
        """Take the GoP that is held as it was when it closed."""
        if self._held is None:
            return
        gop, closed = self._held
        self._held = None
        if closed.start == DEMOTED:
            self._demote(closed)
        elif closed.start == EVENT:
            self._events[self._events.index(gop)] = closed
        self._gops.append(closed)

    def finish(self) -> Tracks:
        """Close the last GoP and return the tracks. Raises ``ValueError`` if there were no frames."""
        self._close()
        if not self._seconds:
            raise ValueError("no frames: expected at least 1")
        return select_tracks(self._gops, self._plan, self._settings, self._width, self._seconds)


def _choose_reach(plan: BudgetPlan) -> int:
    """Return how many frames after a uniform anchor a cut may still move it, 0 for none.

    A GoP that starts that much later must still have a residual frame for each coefficient and an impulse, or tokens would
    be lost.
    """
    if not plan.max_events:
        return 0
    length = plan.num_frames // plan.num_anchors
    return max(0, min(max(1, int(length * MOVE_SHARE)), length - 2 - plan.num_coefficients))


def _strength(gop: OpenGop | ClosedGop) -> tuple[float, int]:
    return gop.event_distance, -gop.anchor_frame


def compress_latents(
    latents: Tensor, seconds: Iterable[float], plan: BudgetPlan, settings: MethodSettings, width: int
) -> Tracks:
    """Return the tracks of a whole clip: ``latents`` (T, H, W, C), ``seconds`` one per frame.

    ``plan``: from ``plan_budget`` with the same ``settings``. ``width``: D, the main channels, which energies are computed
    over.
    """
    compressor = StreamingCompressor(plan, settings, width)
    compressor.push(latents, seconds)
    return compressor.finish()
