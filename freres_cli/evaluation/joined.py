"""Answers that are there already: of this run's own file, of other shards, and of methods that were compared before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freres_cli.errors import UsageError
from freres_cli.evaluation.results import ResultsLog, find_differing, read_log

METHODS = "methods"  # the one key of a run that may differ
REMEDY = "--join takes results of freres eval for the same questions, model, device, settings and releases"


@dataclass(frozen=True)
class KnownCells:
    """What is known about a video. ``row``: one that was written before, whose ``cells`` are not these; ``None`` if nothing
    is known. ``cells``: its parts by the place of their method in the run that is made. ``num_joined``: how many of them
    are from other files than the run's own. ``sha256``: of the video, if it was read. ``notes``, ``lost_s``: how the video
    was read for any of the cells."""

    row: Mapping[str, Any] | None = None
    cells: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    num_joined: int = 0
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    lost_s: float = 0.0


class JoinedAnswers:
    """The answers of other results files to the questions of a run.

    ``paths``: the files; of two that have the same answers, the first counts. ``run``: everything that decides the answers,
    as in ``ResultsFile``. Raises ``UsageError`` for a file that cannot be used, of a run that differs in more than its
    methods, or with none of the methods of this one.
    """

    def __init__(self, paths: Sequence[Path], run: Mapping[str, Any]) -> None:
        written = json.loads(json.dumps(run))  # as files have it
        self._num_cells = len(run[METHODS])
        self._files = [self._read(path, written) for path in paths]

    def find(self, video: str, sha256: str, asked: set[str], own: Mapping[str, Any] | None = None) -> KnownCells:
        """Return what is known about a video.

        ``video``: its name. ``sha256``: of the file. ``asked``: the ids of its questions: what answers other ones is not
        taken, as tokens and times are those of all of them. ``own``: what the run's own file has about it, which counts
        first. What failed is not known: it is tried again.
        """
        used: list[Mapping[str, Any]] = []
        cells: dict[int, dict[str, Any]] = {}
        num_own = 0
        for row, places in self._find_rows(video, own):
            if row is None or row["status"] != "ok" or row["video_sha256"] != sha256:
                continue
            for place, other in places.items():
                cell = row["cells"][other]
                if place not in cells and cell["status"] == "ok" and cell["answers"].keys() == asked:
                    cells[place] = cell
                    num_own += row is own
                    used.append(row)
        # Rows of the same video may have read other frames of it.
        notes = dict.fromkeys(note for row in used for note in row["notes"])
        lost_s = max((row["lost_s"] for row in used), default=0.0)
        return KnownCells(used[0] if used else None, cells, len(cells) - num_own, sha256, tuple(notes), lost_s)

    def _find_rows(
        self, video: str, own: Mapping[str, Any] | None
    ) -> Iterator[tuple[Mapping[str, Any] | None, Mapping[int, int]]]:
        """Rows about a video, each with the places of the run's methods in it."""
        if own is not None and len(own.get("cells", ())) == self._num_cells:
            yield own, {place: place for place in range(self._num_cells)}
        for rows, places in self._files:
            yield rows.get(video), places

    @staticmethod
    def _read(path: Path, run: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[int, int]]:
        """The rows of a file by video, and where it has each method of the run."""
        log = read_log(path, REMEDY, packed=True)
        if log is None:
            raise UsageError(f"{path}: holds no results", REMEDY)
        if differing := [key for key in find_differing(log.run, run) if key != METHODS]:
            raise UsageError(f"{path}: holds the results of another run: {', '.join(differing)} differs", REMEDY)
        held = log.run.get(METHODS)
        if not isinstance(held, list) or not all(isinstance(cell, list) and cell for cell in held):
            raise UsageError(f"{path}: damaged results: the header names no methods", REMEDY)
        places = {own: held.index(cell) for own, cell in enumerate(run[METHODS]) if cell in held}
        if not places:
            names = ", ".join(str(cell[0]) for cell in held)
            raise UsageError(f"{path}: has none of the methods and budgets that are compared: it has {names}", REMEDY)
        return _check_cells(path, log, len(held)), places


def _check_cells(path: Path, log: ResultsLog, count: int) -> dict[str, dict[str, Any]]:
    rows = {row["video"]: row for row in log.rows if row["status"] == "ok"}
    for row in rows.values():
        if len(row["cells"]) != count:
            raise UsageError(
                f"{path}: damaged results: {row['video']} has {len(row['cells'])} of {count} methods", REMEDY
            )
    return rows
