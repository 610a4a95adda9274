"""video -> bundle: decode, encode, compress, write; the stages meet here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli import __version__
from freres_cli.backbones.base import VisionEncoder
from freres_cli.backbones.checkpoint import BUNDLED
from freres_cli.backbones.registry import load_vision_encoder
from freres_cli.bench.clock import PeakMemory, StageTimer
from freres_cli.bundle.store import check_destination, write_bundle
from freres_cli.devices import Device, memory_errors_as
from freres_cli.errors import BackboneError, UsageError, VideoError
from freres_cli.method.budget import BudgetPlan, MethodSettings, plan_budget
from freres_cli.method.compress import StreamingCompressor
from freres_cli.presets import Setting, parse_grid
from freres_cli.records import Frames, FrameSize, Tracks, VideoInfo
from freres_cli.video.decode import Decoder, DecodeReport, decode_frames
from freres_cli.video.probe import hash_file, probe_video
from freres_cli.video.sampling import Sampling, num_sampled_frames
from freres_cli.world.bundled_model import bundled_model_dir
from freres_cli.world.make import is_world_clip

# Tokens encoded at a time: bounds the tower's memory whatever the grid; the result does not depend on it.
ENCODE_BATCH_TOKENS = 4608
MAX_BATCH_FRAMES = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CompressRequest:
    """What to compress and how. ``settings`` come from ``presets.merge_settings``; times are seconds into the clip."""

    video: Path
    model: str
    settings: Mapping[str, Setting]
    device: Device
    revision: str | None = None
    dtype: str | None = None
    method: str = "fre-res"
    start_s: float | None = None
    end_s: float | None = None
    strict: bool = False

    def value(self, key: str) -> Any:
        return self.settings[key].value


@dataclass(frozen=True)
class CompressPlan:
    """What will be done, known before any frame is encoded. ``baseline_frames``: frames the full-token model would
    read."""

    info: VideoInfo
    sampling: Sampling
    size: FrameSize
    budget: BudgetPlan
    baseline_frames: int

    @property
    def full_tokens(self) -> int:
        return self.baseline_frames * self.size.num_tokens


@dataclass(frozen=True)
class CompressResult:
    """A written bundle and what it cost. ``timings_s``: seconds by stage; ``notes``: what the user should know."""

    bundle: Path
    bundle_bytes: int
    manifest: dict[str, Any]
    timings_s: dict[str, float]
    peak_memory_bytes: int
    dtype: torch.dtype
    notes: tuple[str, ...]


def method_settings(settings: Mapping[str, Any]) -> MethodSettings:
    """Return the method's knobs from merged settings (plain values by key)."""
    return MethodSettings(**{knob.name: settings[knob.name] for knob in fields(MethodSettings)})


def plan_compression(request: CompressRequest, encoder: VisionEncoder, info: VideoInfo | None = None) -> CompressPlan:
    """Probe the video, unless ``info`` is known, and allocate the budget. Raises ``VideoError`` or ``UsageError``."""
    info = info or probe_video(request.video)
    grid = parse_grid(request.value("grid"))
    size = encoder.frame_size(info.width_px, info.height_px, grid, request.value("tokens_per_frame"))
    values = {key: setting.value for key, setting in request.settings.items()}
    budget = values["budget_tokens"]
    sampling = choose_sampling(request, 1)
    num_frames = baseline = num_sampled_frames(sampling, info.start_s, info.duration_s, info.num_packets)
    # A budget for every token of the named frames leaves nothing for a denser track to add.
    if budget < baseline * size.num_tokens and values["track_density"] > 1:
        sampling = choose_sampling(request, values["track_density"])
        num_frames = num_sampled_frames(sampling, info.start_s, info.duration_s, info.num_packets)
    plan = plan_budget(num_frames, (size.grid_h, size.grid_w), method_settings(values), budget)
    return CompressPlan(info, sampling, size, plan, baseline)


