"""Cost of a clip, compressed and in full. Each row has its own process, so a row can report that memory ran out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from freres_cli.baselines.registry import FRE_RES
from freres_cli.bench import apart
from freres_cli.bench.clock import PeakMemory, StageTimer
from freres_cli.bench.report import summarize_runs
from freres_cli.bundle.store import read_bundle
from freres_cli.devices import Device, memory_errors_as
from freres_cli.errors import ContextError, FreresError, ResourceError
from freres_cli.pipeline.adapters import NO_ADAPTER
from freres_cli.pipeline.bundle import Bundle
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.manifest import build_manifest
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import FULL_BUDGET, CompressOptions, plan_compression
from freres_cli.pipeline.session import AskRequest, Session, open_session
from freres_cli.pipeline.tokens import load_tokens
from freres_cli.records import VideoTokens

STAGES = ("load_s", "decode_s", "encode_s", "compress_s", "prefill_s", "ttft_s", "next_ttft_s", "tpot_s")


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure: a ``video`` compressed with ``options``, or a ``bundle``.

    ``device``: where the models run. ``question``, ``max_new_tokens``: what to ask, and the maximum tokens in the answer.
    ``repeat``: measured runs. ``warmup``: runs before those, not measured. ``timeout_s``: stop a row that takes longer.
    """

    device: Device
    question: str
    repeat: int
    warmup: int
    max_new_tokens: int
    timeout_s: float
    video: Path | None = None
    options: CompressOptions | None = None
    bundle: AskRequest | None = None

    @property
    def inputs(self) -> tuple[tuple[str, Path | None], ...]:
        """The files that are read, as ``InputFiles`` takes them."""
        bundle = None if self.bundle is None else self.bundle.bundle
        own = () if self.options is None else self.options.files
        return (("video", self.video), ("bundle", bundle), *own)


