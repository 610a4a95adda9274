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
from freres_cli.records import Tracks
from freres_cli.workflows.compress import describe_drop, method_settings, token_counts


@dataclass(frozen=True)
class RepackResult:
    """A smaller bundle. ``notes``: what the user should know."""

    bundle: Path
    bundle_bytes: int
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def repack_bundle(
    source: Path, output: Path, budget_tokens: int | None, deepstack: str | None = None, *, force: bool = False
) -> RepackResult:
    """Cut a bundle to a smaller budget: every kind keeps its most important tokens; None keeps all.

    ``deepstack``: ``drop`` leaves out the DeepStack rows of all tokens; None leaves them as they are. Raises
    ``UsageError`` for an illegal budget or rows that are gone, ``BundleError`` for a bad bundle or destination.
    """
    if budget_tokens is not None and budget_tokens < 1:
        raise UsageError(f"--budget: expected at least 1, got {budget_tokens}")
    check_destination(output, force)
    bundle = read_bundle(source)
    values = _setting_values(source, bundle.manifest["settings"])
    settings = method_settings(values)
    before = sum(bundle.tracks.num_tokens_by_kind().values())
    tracks, notes = bundle.tracks, []
    if budget_tokens is not None:
        tracks = cut_tracks(tracks, settings, budget_tokens)
        if budget_tokens >= before:
            notes.append(
                f"the bundle already fits: {before} tokens, budget {budget_tokens}; more needs the video again"
            )
    if deepstack == "drop":
        tracks = tracks.without_deep_rows()
        num_deep = int(bundle.manifest["model"].get("num_deep_layers") or 0)
        notes.append(describe_drop(num_deep) or "deepstack has no effect: the bundle's model has no such rows")
    elif deepstack == "keep" and values["deepstack"] == "drop":
        raise UsageError("--deepstack: the rows were dropped and cannot come back", "compress the video again")
    manifest = _cut_manifest(bundle.manifest, tracks, budget_tokens, deepstack)
    num_bytes = write_bundle(output, tracks, manifest, force=force)
    return RepackResult(output, num_bytes, manifest, tuple(notes))


def _cut_manifest(
    before: Mapping[str, Any], tracks: Tracks, budget_tokens: int | None, deepstack: str | None
) -> dict[str, Any]:
    """The manifest of the cut bundle, with a step more in its history."""
    recorded = before["tokens"]
    budget = recorded["budget_tokens"] if budget_tokens is None else budget_tokens
    by_kind = tracks.num_tokens_by_kind()
    tokens = {**recorded, **token_counts(by_kind, budget, recorded["full_tokens"])}
    step = {"verb": "repack", "freres_version": __version__, "budget_tokens": budget}
    settings = before["settings"]
    if deepstack is not None:
        step |= {"deepstack": deepstack}
        settings = {**settings, "deepstack": {"value": deepstack, "source": "flag"}}
    rest = {key: value for key, value in before.items() if key != "tensors"}
    return {**rest, "settings": settings, "tokens": tokens, "history": [*before["history"], step]}


def _setting_values(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = {key: setting["value"] for key, setting in settings.items()}
        method_settings(values)
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path}: damaged bundle: the manifest's settings are incomplete") from error
    return values