def choose_sampling(request: CompressRequest, density: int) -> Sampling:
    """Return which frames to read: the preset's, ``density`` times as many for the residual track."""
    mode = request.value("sample")
    return Sampling(
        mode,
        fps=request.value("sample_fps") * density if mode == "fps" else None,
        count=request.value("sample_count") * density if mode == "count" else None,
        start_s=request.start_s,
        end_s=request.end_s,
    )


def load_encoder(request: CompressRequest) -> VisionEncoder:
    """Load the vision half of the request's model. Raises ``BackboneError`` or ``ResourceError``."""
    return load_vision_encoder(
        request.model, request.device, request.dtype, request.revision, bundled_directory=bundled_model_dir()
    )


def compress_video(
    request: CompressRequest, output: Path, *, force: bool = False, progress: Progress | None = None
) -> CompressResult:
    """Compress a video into a bundle at ``output``; nothing is written unless everything went well."""
    check_destination(output, force)
    if output.exists() and request.video.is_file() and output.samefile(request.video):
        raise UsageError(f"{output}: is the video itself", "name another file with -o")
    start = time.perf_counter()
    timer = StageTimer(torch.device(request.device.name))
    memory = PeakMemory(torch.device(request.device.name))
    with timer.stage("probe"):
        probe_video(request.video)  # a file that is no video is refused before a model is loaded
    with timer.stage("load"):
        encoder = load_encoder(request)
    plan = plan_compression(request, encoder)
    with memory_errors_as(f"compressing {request.video}", "lower --budget or --grid, or use a smaller --dtype"):
        tracks, compressor, report = run_stages(request, plan, encoder, timer, progress)
    manifest = build_manifest(request, plan, encoder, tracks, compressor, report)
    with timer.stage("write"):
        num_bytes = write_bundle(output, tracks, manifest, force=force)
    timer.seconds["total"] = time.perf_counter() - start
    limits = describe_limits(request.model, manifest["source"]["made_by_world"])
    notes = (*limits, *encoder.notes, *plan.info.notes, *report.notes, *_plan_notes(plan, request, manifest))
    return CompressResult(
        output, num_bytes, manifest, timer.seconds, memory.read_bytes(), encoder.dtype, tuple(dict.fromkeys(notes))
    )


def run_stages(
    request: CompressRequest,
    plan: CompressPlan,
    encoder: VisionEncoder,
    timer: StageTimer,
    progress: Progress | None = None,
) -> tuple[Tracks, StreamingCompressor, DecodeReport]:
    """Stream decode -> encode -> compress, timing each; frames are never all in memory."""
    decoder = open_decoder(request, plan)
    compressor = start_compressor(request, plan, encoder)
    done, total = 0, plan.budget.num_frames
    for frames, latents in encode_frames(timed_batches(decoder, timer), encoder, timer):
        check_finite(latents, request)
        with timer.stage("compress"):
            compressor.push(latents, frames.pts_seconds)
        done += len(frames.pts_seconds)
        if progress is not None:
            progress(done, max(done, total))
    check_any(done, request)
    with timer.stage("compress"):
        tracks = compressor.finish()
        # At the end, so that what stays is the same to the bit as in a bundle that keeps all.
        if request.value("deepstack") == "drop":
            tracks = tracks.without_deep_rows()
    return tracks, compressor, decoder.report


