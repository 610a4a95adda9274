"""The part ``peers`` of the benchmark: what each method costs after encoding, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from freres_cli.baselines.registry import ADAPTIVE, FRE_RES, METHODS, OWN_METHODS
from freres_cli.bench.apart import STARTED, limit_memory, run_apart
from freres_cli.bench.clock import PeakMemory, StageTimer
from freres_cli.bench.latents import MadeLatents
from freres_cli.cli.output import format_bytes, format_seconds, print_line
from freres_cli.devices import memory_errors_as
from freres_cli.errors import FreresError, ResourceError
from freres_cli.method.adaptive import StretchCompressor
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import StreamingCompressor
from freres_cli.pipeline.planning import method_settings
from freres_cli.pipeline.tokens import make_tokens
from freres_cli.presets import load_settings

GRID, WIDTH = (24, 24), 3584
SHARE = 10  # one token in ten is kept
FPS = 30.0
BATCH_FRAMES = 16  # pushed at a time to a method that streams
FEWER = 10  # a method that does not finish is measured again on a clip this many times shorter
PRESET = "qwen2-vl-7b"
CPU = torch.device("cpu")


def measure_peers(
    num_frames: int = 1800,
    limit_s: float = 600.0,
    names: Sequence[str] | None = None,
    grid: tuple[int, int] = GRID,
    width: int = WIDTH,
) -> dict[str, Any]:
    """Measure every method that has a budget at a tenth of the tokens: seconds and memory from latents to tokens.

    ``num_frames``: of the clip. ``limit_s``: a method that takes longer, or runs out of memory, is a row that says so, and
    a second row on a tenth of the frames. ``names``: the methods, by default all. ``grid``: (H, W). ``width``: D.
    """
    rows, left_out = [], {}
    for name in OWN_METHODS if names is None else names:
        if (reason := _why_not(name)) is not None:
            left_out[name] = reason
            continue
        rows.append(measure_peer(name, num_frames, limit_s, grid, width))
        _show(rows[-1])
        if rows[-1]["status"] in ("over_limit", "out_of_memory") and num_frames >= FEWER:
            rows.append(measure_peer(name, num_frames // FEWER, limit_s, grid, width))
            _show(rows[-1])
    return {
        "grid": grid,
        "width": width,
        "dtype": "bfloat16",
        "latents": " ".join((MadeLatents.__doc__ or "").split()),
        "kept": f"one token in {SHARE}",
        "fre_res_preset": PRESET,
        "limit_s": limit_s,
        "memory": "resident memory of the process: its peak while the method runs, less what it held before; a method that "
        "streams held one batch of frames, any other the whole clip. The tokens kept are part of it.",
        "warmup": 0,
        "runs": 1,
        "rows": rows,
        "not_measured": left_out,
    }


def _why_not(name: str) -> str | None:
    method = METHODS[name]
    if not method.has_budget:
        return "has no budget"
    return None if method.is_question_blind else "needs the question"


def measure_peer(name: str, num_frames: int, limit_s: float, grid: tuple[int, int], width: int) -> dict[str, Any]:
    """Measure one method in its own process, and return its row; one that does not finish has a status and a message.

    ``name``: of the method. ``num_frames``, ``grid``, ``width``: T, (H, W) and D of the clip. ``limit_s``: most seconds,
    not counting the time to make a whole clip's latents, which has the same limit.
    """
    num_latents = num_frames * grid[0] * grid[1]
    row: dict[str, Any] = {
        "method": name,
        "num_frames": num_frames,
        "num_latents": num_latents,
        "latents_bytes": num_latents * width * torch.bfloat16.itemsize,
        "budget_tokens": max(1, num_latents // SHARE),
        "batch_frames": BATCH_FRAMES if METHODS[name].compress is None else None,
        "status": "ok",
        "message": None,
        **dict.fromkeys(("visual_tokens", "compress_s", "peak_above_latents_bytes")),
    }
    outcome = run_apart(run_peer, (name, num_frames, grid, width, row["budget_tokens"]), limit_s)
    if outcome.is_late:
        return row | {"status": "over_limit", "message": f"over {limit_s:g} s"}
    if outcome.is_starved:
        return row | {"status": "out_of_memory", "message": "the system killed the process"}
    if isinstance(outcome.value, dict):
        return row | outcome.value
    status = "out_of_memory" if isinstance(outcome.value, ResourceError) else "failed"
    failure = outcome.value.message if outcome.value else f"the process ended with status {outcome.exit_code}"
    return row | {"status": status, "message": failure}


def run_peer(
    connection: Connection, name: str, num_frames: int, grid: tuple[int, int], width: int, budget_tokens: int
) -> None:
    """Measure one method, and send its figures or a ``FreresError`` through ``connection``.

    ``name``: of the method. ``num_frames``, ``grid``, ``width``: T, (H, W) and D of the clip. ``budget_tokens``: to keep.
    """
    try:
        limit_memory()
        latents = MadeLatents(num_frames, grid, width)
        measure = measure_stream if METHODS[name].compress is None else measure_whole
        with memory_errors_as(name, "use fewer --frames"), torch.no_grad():
            connection.send(measure(name, latents, budget_tokens, connection))
    except FreresError as error:
        connection.send(error)
    except Exception as error:
        connection.send(FreresError(f"{name}: unexpected {type(error).__name__}: {error}"))
    finally:
        connection.close()


def measure_whole(name: str, latents: MadeLatents, budget_tokens: int, connection: Connection | None) -> dict[str, Any]:
    """Return the figures of a method that takes the clip at once. ``latents``: the clip. ``budget_tokens``: to keep.
    ``connection``: is told when the latents are made. ``name``: of the method."""
    compress = METHODS[name].compress
    assert compress is not None
    whole = latents.frames(0, latents.num_frames)
    seconds = torch.arange(latents.num_frames, dtype=torch.float64) / FPS
    if connection is not None:
        connection.send(STARTED)
    memory, timer = PeakMemory(CPU), StageTimer(CPU)
    before = memory.read_bytes()
    with timer.stage("compress"):
        tokens = compress(whole, seconds, budget_tokens, latents.width)
    return _figures(len(tokens), timer, memory.read_bytes() - before)


def measure_stream(
    name: str, latents: MadeLatents, budget_tokens: int, connection: Connection | None
) -> dict[str, Any]:
    """Return the figures of Fre-Res or adaptive Fre-Res, which take the clip in batches. The time to make the batches counts
    towards the limit only.

    ``name``: of the method. ``latents``: the clip. ``budget_tokens``: to keep. ``connection``: is told when the first
    batch is made.
    """
    assert name in (FRE_RES, ADAPTIVE)
    compressor: StreamingCompressor | StretchCompressor
    if name == FRE_RES:
        settings = method_settings(load_settings(PRESET, {}))
        plan = plan_budget(latents.num_frames, latents.grid, settings, budget_tokens)
        compressor = StreamingCompressor(plan, settings, latents.width)
    else:
        compressor = StretchCompressor(latents.grid, latents.width, budget_tokens)
    memory, timer = None, StageTimer(CPU)
    before = 0
    for seconds, batch in _batches(latents):
        if memory is None:
            if connection is not None:
                connection.send(STARTED)
            memory = PeakMemory(CPU)
            before = memory.read_bytes()
        with timer.stage("compress"):
            compressor.push(batch, seconds)
        del batch
    assert memory is not None
    with timer.stage("compress"):
        tokens = make_tokens(compressor.finish())
    return _figures(len(tokens), timer, memory.read_bytes() - before)


def _batches(latents: MadeLatents) -> Iterator[tuple[list[float], Tensor]]:
    for start in range(0, latents.num_frames, BATCH_FRAMES):
        stop = min(start + BATCH_FRAMES, latents.num_frames)
        yield [frame / FPS for frame in range(start, stop)], latents.frames(start, stop)


def _figures(num_tokens: int, timer: StageTimer, peak_bytes: int) -> dict[str, Any]:
    seconds = timer.seconds["compress"]
    return {"visual_tokens": num_tokens, "compress_s": seconds, "peak_above_latents_bytes": max(0, peak_bytes)}


def _show(row: dict[str, Any]) -> None:
    what = row["message"] or (
        f"{format_seconds(row['compress_s'])}, {format_bytes(row['peak_above_latents_bytes'])} above the latents"
    )
    print_line(f"{row['method']}, {row['num_frames']} frames: {what}")
