"""What is inside a bundle, without any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from freres_cli.bundle.store import read_bundle
from freres_cli.method.energy import EnergyReport, report_energy
from freres_cli.method.tokens import build_tokens
from freres_cli.records import GOP_STARTS, TOKEN_KINDS, Tracks, VideoTokens
from freres_cli.workflows.absorption import PictureRequest, check_picture, draw_absorption


def inspect_bundle(path: Path, *, with_tokens: bool = False, picture: PictureRequest | None = None) -> dict[str, Any]:
    """Return everything a bundle says of itself; ``with_tokens`` adds one row for each visual token.

    ``picture`` has the absorber drawn into a file, and adds its maps. Raises ``BundleError``, and what
    ``draw_absorption`` raises.
    """
    if picture is not None:
        check_picture(path, picture)
    bundle = read_bundle(path)
    tracks, manifest = bundle.tracks, bundle.manifest
    variant = manifest["settings"]["variant"]["value"]
    energy = report_energy(tracks)
    tokens = build_tokens(tracks, variant)
    report: dict[str, Any] = {
        "bundle": str(path),
        "bundle_bytes": bundle.num_bytes,
        "bytes_per_token": bundle.num_bytes / max(1, len(tokens)),
        **{key: manifest[key] for key in ("freres_version", "model", "source", "sampling", "geometry", "settings")},
        **manifest["tokens"],
        "history": manifest["history"],
        "channels": tracks.anchor_latents.shape[1],
        "latents_dtype": str(tracks.anchor_latents.dtype).removeprefix("torch."),
        "energy": {
            "clip_kept": energy.clip_kept,
            "pooling_kept": energy.pooling_kept,
            "spectrum": list(energy.spectrum),
            "null_spectrum": list(energy.null_spectrum),
            "worst_seconds": [vars(loss) for loss in energy.losses],
        },
    }
    report["gops"] = _describe_gops(tracks, tokens, energy)
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