def batch_frames(plan: CompressPlan) -> int:
    """Return how many frames are decoded and encoded at a time."""
    return max(1, min(MAX_BATCH_FRAMES, ENCODE_BATCH_TOKENS // plan.size.num_tokens))


def open_decoder(request: CompressRequest, plan: CompressPlan) -> Decoder:
    """Return the decoder of the plan's frames, in batches."""
    return decode_frames(request.video, plan.info, plan.sampling, plan.size, batch_frames(plan), request.strict)


def start_compressor(request: CompressRequest, plan: CompressPlan, encoder: VisionEncoder) -> StreamingCompressor:
    """Return an empty compressor with the request's settings."""
    values = {key: setting.value for key, setting in request.settings.items()}
    return StreamingCompressor(plan.budget, method_settings(values), encoder.width)


def check_finite(latents: Tensor, request: CompressRequest) -> None:
    """Refuse latents that overflowed. Raises ``BackboneError``."""
    if not bool(torch.isfinite(latents).all()):
        raise BackboneError(
            f"{request.model}: latents are not finite in {latents.dtype}", "use --dtype float32 or bfloat16"
        )


def check_any(num_frames: int, request: CompressRequest) -> None:
    """Refuse a clip of no frames. Raises ``VideoError``."""
    if not num_frames:
        raise VideoError(f"{request.video}: no frame could be decoded in the part asked for")


def timed_batches(decoder: Decoder, timer: StageTimer) -> Iterator[Frames]:
    """Yield the decoder's batches, timed as stage ``decode``."""
    batches = iter(decoder)
    while True:
        with timer.stage("decode"):
            frames = next(batches, None)
        if frames is None:
            return
        yield frames


def encode_frames(
    batches: Iterable[Frames], encoder: VisionEncoder, timer: StageTimer
) -> Iterator[tuple[Frames, Tensor]]:
    """Yield each batch with its latents (n, H, W, C); a frame shown again does not pass the tower again."""
    last_index: int | None = None
    last: Tensor | None = None
    for frames in batches:
        indices = frames.source_index
        is_new = [i == 0 or indices[i] != indices[i - 1] for i in range(len(indices))]
        is_new[0] = indices[0] != last_index
        with timer.stage("encode"):
            fresh = [encoder.encode(frames.pixels[torch.tensor(is_new)])] if any(is_new) else []
            known = [] if is_new[0] or last is None else [last[None]]
            rows = torch.tensor(is_new).cumsum(0) - (0 if known else 1)
            latents = torch.cat([*known, *fresh])[rows.to(encoder.device)]
        last_index, last = indices[-1], latents[-1].clone()
        yield frames, latents


def build_manifest(
    request: CompressRequest,
    plan: CompressPlan,
    encoder: VisionEncoder,
    tracks: Tracks,
    compressor: StreamingCompressor,
    report: DecodeReport,
) -> dict[str, Any]:
    """Return the manifest: everything that made the bundle, and nothing that differs between two equal runs."""
    info = {key: value for key, value in asdict(plan.info).items() if key not in ("path", "notes")}
    return {
        "freres_version": __version__,
        "model": {
            **encoder.fingerprint,
            # A folder's name alone would not find it again.
            "folder": _model_folder(request.model),
            "family": encoder.family,
            "width": encoder.width,
            "num_deep_layers": encoder.num_deep_layers,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "attention": encoder.attention,
        },
        "source": {
            "file": os.fsencode(request.video.name).decode(errors="backslashreplace"),
            "bytes": request.video.stat().st_size,
            "sha256": hash_file(request.video),
            "made_by_world": is_world_clip(request.video),
            **info,
            "notes": list(plan.info.notes),
        },
        "sampling": {
            "mode": plan.sampling.mode,
            "fps": plan.sampling.fps,
            "count": plan.sampling.count,
            "start_s": plan.sampling.start_s,
            "end_s": plan.sampling.end_s,
            "num_frames": tracks.grid[0],
            "baseline_frames": min(plan.baseline_frames, tracks.grid[0]),
            "lost_s": report.lost_s,
            "notes": list(report.notes),
        },
        "geometry": {
            "width": tracks.width,
            "grid": list(tracks.grid),
            "pooled_grid": list(tracks.pooled_grid),
            **describe_frames(plan),
        },
        "settings": {
            "method": {"value": request.method, "source": "default"},
            **{key: asdict(setting) for key, setting in request.settings.items() if key != "description"},
        },
        "tokens": describe_tokens(request, plan, tracks, compressor),
        "history": [{"verb": "compress", "freres_version": __version__}],
    }


def describe_frames(plan: CompressPlan) -> dict[str, Any]:
    """Return the frames' size for the manifest, and what became of their aspect ratio (width over height)."""
    size, info = plan.size, plan.info
    return {
        "frame_height_px": size.height_px,
        "frame_width_px": size.width_px,
        "fit": size.fit(info.width_px, info.height_px),
        "frame_aspect": size.width_px / size.height_px,
        "source_aspect": info.width_px / info.height_px,
    }


def _model_folder(model: str) -> str | None:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model != BUNDLED and folder.is_dir() else None


def describe_tokens(
    request: CompressRequest, plan: CompressPlan, tracks: Tracks, compressor: StreamingCompressor
) -> dict[str, Any]:
    """Return the token counts of the manifest."""
    by_kind = tracks.num_tokens_by_kind()
    full = min(plan.baseline_frames, tracks.grid[0]) * plan.size.num_tokens
    return {
        **token_counts(by_kind, request.value("budget_tokens"), full),
        "encoded_tokens": tracks.grid[0] * plan.size.num_tokens,
        "num_gops": int(tracks.gop_anchor_frame.shape[0]),
        "num_coefficients": plan.budget.num_coefficients,
        "cuts_found": compressor.num_cuts_found,
        "cuts_not_honoured": compressor.num_cuts_not_honoured,
    }


def token_counts(by_kind: Mapping[str, int], budget_tokens: int, full_tokens: int) -> dict[str, Any]:
    """Return the counts every verb reports in the same words; compression is in/out, retention out/in."""
    visual = sum(by_kind.values())
    return {
        "visual_tokens": visual,
        "budget_tokens": budget_tokens,
        "full_tokens": full_tokens,
        "compression": full_tokens / visual,
        "retention": visual / full_tokens,
        "tokens_by_kind": dict(by_kind),
    }


def _plan_notes(plan: CompressPlan, request: CompressRequest, manifest: Mapping[str, Any]) -> Iterator[str]:
    tokens, model = manifest["tokens"], manifest["model"]
    if plan.budget.is_lossless:
        yield (
            f"the budget of {plan.budget.budget_tokens} tokens holds all {plan.budget.expected.total} tokens of the "
            "clip: all are kept as they are"
        )
    elif tokens["visual_tokens"] < 0.98 * plan.budget.budget_tokens:
        yield f"{tokens['visual_tokens']} of {plan.budget.budget_tokens} tokens used: the clip has no more that differ"
    if tokens["cuts_not_honoured"]:
        yield f"{tokens['cuts_not_honoured']} of {tokens['cuts_found']} cuts got no anchor of their own: the budget is full"
    if request.value("sample") == "native" and request.value("track_density") > 1:
        yield "track_density has no effect with sample: native"
    if request.value("deepstack") == "drop":
        yield describe_drop(model["num_deep_layers"]) or f"deepstack has no effect: {model['family']} has no such rows"


def describe_limits(model_id: str, is_from_world: bool) -> tuple[str, ...]:
    """What the bundled model is asked beyond what it knows, in words; nothing for other models."""
    if model_id != BUNDLED or is_from_world:
        return ()
    return (
        "the bundled model only knows its own world of drawn shapes ('freres world make'): what it says of other videos "
        "means nothing; name a real model with --model, such as Qwen/Qwen2-VL-2B-Instruct",
    )


def describe_drop(num_deep_layers: int) -> str | None:
    """What leaving out the DeepStack rows costs, in words; None for a model without them."""
    if not num_deep_layers:
        return None
    return (
        f"the bundle holds no DeepStack rows: it is {1 + num_deep_layers} times smaller, the language model adds zeros "
        "in their place, and its answers change"
    )
