"""How far the reading of a video has come, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from freres_cli.video.oddities import OddFrames


@dataclass(frozen=True)
class DecodeReport:
    """The outcome of decoding. ``num_pictures``: sampled frames that differ from the one before. ``lost_s``: seconds of the
    requested part that could not be decoded."""

    num_frames_decoded: int
    num_frames_sampled: int
    num_pictures: int
    lost_s: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Position:
    """How far reading has come, to go on from there in another process.

    ``num_sampled``, ``num_pictures``: so far. ``picture_index``, ``picture_s``: number and time of the frame that shows the
    last picture; ``picture_slot``: frames sampled before it; ``odd``: what was odd before it. ``is_clean``: nothing was
    damaged so far.
    """

    num_sampled: int
    num_pictures: int
    picture_index: int
    picture_s: float
    picture_slot: int
    odd: OddFrames
    is_clean: bool


@dataclass
class Tally:
    """Counts kept while decoding.

    ``num_before``: frames before the one that decoding began at. ``is_on_gpu``: whether a GPU decodes, as long as nothing is
    damaged. ``num_missing``: frames of the requested part that did not come out of the decoder; ``num_missing_first``:
    those of them before the first that did.
    """

    num_before: int = 0
    is_on_gpu: bool = False
    num_decoded: int = 0
    num_sampled: int = 0
    num_pictures: int = 0
    num_failed: int = 0
    num_missing: int = 0
    num_missing_first: int = 0
    num_damaged: int = 0
    num_restamped: int = 0
    is_read_again: bool = False
    ends_badly: bool = False
    is_exhausted: bool = False
    covered_s: float = 0.0
