"""What is inside a bundle, without any model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from freres_cli.baselines.registry import METHODS
from freres_cli.bundle.store import StoredBundle, read_bundle
from freres_cli.content import Content, latents_of
from freres_cli.method.allocation import frame_edges_s, frames_at, sum_in_time, token_boxes
from freres_cli.method.energy import EnergyReport, lost_in_time, report_energy
from freres_cli.method.stretch_means import box_sizes
from freres_cli.pipeline.adapters import NO_ADAPTER
from freres_cli.pipeline.manifest import clip_end_s
from freres_cli.pipeline.tokens import load_tokens
from freres_cli.records import TOKEN_KINDS, VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import GOP_STARTS, Tracks
from freres_cli.workflows.absorption import PictureRequest, check_picture, draw_absorption

NUM_WORST = 5  # stretches of time that lost the most
NUM_LARGEST = 6  # stretches of adaptive Fre-Res that stand for the most latents
NUM_BINS = 70  # parts of the clip at most, for what changes over time
WHY_NO_LOSS = {
    Stretches: "not stored by second, only for the whole clip: freres fidelity measures it from the video",
    VideoTokens: "not stored by this method: freres fidelity measures it from the video",
}


def inspect_bundle(path: Path, *, with_tokens: bool = False, picture: PictureRequest | None = None) -> dict[str, Any]:
    """Return everything a bundle says about itself. Residual energy and GoPs are ``None`` for methods without them.

    ``with_tokens``: add one row for each visual token. ``picture``: draw the absorber into a file, and add its maps.
    Raises ``BundleError``, and what ``draw_absorption`` raises.
    """
    if picture is not None:
        check_picture(path, picture)
    return describe_bundle(read_bundle(path), with_tokens, picture)


def describe_bundle(
    bundle: StoredBundle, with_tokens: bool = False, picture: PictureRequest | None = None
) -> dict[str, Any]:
    """Return what ``inspect_bundle`` does, of a bundle that was read. The arguments are as there."""
    content, manifest = bundle.content, bundle.manifest
    # Without an adapter, these are the bundle's own tokens.
    tokens = load_tokens(bundle, NO_ADAPTER).tokens
    latents = latents_of(content)
    report: dict[str, Any] = {
        "bundle": str(bundle.path),
        "bundle_bytes": bundle.num_bytes,
        "bytes_per_token": bundle.num_bytes / max(1, len(tokens)),
        **{key: manifest[key] for key in ("freres_version", "model", "source", "sampling", "geometry", "settings")},
        **manifest["tokens"],
        "history": manifest["history"],
        "channels": latents.shape[1],
        "latents_dtype": str(latents.dtype).removeprefix("torch."),
        "schema_version": bundle.schema_version,
        "energy": None,
        "gops": None,
        "over_time": None,
        "tokens": None,
        "absorber": None,
        "stretches": describe_stretches(content, clip_end_s(manifest)) if isinstance(content, Stretches) else None,
    }
    energy = report_energy(content, clip_end_s(manifest)) if isinstance(content, Tracks) else None
    report["over_time"] = describe_time(content, tokens, energy, clip_end_s(manifest)) | {
        "note": _describe_mixing(manifest)
    }
    if isinstance(content, Tracks) and energy is not None:
        report["energy"] = _describe_energy(energy)
        report["gops"] = _describe_gops(content, tokens, energy)
    if with_tokens:
        report["tokens"] = [
            {"kind": TOKEN_KINDS[kind], "gop": gop, "t": t, "h": h, "w": w, "seconds": second, "energy": e}
            for kind, gop, (t, h, w), second, e in zip(
                tokens.kind.tolist(),
                tokens.gop.tolist(),
                tokens.positions.tolist(),
                tokens.seconds.tolist(),
                tokens.energy.tolist(),
                strict=True,
            )
        ]
    if picture is not None:
        report["absorber"] = draw_absorption(bundle, picture)
    return report


def _describe_mixing(manifest: Mapping[str, Any]) -> str | None:
    """Return why tokens are shown at fewer places than they stand for, if they are."""
    method = METHODS.get(manifest["settings"]["method"]["value"])  # a bundle of tokens may be of any method
    if method is None or not method.mixes:
        return None
    return f"tokens of method {method.name} mix latents that the bundle does not name: each is shown at its own place"


def describe_time(
    content: Content, tokens: VideoTokens, energy: EnergyReport | None, end_s: float, num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Return how many tokens stand for each of at most ``num_bins`` equal parts of the clip, and the energy lost in each.

    ``content``, ``tokens``: of the bundle. ``energy``: of its tracks; without it, ``lost_energy`` is ``None`` and
    ``why_no_loss`` says why. ``end_s``: when the clip ends. A token is spread evenly over the time that it stands for, so
    the parts of the clip sum to all tokens.
    """
    edges_s = frame_edges_s(content.frame_seconds, end_s)
    count = min(num_bins, content.grid[0])
    bounds = torch.linspace(float(edges_s[0]), float(edges_s[-1]), count + 1, dtype=torch.float64)
    places = frames_at(edges_s, bounds)
    boxes = token_boxes(tokens)
    by_kind = {
        kind: sum_in_time(boxes, places, (tokens.kind == place).to(torch.float64)).tolist()
        for place, kind in enumerate(TOKEN_KINDS)
    }
    return {
        "edges_s": bounds.tolist(),
        "tokens": sum_in_time(boxes, places).tolist(),
        "tokens_by_kind": by_kind,
        "lost_energy": None if energy is None else lost_in_time(energy.losses, bounds).tolist(),
        "why_no_loss": WHY_NO_LOSS.get(type(content)),
    }


