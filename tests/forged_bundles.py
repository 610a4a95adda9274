"""Hand-made bundles with correct checksums, even if their content is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freres_cli.baselines.uniform import sample_uniform_frames
from freres_cli.bundle import version_1
from freres_cli.bundle.schema import FORMAT, READERS, SCHEMA_VERSION, describe_tensors, encode_manifest
from freres_cli.bundle.store import write_bundle
from freres_cli.bundle.version_4 import TENSORS
from freres_cli.content import Content, count_by_kind, kind_of
from freres_cli.method.adaptive import StretchCompressor
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import compress_latents
from freres_cli.pipeline.planning import method_settings
from freres_cli.presets import load_settings
from freres_cli.records import VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks

BUDGET = 300
WIDTH = 16
MANIFEST: dict[str, Any] = {
    "freres_version": "0",
    "model": {
        "model_id": "x",
        "revision": None,
        "config_sha256": "1" * 64,
        "projector_sha256": "2" * 64,
        "folder": None,
        "family": "qwen2_vl",
        "width": WIDTH,
        "num_deep_layers": 0,
        "dtype": "float32",
        "attention": "sdpa",
    },
    "source": {
        "file": "clip.mp4",
        "bytes": 1000,
        "sha256": "3" * 64,
        "made_by_world": False,
        "container": "mp4",
        "codec": "h264",
        "width_px": 64,
        "height_px": 64,
        "source_fps": 10.0,
        "start_s": 0.0,
        "zero_s": 0.0,
        "duration_s": 4.0,
        "notes": [],
    },
    "sampling": {
        "mode": "native",
        "fps": None,
        "count": None,
        "start_s": None,
        "end_s": None,
        "num_frames": 40,
        "baseline_frames": 40,
        "lost_s": 0.0,
        "notes": [],
    },
    "settings": load_settings("bundled", {"method": "fre-res"}).record(),
    "tokens": {
        "visual_tokens": BUDGET,
        "budget_tokens": BUDGET,
        "full_tokens": 2560,
        "compression": 2560 / BUDGET,
        "retention": BUDGET / 2560,
        "tokens_by_kind": {"anchor": 100, "dynamic": 100, "static": 50, "summary": 50},
        "encoded_tokens": 2560,
        "num_gops": 4,
        "num_coefficients": 1,
        "cuts_found": 0,
        "cuts_not_honoured": 0,
    },
    "history": [],
}
FRAMES = {"frame_height_px": 64, "frame_width_px": 64, "fit": "exact", "frame_aspect": 1.0, "source_aspect": 1.0}


def smooth_latents(num_frames: int = 40, side: int = 8) -> Tensor:
    """(T, side, side, 16) that drift in the middle of the grid and nearly stand still elsewhere."""
    generator = torch.Generator().manual_seed(0)
    still, drift = (torch.randn(side, side, WIDTH, generator=generator) for _ in range(2))
    mask = torch.zeros(side, side, 1)
    mask[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1.0
    t = torch.linspace(0, 1, num_frames)[:, None, None, None]
    noise = 1e-3 * torch.randn(num_frames, side, side, WIDTH, generator=generator)
    return still + 3.0 + torch.sin(3 * t) * drift * mask + noise


def make_tracks(latents: Tensor, budget_tokens: int = BUDGET, anchors: int = 4) -> Tracks:
    """Tracks of a clip at 10 frames a second, with tokens of every kind."""
    knobs = method_settings(load_settings("bundled", {"anchors": anchors, "events": False}))
    plan = plan_budget(len(latents), tuple(latents.shape[1:3]), knobs, budget_tokens)
    return compress_latents(latents, [i / 10 for i in range(len(latents))], plan, knobs, WIDTH)


def make_tokens(latents: Tensor, budget_tokens: int = BUDGET) -> VideoTokens:
    """The same clip's tokens by method uniform."""
    return sample_uniform_frames(latents, torch.arange(len(latents), dtype=torch.float64) / 10, budget_tokens, WIDTH)


def make_stretches(latents: Tensor, budget_tokens: int = BUDGET, keeps_trends: bool = True) -> Stretches:
    """The same clip's stretches."""
    compressor = StretchCompressor(tuple(latents.shape[1:3]), WIDTH, budget_tokens, keeps_trends=keeps_trends)
    compressor.push(latents, [i / 10 for i in range(len(latents))])
    return compressor.finish()


def manifest_for(content: Content, **sections: Any) -> dict[str, Any]:
    """``MANIFEST`` with the geometry of this content, and with other ``sections``."""
    geometry = {"width": content.width, "grid": list(content.grid), "pooled_grid": None, **FRAMES}
    by_kind = count_by_kind(content)
    full_tokens = MANIFEST["sampling"]["baseline_frames"] * content.grid[1] * content.grid[2]
    counts = {"tokens_by_kind": by_kind, "visual_tokens": sum(by_kind.values()), "full_tokens": full_tokens}
    manifest = {**MANIFEST, "geometry": geometry, "tokens": {**MANIFEST["tokens"], **counts}}
    if isinstance(content, Tracks):
        geometry["pooled_grid"] = list(content.pooled_grid)
    else:
        only_tracks = ("num_gops", "num_coefficients", "cuts_found", "cuts_not_honoured")
        method = "adaptive" if isinstance(content, Stretches) else "uniform"
        manifest["settings"] = {**MANIFEST["settings"], "method": {"value": method, "source": "flag"}}
        manifest["tokens"] |= dict.fromkeys(only_tracks)
    if isinstance(content, Stretches):
        manifest["tokens"]["quality"] = content.quality
        manifest["settings"]["trends"] = {"value": "keep" if content.has_trends else "drop", "source": "flag"}
    return {**manifest, **sections}


def forge(
    path: Path,
    content: Content,
    tensors: Mapping[str, Tensor],
    version: int = SCHEMA_VERSION,
    **sections: Any,
) -> None:
    """Write a bundle of these ``tensors``, described as ``content`` would be, with other ``sections`` in its manifest.

    Earlier versions have none of the columns that were added since.
    """
    kind = kind_of(content)
    of_version = version_1.TENSORS if version == 1 else READERS[version].TENSORS[kind]
    tensors = {name: t for name, t in tensors.items() if name in of_version or name not in TENSORS[kind]}
    manifest = {**manifest_for(content, **sections), "content": kind, "tensors": describe_tensors(tensors)}
    _sign(path, {"format": FORMAT, "schema_version": version, "tensors": dict(tensors)}, encode_manifest(manifest))


def rewrite(path: Path, **changes: Any) -> None:
    """Change the outer dictionary of a bundle, checksums of the rest untouched."""
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Let ``edit`` change the manifest of a bundle, and make its checksum right."""
    outer = torch.load(path, weights_only=True)
    manifest = json.loads(outer["manifest"])
    edit(manifest)
    _sign(path, outer, encode_manifest(manifest))


def edit_text(path: Path, old: str, new: str) -> None:
    """Replace a part of a bundle's manifest as it is written, and make its checksum right."""
    outer = torch.load(path, weights_only=True)
    assert old in outer["manifest"]
    _sign(path, outer, outer["manifest"].replace(old, new, 1))


def _sign(path: Path, outer: Mapping[str, Any], text: str) -> None:
    torch.save({**outer, "manifest": text, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}, path)


@pytest.fixture(scope="module")
def tracks() -> Tracks:
    return make_tracks(smooth_latents())


@pytest.fixture
def bundle(tmp_path: Path, tracks: Tracks) -> Path:
    path = tmp_path / "bundle.pt"
    write_bundle(path, tracks, manifest_for(tracks))
    return path
