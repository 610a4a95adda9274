"""bundle + trained modules -> a picture of where the absorber takes in each GoP's motion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli.baselines.registry import FRE_RES
from freres_cli.bundle.store import StoredBundle
from freres_cli.errors import BackboneError, BundleError, UsageError
from freres_cli.files import InputFiles, check_destination, write_atomically
from freres_cli.method.absorption import AbsorptionMaps, map_absorption
from freres_cli.method.tokens import VARIANTS_WITHOUT_ABSORBER
from freres_cli.pipeline.adapters import adapter_file, choose_adapter_for, load_modules
from freres_cli.video.picture import draw_maps, encode_png

FLAG = "--absorber"
MAX_GOPS_SHOWN = 20
TITLES = ("energy", "absorbed")


@dataclass(frozen=True)
class PictureRequest:
    """Which picture to draw.

    ``output``: the PNG file to write. ``adapter``: the trained modules, as ``adapters.choose_adapter`` takes them.
    ``force``: replace an existing file.
    """

    output: Path
    adapter: str | None = None
    force: bool = False


def check_picture(bundle: Path, request: PictureRequest) -> None:
    """Refuse, before any work is done, a picture that cannot be written. Raises ``UsageError``."""
    output = request.output
    if output.suffix.lower() != ".png":
        raise UsageError(f"{FLAG}: expected a file name ending in .png, got {output}")
    check_destination(output, request.force, FLAG)
    InputFiles([("bundle", bundle), ("adapter", adapter_file(request.adapter))]).refuse(output, FLAG)


def draw_absorption(bundle: StoredBundle, request: PictureRequest) -> dict[str, Any]:
    """Write a picture with a row for each GoP: the energy of its kept coefficients and what was absorbed, by cell.

    Returns what the picture shows, with the maps of every GoP as numbers. For a long clip the picture shows the GoPs
    with the most energy, in time order. Raises ``UsageError`` without an adapter or for a file that cannot be written,
    ``BundleError`` for a bundle with nothing to absorb, and ``BackboneError`` for an adapter that is damaged or does not
    fit.
    """
    maps, adapter, gamma = read_absorption(bundle, request.adapter)
    tracks = bundle.tracks
    shown = strongest_gops(maps, MAX_GOPS_SHOWN)
    starts = tracks.frame_seconds[tracks.gop_anchor_frame].tolist()
    picture = _draw(torch.stack([maps.energy, maps.absorbed], 1), shown, starts)
    png = encode_png(picture)
    write_atomically(request.output, lambda file: file.write(png), force=request.force, flag=FLAG)
    return {
        "picture": str(request.output),
        "adapter": str(adapter),
        "height_px": picture.shape[0],
        "width_px": picture.shape[1],
        "gamma": gamma,
        "pooled_grid": list(tracks.pooled_grid),
        "gops_shown": shown.tolist(),
        "notes": _describe_limits(len(shown), len(starts), gamma),
        "gops": [
            {"start_s": start, "energy": energy, "absorbed": absorbed}
            for start, energy, absorbed in zip(starts, maps.energy.tolist(), maps.absorbed.tolist(), strict=True)
        ],
    }


def read_absorption(bundle: StoredBundle, named: str | None, flag: str = FLAG) -> tuple[AbsorptionMaps, Path, float]:
    """Return what the absorber takes from each cell of each GoP, the adapter that says so, and its gamma.

    ``bundle``: of Fre-Res. ``named``: the adapter, as ``adapters.choose_adapter`` takes it. ``flag``: what needs it, for
    messages. Raises what ``draw_absorption`` does.
    """
    tracks = bundle.tracks
    variant = bundle.manifest["settings"]["variant"]["value"]
    if variant in VARIANTS_WITHOUT_ABSORBER:
        raise BundleError(
            f"{bundle.path}: variant {variant} has no absorber", "compress the video with --variant absorber"
        )
    if not tracks.coefficient_gop.numel():
        raise BundleError(
            f"{bundle.path}: variant {variant}, no coefficient kept: nothing to absorb",
            "compress a video that moves with --variant absorber, or with a larger --budget",
        )
    model = bundle.manifest["model"]
    adapter = choose_adapter_for(named, model, FRE_RES, variant)
    if adapter is None:
        raise UsageError(f"{flag}: expected trained modules: without them nothing is absorbed", "name --adapter FILE")
    modules = load_modules(adapter, model, variant, tracks.width, tracks.num_bands)
    maps = map_absorption(tracks, modules, variant)
    if not maps.absorbed.isfinite().all():
        raise BackboneError(f"{adapter}: damaged adapter: what its absorber adds is not finite")
    return maps, adapter, float(modules.absorber.gamma.detach())


def strongest_gops(maps: AbsorptionMaps, count: int) -> Tensor:
    """Return the ``count`` GoPs with the most energy, in time order: (n,) int64."""
    return maps.energy.sum((1, 2)).argsort(descending=True, stable=True)[:count].sort().values


def _draw(maps: Tensor, shown: Tensor, starts: list[float]) -> Tensor:
    labels = [f"{starts[gop]:.2f} s" for gop in shown.tolist()]
    note = f"{len(shown)} of {len(starts)} GoPs" if len(shown) < len(starts) else ""
    return draw_maps(maps[shown], labels, TITLES, note)


def _describe_limits(num_shown: int, num_gops: int, gamma: float) -> list[str]:
    notes = []
    if num_shown < num_gops:
        notes.append(f"the picture shows the {num_shown} GoPs with the most energy, of {num_gops}")
    if gamma == 0:
        notes.append("the adapter's gamma is 0: its absorber adds nothing")
    return notes
