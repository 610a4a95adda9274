"""Bundle -> visual tokens, ready for a language model, without loading one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from freres_cli.content import Content
from freres_cli.devices import memory_errors_as
from freres_cli.method.adaptive import build_stretch_tokens
from freres_cli.method.stretch_modules import StretchModules
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.adapters import (
    NO_ADAPTER,
    AnyModules,
    choose_adapter_for,
    has_other_weights,
    load_modules,
    load_stretch_modules,
)
from freres_cli.pipeline.models import Models, describe_model
from freres_cli.pipeline.notes import describe_drop
from freres_cli.records import TOKEN_KINDS, VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks

NO_TRENDS = "the bundle holds no trends of its stretches; compress the video again with --set trends=keep"


@dataclass(frozen=True)
class LoadedTokens:
    """The visual tokens of a bundle. ``notes``: what the user should know about them."""

    tokens: VideoTokens
    notes: tuple[str, ...] = ()


class AnyBundle(Protocol):
    """A bundle, read from a file or just made."""

    @property
    def content(self) -> Content: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def path(self) -> Path | None: ...


def load_tokens(bundle: AnyBundle, adapter: str | None = None, models: Models | None = None) -> LoadedTokens:
    """Return the visual tokens of a bundle, with a row for every channel that its language model takes.

    No language model is loaded. ``adapter``: trained modules, as ``adapters.choose_adapter`` takes them. ``models``: what
    will read the tokens, if it is at hand: an adapter that was named is then refused for other weights of the decoder too,
    and the one that ships is left out, with a note. Raises ``BackboneError`` for a named adapter that does not fit,
    ``ResourceError`` where memory runs out.
    """
    content, manifest = bundle.content, bundle.manifest
    model, settings = manifest["model"], manifest["settings"]
    method, variant = settings["method"]["value"], settings["variant"]["value"]
    notes = []
    modules: AnyModules | None = None
    if isinstance(content, Tracks):
        path = choose_adapter_for(adapter, model, method, variant)
        known = model if path is None else _known(model, models)
        if adapter is None and variant == "absorber" and has_other_weights(known):
            path = None
            notes.append(f"opened without an adapter: the one that ships does not fit {_name_unfit(model, models)}")
        if path is not None:
            modules = load_modules(path, known, variant, content.width, content.num_bands)
        if modules is None and variant == "concat":
            notes.append("variant concat without an adapter: coefficients enter the model raw")
    elif isinstance(content, Stretches):
        path = choose_adapter_for(adapter, model, method, variant)
        if path is not None:
            modules = load_stretch_modules(path, _known(model, models), content.width)
        if modules is not None and not content.has_trends:
            modules = None
            notes.append(f"the adapter has no effect: {NO_TRENDS}")
    elif adapter not in (None, NO_ADAPTER):
        notes.append(f"the adapter has no effect: method {method} has no trained modules")
    with torch.no_grad(), memory_errors_as(f"opening {bundle.path or 'bundle'}", "repack it to a smaller budget"):
        tokens = make_tokens(content, variant, modules)
    if settings["deepstack"]["value"] == "drop" and (cost := describe_drop(model["num_deep_layers"])) is not None:
        tokens = with_deep_rows(tokens, model["num_deep_layers"])
        notes.append(cost)
    return LoadedTokens(tokens, tuple(notes))


def _known(model: Mapping[str, Any], models: Models | None) -> dict[str, Any]:
    """The manifest's facts about a model, with the decoder's where it is at hand."""
    return {**model, **({} if models is None else {"decoder_sha256": models.decoder_sha256})}


def _name_unfit(recorded: Mapping[str, Any], models: Models | None) -> str:
    """What the adapter that ships does not fit: the weights that made the bundle, or else the decoder that reads it."""
    if models is None or has_other_weights(recorded):
        return describe_model(recorded)
    return f"the language half of {models.source.name}"


def make_tokens(content: Content, variant: str = "absorber", modules: AnyModules | None = None) -> VideoTokens:
    """Return the visual tokens of any content, with the time that each stands for.

    ``variant``: for the tracks of Fre-Res, as ``method.tokens.build_tokens`` takes it. ``modules``: those of the content's
    method; stretches without trends take none.
    """
    if isinstance(content, Tracks):
        assert not isinstance(modules, StretchModules)
        tokens = build_tokens(content, variant, modules)
        return replace(tokens, stretches=find_stretches(tokens, content))
    if isinstance(content, Stretches):
        assert modules is None or isinstance(modules, StretchModules)
        return build_stretch_tokens(content, modules)
    return content


def find_stretches(tokens: VideoTokens, tracks: Tracks) -> Tensor:
    """Return the stretch of the frame axis that each token of these tracks stands for, (S, 2) float32.

    That of a static or summary token is all residual frames of its GoP. The dynamic tokens of a cell divide them halfway
    between one instant and the next (ours). For an anchor token, the row has no meaning.
    """
    start = tracks.gop_anchor_frame[tokens.gop].to(torch.float32) + 0.5
    stretches = torch.stack([start, start + tracks.gop_num_residuals[tokens.gop]], dim=1)
    order = (tokens.kind == TOKEN_KINDS.index("dynamic")).nonzero()[:, 0]
    for key in (*tokens.positions.unbind(1), tokens.gop):
        order = order[torch.argsort(key[order], stable=True)]
    # An impulse may lie at the instant of another token of its cell; both stand for the same time.
    places = torch.cat([tokens.gop[:, None].to(tokens.positions.dtype), tokens.positions], dim=1)[order]
    places, run = torch.unique_consecutive(places, dim=0, return_inverse=True)
    ends = torch.empty(places.shape[0], 2).index_copy_(0, run, stretches[order])
    gop, t, h, w = places.unbind(1)
    is_same = (gop[:-1] == gop[1:]) & (h[:-1] == h[1:]) & (w[:-1] == w[1:])
    middle = (t[:-1] + t[1:])[is_same] / 2
    ends[:-1][is_same, 1] = middle
    ends[1:][is_same, 0] = middle
    stretches[order] = ends[run]
    return stretches


def with_deep_rows(tokens: VideoTokens, num_deep_layers: int) -> VideoTokens:
    """Return tokens with zeros in place of dropped DeepStack rows; tokens that have their rows are unchanged."""
    if tokens.latents.shape[1] != tokens.width:
        return tokens
    zeros = tokens.latents.new_zeros(len(tokens), tokens.width * num_deep_layers)
    return replace(tokens, latents=torch.cat([tokens.latents, zeros], dim=1))
