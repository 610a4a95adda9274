"""What is inside a bundle, without any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from freres_cli.bundle.store import read_bundle
from freres_cli.content import latents_of
from freres_cli.method.energy import EnergyReport, report_energy
from freres_cli.pipeline.adapters import NO_ADAPTER
from freres_cli.pipeline.tokens import load_tokens
from freres_cli.records import TOKEN_KINDS, VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import GOP_STARTS, Tracks
from freres_cli.workflows.absorption import PictureRequest, check_picture, draw_absorption


def inspect_bundle(path: Path, *, with_tokens: bool = False, picture: PictureRequest | None = None) -> dict[str, Any]:
    """Return everything a bundle says about itself. Residual energy and GoPs are ``None`` for methods without them.

    ``with_tokens``: add one row for each visual token. ``picture``: draw the absorber into a file, and add its maps.
    Raises ``BundleError``, and what ``draw_absorption`` raises.
    """
    if picture is not None:
        check_picture(path, picture)
    bundle = read_bundle(path)
    content, manifest = bundle.content, bundle.manifest
    # Without an adapter, these are the bundle's own tokens.
    tokens = load_tokens(bundle, NO_ADAPTER).tokens
    latents = latents_of(content)
    report: dict[str, Any] = {
        "bundle": str(path),
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
        "stretches": describe_stretches(content) if isinstance(content, Stretches) else None,
    }
    if isinstance(content, Tracks):
        energy = report_energy(content)
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


def describe_stretches(stretches: Stretches) -> dict[str, Any]:
    """Return what adaptive Fre-Res kept: the share of the energy, that at other budgets, and how long stretches are."""
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
    }


def _describe_energy(energy: EnergyReport) -> dict[str, Any]:
    return {
        "clip_kept": energy.clip_kept,
        "pooling_kept": energy.pooling_kept,
        "spectrum": list(energy.spectrum),
        "null_spectrum": list(energy.null_spectrum),
        "worst_seconds": [vars(loss) for loss in energy.losses],
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
