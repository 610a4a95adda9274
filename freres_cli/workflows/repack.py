"""bundle -> smaller bundle: no video, no tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freres_cli import __version__
from freres_cli.bundle.store import check_destination, read_bundle, write_bundle
from freres_cli.errors import BundleError, UsageError
from freres_cli.method.select import cut_tracks
from freres_cli.workflows.compress import method_settings, token_counts


@dataclass(frozen=True)
class RepackResult:
    """A smaller bundle. ``notes``: what the user should know."""

    bundle: Path
    bundle_bytes: int
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def repack_bundle(source: Path, output: Path, budget_tokens: int, *, force: bool = False) -> RepackResult:
    """Cut a bundle to a smaller budget: every kind keeps its most important tokens.

    Raises ``UsageError`` for an illegal budget, ``BundleError`` for a bad bundle or destination.
    """
    if budget_tokens < 1:
        raise UsageError(f"--budget: expected at least 1, got {budget_tokens}")
    check_destination(output, force)
    bundle = read_bundle(source)
    values = _setting_values(source, bundle.manifest["settings"])
    settings = method_settings(values)
    before = sum(bundle.tracks.num_tokens_by_kind().values())
    tracks = cut_tracks(bundle.tracks, settings, budget_tokens)
    by_kind = tracks.num_tokens_by_kind()
    recorded = bundle.manifest["tokens"]
    tokens = {**recorded, **token_counts(by_kind, budget_tokens, recorded["full_tokens"])}
    step = {"verb": "repack", "freres_version": __version__, "budget_tokens": budget_tokens}
    manifest = {**bundle.manifest, "tokens": tokens, "history": [*bundle.manifest["history"], step]}
    del manifest["tensors"]
    num_bytes = write_bundle(output, tracks, manifest, force=force)
    notes = ()
    if budget_tokens >= before:
        notes = (f"the bundle already fits: {before} tokens, budget {budget_tokens}; more needs the video again",)
    return RepackResult(output, num_bytes, manifest, notes)


def _setting_values(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = {key: setting["value"] for key, setting in settings.items()}
        method_settings(values)
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path}: damaged bundle: the manifest's settings are incomplete") from error
    return values
