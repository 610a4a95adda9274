"""The streaming compressor: latents go in frame by frame, tracks within the budget come out."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import Tensor

from freres_cli.method.anchors import EventDetector, anchor_schedule
from freres_cli.method.budget import BudgetPlan, MethodSettings
from freres_cli.method.gop import ClosedGop, OpenGop, SummaryStore, fetch
from freres_cli.method.residuals import pool_to_cells
from freres_cli.method.select import select_tracks
from freres_cli.tracks import GOP_STARTS, Tracks

# Frames of a batch, by index -> their latents on the whole grid, (k, H, W, C).
EncodeWhole = Callable[[list[int]], Tensor]

UNIFORM, EVENT, DEMOTED = range(len(GOP_STARTS))

# Ours. Cuts beyond the cap still end a GoP, so that no residual crosses them. The strongest of them, at most this many,
# keep their residual tracks; the others keep one summary each. This bounds memory in a film with a thousand cuts.
MAX_DEMOTED_TRACKS = 32
# Ours. A uniform anchor that a cut follows within this share of a GoP moves to the cut: its own frame still belongs to the
# shot before, where it would stand for next to nothing.
MOVE_SHARE = 0.25


class StreamingCompressor:
    """Turns a stream of latents into tracks (method sections 2 to 7).

    Memory grows with the tokens kept, not with the frames, but for 8 bytes for the time of each. How the same latents are
    batched does not change the result: on a CPU to the bit, on a GPU but for rounding, as sums over a batch are added up in
    another order there.
    """

    def __init__(self, plan: BudgetPlan, settings: MethodSettings, width: int) -> None:
        self._plan = plan
        self._settings = settings
        self._width = width
        self._schedule = set(anchor_schedule(plan.num_frames, plan.num_anchors))
        self._reach = _choose_reach(plan)
        self._detector = EventDetector(settings.tau) if plan.max_events else None
        self._gops: list[ClosedGop] = []
        self._on_device: list[ClosedGop] = []  # closed since the last copy
        self._open: OpenGop | None = None
        # The GoP before a uniform anchor that may still move: as it was when it closed, and as it goes on if it does.
        self._held: tuple[OpenGop, ClosedGop] | None = None
        self._events: list[OpenGop | ClosedGop] = []
        self._demoted: list[ClosedGop] = []
        # What gave up its residuals, moved to the store once it is on the host.
        self._dropped: list[ClosedGop] = []
        self._store = SummaryStore()
        self._seconds = array("d")  # 8 bytes a frame
        self.num_frames_whole = 0
        self.num_cuts_found = 0
        self.num_cuts_not_honoured = 0

    @property
    def num_frames(self) -> int:
        """Number of frames so far."""
        return len(self._seconds)

    def push(self, latents: Tensor, seconds: Iterable[float], whole: EncodeWhole | None = None) -> None:
        """Take the next frames: ``latents`` (n, H, W, C) and their times in ``seconds``.

        With ``whole`` there are two resolutions (method section 9): ``latents`` are on a smaller grid, events and residuals
        are taken from them, and ``whole`` is asked for the anchor frames of the batch. Raises ``ValueError`` for another
        grid or number of times, and takes nothing then.
        """
        if whole is None and tuple(latents.shape[1:3]) != self._plan.grid:
            raise ValueError(f"latents: expected a grid of {self._plan.grid}, got {tuple(latents.shape[1:3])}")
        seconds = list(seconds)
        if len(seconds) != latents.shape[0]:
            raise ValueError(f"seconds: expected {latents.shape[0]}, got {len(seconds)}")
        cells = pool_to_cells(latents, *self._plan.pooled_grid)
        first = len(self._seconds)
        last = self._seconds[-1] if self._seconds else None
        self._seconds.extend(seconds)
        found = self._detect(latents, [a == b for a, b in pairwise([last, *seconds])])
        starts = [i for i, (_, is_event) in enumerate(found) if is_event or first + i in self._schedule]
        self.num_frames_whole += 0 if whole is None else len(starts)
        # Indexing with a list would send the list to the device.
        anchors = whole(starts) if whole is not None and starts else [latents[i] for i in starts]
        for run, anchor in zip(_split_runs(starts, len(found)), [None, *anchors], strict=True):
            if anchor is not None:
                at, run = run.start, slice(run.start + 1, run.stop)
                self._begin(first + at, anchor, latents[at : at + 1], cells[at : at + 1], *found[at])
            if run.start < run.stop:
                self._append(latents[run], cells[run])

    def _detect(self, latents: Tensor, is_repeat: list[bool]) -> list[tuple[float, bool]]:
        """The distance of each frame to the one before, and whether it is an event.

        These are the only numbers that the rest waits for. The GoPs that closed in the batch before come to the host with
        them, so there is one copy from the device a batch.
        """
        if self._detector is None:
            self._fetch()
            return [(0.0, False)] * latents.shape[0]
        (distances,) = self._fetch(self._detector.measure(latents[..., : self._width]))
        listed: list[float] = distances.tolist()
        return list(zip(listed, self._detector.judge(listed, is_repeat), strict=True))

    def _fetch(self, *more: Tensor) -> list[Tensor]:
        """Bring the closed GoPs to the host, and ``more`` with them, which is returned."""
        tensors = [gop.tensors() for gop in self._on_device]
        fetched = iter(fetch([*more, *(tensor for named in tensors for tensor in named.values())]))
        brought = [next(fetched) for _ in more]
        for gop, named in zip(self._on_device, tensors, strict=True):
            for name in named:
                setattr(gop, name, next(fetched))
        self._on_device.clear()
        for gop in self._dropped:
            gop.move_to(self._store)
        self._dropped.clear()
        return brought

    def _begin(
        self, frame: int, anchor: Tensor, latents: Tensor, cells: Tensor, distance: float, is_event: bool
    ) -> None:
        """Open a GoP at an anchor frame. ``anchor``: (H, W, C); ``latents`` (1, h, w, C) and ``cells`` as of a residual
        frame."""
        self.num_cuts_found += is_event
        is_uniform = frame in self._schedule
        if self._held is not None and not is_uniform:
            # The uniform anchor moves here, and the GoP before it takes the frames that it had.
            self._open, self._held, is_uniform = self._held[0], None, True
        self._close(may_go_on=is_uniform and not is_event)
        if self._held is not None:
            self._held[0].append(latents, cells)
        start = UNIFORM if is_uniform else EVENT
        # Slices of the batch would keep the whole batch alive.
        reference = latents[0].clone(), cells[0].clone()
        self._open = OpenGop(frame, anchor.clone(), self._width, self._plan.pooled_grid, start, distance, reference)
        if start == EVENT:
            self._honour(self._open)

    def _append(self, latents: Tensor, cells: Tensor) -> None:
        """Add residual frames to the open GoP, and to the one before while its uniform anchor may still move."""
        assert self._open is not None
        self._open.append(latents, cells)
        if self._held is None:
            return
        left = max(1, self._reach - self._open.num_residuals + latents.shape[0])
        self._held[0].append(latents[:left], cells[:left])
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
            self._dropped.append(weakest)

    def _close(self, may_go_on: bool = False) -> None:
        """Close the open GoP. ``may_go_on``: because of a uniform anchor, which may still move and give it more frames."""
        self._settle()
        if self._open is None:
            return
        closed = self._open.close(self._plan.num_coefficients)
        self._held = self._open, closed
        self._on_device.append(closed)
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
        self._fetch()
        if not self._seconds:
            raise ValueError("no frames: expected at least 1")
        return select_tracks(self._gops, self._plan, self._settings, self._width, self._seconds)


def _split_runs(starts: list[int], count: int) -> list[slice]:
    """Split ``count`` frames at ``starts``: the frames before the first, then those from each to the next."""
    return [slice(a, b) for a, b in pairwise([0, *starts, count])]


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
