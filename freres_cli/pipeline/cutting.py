"""Cut the content of a bundle to a smaller budget, or drop its DeepStack rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from freres_cli import __version__
from freres_cli.baselines.registry import ADAPTIVE, METHODS
from freres_cli.content import Content, count_by_kind, without_deep_rows
from freres_cli.errors import BundleError, UsageError, count_of
from freres_cli.method.adaptive import count_for_quality, cut_stretches
from freres_cli.method.budget import MethodSettings
from freres_cli.method.select import cut_tracks
from freres_cli.pipeline.manifest import token_counts
from freres_cli.pipeline.notes import describe_drop
from freres_cli.pipeline.prompt_text import describe_text, recall_text
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks


@dataclass(frozen=True)
class Cut:
    """What to cut a bundle to.

    ``budget_tokens``: maximum visual tokens; ``None`` keeps all. ``quality``: share of the latents' energy to keep, in as
    few tokens as possible. ``deepstack``: ``drop`` removes the DeepStack rows of all tokens; ``None`` leaves them
    unchanged.
    """

    budget_tokens: int | None = None
    quality: float | None = None
    deepstack: str | None = None


def cut_content(
    content: Content, manifest: Mapping[str, Any], cut: Cut, name: str
) -> tuple[Content, dict[str, Any], tuple[str, ...]]:
    """Return content, manifest and notes of a smaller bundle.

    ``content``, ``manifest``: those of the bundle. ``cut``: what to cut it to. ``name``: the bundle's, for messages.
    Raises ``UsageError`` for an illegal budget or quality, or if rows to keep were dropped before, ``BundleError`` for a
    method whose tokens cannot be cut.
    """
    if cut.budget_tokens is not None and cut.budget_tokens < 1:
        raise UsageError(f"budget_tokens: expected at least 1, got {cut.budget_tokens}")
    if cut.deepstack == "keep" and manifest["settings"]["deepstack"]["value"] == "drop":
        raise UsageError("--deepstack: the rows were dropped and cannot come back", "compress the video again")
    notes = []
    before = sum(count_by_kind(content).values())
    budget = before if cut.budget_tokens is None else cut.budget_tokens
    if cut.quality is not None:
        budget = min(budget, _count_for_quality(content, manifest, cut.quality, name))
    if budget < before:
        content = _cut(content, manifest, budget, name)
        notes += _describe_frames(content, manifest, before)
        if cut.quality is not None and isinstance(content, Stretches) and content.quality < cut.quality:
            notes.append(
                f"quality {content.quality:.4f} in place of {cut.quality:g}: the budget of {count_of(budget, 'token')} "
                "allows no more"
            )
    elif cut.budget_tokens is not None:
        kept = f", quality {content.quality:.4f}" if cut.quality is not None and isinstance(content, Stretches) else ""
        notes.append(
            f"the bundle already fits: {count_of(before, 'token')}{kept}, budget {cut.budget_tokens}; for more, compress "
            "the video again"
        )
    elif cut.quality is not None:
        assert isinstance(content, Stretches)
        notes.append(
            f"the bundle is unchanged: it keeps {content.quality:.4f} of the energy, and one token less would keep less "
            f"than {cut.quality:g}; for more, compress the video again"
        )
    if cut.deepstack == "drop":
        content = without_deep_rows(content)
        num_deep = manifest["model"]["num_deep_layers"]
        notes.append(describe_drop(num_deep) or "deepstack has no effect: the bundle's model has no such rows")
    return content, _cut_manifest(manifest, content, cut), tuple(notes)


def _count_for_quality(content: Content, manifest: Mapping[str, Any], quality: float, name: str) -> int:
    if not 0 <= quality <= 1:
        raise UsageError(f"quality: expected 0 to 1, got {quality:g}")
    if not isinstance(content, Stretches):
        method = manifest["settings"]["method"]["value"]
        again = f"compress the video again with --method {ADAPTIVE} --quality {quality:g}"
        raise BundleError(
            f"{name}: made by method {method}: only bundles of method {ADAPTIVE} can be cut to a quality",
            f"cut it to a --budget, or {again}" if isinstance(content, Tracks) else again,
        )
    return count_for_quality(content, quality)


def _describe_frames(content: Content, manifest: Mapping[str, Any], before: int) -> list[str]:
    """Return a note if compressing to fewer tokens reads other frames than the bundle was made from."""
    settings = {key: setting["value"] for key, setting in manifest["settings"].items()}
    if not isinstance(content, Stretches) or before < manifest["tokens"]["full_tokens"]:
        return []
    is_denser = settings["sample"] != "native" and settings.get("track_density", 1) > 1
    keys = [
        key
        for key, has_effect in (("track_density", is_denser), ("line_levels", settings.get("line_levels")))
        if has_effect
    ]
    if not keys:
        return []
    named = " and ".join(f"{key}={settings[key]}" for key in keys)
    return [
        f"the bundle holds every token, so it was made without {named}: compressing to a smaller budget reads other frames"
    ]


def _cut(content: Content, manifest: Mapping[str, Any], budget_tokens: int, name: str) -> Content:
    if isinstance(content, Stretches):
        return cut_stretches(content, budget_tokens)
    if not isinstance(content, Tracks):
        method = manifest["settings"]["method"]["value"]
        has_budget = method in METHODS and METHODS[method].has_budget
        other = (
            f"--method {method} --budget {budget_tokens}"
            if has_budget
            else f"another --method and --budget {budget_tokens}"
        )
        raise BundleError(
            f"{name}: made by method {method}: its tokens are not ordered by importance, so it cannot be cut",
            f"compress the video again with {other}",
        )
    values = {knob.name: manifest["settings"][knob.name]["value"] for knob in fields(MethodSettings)}
    return cut_tracks(content, MethodSettings(**values), budget_tokens)


def _cut_manifest(before: Mapping[str, Any], content: Content, cut: Cut) -> dict[str, Any]:
    """Return the manifest of the cut bundle, with one more step in its history."""
    recorded = before["tokens"]
    by_kind = count_by_kind(content)
    budget = recorded["budget_tokens"] if cut.budget_tokens is None else cut.budget_tokens
    if cut.quality is not None and cut.budget_tokens is None:
        budget = sum(by_kind.values())
    counts = describe_text(content, before["settings"]["variant"]["value"], recall_text(before["geometry"]))
    tokens = {**recorded, **token_counts(by_kind, budget, recorded["full_tokens"]), **counts}
    if isinstance(content, Stretches):
        tokens["quality"] = content.quality
    step = {"verb": "repack", "freres_version": __version__, "budget_tokens": budget}
    if cut.quality is not None:
        step |= {"quality": cut.quality}
    settings = before["settings"]
    if cut.deepstack is not None:
        step |= {"deepstack": cut.deepstack}
        settings = {**settings, "deepstack": {"value": cut.deepstack, "source": "flag"}}
    rest = {key: value for key, value in before.items() if key != "tensors"}
    return {**rest, "settings": settings, "tokens": tokens, "history": [*before["history"], step]}
