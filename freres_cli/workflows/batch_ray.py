"""A batch on Ray: Ray Data feeds a pool of actors, each of which looks after one worker process."""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import socket
import warnings
from collections.abc import Generator, Sequence
from typing import Any

from freres_cli.errors import ResourceError, UsageError
from freres_cli.workflows.batch_process import Supervisor
from freres_cli.workflows.batch_worker import BatchRow, Job, WorkerSetup, broken_row

# Ray keeps track of every block: up to this many, a block is one video, so that a lost actor loses no other.
MOST_BLOCKS = 10_000
ANSWER_S = 5.0  # for a cluster to answer
STORE_BYTES = 128 * 2**20  # rows are text; no tensor passes through Ray


class RayWorker:
    """What a Ray actor runs. The model is in a process of its own, as without Ray, so that the same things happen when it
    breaks; an actor that breaks itself is started again by Ray."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._supervisor = Supervisor(setup)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Return the pickled rows of pickled jobs."""
        rows = [self._supervisor.run(pickle.loads(job)) for job in batch["job"]]
        return {"number": list(batch["number"]), "row": [pickle.dumps(row) for row in rows]}


def run_on_ray(
    jobs: Sequence[Job], setup: WorkerSetup, num_actors: int | None, address: str | None
) -> Generator[tuple[int, BatchRow]]:
    """Yield the number and the row of each job as it is done.

    ``jobs``, ``setup``: what to do. ``num_actors``: how many actors; ``None`` for one a GPU of the cluster, or one.
    ``address``: the cluster's, or ``auto``; ``None`` starts one on this machine. Raises ``UsageError`` if Ray is missing or
    cannot be reached, ``ResourceError`` if the cluster has no room for the actors.
    """
    ray = _start_ray(address, num_actors)
    try:
        wanted, num_gpus = _share_gpus(ray, setup, num_actors, len(jobs))
        missing = set(range(len(jobs)))
        for found in _open_dataset(ray, jobs, setup, wanted, num_gpus).iter_rows():
            missing.discard(found["number"])
            yield int(found["number"]), pickle.loads(found["row"])
        for number in sorted(missing):
            yield number, broken_row(jobs[number], setup, 2, "was lost with its actor or node")
    finally:
        ray.shutdown()


def _open_dataset(ray: Any, jobs: Sequence[Job], setup: WorkerSetup, num_actors: int, num_gpus: float) -> Any:
    """The rows of the jobs, which Ray makes while they are read."""
    items = [{"number": number, "job": pickle.dumps(job)} for number, job in enumerate(jobs)]
    blocks = math.ceil(len(jobs) / math.ceil(len(jobs) / MOST_BLOCKS))
    with warnings.catch_warnings():
        # Ray has no other way yet to say how often a task is tried again, and means to remove this one in 2.64.
        warnings.simplefilter("ignore")
        return ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            RayWorker,
            fn_constructor_args=(setup,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=num_gpus,
            max_restarts=-1,  # an actor that breaks is replaced, however often
            max_task_retries=1,  # its video is tried once more
        )


def _start_ray(address: str | None, num_actors: int | None) -> Any:
    """The package, connected to a cluster. On this machine, one is started that ends with the command."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            "--engine ray: Ray is not installed", "pip install 'freres[ray]', or --engine local"
        ) from error
    _check_address(address)
    wanted: dict[str, Any] = {"address": address}
    if address is None:
        # Without an address, Ray would look for a cluster in RAY_ADDRESS and on this machine first.
        wanted = {"address": "local", "include_dashboard": False, "object_store_memory": STORE_BYTES}
        wanted |= {"num_cpus": max(num_actors or 1, os.cpu_count() or 1)}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **wanted)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if address is None:
            raise UsageError(f"--engine ray: Ray cannot be started: {reason}", "use --engine local") from error
        raise UsageError(f"--address {address}: Ray cannot be reached: {reason}", "start it with: ray start") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a video whose actors broke twice is a failed row, and the run goes on
    return ray


def _check_address(address: str | None) -> None:
    """Refuse an address at which nothing answers: Ray would try for minutes, and then end this process without a word."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", address or "")
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        hint = "start a cluster with: ray start --head"
        raise UsageError(f"--address {address}: Ray cannot be reached: {error}", hint) from error


def _share_gpus(ray: Any, setup: WorkerSetup, num_actors: int | None, num_jobs: int) -> tuple[int, float]:
    """How many actors, and how much of a GPU each has. Raises ``ResourceError`` if they do not fit."""
    resources = ray.cluster_resources()
    gpus = 0.0 if setup.device == "cpu" else resources.get("GPU", 0.0)
    wanted = min(num_actors or int(gpus) or 1, num_jobs)
    if wanted > resources.get("CPU", 0.0):
        cpus = f"{resources.get('CPU', 0.0):g}"
        raise ResourceError(f"--actors {wanted}: the cluster has {cpus} CPUs: expected at most one actor a CPU")
    # Ray gives a share below 1 from one GPU only, in steps of 1e-4: rounded up, the last actors would wait for ever.
    a_gpu = math.ceil(wanted / gpus) if gpus >= 1 else 0
    return wanted, math.floor(1e4 / a_gpu) / 1e4 if a_gpu else min(1.0, gpus / wanted)
