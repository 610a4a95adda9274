"""The state of a long compression, kept beside its output, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from freres_cli import __version__
from freres_cli.backbones.base import VisionEncoder
from freres_cli.errors import FreresError, is_out_of_memory
from freres_cli.files import make_folder, write_atomically
from freres_cli.method.adaptive import CutDetector, StretchCompressor
from freres_cli.method.anchors import EventDetector
from freres_cli.method.budget import Allocation, BudgetPlan, MethodSettings
from freres_cli.method.compress import StreamingCompressor
from freres_cli.method.gop import ClosedGop, OpenGop, SummaryStore
from freres_cli.method.merging import STATE_CLASSES
from freres_cli.method.residuals import ResidualTrajectory
from freres_cli.pipeline.between import Waiting
from freres_cli.pipeline.encoding import VideoSource, count_batch_frames
from freres_cli.pipeline.planning import CompressOptions, CompressPlan
from freres_cli.pipeline.reduction import Reducer
from freres_cli.records import Frames
from freres_cli.video.lines import KeyFinder
from freres_cli.video.oddities import OddFrames
from freres_cli.video.reading import Position

PREFIX, SUFFIX = ".freres-", ".resume"
_DAMAGE = (
    *(OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)
EVERY_S = 300.0
MOST_SHARE = 0.05  # of the time that may go into writing
KEPT_S = 14 * 24 * 3600.0  # nobody comes back for an older one

# All that a file may hold besides tensors and plain values: torch refuses to make anything else.
CLASSES = (
    *(StreamingCompressor, OpenGop, ClosedGop, SummaryStore, ResidualTrajectory, EventDetector),
    *(BudgetPlan, Allocation, MethodSettings, StretchCompressor, CutDetector, *STATE_CLASSES),
    *(Position, OddFrames, array, Waiting, KeyFinder, Frames),
)


@dataclass(frozen=True)
class State:
    """How far a compression has come. ``position``: of the decoder. ``known``: latents of the last picture, by its number.
    ``reducer``: what it keeps so far. ``waiting``: the frames since the last key frame, if frames between are not encoded."""

    position: Position
    known: dict[int, Tensor]
    reducer: Reducer
    waiting: Waiting | None = None


class Checkpoints:
    """Keeps the state of one compression.

    ``folder``: of its output. ``tell``: called with a line when it goes on from a state, or cannot keep one. ``every_s``:
    seconds between two writes; work that takes less leaves nothing on the disk.
    """

    def __init__(self, folder: Path, tell: Callable[[str], object], every_s: float | None = None) -> None:
        self._folder, self._tell = folder, tell
        self._every_s = EVERY_S if every_s is None else every_s
        self._due = time.monotonic() + self._every_s
        self._path: Path | None = None
        self._identify: Callable[[], str] = str
        self.resumed_frames = 0

    def find(
        self, source: VideoSource, options: CompressOptions, plan: CompressPlan, encoder: VisionEncoder
    ) -> State | None:
        """Return the state that the same work was stopped at, if there is one.

        ``source``, ``options``, ``plan``, ``encoder``: the work. It is the same if the video has the same bytes, and the
        model, the settings, the device and the versions of freres, torch and PyAV are the same.
        """
        self._identify = lambda: _digest(source, options, plan, encoder)
        kept = [path for path in self._folder.glob(f"{PREFIX}*{SUFFIX}") if not _remove_if_old(path)]
        if not kept:
            return None  # the video need not be hashed before it is read
        self._path = self._place()
        if self._path not in kept:
            return None
        state = _read(self._path)
        if state is None:
            self._tell("the state of a stopped run cannot be read: beginning anew")
            self.remove()
            return None
        self.resumed_frames = state.position.num_sampled
        self._tell(
            f"going on after {self.resumed_frames} of {plan.num_frames} frames, where an earlier run was stopped"
        )
        return state

    def is_due(self) -> bool:
        """Whether it is time to write a state."""
        return time.monotonic() >= self._due

    def offer(self, make_state: Callable[[], State]) -> None:
        """Write the state if it is time to. A disk that is full costs the state, not the work."""
        if not self.is_due():
            return
        begun = time.monotonic()
        self._path = self._path or self._place()
        state = make_state()
        parts = {"position": state.position, "known": state.known, "reducer": state.reducer, "waiting": state.waiting}
        try:
            make_folder(self._folder)  # a command that failed may have removed it while it was empty
            write_atomically(self._path, lambda file: torch.save(parts, file), force=True)
        except FreresError as error:
            self._tell(f"the state of this run cannot be kept, so a stopped run begins anew: {error.message}")
            self._due = float("inf")
            return
        end = time.monotonic()
        self._due = end + max(self._every_s, (end - begun) / MOST_SHARE)

    def remove(self) -> None:
        """Remove the state, if there is one: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _place(self) -> Path:
        return self._folder / f"{PREFIX}{self._identify()[:24]}{SUFFIX}"


def _remove_if_old(path: Path) -> bool:
    try:
        if time.time() - path.stat().st_mtime < KEPT_S:
            return False
        path.unlink()
    except OSError:
        return False
    return True


def _digest(source: VideoSource, options: CompressOptions, plan: CompressPlan, encoder: VisionEncoder) -> str:
    facts = {
        "versions": [__version__, torch.__version__, av.__version__],
        "video": [source.sha256, source.num_bytes],
        "model": [encoder.fingerprint, str(encoder.dtype), encoder.attention, encoder.pixels_sha256],
        "device": options.model.device.name,
        "settings": {**options.settings.values(), "method": options.method},
        "window": [options.start_s, options.end_s, options.strict, options.decode],
        "plan": [asdict(plan.sampling), asdict(plan.size), plan.num_frames, count_batch_frames(plan)],
        # Settings alone do not say whether the budget limits a --quality: where they come from does.
        "limits": [plan.budget_tokens, plan.quality],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> State | None:
    """Return the state in a file of this user; ``None`` if it is damaged or holds anything else."""
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(list(CLASSES)):
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            with zipfile.ZipFile(file) as archive:  # torch does not look at the checksums that it writes
                if archive.testzip() is not None:
                    return None
            file.seek(0)
            parts: dict[str, Any] = torch.load(file, weights_only=True)
        return State(parts["position"], parts["known"], parts["reducer"], parts["waiting"])
    except _DAMAGE as error:
        if is_out_of_memory(error):
            raise  # the state is good, and stays for when there is room
        return None