def profile(request: ProfileRequest, on_row: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
    """Return a row for the method of the clip or the bundle, and one for the full-token run of the same model.

    ``on_row``: called with each row when it is measured.

    The ``status`` of a row is ok, out_of_memory, context_exceeded or timed_out; figures it did not reach are ``None``.
    Raises a ``FreresError`` for a video, bundle or model that cannot be used at all.
    """
    if request.video is not None:
        VideoSource(request.video)  # refuses a file that is no video before the first row's process starts
    rows = []
    for method in dict.fromkeys((_method_of(request), "full")):
        row = run_apart(request, method)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _method_of(request: ProfileRequest) -> str:
    if request.options is not None:
        return request.options.method
    assert request.bundle is not None
    return str(read_bundle(request.bundle.bundle).manifest["settings"]["method"]["value"])


RowTarget = Callable[[Connection, ProfileRequest, str], None]


def run_apart(request: ProfileRequest, method: str, target: RowTarget | None = None) -> dict[str, Any]:
    """Measure one row in a fresh process, with ``run_row`` or another ``target``, and return the row."""
    outcome = apart.run_apart(target or run_row, (request, method), request.timeout_s)
    value = outcome.value
    if isinstance(value, dict):
        return value
    if isinstance(value, ContextError):
        return empty_row(method, "context_exceeded", value.message)
    if isinstance(value, FreresError) and not isinstance(value, ResourceError):
        raise value
    if outcome.is_late:
        return empty_row(method, "timed_out", f"took longer than {request.timeout_s:g} s")
    # Any other silent exit is our own failure.
    if value is None and not outcome.is_starved:
        raise FreresError(f"profile: the process of row {method} failed with status {outcome.exit_code}; see above")
    return empty_row(method, "out_of_memory", value.message if value is not None else "the system killed the process")


def empty_row(method: str, status: str, message: str | None) -> dict[str, Any]:
    """Return a row without figures. ``status``: as ``profile`` has it; ``message``: why it has none."""
    figures = {name: None for name in ("visual_tokens", "context_tokens", "full_tokens", "peak_memory_bytes")}
    figures |= {"encode_peak_memory_bytes": None, "ask_peak_memory_bytes": None, "base_memory_bytes": None}
    return {
        "method": method,
        "status": status,
        "message": message,
        "notes": [],
        "dtype": None,
        "kv_dtype": None,
        "weight_dtype": None,
        "attention": None,
        **figures,
        **dict.fromkeys(STAGES),
        "spread": {},
    }


def run_row(connection: Connection, request: ProfileRequest, method: str) -> None:
    """Measure one row, and send it or the ``FreresError`` it raised through ``connection``."""
    send_row(connection, request, method, lambda: _measure_row(request, method))


def send_row(connection: Connection, request: ProfileRequest, name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Send what ``measure`` returns, or the ``FreresError`` it raised, through ``connection``.

    ``request``: how to measure. ``name``: of the row, for messages.
    """
    try:
        if not request.device.is_cuda:
            apart.limit_memory()
        with memory_errors_as(f"row {name}", "use a machine with more memory, or fewer tokens"):
            row = measure()
        connection.send(row)
    except FreresError as error:
        connection.send(error)
    finally:
        connection.close()


def _measure_row(request: ProfileRequest, method: str) -> dict[str, Any]:
    device = torch.device(request.device.name)
    memory = PeakMemory(device)
    row = empty_row(method, "ok", None) | {"base_memory_bytes": memory.read_bytes()}
    runs: dict[str, list[float]] = {stage: [] for stage in STAGES}
    if request.options is not None:
        tokens, full_tokens, row["notes"] = _encode_runs(request, method, runs)
        row["encode_peak_memory_bytes"] = memory.read_bytes()
        memory.reset()
        session = _session_for(request.options, tokens, full_tokens, runs)
    else:
        assert request.bundle is not None
        session = open_session(request.bundle)
        runs["load_s"].append(session.load_s)
        if method == "full" and len(session.tokens) != session.full_tokens:
            session.tokens = _stand_in(session.tokens, session.full_tokens)
            row["message"] = "random latents stand in for the full tokens: the bundle does not hold the video"
    return measure_asks(session, request, memory, row, runs)


def measure_asks(
    session: Session,
    request: ProfileRequest,
    memory: PeakMemory,
    row: dict[str, Any],
    runs: dict[str, list[float]],
) -> dict[str, Any]:
    """Ask as often as requested, and return the row with its figures.

    ``session``, ``request``: what to ask. ``memory``: whose span the asking belongs to. ``row``: what is known so far.
    ``runs``: the seconds of each stage so far, by its name in ``STAGES``.
    """
    for run in range(-request.warmup, request.repeat):
        context_tokens = _ask_once(session, request, runs if run >= 0 else None)
    row["dtype"] = str(session.model.dtype).removeprefix("torch.")
    row |= {"attention": session.model.attention, **session.model.storage.describe(session.model.dtype)}
    row["ask_peak_memory_bytes"] = memory.read_bytes()
    row["peak_memory_bytes"] = max(row["ask_peak_memory_bytes"], row["encode_peak_memory_bytes"] or 0)
    row |= {"visual_tokens": len(session.tokens), "full_tokens": session.full_tokens, "context_tokens": context_tokens}
    row["spread"] = {stage: summarize_runs(values) for stage, values in runs.items() if values}
    return row | {stage: spread["median"] for stage, spread in row["spread"].items()}


def _encode_runs(
    request: ProfileRequest, method: str, runs: dict[str, list[float]]
) -> tuple[VideoTokens, int, list[str]]:
    """Decode, encode and compress as often as asked; return the tokens, the full-token count, and what is odd about the
    video."""
    options, video = request.options, request.video
    assert options is not None and video is not None
    if method == "full":
        full = {"budget_tokens": FULL_BUDGET, "track_density": 1, "variant": "absorber", "deepstack": "keep"}
        settings = options.settings.with_values("full", quality=None, **full)
        options = replace(options, method=FRE_RES, settings=settings)
    compressor = Compressor.from_options(options)
    timer = StageTimer(torch.device(request.device.name))
    with timer.stage("load"):
        encoder = compressor.models.encoder
    runs["load_s"].append(timer.seconds["load"])
    source = VideoSource(video)
    plan = plan_compression(options, encoder, source.info)
    for run in range(-request.warmup, request.repeat):
        timer.seconds.clear()
        reduction, report = compressor.run_stages(source, options, plan, timer)
        if run >= 0:
            for stage in ("decode", "encode", "compress"):
                runs[f"{stage}_s"].append(timer.seconds[stage])
    manifest = build_manifest(source, options, plan, encoder, reduction, report)
    tokens = load_tokens(Bundle(manifest, reduction.content), NO_ADAPTER).tokens
    notes = dict.fromkeys((*source.info.notes, *manifest["sampling"]["notes"]))
    return tokens, int(manifest["tokens"]["full_tokens"]), list(notes)


def _session_for(
    options: CompressOptions, tokens: VideoTokens, full_tokens: int, runs: dict[str, list[float]]
) -> Session:
    """Return a session over tokens that were never written to a bundle."""
    timer = StageTimer(torch.device(options.model.device.name))
    with timer.stage("load"):
        model = Models(options.model).language_model
    runs["load_s"][0] += timer.seconds["load"]
    return Session(model, tokens, full_tokens, options.settings.text_after, timer.seconds["load"])


def _stand_in(tokens: VideoTokens, full_tokens: int) -> VideoTokens:
    """Return random latents for every token of the full sequence. Cost does not depend on their values."""
    _, grid_h, grid_w = tokens.grid
    num_frames = full_tokens // (grid_h * grid_w)
    index = torch.arange(full_tokens)
    t, h, w = index // (grid_h * grid_w), index // grid_w % grid_h, index % grid_w
    generator = torch.Generator().manual_seed(0)
    first, last = float(tokens.frame_seconds[0]), float(tokens.frame_seconds[-1])
    frame_seconds = torch.linspace(first, last, num_frames, dtype=torch.float64)
    latents = torch.randn(full_tokens, tokens.latents.shape[1], generator=generator).to(tokens.latents.dtype)
    return VideoTokens(
        latents=latents,
        positions=torch.stack([t, h, w], dim=1).to(torch.float32),
        seconds=frame_seconds[t],
        kind=torch.zeros(full_tokens, dtype=torch.uint8),
        gop=t,
        energy=torch.zeros(full_tokens),
        grid=(num_frames, grid_h, grid_w),
        width=tokens.width,
        frame_seconds=frame_seconds,
    )


def _ask_once(session: Session, request: ProfileRequest, runs: dict[str, list[float]] | None) -> int:
    """Ask once with a cold prefix and once with the prefix reused; return the tokens in context."""
    session.forget_prefix()
    first = session.ask(request.question, max_new_tokens=request.max_new_tokens)
    second = session.ask(request.question, max_new_tokens=1)
    if runs is not None:
        runs["prefill_s"].append(session.prefill_s)
        assert first.ttft_s is not None and second.ttft_s is not None
        runs["ttft_s"].append(first.ttft_s)
        runs["next_ttft_s"].append(second.ttft_s)
        runs["tpot_s"] += [] if first.tpot_s is None else [first.tpot_s]
    return first.num_context_tokens