def describe_stretches(stretches: Stretches, end_s: float) -> dict[str, Any]:
    """Return what adaptive Fre-Res kept: the share of the energy, that at other budgets, and how long stretches are.
    ``end_s``: when the clip ends."""
    sides = stretches.boxes[:, 1::2] - stretches.boxes[:, ::2]
    frames, cells = sides[:, 0], sides[:, 1] * sides[:, 2]
    curve = zip(stretches.curve_tokens.tolist(), stretches.curve_loss.tolist(), strict=True)
    return {
        "quality": stretches.quality,
        "curve": [{"visual_tokens": count, "quality": stretches.quality_at(lost)} for count, lost in curve],
        "num_cuts": stretches.cut_frame.shape[0],
        "cuts_s": stretches.frame_seconds[stretches.cut_frame].tolist(),
        "frames_mean": float(frames.double().mean()),
        "frames_max": int(frames.max()),
        "cells_mean": float(cells.double().mean()),
        "cells_max": int(cells.max()),
        "num_single": int(((frames == 1) & (cells == 1)).sum()),
        "largest": _largest(stretches, end_s),
    }


def _largest(stretches: Stretches, end_s: float) -> list[dict[str, Any]]:
    """The stretches that stand for the most latents, largest first."""
    edges_s = frame_edges_s(stretches.frame_seconds, end_s).tolist()
    order = box_sizes(stretches.boxes).argsort(descending=True, stable=True)[:NUM_LARGEST]
    return [
        {"start_s": edges_s[t0], "end_s": edges_s[t1], "frames": t1 - t0, "rows": [h0, h1], "columns": [w0, w1]}
        for t0, t1, h0, h1, w0, w1 in stretches.boxes[order].tolist()
    ]


def _describe_energy(energy: EnergyReport) -> dict[str, Any]:
    return {
        "clip_kept": energy.clip_kept,
        "pooling_kept": energy.pooling_kept,
        "spectrum": list(energy.spectrum),
        "null_spectrum": list(energy.null_spectrum),
        "worst_seconds": [vars(loss) for loss in energy.losses[:NUM_WORST]],
    }


def _describe_gops(tracks: Tracks, tokens: VideoTokens, energy: EnergyReport) -> list[dict[str, Any]]:
    kinds = len(TOKEN_KINDS)
    counts = torch.bincount(tokens.gop * kinds + tokens.kind, minlength=kinds * tracks.gop_anchor_frame.shape[0])
    return [
        {
            "anchor_frame": int(tracks.gop_anchor_frame[g]),
            "start_s": float(tracks.frame_seconds[int(tracks.gop_anchor_frame[g])]),
            "num_residual_frames": int(tracks.gop_num_residuals[g]),
            "frames_per_time_bin": int(tracks.gop_bin_frames[g]),
            "start": GOP_STARTS[int(tracks.gop_start[g])],
            "event_distance": float(tracks.gop_event_distance[g]),
            "energy_kept": energy.gop_kept[g],
            "tokens_by_kind": dict(zip(TOKEN_KINDS, by_kind, strict=True)),
        }
        for g, by_kind in enumerate(counts.reshape(-1, kinds).tolist())
    ]


def choose_gops(gops: list[dict[str, Any]], count: int) -> list[int]:
    """Return the places, in time order, of ``count`` GoPs: half that kept the least energy, the others with most tokens."""
    worst = sorted(
        range(len(gops)), key=lambda g: 2.0 if gops[g]["energy_kept"] is None else float(gops[g]["energy_kept"])
    )
    largest = sorted(range(len(gops)), key=lambda g: -sum(gops[g]["tokens_by_kind"].values()))
    chosen = list(dict.fromkeys([*worst[: count // 2], *largest, *worst]))
    return sorted(chosen[:count])
