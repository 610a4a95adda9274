"""video -> bundle, for one video or many: the model is loaded once, and a bad video is a failed row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from freres_cli.bundle.store import read_bundle
from freres_cli.errors import BackboneError, BundleError, FreresError, ResourceError, UsageError
from freres_cli.files import check_destination, make_folder
from freres_cli.pipeline.bundle import Bundle
from freres_cli.pipeline.compressor import Compressor, Progress
from freres_cli.pipeline.matching import find_differences
from freres_cli.video.probe import hash_file

SUFFIX = ".pt"


@dataclass(frozen=True)
class CompressResult:
    """A written bundle and what it cost. ``timings_s``: seconds by stage; ``notes``: what the user should know."""

    bundle: Path
    bundle_bytes: int
    manifest: dict[str, Any]
    timings_s: dict[str, float]
    peak_memory_bytes: int
    dtype: torch.dtype
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What became of one video of many.

    ``status``: done, skipped (its bundle was there already, whole and the same) or failed. ``result``: of one that is
    done. ``manifest``: of its bundle, unless it failed. ``error``: why it failed.
    """

    video: Path
    bundle: Path
    status: str
    result: CompressResult | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    error: FreresError | None = None


def compress_file(
    compressor: Compressor, video: Path, output: Path, *, force: bool = False, progress: Progress | None = None
) -> CompressResult:
    """Compress a video into a bundle; nothing is written unless everything went well.

    ``compressor``: model and settings. ``video``, ``output``: the files. ``force``: replace an existing bundle.
    ``progress``: told how many frames of how many are done. Raises what ``Compressor.compress`` and ``Bundle.save``
    raise.
    """
    check_destination(output, force)
    _refuse_overwriting(video, output)
    start = time.perf_counter()
    bundle = compressor.compress(video, progress=progress)
    return _write(compressor, bundle, output, force, start)


def _refuse_overwriting(video: Path, output: Path) -> None:
    if output.exists() and video.is_file() and output.samefile(video):
        raise UsageError(f"{output}: is the video itself", "name another file with -o")


def _write(compressor: Compressor, bundle: Bundle, output: Path, force: bool, start: float) -> CompressResult:
    before = time.perf_counter()
    bundle.save(output, force=force)
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
) -> list[Row]:
    """Compress videos into a folder, with one load of the model, and none where every bundle is there.

    A bundle that is there already and is what would be made (the same video by its hash, model and settings) is left as
    it is. Any other file in its place is a failed row, unless ``force`` replaces it; so is a video that cannot be used.

    ``compressor``: model and settings. ``videos``: each with the name of its bundle, without suffix, below ``folder``,
    which is made. ``on_row``: told each row as it is known. ``progress``: told how many videos of how many are done.
    Raises ``UsageError`` for the folder, ``BackboneError`` where the model cannot be loaded.
    """
    make_folder(folder)
    rows = []
    for done, (video, name) in enumerate(videos):
        if progress is not None:
            progress(done, len(videos))
        output = folder / name.with_name(name.name + SUFFIX)
        try:
            row = _compress_one(compressor, video, output, force)
        except FreresError as error:
            # Without a model every other video would fail by the same cause.
            if isinstance(error, BackboneError | ResourceError) and not compressor.models.has_encoder:
                raise
            row = Row(video, output, "failed", error=error)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _compress_one(compressor: Compressor, video: Path, output: Path, force: bool) -> Row:
    make_folder(output.parent)
    check_destination(output, force=True)
    _refuse_overwriting(video, output)
    if output.exists():
        sha256 = hash_file(video)
        manifest, difference = _compare(compressor, sha256, output)
        if difference is None:
            return Row(video, output, "skipped", manifest=manifest)
        if not force:
            raise UsageError(f"{output}: {difference}", "name another folder with -o, or overwrite it with --force")
    result = compress_file(compressor, video, output, force=force)
    return Row(video, output, "done", result, result.manifest)


def _compare(compressor: Compressor, video_sha256: str, output: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest of the bundle in the output's place, and why it is not the one that would be made, if so."""
    try:
        manifest = read_bundle(output).manifest
    except BundleError:
        return {}, "already exists, and is not a whole bundle"
    differing = find_differences(manifest, video_sha256, compressor.models.identify_encoder(), compressor.options)
    return manifest, f"holds another compression: {', '.join(differing)} differs" if differing else None
