"""The parts ``kills``, ``actors`` and ``storage`` of the benchmark: what ``freres batch`` survives, what a second worker
gains, and what a token takes on disk.

Linux only: processes are found in /proc.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freres_cli.bench.apart import FRERES, children_cpu_s
from freres_cli.bench.report import summarize_ratios, summarize_runs
from freres_cli.bundle.store import read_bundle
from freres_cli.cli.benchmark.inputs import METHOD, METHOD_FLAGS
from freres_cli.errors import BundleError
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models
from freres_cli.world.clip import make_clip
from freres_cli.world.make import make_set

WORKER = b"spawn_main"  # in the command line of every process that multiprocessing spawned
DRIVER_SHARE = 0.3  # of the kills; the others meet a worker
EARLY_SHARE = 0.2  # of the kills, which need not wait for a bundle: most meet a process that is starting
BUDGET_TOKENS = 300


@dataclass
class Kills:
    """What a folder of bundles went through, and what was found in it.

    ``killed``: how many processes of each kind. ``at``: the number of bundles that were there at each kill. ``rounds``:
    complete runs; after each, the folder is emptied. ``missing``, ``broken``: bundles at the end of the rounds that were
    not there, or that freres cannot open. ``replaced``: bundles whose file changed once it was there. ``made_twice``: videos
    with more than one row that says done. ``statuses``: rows of the runs that came to their end.
    """

    killed: Counter[str] = field(default_factory=Counter)
    at: list[int] = field(default_factory=list)
    rounds: int = 0
    missing: int = 0
    broken: int = 0
    replaced: int = 0
    made_twice: int = 0
    statuses: Counter[str] = field(default_factory=Counter)


class KilledBatch:
    """Runs ``freres batch`` on a folder of clips again and again, and kills its processes at random moments.

    ``clips``: the folder. ``out``: of the bundles. ``flags``: of the command. ``longest_s``: most seconds from a
    new bundle to a kill.
    ``seed``: chooses moments and targets.
    """

    def __init__(self, clips: Path, out: Path, flags: Sequence[str], longest_s: float, seed: int = 0) -> None:
        self._out, self._longest_s = out, longest_s
        self._names = sorted(path.stem for path in clips.iterdir() if path.suffix != ".jsonl")
        self._command = [*FRERES, "batch", str(clips), "-o", str(out), "--json", "-q", *flags]
        self._random = random.Random(seed)
        self._files: dict[str, tuple[int, int]] = {}
        self._done: Counter[str] = Counter()
        self.found = Kills()

    def run(self, num_kills: int) -> Kills:
        """Kill ``num_kills`` times, then run to the end. Rounds that end before are checked, and another one starts."""
        while True:
            while not self._run_once(num_kills):
                pass
            self._check_round()
            if self.found.killed.total() >= num_kills:
                return self.found
            for path in self._out.iterdir():
                path.unlink()
            self._files.clear()
            self._done.clear()

    def _run_once(self, num_kills: int) -> bool:
        """Run the command, and return whether it came to its end."""
        log = self._out.with_suffix(".log")
        with log.open("wb") as file:
            process = subprocess.Popen(self._command, stdout=file, stderr=subprocess.PIPE)
        is_killed = False
        try:
            while self.found.killed.total() < num_kills and not is_killed:
                self._wait(process)
                if process.poll() is not None:
                    break
                is_killed = self._kill_one(process.pid)
            _, errors = process.communicate()
        finally:
            process.kill()
            process.wait()
        self._read_log(log, not is_killed)
        if not is_killed and process.returncode not in (0, 6):  # 6: a video on which two workers were killed
            raise RuntimeError(f"freres batch ended with {process.returncode}: {errors.decode()[-2000:]}")
        return process.returncode == 0

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the next kill: mostly for a new bundle and then up to ``longest_s``, so that workers are at work."""
        is_early, before = self._random.random() < EARLY_SHARE, self._count()
        while not is_early and self._count() == before and process.poll() is None:
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            process.wait(self._random.uniform(0, self._longest_s))

    def _count(self) -> int:
        return len(list(self._out.glob("*.pt")))

    def _kill_one(self, driver: int) -> bool:
        """Kill the driver or one of its workers, and return whether it was the driver."""
        workers = find_workers(driver)
        is_driver = self._random.random() < DRIVER_SHARE
        if not workers and not is_driver:
            return False
        with suppress(ProcessLookupError):
            os.kill(driver if is_driver else self._random.choice(workers), signal.SIGKILL)
            self.found.killed["driver" if is_driver else "worker"] += 1
            self.found.at.append(self._count())
        self._look()
        return is_driver

    def _look(self) -> None:
        """See which bundles are there, and whether one that was there before is another file now."""
        for path in self._out.glob("*.pt"):
            status = path.stat()
            facts = (status.st_ino, status.st_mtime_ns)
            self.found.replaced += self._files.setdefault(path.stem, facts) != facts

    def _read_log(self, log: Path, is_complete: bool) -> None:
        for line in log.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue  # the driver was killed while it wrote this one
            row = json.loads(line)
            self._done[row["video"]] += row["status"] == "done"
            if is_complete:
                self.found.statuses[row["status"]] += 1

    def _check_round(self) -> None:
        self._look()
        self.found.rounds += 1
        self.found.made_twice += sum(count > 1 for count in self._done.values())
        for name in self._names:
            path = self._out / f"{name}.pt"
            self.found.missing += not path.is_file()
            try:
                read_bundle(path)
            except BundleError:
                self.found.broken += 1


