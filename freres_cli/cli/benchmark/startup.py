"""The part ``startup`` of the benchmark: ``compress`` and ``ask`` on a short clip, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from freres_cli.bench.apart import FRERES, children_cpu_s
from freres_cli.bench.report import summarize_ratios, summarize_runs
from freres_cli.cli.benchmark.inputs import METHOD, METHOD_FLAGS
from freres_cli.world.make import make_set

THIS = Path(__file__).parents[3]
QUESTION = "what moves first?"


def measure_startup(folder: Path, other: Path | None, repeat: int = 3) -> dict[str, Any]:
    """Time both commands, from the start of Python to its end, with this checkout and with another, in turn.

    ``folder``: for the files. ``other``: the root of the other checkout, such as the release before; ``None`` for this one
    alone. ``repeat``: the number of pairs, after one that is not counted.
    """
    (folder / "startup").mkdir()
    clip = folder / "startup" / make_set(folder / "startup", "test", 1)[0].file
    checkouts = {"this": THIS} | ({} if other is None else {"other": other.resolve()})
    commands = {
        "compress": ("compress", str(clip), *METHOD_FLAGS, "-o", str(folder / "startup.pt"), "--force"),
        "ask": ("ask", str(folder / "startup.pt"), QUESTION),
    }
    # Both checkouts keep their compiled modules, as an installed package does, in a place of their own.
    environment = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), **os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for counted in [False] + [True] * repeat:
        for name, command in commands.items():
            for which, root in checkouts.items():
                run = run_cold(root, command, environment)
                if counted:
                    runs.setdefault((name, which), []).append(run)
    measured: dict[str, Any] = {}
    for name in commands:
        for kind in ("cpu_s", "wall_s", "first_line_s"):
            values = {which: [run[kind] for run in runs[name, which]] for which in checkouts}
            row: dict[str, Any] = {which: summarize_runs(own) for which, own in values.items()}
            if other is not None:
                row["this_over_other"] = summarize_ratios(values["this"], values["other"])
            measured.setdefault(name, {})[kind] = row
    return {
        "commands": [f"freres compress CLIP --method {METHOD} -o BUNDLE --force", f'freres ask BUNDLE "{QUESTION}"'],
        "clip": "freres world make --split test, the first: 4 to 5 s at 8 fps",
        "checkouts": {which: describe_checkout(root) for which, root in checkouts.items()},
        "load_average": os.getloadavg()[0],
        "warmup": 1,
        "runs": repeat,
        **measured,
    }


def run_cold(root: Path, command: tuple[str, ...], environment: dict[str, str]) -> dict[str, float]:
    """Run ``freres`` of the checkout at ``root`` with the variables of ``environment``, and return its CPU and wall seconds,
    and those to its first line on stderr."""
    # The command of an older checkout begins elsewhere.
    is_old = not (root / "freres_cli" / "cli" / "start.py").exists()
    freres = [part.replace("cli.start", "cli.app") if is_old else part for part in FRERES]
    before, start = children_cpu_s(), time.perf_counter()
    with subprocess.Popen(
        [*freres, *command],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        first_line_s = time.perf_counter() - start
        process.stderr.read()
    cpu_s = children_cpu_s() - before
    if process.returncode:
        raise RuntimeError(f"{root}: freres {command[0]}: expected exit status 0, got {process.returncode}")
    return {"cpu_s": cpu_s, "wall_s": time.perf_counter() - start, "first_line_s": first_line_s}


def describe_checkout(root: Path) -> str:
    """Return the commit of a checkout, marked where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
    )
    return described.stdout.strip()
