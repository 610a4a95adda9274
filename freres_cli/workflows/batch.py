"""Many videos, on many workers, on one machine or a Ray cluster. The bundles are the checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from freres_cli.errors import UsageError
from freres_cli.files import InputFiles, check_destination, made_folder, write_atomically
from freres_cli.pipeline.compressor import Progress
from freres_cli.workflows.batch_process import run_local
from freres_cli.workflows.batch_ray import run_on_ray
from freres_cli.workflows.batch_store import Store, is_one_of, is_url
from freres_cli.workflows.batch_worker import BatchRow, Job, WorkerSetup

SCHEMA = "freres.batch/1"
LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)


@dataclass(frozen=True)
class BatchRequest:
    """What to run.

    ``jobs``: the videos. ``setup``: what the workers share. ``engine``: one of ``ENGINES``. ``num_actors``: how many
    workers; ``None`` for one a GPU, or one. ``address``: of a Ray cluster; ``None`` for one on this machine. ``rows_file``: a
    path or URL for the rows of all videos.
    """

    jobs: Sequence[Job]
    setup: WorkerSetup
    engine: str
    num_actors: int | None
    address: str | None
    rows_file: str


def check_engine(engine: str, address: str | None) -> None:
    """Refuse an engine that is not one of ``ENGINES``, and an address for one that has none. Raises ``UsageError``."""
    if engine not in ENGINES:
        raise UsageError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine}")
    if address is not None and engine != RAY:
        raise UsageError(f"--address: engine {engine} has none", f"use --engine {RAY}, or leave --address out")


def run_batch(
    request: BatchRequest, on_row: Callable[[BatchRow], None] | None = None, progress: Progress | None = None
) -> list[BatchRow]:
    """Compress every video that is not compressed yet, write the file of rows, and return the rows in the order of the jobs.

    A video that fails is a failed row. ``on_row``: called with each row when it is done. Raises ``UsageError`` for the
    output or the engine, and the error of a worker that no other video would escape, such as a missing model.
    """
    place = request.setup.output
    with contextlib.nullcontext() if is_url(place) else made_folder(Path(place)):
        check_rows_file(request.rows_file, request.setup.force)
        _refuse_taken(request)
        ordered = _work(request, on_row, progress)
        write_rows(request.rows_file, ordered)
    return ordered


def _work(
    request: BatchRequest, on_row: Callable[[BatchRow], None] | None, progress: Progress | None
) -> list[BatchRow]:
    """The rows of all jobs, in their order. Raises the error that every other video would meet, too."""
    rows: dict[int, BatchRow] = {}
    with contextlib.closing(_start(request)) as found:
        if progress is not None:
            progress(0, len(request.jobs))
        for number, row in found:
            if row.is_fatal and row.error is not None:
                raise row.error
            rows[number] = row
            if on_row is not None:
                on_row(row)
            if progress is not None:
                progress(len(rows), len(request.jobs))
    return [rows[number] for number in range(len(request.jobs))]


def _start(request: BatchRequest) -> Generator[tuple[int, BatchRow]]:
    if request.engine == RAY:
        return run_on_ray(request.jobs, request.setup, request.num_actors, request.address)
    device = request.setup.device or ""
    num_gpus = 0 if device == "cpu" else 1 if ":" in device else torch.cuda.device_count()
    num_actors = min(request.num_actors or num_gpus or 1, len(request.jobs))
    # Threads of several workers that wait for the same cores cost more than they gain.
    num_threads = None if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // num_actors)
    return run_local(request.jobs, replace(request.setup, num_threads=num_threads), num_actors)


def check_rows_file(place: str, force: bool) -> None:
    """Refuse, before any work is done, a file in the place of the rows that a batch has not written, unless ``force``
    replaces it. Raises ``UsageError``."""
    if is_url(place):
        store = Store(place)
        first = store.read().partition(b"\n")[0] if not force and store.exists() else None
    else:
        path = Path(place)
        check_destination(path, force=True, flag="--rows")
        first = path.read_bytes().partition(b"\n")[0] if not force and path.is_file() else None
    if first is not None and f'"{SCHEMA}"'.encode() not in first:
        raise UsageError(f"{place}: already exists, and holds no rows of a batch", "name another file with --rows")


def _refuse_taken(request: BatchRequest) -> None:
    """Refuse a file of rows in the place of another file of the run, ``force`` or not: it would replace it."""
    if request.jobs and not is_url(request.rows_file):  # the preset and the model are those of all jobs
        InputFiles(request.jobs[0].options.files).refuse(Path(request.rows_file), "--rows")
    # Bundles may not be there yet. Of the many paths, only the folder that they share is looked up.
    setup = replace(request.setup, output=_absolute(request.setup.output))
    bundles = [setup.bundle_of(job) for job in request.jobs]
    if _absolute(request.rows_file) in bundles or is_one_of(request.rows_file, bundles):
        kind = "a bundle of this run"
    elif is_one_of(request.rows_file, (job.video for job in request.jobs)):
        kind = "one of the videos"
    else:
        return
    raise UsageError(f"--rows {request.rows_file}: is {kind}, and would be replaced", "name another file")


def _absolute(place: str) -> str:
    """A URL as it is; a path without links."""
    return place if is_url(place) else os.path.realpath(place)


def write_rows(place: str, rows: Sequence[BatchRow]) -> None:
    """Write one JSON object a line for each row, whole or not at all; a file of an earlier run is replaced."""
    text = "".join(json.dumps({"schema": SCHEMA, **row.describe()}) + "\n" for row in rows).encode()
    if not is_url(place):
        write_atomically(Path(place), lambda file: file.write(text), force=True, flag="--rows")
        return
    with tempfile.TemporaryDirectory(prefix="freres-batch-") as folder:
        copy = Path(folder) / "rows"
        copy.write_bytes(text)
        Store(place).put(copy)