def find_workers(driver: int) -> list[int]:
    """Return the ids of the worker processes below a process, however far."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return sorted(pid for pid in parents if _is_below(pid, driver, parents) and WORKER in _command_line(pid))


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while (pid := parents.get(pid, 0)) > 1:
        if pid == ancestor:
            return True
    return False


def _command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def measure_kills(folder: Path, count: int = 40, num_kills: int = 50, longest_s: float = 4.0) -> dict[str, Any]:
    """Kill workers and drivers of batches of clips at random moments, and look at what they leave.

    ``folder``: for clips and bundles. ``count``: clips of a batch. ``num_kills``, ``longest_s``: as ``KilledBatch`` takes
    them.
    """
    clips, out = folder / "killed", folder / "killed-out"
    clips.mkdir()
    out.mkdir()
    make_set(clips, "test", count)
    flags = ("--actors", "2", *METHOD_FLAGS, "--budget", str(BUDGET_TOKENS), "--device", "cpu")
    found = KilledBatch(clips, out, flags, longest_s).run(num_kills)
    return {
        "command": f"freres batch CLIPS -o OUT --json -q {' '.join(flags)}",
        "clips": f"{count} of freres world make --split test, 4 to 5 s at 8 fps",
        "signal": "SIGKILL",
        "kills": dict(found.killed),
        "longest_s_from_a_bundle_to_a_kill": longest_s,
        "share_of_kills_that_wait_for_no_bundle": EARLY_SHARE,
        "bundles_there_at_each_kill": found.at,
        **{name: getattr(found, name) for name in ("rounds", "missing", "broken", "replaced", "made_twice")},
        "rows_of_complete_runs": dict(found.statuses),
    }


def measure_actors(folder: Path, count: int = 40, repeat: int = 3) -> dict[str, Any]:
    """Time batches with one worker and with two, in turn. The clock runs from the first row to the last, so that starting
    the processes and loading the model are not in it."""
    clips = folder / "actors"
    clips.mkdir()
    make_set(clips, "test", count)
    rates: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    for run in range(repeat):
        for actors in rates:
            before = children_cpu_s()
            rates[actors].append(_rate_of(clips, folder / f"actors-{run}-{actors}", actors))
            cpu[actors].append((children_cpu_s() - before) / count)
    return {
        "command": f"freres batch CLIPS -o OUT --json -q --actors N --method {METHOD} --device cpu",
        "clips": f"{count} of freres world make --split test, 4 to 5 s at 8 fps",
        "warmup": 0,
        "runs": repeat,
        "threads_of_a_worker": 1,
        "load_average": os.getloadavg(),
        "videos_per_s": {str(actors): summarize_runs(values) for actors, values in rates.items()},
        "two_over_one": summarize_ratios(rates[2], rates[1]),
        "cpu_s_per_video_with_start": {str(actors): summarize_runs(values) for actors, values in cpu.items()},
    }


def measure_storage(folder: Path, budgets: tuple[int, int] = (400, 1600)) -> dict[str, Any]:
    """Compress one clip at two budgets, and return what a token takes in a bundle beyond its latent, in bytes."""
    clip = make_clip(folder / "storage.mp4", seconds=8.0)
    models = Compressor(device="cpu").models
    rows = {}
    for method in ("adaptive", "fre-res", "uniform"):
        (few, small), (many, large) = (_size_of(clip, method, budget, models, folder) for budget in budgets)
        per_token = (large - small) / (many - few)
        latent = models.encoder.width * models.encoder.dtype.itemsize
        rows[method] = {
            "visual_tokens": [few, many],
            "bundle_bytes": [small, large],
            "bytes_per_token": per_token,
            "of_these_the_latent": latent,
            "bytes_per_token_beyond_the_latent": per_token - latent,
            "bytes_of_no_token": small - per_token * few,
        }
    return {"clip": "8 s at 30 fps, made by freres demo", "model": "bundled, float32", "methods": rows}


def _size_of(clip: Path, method: str, budget: int, models: Models, folder: Path) -> tuple[int, int]:
    bundle = Compressor(method=method, budget_tokens=budget, models=models).compress(clip)
    path = folder / f"{method}-{budget}.pt"
    bundle.save(path)
    return bundle.num_visual_tokens, path.stat().st_size


def _rate_of(clips: Path, out: Path, actors: int) -> float:
    """Videos a second between the first row and the last; the first of each worker is not counted."""
    flags = ("--actors", str(actors), *METHOD_FLAGS, "--budget", str(BUDGET_TOKENS), "--device", "cpu")
    command = [*FRERES, "batch", str(clips), "-o", str(out), "--json", "-q", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        moments = _moments_of(process.stdout)
    if process.returncode:
        raise RuntimeError(f"freres batch ended with {process.returncode}")
    steady = moments[2:]  # both workers have loaded their model once they have a row
    return (len(steady) - 1) / (steady[-1] - steady[0])


def _moments_of(lines: Iterable[str]) -> list[float]:
    return [time.perf_counter() for _ in lines]
