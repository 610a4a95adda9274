"""video -> bundle, for one video or many. The model is loaded once, and a bad video becomes a failed row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.errors import (
    BackboneError,
    BundleError,
    DiskFullError,
    FreresError,
    ResourceError,
    UsageError,
    as_freres_error,
)
from freres_cli.files import InputFiles, check_destination, make_folder, save_stream
from freres_cli.pipeline.bundle import Bundle
from freres_cli.pipeline.checkpoints import Checkpoints
from freres_cli.pipeline.compressor import Compressor, Progress
from freres_cli.pipeline.matching import find_differences
from freres_cli.video.nvdec import choose_gpu
from freres_cli.video.opening import hash_file
from freres_cli.video.sampling import check_window

SUFFIX = ".pt"
PIPE_TITLE = "standard input"
Tell = Callable[[str], object]


@dataclass(frozen=True)
class CompressResult:
    """A written bundle and what it cost. ``timings_s``: seconds by stage; ``notes``: what the user should know;
    ``resumed_frames``: frames that an earlier run, which was stopped, had done."""

    bundle: Path
    bundle_bytes: int
    manifest: dict[str, Any]
    timings_s: dict[str, float]
    peak_memory_bytes: int
    dtype: torch.dtype
    notes: tuple[str, ...]
    resumed_frames: int = 0


@dataclass(frozen=True)
class Row:
    """The outcome for one of many videos.

    ``status``: done, skipped (the same bundle already exists) or failed. ``result``: what a
    finished video gave. ``manifest``: the bundle's, unless the video failed. ``error``: why it failed.
    """

    video: Path
    bundle: Path
    status: str
    result: CompressResult | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    error: FreresError | None = None


def compress_file(
    compressor: Compressor,
    video: Path,
    output: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
    title: str | None = None,
) -> CompressResult:
    """Compress a video into a bundle. Nothing is written unless everything succeeds, but for the state of long work, which
    is kept in a hidden file beside the bundle until the bundle is there.

    ``compressor``: model and settings. ``video``, ``output``: the files. ``force``: replace an existing bundle.
    ``progress``: called with the number of frames done and the number of all frames. ``tell``: called with a note when
    work goes on where an earlier run was stopped. ``title``: what the bundle calls the video. Raises what
    ``Compressor.compress`` and ``Bundle.save`` raise.
    """
    check_destination(output, force)
    InputFiles([("video", video), *compressor.options.files]).refuse(output)
    start = time.perf_counter()
    checkpoints = Checkpoints(output.parent, tell or (lambda _: None))
    bundle = compressor.compress(video, progress=progress, checkpoints=checkpoints, title=title)
    result = _write(compressor, bundle, output, force, start)
    checkpoints.remove()
    return replace(result, resumed_frames=checkpoints.resumed_frames)


def compress_stream(
    compressor: Compressor,
    stream: IO[bytes],
    output: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> CompressResult:
    """Compress a video that arrives through a pipe. It is saved beside the bundle first, and removed afterwards: a video is
    read more than once, and the number of its frames decides which are anchors. What needs no video is checked before the
    pipe is read.

    ``stream``: the pipe. ``compressor``, ``output``, ``force``, ``progress``, ``tell``: as ``compress_file`` takes them.
    """
    check_destination(output, force)
    options = compressor.options
    InputFiles(options.files).refuse(output)
    check_window(options.start_s, options.end_s)
    if (gpu := options.decoding_gpu) is not None:
        choose_gpu(gpu)
    compressor.models.identify_encoder()
    with save_stream(stream, output.parent) as saved:
        try:
            return compress_file(compressor, saved, output, force=force, progress=progress, tell=tell, title=PIPE_TITLE)
        except FreresError as error:
            raise type(error)(error.message.replace(str(saved), PIPE_TITLE), error.hint) from error


def _write(compressor: Compressor, bundle: Bundle, output: Path, force: bool, start: float) -> CompressResult:
    before = time.perf_counter()
    make_folder(output.parent)  # another command that failed may have removed it while it was empty
    write_bundle(output, bundle.content, bundle.manifest, force=force)
    end = time.perf_counter()
    assert bundle.peak_memory_bytes is not None
    return CompressResult(
        output,
        output.stat().st_size,
        dict(bundle.manifest),
        {**bundle.timings_s, "write": end - before, "total": end - start},
        bundle.peak_memory_bytes,
        compressor.models.encoder.dtype,
        bundle.notes,
    )


def compress_many(
    compressor: Compressor,
    videos: Sequence[tuple[Path, Path]],
    folder: Path,
    *,
    force: bool = False,
    on_row: Callable[[Row], None] | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> list[Row]:
    """Compress videos into a folder. The model is loaded once, or not at all if every bundle already exists.

    An existing bundle is skipped if it is the one that would be made: from the same video (by its hash), model and
    settings. Any other file in its place makes the row fail, unless ``force`` replaces it; so does an unusable video.

    ``compressor``: model and settings. ``videos``: each with the name of its bundle, without suffix, relative to
    ``folder``, which is created. ``on_row``: called with each row when it is done. ``progress``: called with the number
    of videos done and the number of all videos. ``tell``: as ``compress_file`` takes it. Raises ``UsageError`` for the
    folder, ``BackboneError`` if the model cannot be loaded, ``ResourceError`` if the GPU cannot decode, and
    ``DiskFullError`` after the row of the first bundle that finds no room.
    """
    if (gpu := compressor.options.decoding_gpu) is not None:
        choose_gpu(gpu)  # without it, every video would fail for the same reason
    rows = []
    inputs = InputFiles([*(("video", video) for video, _ in videos), *compressor.options.files])
    make_folder(folder)
    for done, (video, name) in enumerate(videos):
        if progress is not None:
            progress(done, len(videos))
        output = folder / name.with_name(name.name + SUFFIX)
        try:
            make_folder(output.parent)
            check_destination(output, force=True)
            inputs.refuse(output)
            row = _compress_one(compressor, video, output, force, tell)
        except Exception as error:
            # Without a model, or on a full disk, every other video would fail for the same reason.
            if isinstance(error, BackboneError | ResourceError) and not compressor.models.has_encoder:
                raise
            row = Row(video, output, "failed", error=as_freres_error(error, str(video)))
        rows.append(row)
        if on_row is not None:
            on_row(row)
        if isinstance(row.error, DiskFullError):
            raise row.error
    return rows


def _compress_one(compressor: Compressor, video: Path, output: Path, force: bool, tell: Tell | None) -> Row:
    row = _find_done(compressor, video, output, force)
    if row is not None:
        return row
    try:
        result = compress_file(compressor, video, output, force=force, tell=tell)
    except UsageError:
        # Another run may have written it in the meantime.
        row = _find_done(compressor, video, output, force)
        if row is None:
            raise
        return row
    return Row(video, output, "done", result, result.manifest)


def _find_done(compressor: Compressor, video: Path, output: Path, force: bool) -> Row | None:
    """The row of a bundle that need not be made again. Raises ``UsageError`` for any other file in its place, unless
    ``force`` replaces it."""
    if not output.exists():
        return None
    manifest, difference = _compare(compressor, hash_file(video), output)
    if difference is None:
        return Row(video, output, "skipped", manifest=manifest)
    if force:
        return None
    raise UsageError(f"{output}: {difference}", "name another folder with -o, or overwrite it with --force")


def _compare(compressor: Compressor, video_sha256: str, output: Path) -> tuple[dict[str, Any], str | None]:
    """Return the manifest of the existing bundle, and how it differs from the one that would be made, if it does."""
    try:
        manifest = read_bundle(output).manifest
    except BundleError:
        return {}, "already exists, and is not an intact bundle"
    differing = find_differences(manifest, video_sha256, compressor.models.identify_encoder(), compressor.options)
    return manifest, f"already exists, and differs in {', '.join(differing)}" if differing else None
