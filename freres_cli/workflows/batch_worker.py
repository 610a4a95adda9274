"""One job of a batch: fetch a video, compress it, store its bundle. The model is loaded once, for all jobs of a process."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from freres_cli.errors import DiskFullError, ExitStatus, FreresError, ResourceError, as_freres_error
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models, make_source
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.workflows.batch_store import Store, is_url, join_url
from freres_cli.workflows.compress import SUFFIX, Row, compress_many

FACTS = ("visual_tokens", "full_tokens", "video_s", "video_bytes", "bundle_bytes")


@dataclass(frozen=True)
class Job:
    """A video to compress.

    ``video``: its path or URL. ``name``: that of its bundle, without suffix, relative to the output. ``options``: how to
    compress it; each worker puts its own device in place of the one in there.
    """

    video: str
    name: str
    options: CompressOptions


@dataclass(frozen=True)
class WorkerSetup:
    """What all workers of a batch share.

    ``output``: the folder of the bundles, a path or a URL. ``force``: replace bundles that differ. ``model``, ``device``,
    ``dtype``, ``revision``, ``attention``: as ``models.make_source`` takes them. ``num_threads``: CPU threads of each.
    """

    output: str
    force: bool
    model: str
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    attention: str | None = None
    num_threads: int | None = None

    def bundle_of(self, job: Job) -> str:
        """Return the path or URL of a job's bundle."""
        return join_url(self.output, job.name + SUFFIX)


