"""The manifest of a bundle: how it was made, without anything that differs between two identical runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from freres_cli import __version__
from freres_cli.backbones.base import VisionEncoder
from freres_cli.baselines.registry import PLUGINS
from freres_cli.content import count_by_kind, kind_of
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.notes import describe_repeats
from freres_cli.pipeline.planning import CompressOptions, CompressPlan
from freres_cli.pipeline.prompt_text import PromptText, describe_text, record_text
from freres_cli.pipeline.reduction import Reduction
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks
from freres_cli.video.reading import DecodeReport


def build_manifest(
    source: VideoSource,
    options: CompressOptions,
    plan: CompressPlan,
    encoder: VisionEncoder,
    reduction: Reduction,
    report: DecodeReport,
    text: PromptText | None = None,
) -> dict[str, Any]:
    """Return the manifest of a finished compression.

    ``source``: the video. ``options``: what was asked for. ``plan``: what was planned from that. ``encoder``: the tower.
    ``reduction``: what was kept. ``report``: how decoding went. ``text``: that of the model's prompt about this clip, if
    it could be counted.
    """
    num_frames = reduction.num_frames
    tracks = reduction.content if isinstance(reduction.content, Tracks) else None
    tokens = describe_tokens(plan, options, reduction, report)
    settings = options.recorded_settings
    counts = describe_text(reduction.content, settings.variant, text)
    if not options.has_budget:
        settings = settings.with_values(f"method {options.method}", budget_tokens=tokens["budget_tokens"])
    return {
        "freres_version": __version__,
        "content": kind_of(reduction.content),
        "model": {
            **encoder.fingerprint,
            # Its name alone is not enough to find a folder again.
            "folder": None if options.model.folder is None else as_text(options.model.folder),
            "family": encoder.family,
            "width": encoder.width,
            "num_deep_layers": encoder.num_deep_layers,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "attention": encoder.attention,
            "pixels_sha256": encoder.pixels_sha256,
        },
        "source": describe_source(source),
        "sampling": {
            "mode": plan.sampling.mode,
            "fps": plan.sampling.fps,
            "count": plan.sampling.count,
            "start_s": plan.sampling.start_s,
            "end_s": plan.sampling.end_s,
            "num_frames": num_frames,
            "baseline_frames": count_baseline_frames(plan, num_frames),
            "lost_s": report.lost_s,
            "notes": [*describe_repeats(plan), *report.notes],
        },
        "geometry": {
            "width": reduction.content.width,
            "grid": [num_frames, plan.size.grid_h, plan.size.grid_w],
            "pooled_grid": None if tracks is None else list(tracks.pooled_grid),
            "residual_grid": None
            if plan.residual_size is None
            else [plan.residual_size.grid_h, plan.residual_size.grid_w],
            **describe_frames(plan),
            **record_text(text),
        },
        "settings": {
            key: {**setting, "source": as_text(setting["source"])} for key, setting in settings.record().items()
        },
        "tokens": {**tokens, **counts},
        "history": [{"verb": "compress", "freres_version": __version__, **_describe_origin(options.method)}],
    }


def _describe_origin(method: str) -> dict[str, str]:
    """Which package a method is from, if it is not freres itself."""
    origin = PLUGINS.origins.get(method)
    return {} if origin is None else {"method_from": origin}


def describe_source(source: VideoSource) -> dict[str, Any]:
    """Return the manifest's facts about a video, with the file's name but no path."""
    info = source.info
    facts = {key: value for key, value in asdict(info).items() if key not in ("path", "notes", "num_bytes")}
    name = None if source.title is None else as_text(source.title)
    return {
        "file": name,
        "bytes": source.num_bytes,
        "sha256": source.sha256,
        "made_by_world": source.is_from_world,
        **facts,
        "notes": list(info.notes),
    }


def clip_end_s(manifest: Mapping[str, Any]) -> float:
    """Return when the part of the video that was read ends, counted as all times of the clip are."""
    source, last_s = manifest["source"], manifest["sampling"]["end_s"]
    length_s = source["duration_s"] if last_s is None else min(source["duration_s"], last_s)
    return float(source["start_s"] - source["zero_s"] + length_s)


def as_text(name: str) -> str:
    """Return a file's name as Unicode; bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def describe_frames(plan: CompressPlan) -> dict[str, Any]:
    """Return the frame size for the manifest, with the aspect ratio (width over height) before and after resizing."""
    size, info = plan.size, plan.info
    return {
        "frame_height_px": size.height_px,
        "frame_width_px": size.width_px,
        "fit": size.fit(info.width_px, info.height_px),
        "frame_aspect": size.width_px / size.height_px,
        "source_aspect": info.width_px / info.height_px,
    }


def count_baseline_frames(plan: CompressPlan, num_frames: int) -> int:
    """Return how many frames the full-token model would read where ``num_frames`` of those of the plan could be."""
    if num_frames >= plan.num_frames:
        return plan.baseline_frames
    return max(1, math.ceil(plan.baseline_frames * num_frames / plan.num_frames))


def describe_tokens(
    plan: CompressPlan, options: CompressOptions, reduction: Reduction, report: DecodeReport
) -> dict[str, Any]:
    """Return the token counts of the manifest. Counts that only Fre-Res has are null for other methods.

    ``plan``, ``options``: what was asked for. ``reduction``: what was kept. ``report``: how decoding went.
    """
    by_kind = count_by_kind(reduction.content)
    per_frame, of_frame = plan.size.num_tokens, plan.residual_size or plan.size
    num_encoded = report.num_pictures if reduction.num_encoded is None else reduction.num_encoded
    full = count_baseline_frames(plan, reduction.num_frames) * per_frame
    tracks = reduction.content if isinstance(reduction.content, Tracks) else None
    budget_tokens = plan.budget_tokens if options.has_budget else sum(by_kind.values())
    return {
        **token_counts(by_kind, budget_tokens, full),
        "quality": reduction.content.quality if isinstance(reduction.content, Stretches) else None,
        "encoded_tokens": num_encoded * of_frame.num_tokens + reduction.num_frames_whole * per_frame,
        "num_gops": None if tracks is None else int(tracks.gop_anchor_frame.shape[0]),
        "num_coefficients": None if plan.budget is None else plan.budget.num_coefficients,
        "cuts_found": reduction.num_cuts_found,
        "cuts_not_honoured": reduction.num_cuts_not_honoured,
    }


def token_counts(by_kind: Mapping[str, int], budget_tokens: int, full_tokens: int) -> dict[str, Any]:
    """Return the counts that all verbs report, under the same names. Compression is in/out, retention out/in."""
    visual = sum(by_kind.values())
    return {
        "visual_tokens": visual,
        "budget_tokens": budget_tokens,
        "full_tokens": full_tokens,
        "compression": full_tokens / visual,
        "retention": visual / full_tokens,
        "tokens_by_kind": dict(by_kind),
    }
