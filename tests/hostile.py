"""Hostile input by the thousand: ``python -m tests.hostile -o FILE [PART ...]`` adds to the counts in a JSON file.

Parts: ``videos`` and ``bundles`` (mutated, see ``hostile_cases``), ``kills`` (SIGKILL at a random moment of a compression,
then the same command again), ``full`` (a disk that fills up) and ``writers`` (two runs with one output). Each case is made
from its number alone. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests import clips
from tests.hostile_cases import CHECKS, run_case

LIMIT_S, LIMIT_BYTES = 20.0, 2 * 2**30
STUCK_S = 1800.0
EXPECTED = {
    *(
        "decoded",
        "decoded, pixels not the same twice",
        "read",
        "UsageError",
        "VideoError",
        "BundleError",
        "ResourceError",
    ),
    *(
        "PresetError",
        "BackboneError",
        "killed, then the same bundle",
        "done before it was killed",
        "nothing written, status 6",
    ),
    *("written, status 0", "one bundle, one refusal", "two in turn, one bundle"),
}
Case = Callable[[int, Path], str]


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


# --- what is measured in a process that runs many cases


def work(connection: Any, part: str, numbers: list[int], folder: str) -> None:
    """Run cases and send (number, outcome, CPU seconds, peak bytes) for each; the number alone before it begins."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # encoders talk
    for number in numbers:
        connection.send(number)
        reset_peak()
        start = time.process_time()
        try:
            outcome = CASES[part](number, Path(folder))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"BUG {type(error).__name__}: {str(error)[:80]} ({Path(place.filename).name}:{place.lineno})"
        connection.send((number, outcome, time.process_time() - start, peak_bytes()))


def run_part(part: str, count: int, record: dict[str, Any], save: Callable[[], None], folder: Path) -> None:
    """Run the cases that are not in ``record`` yet, in processes that are replaced if they die or hang."""
    outcomes = Counter(record.get("outcomes", {}))
    done = record.get("cases", 0)
    context = multiprocessing.get_context("spawn")
    while done < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(theirs, part, list(range(done, count)), str(folder)))
        process.start()
        theirs.close()
        try:
            while done < count:
                begun = ours.recv()
                if not _answers(ours, process.pid):
                    found, seconds, peak = "BUG hangs", LIMIT_S, 0
                    process.kill()
                else:
                    begun, found, seconds, peak = ours.recv()
                if seconds > LIMIT_S and not found.startswith("BUG"):
                    found = f"BUG takes {seconds:.0f} s"
                if peak > LIMIT_BYTES:
                    found = f"BUG takes {peak >> 20} MiB"
                done = begun + 1
                _count(record, outcomes, begun, found, seconds, peak)
                if done % 200 == 0:
                    save()
                if found == "BUG hangs":
                    break
        except EOFError:
            process.join()
            if done < count:
                _count(record, outcomes, done, f"BUG process ended with {process.exitcode}", 0.0, 0)
                done += 1
        finally:
            process.kill()
            process.join()
            save()


def _answers(connection: Any, pid: int | None) -> bool:
    """Whether a case ends before it has worked for ``LIMIT_S``, or waited for ``STUCK_S`` without working. On a machine that
    is shared, the clock on the wall says little: the process may have been stopped."""
    worked, last_change = [_cpu_seconds(pid)], time.monotonic()
    while not connection.poll(1.0):
        now = _cpu_seconds(pid)
        if now > worked[-1]:
            last_change = time.monotonic()
        worked.append(now)
        if now - worked[0] > LIMIT_S or time.monotonic() - last_change > STUCK_S:
            return False
    return True


