"""``freres plan``: what a video will cost, before anything heavy runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.baselines.registry import METHODS
from freres_cli.cli import options
from freres_cli.cli.compress import make_options, plan_document
from freres_cli.cli.given import gather_flags
from freres_cli.cli.output import (
    format_bytes,
    format_seconds,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
)
from freres_cli.devices import choose_storage
from freres_cli.errors import ResourceError, UsageError
from freres_cli.presets import environment_value

if TYPE_CHECKING:
    from freres_cli.workflows.plan import Cost, Speed, Stage

MAX_DIGITS = 18
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def plan(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A video file.")],
    budget: options.Budget = None,
    preset: options.PresetName = None,
    model: options.Model = None,
    revision: options.Revision = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", help="Compression method.", autocompletion=options.complete_bundle_method
        ),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", metavar="SIZE", help="Memory that it must fit: 24GiB, 24GB or 24000MiB."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", min=1e-6, help="Speed to estimate times from, in TFLOP/s, in place of measuring it."),
    ] = None,
    assignments: options.Assignments = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    weight_dtype: options.WeightDtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a video will cost before compressing it or asking about it.

    Prints frames, tokens, work of the tower, tokens in context, KV cache, peak memory with all its parts, and the
    estimated time of every stage but the method's own, which is short. Reads the video's packets and the model's
    configs; no weights are needed. Where cuts may add tokens, tokens in context, cache and memory are those at most. With
    --device-memory it says whether that fits, and the largest budget that fits it and the model's context; the exit
    status is 6 if it does not fit.
    """
    path = options.check_path(video, "VIDEO")
    limit = None if device_memory is None else parse_size(device_memory)
    flags = gather_flags(assignments, {"budget_tokens": budget})
    storage = choose_storage(kv_dtype, weight_dtype)
    chosen = make_options(flags, preset, model, revision, method, device=device, dtype=dtype, storage=storage)
    chosen.check_settings()
    from freres_cli.bench.report import describe_environment
    from freres_cli.workflows.plan import UNKNOWN_SPEED, Planner, estimate_stages, measure_speed, state_speed

    here = chosen.model.device
    is_cpu_named = (device or environment_value("device")) == "cpu"
    planner = Planner(path, chosen, is_cuda=here.is_cuda or (limit is not None and not is_cpu_named))
    cost = planner.cost()
    if tflops is not None:
        speed = state_speed(tflops)
    else:
        speed = UNKNOWN_SPEED if planner.is_cuda and not here.is_cuda else measure_speed(here.name, cost.dtype)
    stages = estimate_stages(cost, speed)
    needed = cost.peak_bytes + cost.base_bytes
    fits = None if limit is None else needed <= limit
    largest = None if limit is None else planner.largest_budget(limit)
    if json:
        facts = {"device_memory_bytes": limit, "fits": fits, "largest_budget": largest}
        document = {**plan_document(cost.plan, chosen), **_document(cost, stages, speed), **facts}
        document |= {"model": chosen.model.name, "notes": list(planner.notes)}
        print_json("freres.plan/2", {**document, "environment": describe_environment(here)})
    else:
        print_notes(planner.notes, quiet)
        _print_cost(cost, stages, speed)
    if fits is False and limit is not None:
        hint = "no budget fits: use a smaller --dtype or another model"
        if largest is not None:
            hint = f"--budget {largest} would fit"
        if not METHODS[chosen.method].has_budget:
            hint = f"method {chosen.method} keeps every token: use another one, a smaller --dtype or model"
        raise ResourceError(
            f"{path}: does not fit: expected at most {format_bytes(limit)}, got {format_bytes(needed)}", hint
        )
    if limit is not None and not json:
        most = "no prompt fits the model's context" if largest is None else f"the largest budget that would: {largest}"
        print_result(f"fits {format_bytes(limit)}: yes; {most}")


def parse_size(text: str) -> int:
    """Return the bytes of ``24GiB``, ``24GB`` or ``24000MiB``. Raises ``UsageError`` for anything else, and for nothing."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B", text.strip())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found and len(found[1]) <= MAX_DIGITS else 0
    if size < 1:
        raise UsageError(f"--device-memory: expected a size such as 24GiB, 24GB or 24000MiB, got {text}")
    return size


def _print_cost(cost: Cost, stages: list[Stage], speed: Speed) -> None:
    plan, text = cost.plan, "" if cost.text_tokens is None else f", {cost.text_tokens} of them text in the video"
    print_result(f"frames           {plan.num_frames} of {plan.size.grid_h}x{plan.size.grid_w} tokens")
    visual = f"{cost.visual_tokens} of {plan.full_tokens}"
    if plan.budget is not None and plan.budget.max_events:
        visual = f"at most {visual}; {plan.budget.expected.total} without cuts"
    if plan.quality is not None:
        visual = f"at most {visual}, as few as keep quality {plan.quality:g}: the rest is for the most"
    print_result(f"visual tokens    {visual}")
    print_result(f"context tokens   at most {cost.context_tokens}{text}")
    print_result(f"KV cache         {format_bytes(cost.kv_bytes)}")
    rows = [
        (s.name, "-" if s.flops is None else f"{s.flops / 1e12:.4g}", format_seconds(s.seconds), s.assumes)
        for s in stages
    ]
    print_table(("stage", "TFLOP", "estimate", "assumes"), rows)
    print_result(f"speed from {speed.source}")
    for name, parts, total in (("compress", cost.encode, cost.encode_bytes), ("ask", cost.ask, cost.ask_bytes)):
        print_table(
            (f"memory of {name}", "size", "where", "formula"),
            [
                (
                    part.name,
                    format_bytes(part.num_bytes),
                    "device" if part.is_on_device or not cost.is_cuda else "host",
                    part.formula,
                )
                for part in parts
            ],
        )
        print_line(f"peak of {name}: {format_bytes(total)}")
    base = "the interpreter, not counted" if not cost.is_cuda else f"{format_bytes(cost.base_bytes)} of CUDA context"
    print_result(f"peak memory {format_bytes(cost.peak_bytes)}, and {base}")


def _document(cost: Cost, stages: list[Stage], speed: Speed) -> dict[str, Any]:
    return {
        "context_tokens": cost.context_tokens,
        "text_overhead_tokens": cost.text_tokens,
        "dtype": str(cost.dtype).removeprefix("torch."),
        **cost.storage.describe(cost.dtype),
        "kv_bytes": cost.kv_bytes,
        "peak_memory_bytes": cost.peak_bytes,
        "base_memory_bytes": cost.base_bytes,
        "frame_tower_flops": cost.tower.flops,
        "prefill_chunk_tokens": cost.chunk,
        "speed": vars(speed),
        "stages": [vars(stage) for stage in stages],
        "memory": {
            "compress": {"bytes": cost.encode_bytes, "parts": [vars(part) for part in cost.encode]},
            "ask": {"bytes": cost.ask_bytes, "parts": [vars(part) for part in cost.ask]},
        },
    }
