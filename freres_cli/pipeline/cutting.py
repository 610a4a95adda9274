"""Cut the content of a bundle to a smaller budget, or drop its DeepStack rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from freres_cli import __version__
from freres_cli.baselines.registry import METHODS
from freres_cli.errors import UsageError
from freres_cli.method.budget import MethodSettings
from freres_cli.method.select import cut_tracks
from freres_cli.pipeline.manifest import token_counts
from freres_cli.pipeline.notes import describe_drop
from freres_cli.pipeline.prompt_text import describe_text, recall_text
from freres_cli.records import VideoTokens
from freres_cli.tracks import Tracks, count_by_kind


def cut_content(
    content: Tracks | VideoTokens,
    manifest: Mapping[str, Any],
    budget_tokens: int | None,
    deepstack: str | None,
    name: str,
) -> tuple[Tracks | VideoTokens, dict[str, Any], tuple[str, ...]]:
    """Return content, manifest and notes of a smaller bundle, in which each kind keeps its most important tokens.

    ``content``, ``manifest``: those of the bundle. ``budget_tokens``: maximum visual tokens; ``None`` keeps all.
    ``deepstack``: ``drop`` removes the DeepStack rows of all tokens; ``None`` leaves them unchanged. ``name``: the
    bundle's, for messages. Raises ``UsageError`` for an illegal budget, for tokens that cannot be cut, or if rows to keep
    were dropped before.
    """
    if budget_tokens is not None and budget_tokens < 1:
        raise UsageError(f"budget_tokens: expected at least 1, got {budget_tokens}")
    if deepstack == "keep" and manifest["settings"]["deepstack"]["value"] == "drop":
        raise UsageError("--deepstack: the rows were dropped and cannot come back", "compress the video again")
    notes = []
    if budget_tokens is not None:
        before = sum(count_by_kind(content).values())
        if budget_tokens >= before:
            notes.append(
                f"the bundle already fits: {before} tokens, budget {budget_tokens}; for more, compress the video again"
            )
        else:
            content = _cut(content, manifest, budget_tokens, name)
    if deepstack == "drop":
        content = _without_deep_rows(content)
        num_deep = manifest["model"]["num_deep_layers"]
        notes.append(describe_drop(num_deep) or "deepstack has no effect: the bundle's model has no such rows")
    return content, _cut_manifest(manifest, content, budget_tokens, deepstack), tuple(notes)


def _cut(
    content: Tracks | VideoTokens, manifest: Mapping[str, Any], budget_tokens: int, name: str
) -> Tracks | VideoTokens:
    if not isinstance(content, Tracks):
        method = manifest["settings"]["method"]["value"]
        has_budget = method in METHODS and METHODS[method].has_budget
        other = (
            f"--method {method} --budget {budget_tokens}"
            if has_budget
            else f"another --method and --budget {budget_tokens}"
        )
        raise UsageError(
            f"{name}: made by method {method}: its tokens are not ordered by importance, so it cannot be cut",
            f"compress the video again with {other}",
        )
    values = {knob.name: manifest["settings"][knob.name]["value"] for knob in fields(MethodSettings)}
    return cut_tracks(content, MethodSettings(**values), budget_tokens)


def _without_deep_rows(content: Tracks | VideoTokens) -> Tracks | VideoTokens:
    if isinstance(content, Tracks):
        return content.without_deep_rows()
    return replace(content, latents=content.latents[:, : content.width].contiguous())


def _cut_manifest(
    before: Mapping[str, Any], content: Tracks | VideoTokens, budget_tokens: int | None, deepstack: str | None
) -> dict[str, Any]:
    """Return the manifest of the cut bundle, with one more step in its history."""
    recorded = before["tokens"]
    budget = recorded["budget_tokens"] if budget_tokens is None else budget_tokens
    counts = describe_text(content, before["settings"]["variant"]["value"], recall_text(before["geometry"]))
    tokens = {**recorded, **token_counts(count_by_kind(content), budget, recorded["full_tokens"]), **counts}
    step = {"verb": "repack", "freres_version": __version__, "budget_tokens": budget}
    settings = before["settings"]
    if deepstack is not None:
        step |= {"deepstack": deepstack}
        settings = {**settings, "deepstack": {"value": deepstack, "source": "flag"}}
    rest = {key: value for key, value in before.items() if key != "tensors"}
    return {**rest, "settings": settings, "tokens": tokens, "history": [*before["history"], step]}