def _cpu_seconds(pid: int | None) -> float:
    """CPU seconds of a process and of the children that it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _count(
    record: dict[str, Any], outcomes: Counter[str], number: int, outcome: str, seconds: float, peak: int
) -> None:
    outcomes[outcome] += 1
    record["cases"], record["outcomes"] = number + 1, dict(outcomes.most_common())
    record["most_cpu_s"] = round(max(record.get("most_cpu_s", 0.0), seconds), 2)
    record["most_memory_bytes"] = max(record.get("most_memory_bytes", 0), peak)
    if outcome not in EXPECTED:
        record.setdefault("bugs", []).append([number, outcome])


# --- kills, full disks, two writers: each in forks of a process that has the model


class Bench:
    """A clip, and the bundle that it gives. Made once a process; forks share the model."""

    made: Bench | None = None

    def __init__(self, folder: Path) -> None:
        from freres_cli.pipeline.compressor import Compressor

        self.clip = clips.write_clip(folder / f"clip-{os.getpid()}.mp4", 48)
        self.compressor = Compressor(budget_tokens=300, device="cpu", method="fre-res")
        self.whole = self.compress(folder / f"whole-{os.getpid()}.pt").read_bytes()
        start = time.monotonic()
        self.compress(folder / f"again-{os.getpid()}.pt")
        self.seconds = time.monotonic() - start

    @classmethod
    def of(cls, folder: Path) -> Bench:
        cls.made = cls.made or Bench(folder)
        return cls.made

    def compress(self, output: Path, force: bool = False) -> Path:
        from freres_cli.pipeline import checkpoints, encoding
        from freres_cli.workflows.compress import compress_file

        # Twelve batches, so that there are states to be killed between.
        often = mock.patch.multiple(checkpoints, EVERY_S=0.0, MOST_SHARE=float("inf"))
        with mock.patch.object(encoding, "MAX_BATCH_FRAMES", 4), often:
            return compress_file(self.compressor, self.clip, output, force=force).bundle

    def fork(self, output: Path, force: bool = False, limit: int | None = None) -> int:
        """Compress in a fork, whose exit status is that of the command. ``limit``: most bytes of a file."""
        if (child := os.fork()) != 0:
            return child
        from freres_cli.errors import FreresError

        status = 1
        try:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            self.compress(output, force)
            status = 0
        except FreresError as error:
            status = int(error.exit_status)
        finally:
            os._exit(status)


def _fresh(folder: Path, name: str) -> Path:
    place = folder / f"{name}-{os.getpid()}"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    return place


def kill_once(number: int, folder: Path) -> str:
    """Kill a compression at a random moment, as often as it takes, and let the last one finish."""
    bench, dice = Bench.of(folder), random.Random(f"kill {number}")
    # A folder of its own: what a killed run left goes when a process first writes there, and this one writes in all.
    place = _fresh(folder, f"kills-{number}")
    output = place / "b.pt"
    child = bench.fork(output)
    time.sleep(dice.uniform(0, 1.1) * bench.seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if output.exists():
        assert output.read_bytes() == bench.whole, "half a bundle"
        was_done = "done before it was killed"
    else:
        assert os.WIFSIGNALED(status), "ended without a bundle"
        was_done = "killed, then the same bundle"
    bench.compress(output, force=True)
    assert output.read_bytes() == bench.whole, "another bundle"
    assert [path.name for path in place.iterdir()] == ["b.pt"], sorted(path.name for path in place.iterdir())
    return was_done


def fill_once(number: int, folder: Path) -> str:
    """Compress where no file may be larger than a random size."""
    bench, dice = Bench.of(folder), random.Random(f"full {number}")
    place = _fresh(folder, "full")
    output = place / "b.pt"
    limit = dice.randrange(int(1.2 * len(bench.whole)))
    _, status = os.waitpid(bench.fork(output, limit=limit), 0)
    code = os.waitstatus_to_exitcode(status)
    left = [path.name for path in place.iterdir()]
    if limit >= len(bench.whole):
        assert code == 0 and output.read_bytes() == bench.whole and left == ["b.pt"], (code, left)
        return "written, status 0"
    # A state that was kept before the disk was full may stay: the next run goes on from it.
    assert code == 6 and not [name for name in left if not name.endswith(".resume")], (code, left)
    return "nothing written, status 6"


def write_twice(number: int, folder: Path) -> str:
    """Two compressions with the same output, begun at nearly the same time."""
    bench, dice = Bench.of(folder), random.Random(f"writers {number}")
    place, force = _fresh(folder, "writers"), number % 2 == 1
    output = place / "b.pt"
    children = [bench.fork(output, force)]
    time.sleep(dice.uniform(0, 0.3) * bench.seconds)
    children.append(bench.fork(output, force))
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == ([0, 0] if force else [0, 2]), codes
    assert output.read_bytes() == bench.whole, "another bundle"
    # The state of the refused run stays: under another name its work is not lost, and then the state is gone.
    assert bench.compress(place / "c.pt").read_bytes() == bench.whole
    left = sorted(path.name for path in place.iterdir())
    assert left == ["b.pt", "c.pt"], left
    return "two in turn, one bundle" if force else "one bundle, one refusal"


CASES: dict[str, Case] = {
    **{kind: (lambda number, folder, kind=kind: run_case(kind, number, folder)) for kind in CHECKS},
    "kills": kill_once,
    "full": fill_once,
    "writers": write_twice,
}
COUNTS = {"videos": 10_000, "bundles": 10_000, "kills": 1000, "full": 200, "writers": 200}


def main() -> None:
    """Run the parts, and end with status 1 if any case is a bug."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, help="cases of each part, in place of its own number")
    parser.add_argument("parts", nargs="*", help=f"{', '.join(COUNTS)}; default: all")
    arguments = parser.parse_args()
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}

    def save() -> None:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")

    from freres_cli.bench.report import describe_environment
    from freres_cli.devices import choose_device

    document["environment"] = describe_environment(choose_device("cpu"))
    document["command"] = f"python -m tests.hostile -o freres_cli/bench/results/{arguments.output.name}"
    document["limits"] = {"seconds": LIMIT_S, "memory_bytes": LIMIT_BYTES}
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts or COUNTS:
            record = document.setdefault(part, {})
            run_part(part, arguments.count or COUNTS[part], record, save, Path(folder))
            print(part, json.dumps(record))
    sys.exit(any(document[part].get("bugs") for part in COUNTS if part in document))


if __name__ == "__main__":
    main()
