"""The paper's cost table on the model and device at hand: the language half alone, with tokens made without a video.

Each row has its own process, as in ``freres profile``, so that one that runs out of memory or time is a row like the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.checkpoint import config_dtype
from freres_cli.backbones.sizes import DecoderSizes, measure_decoder
from freres_cli.bench.clock import PeakMemory, StageTimer, total_memory_bytes
from freres_cli.bench.tables import CostRow, CostTable
from freres_cli.devices import AS_COMPUTED, Storage, choose_dtype
from freres_cli.pipeline.made_clip import fill_tokens, fit_prompt, place_made_tokens
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.session import Session
from freres_cli.presets import load_settings
from freres_cli.workflows.plan import measure_speed
from freres_cli.workflows.profile import STAGES, ProfileRequest, empty_row, measure_asks, run_apart, send_row


@dataclass(frozen=True, kw_only=True)
class TableRequest(ProfileRequest):
    """What to measure: the rows of a ``table`` with the language half of ``model``. The rest is as in ``ProfileRequest``."""

    model: ModelSource
    table: CostTable


def profile_table(
    request: TableRequest, on_row: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each of the table's, as ``profile`` has them, with ``name``, ``text_tokens``, ``floor`` and ``paper``.

    ``text_tokens``: tokens of the prompt that are no visual tokens. ``floor``: the least that the prompt can cost, derived:
    its FLOPs at the speed of a large matrix product here, and the bytes of weights and cache. ``paper``: what the paper
    measured on its own device. ``on_row``: called with each row when it is measured. Raises a ``FreresError`` for a model
    that cannot be used at all.
    """
    weightless = Models(request.model).prompt_counter
    sizes = measure_decoder(weightless)
    dtype = _choose_dtype(request, sizes)
    rows = []
    for wanted in request.table.rows:
        row = _explain_too_large(request, wanted, sizes, dtype) or run_apart(request, wanted.name, run_table_row)
        about = {"name": wanted.name, "method": wanted.method, "paper": wanted.paper_figures}
        context_tokens = row["context_tokens"] or wanted.context_tokens
        rows.append({"text_tokens": None, "flops_per_s": None, **row, **about, "context_tokens": context_tokens})
        if on_row is not None:
            on_row(rows[-1])
    speed = max((row["flops_per_s"] for row in rows if row["flops_per_s"]), default=None)
    storage = request.model.storage
    return [row | {"floor": find_floor(sizes, row["context_tokens"], dtype, speed, storage)} for row in rows]


def find_floor(
    sizes: DecoderSizes,
    context_tokens: int,
    dtype: torch.dtype,
    flops_per_s: float | None,
    storage: Storage = AS_COMPUTED,
) -> dict[str, Any]:
    """Return the least time and memory of a prompt, as the JSON has it.

    Every row passes the matrices once, attends to itself and the rows before it and no others, and one row is turned into
    logits; weights and KV cache are in memory. ``sizes``: of the decoder. ``context_tokens``: rows. ``dtype``: of weights
    and cache, where ``storage`` names no other. ``flops_per_s``: of a large matrix product, ``None`` if not known.
    """
    pairs = context_tokens * (context_tokens + 1) // 2
    flops = context_tokens * sizes.row_flops + pairs * sizes.pair_flops + sizes.head_flops
    return {
        "flops": flops,
        "flops_per_s": flops_per_s,
        "ttft_s": None if flops_per_s is None else flops / flops_per_s,
        "memory_bytes": _least_bytes(sizes, context_tokens, dtype, storage),
    }


def _least_bytes(sizes: DecoderSizes, context_tokens: int, dtype: torch.dtype, storage: Storage) -> int:
    b = dtype.itemsize
    return sizes.weight_bytes(b, storage) + context_tokens * sizes.row_bytes(b, storage)


def _choose_dtype(request: TableRequest, sizes: DecoderSizes) -> torch.dtype:
    checkpoint = Models(request.model).checkpoint
    stored = config_dtype(checkpoint.config)
    return choose_dtype(request.model.dtype, request.device, stored, sizes.num_parameters * stored.itemsize)[0]


def _explain_too_large(
    request: TableRequest, wanted: CostRow, sizes: DecoderSizes, dtype: torch.dtype
) -> dict[str, Any] | None:
    """Return the row of a prompt that cannot fit, ``None`` if it may. Filling a device until it is full takes minutes."""
    needed, room = (
        _least_bytes(sizes, wanted.context_tokens, dtype, request.model.storage),
        total_memory_bytes(torch.device(request.device.name)),
    )
    if needed <= room:
        return None
    told = f"{needed / 1e9:.1f} GB, of {room / 1e9:.1f} GB"
    return empty_row(wanted.method, "out_of_memory", f"not tried: weights and KV cache alone take {told}")


def run_table_row(connection: Connection, request: ProfileRequest, name: str) -> None:
    """Measure the row ``name`` of a ``TableRequest``, and send it or the ``FreresError`` it raised through ``connection``."""
    wanted = cast(TableRequest, request)
    row = next(row for row in wanted.table.rows if row.name == name)
    send_row(connection, request, name, lambda: measure_table_row(wanted, row))


def measure_table_row(request: TableRequest, wanted: CostRow) -> dict[str, Any]:
    """Return one row, measured in this process. ``wanted``: which one."""
    device = torch.device(request.device.name)
    memory, timer = PeakMemory(device), StageTimer(device)
    row = empty_row(wanted.method, "ok", None) | {"base_memory_bytes": memory.read_bytes()}
    placed = place_made_tokens(request.table, wanted)
    with timer.stage("load"):
        model = Models(request.model).language_model
    tokens, text_tokens = fit_prompt(placed, model, request.question, wanted.context_tokens)
    row["message"] = _lift_limit(model, wanted.context_tokens + request.max_new_tokens)
    speed = measure_speed(request.device.name, model.dtype)
    filled = fill_tokens(tokens, model.width, model.num_deep_layers, model.dtype)
    text_after = load_settings(request.table.preset, {}).text_after
    session = Session(model, filled, request.table.full_tokens, text_after, timer.seconds["load"])
    runs: dict[str, list[float]] = {stage: [] for stage in STAGES} | {"load_s": [timer.seconds["load"]]}
    memory.reset()
    row = measure_asks(session, request, memory, row, runs)
    return row | {
        "text_tokens": text_tokens,
        "flops_per_s": speed.flops_per_s,
        "prefill_chunk_tokens": session.chunk_tokens,
    }


def _lift_limit(model: LanguageModel, num_tokens: int) -> str | None:
    """Let a model take prompts beyond its context, and say so. What they cost does not depend on that limit."""
    limit = model.max_context_tokens
    if num_tokens <= limit:
        return None
    model.max_context_tokens = num_tokens
    return f"beyond the model's context of {limit} tokens: it can be measured, not used"
