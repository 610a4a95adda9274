"""videos -> how much of each clip the methods' tokens can rebuild. Each video is decoded and encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli.baselines.registry import FRE_RES
from freres_cli.bench.clock import StageTimer
from freres_cli.devices import memory_errors_as
from freres_cli.errors import FreresError
from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.fidelity import (
    READERS,
    Reading,
    find_places,
    lost_by_second,
    measure_energy,
    measure_loss,
    share_kept,
)
from freres_cli.evaluation.fidelity_plot import draw_fidelity
from freres_cli.evaluation.plots import PLOT_FLAG, PlotFile
from freres_cli.files import InputFiles
from freres_cli.method.rebuild import rebuild_frames
from freres_cli.pipeline.choices import count_budget
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.records import VideoTokens
from freres_cli.workflows.eval_run import describe_frame_counts, describe_oddities, reads_other_frames

Rebuild = Callable[[slice], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FidelityRequest:
    """What to measure.

    ``videos``: the files. ``cells``: the methods and budgets to compare. ``options``: model, device and settings.
    ``plot``: the picture to draw, if any.
    """

    videos: tuple[Path, ...]
    cells: tuple[Cell, ...]
    options: CompressOptions
    plot: PlotFile | None = None


@dataclass(frozen=True)
class FidelityResult:
    """What was measured.

    ``rows``: means over the videos, one for each method and budget. ``videos``: the same for each video, with the share
    that is lost in each second, and how the video was read. ``failed``: videos that could not be used, which count for no
    mean; ``first_failure`` is the error of the first of them. ``model``: the encoder's fingerprint. ``dtype``: of the
    latents. ``notes``: what the user should know.
    """

    rows: list[dict[str, Any]]
    videos: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    model: dict[str, Any]
    dtype: torch.dtype
    notes: tuple[str, ...]
    first_failure: FreresError | None = None


def measure_fidelity(
    request: FidelityRequest, progress: Progress | None = None, models: Models | None = None
) -> FidelityResult:
    """Measure what each method keeps of each video at each budget, and draw the plot if one is asked for.

    ``progress``: called with the number of videos done and the number of all videos. ``models``: a model that is already
    loaded; only its tower is used. Raises ``UsageError`` for a plot that cannot be drawn, and the error of the first
    video if none can be used.
    """
    if request.plot is not None:
        request.plot.check()
        inputs = InputFiles([*(("video", video) for video in request.videos), *request.options.files])
        inputs.refuse(request.plot.path, PLOT_FLAG)
    encoder = (models or Models(request.options.model)).encoder
    videos, failed, errors = [], [], []
    for done, path in enumerate(request.videos):
        if progress is not None:
            progress(done, len(request.videos))
        try:
            with memory_errors_as(f"video {path}", "measure a shorter one, or use a smaller --dtype"):
                timer = StageTimer(torch.device(request.options.model.device.name))
                clip = EncodedClip(VideoSource(path), request.options, encoder, timer)
                found = measure_clip(clip, request.cells, encoder.width)
                videos.append(found | {"video": str(path), "lost_s": clip.lost_s, "notes": list(clip.notes)})
        except FreresError as error:
            errors.append(error.without_frames().naming(path))
            failed.append({"video": str(path), "message": errors[-1].message})
    if not videos:
        first = errors[0]
        if len(errors) > 1:
            first = type(first)(f"none of {len(errors)} videos could be used: {first.message}", first.hint)
        raise first
    rows = average_rows([video["rows"] for video in videos])
    notes = [*describe_oddities(videos), *encoder.notes]
    if any(reads_other_frames(video["rows"]) for video in videos):
        told = describe_frame_counts(rows, request.options.settings.track_density, " (means over videos)")
        notes.append(f"{told}; all are judged on the frames that the settings name")
    if request.plot is not None:
        png, more = draw_fidelity(rows, videos)
        request.plot.write(png)
        notes += more
    model, first_failure = dict(encoder.fingerprint), errors[0] if errors else None
    return FidelityResult(rows, videos, failed, model, encoder.dtype, tuple(notes), first_failure)


def measure_clip(clip: EncodedClip, cells: Sequence[Cell], width: int) -> dict[str, Any]:
    """Return what is measured of one clip: its frames and tokens, and a row for each of ``cells``. ``width``: D."""
    energy = measure_energy(clip.latents, width)
    rows = []
    for cell in cells:
        budget_tokens = count_budget(cell.method, cell.budget, clip.full_tokens)
        num_tokens, rebuilds = rebuild_clip(clip, cell.method, budget_tokens)
        row: dict[str, Any] = {
            "method": cell.method,
            "budget": None if cell.budget is None else cell.budget.number,
            "budget_tokens": budget_tokens,
            "visual_tokens": num_tokens,
            "full_tokens": clip.full_tokens,
            "num_frames": clip.count_frames(cell.method, budget_tokens)[0],
        }
        for reader, rebuild in rebuilds.items():
            lost = measure_loss(clip.latents, rebuild, width)
            row[f"kept_{reader}"] = share_kept(float(lost.sum()), energy)
            row[f"lost_by_second_{reader}"] = lost_by_second(lost, energy, clip.pts_seconds)
        rows.append(row)
    return {"num_frames": clip.num_frames, "full_tokens": clip.full_tokens, "rows": rows}


def rebuild_clip(clip: EncodedClip, method: str, budget_tokens: int) -> tuple[int, dict[str, Rebuild]]:
    """Return how many tokens a method keeps of a clip, and the clip as each reader rebuilds it from them.

    Fre-Res is rebuilt from its tracks, by either reader. If a method reads frames more densely than the clip, each frame
    is compared with the one of them that is nearest in time; of several at one time, with one in the middle.
    """
    if method == FRE_RES:
        times = torch.tensor(clip.pts_seconds, dtype=torch.float64)
        tracks = clip.build_tracks(budget_tokens)
        frames = rebuild_frames(tracks)
        nearest = find_places(tracks.frame_seconds, times)
        return sum(tracks.num_tokens_by_kind().values()), dict.fromkeys(READERS, lambda part: frames[nearest[part]])
    tokens = clip.build_tokens(method, budget_tokens)
    return len(tokens), rebuild_tokens(clip, tokens)


def rebuild_tokens(clip: EncodedClip, tokens: VideoTokens) -> dict[str, Rebuild]:
    """Return the clip as each reader rebuilds it from visual tokens, at the times of the clip's frames."""
    readings = {name: read(tokens) for name, read in READERS.items()}
    if tokens.grid[0] == clip.num_frames:
        return {name: reading.frames for name, reading in readings.items()}
    near = find_places(tokens.frame_seconds, torch.tensor(clip.pts_seconds, dtype=torch.float64))
    return {name: partial(_frames_at, reading, near) for name, reading in readings.items()}


def _frames_at(reading: Reading, frames: Tensor, part: slice) -> Tensor:
    return reading.frames(frames[part])


def average_rows(videos: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean over videos of each row's figures; every video counts once."""
    figures = ("budget_tokens", "visual_tokens", "full_tokens", "num_frames", *(f"kept_{reader}" for reader in READERS))
    return [
        {key: own[0][key] for key in ("method", "budget")}
        | {key: sum(row[key] for row in own) / len(own) for key in figures}
        for own in zip(*videos, strict=True)
    ]