@dataclass(frozen=True)
class BatchRow:
    """The outcome for one video.

    ``status``: done, skipped (the same bundle already exists) or failed. ``facts``: values of ``FACTS``, as far as they are
    known. ``timings_s``: seconds by stage. ``total_s``: seconds that the video took, with fetching and storing.
    ``tries``: 2 if a worker broke on it before. ``error``: why it failed. ``is_fatal``: every other video would fail
    for the same reason.
    """

    video: str
    bundle: str
    status: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    total_s: float | None = None
    tries: int = 1
    notes: tuple[str, ...] = ()
    error: FreresError | None = None
    is_fatal: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the row as one JSON object; every row has every key."""
        return {
            "video": self.video,
            "bundle": self.bundle,
            "status": self.status,
            **{key: self.facts.get(key) for key in FACTS},
            "total_s": self.total_s,
            "timings_s": dict(self.timings_s),
            "tries": self.tries,
            "error": None if self.error is None else self.error.message,
            "exit_status": int(ExitStatus.DONE if self.error is None else self.error.exit_status),
        }


class _FatalError(Exception):
    """``error``, which would meet every other video as well."""

    def __init__(self, error: FreresError) -> None:
        super().__init__(error.message)
        self.error = error


class VideoWorker:
    """Works through jobs, one at a time, in one process. ``setup``: what it shares with the others. ``scratch``: a folder for
    copies of remote files."""

    def __init__(self, setup: WorkerSetup, scratch: Path) -> None:
        self._setup, self._scratch = setup, scratch
        self._models: Models | None = None

    def run(self, job: Job) -> BatchRow:
        """Return the outcome for one video. Whatever it does wrong is a failed row."""
        start = time.perf_counter()
        bundle = self._setup.bundle_of(job)
        try:
            row = self._run(job, bundle)
        except _FatalError as fatal:
            row = BatchRow(job.video, bundle, "failed", error=fatal.error, is_fatal=True)
        except MemoryError:
            hint = "lower its budget or grid, or use fewer --actors"
            row = BatchRow(job.video, bundle, "failed", error=ResourceError(f"{job.video}: not enough memory", hint))
        except Exception as error:  # a bug that one video shows must not end the run for all others
            row = BatchRow(job.video, bundle, "failed", error=as_freres_error(error, job.video))
        return replace(row, total_s=time.perf_counter() - start)

    def _run(self, job: Job, bundle: str) -> BatchRow:
        models = self._open_models()
        compressor = Compressor.from_options(replace(job.options, model=models.source), models)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            timings: dict[str, float] = {}
            video = self._fetch(job.video, Path(folder), timings)
            if not is_url(bundle):
                row = self._compress(compressor, video, job, Path(self._setup.output))
            else:
                row = self._compress_to_store(compressor, video, job, Path(folder) / "bundles", timings)
            return _describe(row, job.video, bundle, timings)

    def _open_models(self) -> Models:
        if self._models is None:
            s = self._setup
            try:
                self._models = Models(make_source(s.model, s.device, s.dtype, s.revision, s.attention))
            except FreresError as error:
                raise _FatalError(error) from error
        return self._models

    def _fetch(self, video: str, folder: Path, timings: dict[str, float]) -> Path:
        if not is_url(video):
            return Path(video)
        start = time.perf_counter()
        (folder / "video").mkdir()
        path = Store(video).fetch(folder / "video")
        timings["fetch"] = time.perf_counter() - start
        return path

    def _compress(self, compressor: Compressor, video: Path, job: Job, folder: Path) -> Row:
        try:
            return compress_many(compressor, [(video, Path(job.name))], folder, force=self._setup.force)[0]
        except FreresError as error:  # it raises only what concerns every video: model, folder or disk
            raise _FatalError(error) from error

    def _compress_to_store(
        self, compressor: Compressor, video: Path, job: Job, folder: Path, timings: dict[str, float]
    ) -> Row:
        """Compress into a local folder, where the stored bundle, if there is one, is compared first; then store it."""
        store = Store(self._setup.bundle_of(job))
        local = folder / (job.name + SUFFIX)
        local.parent.mkdir(parents=True)
        try:
            if store.exists():
                shutil.move(store.fetch(folder), local)
        except FreresError:
            if not self._setup.force:
                raise
        try:
            row = self._compress(compressor, video, job, folder)
        except _FatalError as fatal:
            if not isinstance(fatal.error, DiskFullError):
                raise
            # Copies are removed one by one, so a smaller video may find room.
            message = f"{job.video}: not enough disk space for its bundle, which is made here first"
            raise ResourceError(message, "set TMPDIR to a larger disk") from fatal
        if row.status == "done":
            start = time.perf_counter()
            try:
                store.put(local)
            except DiskFullError as error:
                raise _FatalError(error) from error
            timings["store"] = time.perf_counter() - start
        return row


def _describe(row: Row, video: str, bundle: str, timings: Mapping[str, float]) -> BatchRow:
    """The outcome in the names that the user knows: those of remote files, not of their copies."""
    error = row.error
    if error is not None:
        message, hint = (
            None if text is None else text.replace(str(row.video), video).replace(str(row.bundle), bundle)
            for text in (error.message, error.hint)
        )
        return BatchRow(video, bundle, "failed", timings_s=timings, error=type(error)(str(message), hint))
    result, source = row.result, row.manifest["source"]
    tokens = row.manifest["tokens"]
    facts = {
        "visual_tokens": tokens["visual_tokens"],
        "full_tokens": tokens["full_tokens"],
        "video_s": source["duration_s"],
        "video_bytes": source["bytes"],
        "bundle_bytes": row.bundle.stat().st_size if result is None else result.bundle_bytes,
    }
    stages = {} if result is None else {key: s for key, s in result.timings_s.items() if key != "total"}
    notes = () if result is None else result.notes
    return BatchRow(video, bundle, row.status, facts, {**timings, **stages}, notes=notes)


def broken_row(job: Job, setup: WorkerSetup, tries: int, reason: str) -> BatchRow:
    """Return the row of a video on which workers broke.

    ``job``, ``setup``: what it was to become. ``tries``: how often it was tried. ``reason``: how the last worker ended.
    """
    hint = "try it alone with freres compress; if memory ran out, use fewer --actors"
    error = ResourceError(f"{job.video}: its worker {reason}, {tries} times", hint)
    return BatchRow(job.video, setup.bundle_of(job), "failed", tries=tries, error=error)
