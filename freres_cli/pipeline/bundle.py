"""A bundle in memory: what a compressor returns and ``load_bundle`` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.content import Content
from freres_cli.devices import Device, choose_storage
from freres_cli.errors import UsageError
from freres_cli.pipeline.choices import as_number, as_path, as_whole, check_revision
from freres_cli.pipeline.cutting import Cut, cut_content
from freres_cli.pipeline.models import Models, find_device, find_dtype, name_model, refuse_beside
from freres_cli.pipeline.session import AskRequest, Session, open_bundle
from freres_cli.pipeline.tokens import load_tokens
from freres_cli.pipeline.torch_state import plain_torch
from freres_cli.presets import TEXT_AFTER
from freres_cli.records import VideoTokens


@dataclass(frozen=True, eq=False)
class Bundle:
    """What is kept of one video.

    ``manifest``: where it comes from and how it was made, see freres-bundle(5). ``content``: the stretches of adaptive
    Fre-Res, the tracks of Fre-Res, or the tokens of another method. ``path``: its file, ``None`` before it is saved.
    ``notes``: what the user should know. ``timings_s``, ``peak_memory_bytes``: cost of the compression, in seconds by
    stage and bytes; empty and ``None`` for a bundle that was read from a file.
    """

    manifest: Mapping[str, Any]
    content: Content
    path: Path | None = None
    notes: tuple[str, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None

    @property
    def method(self) -> str:
        """The method that made it."""
        return str(self.manifest["settings"]["method"]["value"])

    @property
    def num_visual_tokens(self) -> int:
        """Number of tokens that the language model is given."""
        return int(self.manifest["tokens"]["visual_tokens"])

    @property
    def name(self) -> str:
        """Its name in messages: the path, if it has one."""
        return "bundle" if self.path is None else str(self.path)

    @plain_torch()
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Bundle:
        """Write the bundle atomically, and return it with its path.

        ``force``: replace an existing file. Raises ``UsageError`` or ``ResourceError``.
        """
        path = as_path(path, "path")
        write_bundle(path, self.content, self.manifest, force=force, flag="path")
        return replace(self, path=path)

    @plain_torch()
    def tokens(self, adapter: str | os.PathLike[str] | None = None) -> VideoTokens:
        """Return the visual tokens, ready for a language model, without loading one.

        ``adapter``: a file that freres train wrote, or ``none``; by default the bundled model's own. Raises
        ``BackboneError`` for an adapter that does not fit.
        """
        return load_tokens(self, _name_adapter(adapter)).tokens

    @plain_torch()
    def open(
        self,
        *,
        model: str | os.PathLike[str] | None = None,
        device: str | torch.device | Device | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        attention: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        text_after: str | None = None,
        kv_dtype: str | None = None,
        weight_dtype: str | None = None,
        models: Models | None = None,
    ) -> Session:
        """Load the language model and return a session to ask.

        ``model``, ``revision``: where to find the model, if not where the bundle says. ``device``, ``dtype``,
        ``attention``: as ``models.find_device`` and ``find_dtype`` take them. ``adapter``: as ``tokens`` takes it.
        ``text_after``: overrides the bundle's. ``kv_dtype``, ``weight_dtype``: int8 or fp8 for the model's cache and for its
        linear layers (``devices.choose_storage``). ``models``: a model that is already loaded; then only ``adapter`` and
        ``text_after`` may be given as well. Raises ``BackboneError``, ``ResourceError`` or ``UsageError``.
        """
        if text_after not in (None, *TEXT_AFTER):
            raise UsageError(f"text_after: expected one of {', '.join(TEXT_AFTER)}, got {text_after}")
        name = None if model is None else name_model(model)
        if models is None:
            check_revision(name, revision)
            place = find_device(device, attention)
        else:
            settled = {"device": device, "dtype": dtype, "revision": revision, "attention": attention}
            refuse_beside(models, name, **settled, kv_dtype=kv_dtype, weight_dtype=weight_dtype)
            place = models.source.device
        own = (name, revision, find_dtype(dtype), _name_adapter(adapter), text_after)
        storage = choose_storage(kv_dtype, weight_dtype)
        request = AskRequest(self.path or Path(self.name), place, *own, storage=storage)
        return open_bundle(self, request, models)

    @plain_torch()
    def repack(self, budget_tokens: int | None = None, *, quality: float | None = None) -> Bundle:
        """Return the same clip in at most ``budget_tokens``, without the video or the tower.

        ``quality``: share of the latents' energy to keep, in as few tokens as possible; needs a bundle of adaptive
        Fre-Res. Raises ``UsageError`` for an illegal budget or quality, ``BundleError`` for a method whose tokens cannot be
        cut.
        """
        if budget_tokens is None and quality is None:
            raise UsageError("repack: expected budget_tokens or quality, got neither")
        budget = None if budget_tokens is None else as_whole(budget_tokens, "budget_tokens")
        cut = Cut(budget, as_number(quality, "quality"))
        content, manifest, notes = cut_content(self.content, self.manifest, cut, self.name)
        return Bundle(manifest, content, notes=notes)


def _name_adapter(adapter: str | os.PathLike[str] | None) -> str | None:
    """A path is that of a file, even one named none."""
    if adapter is None:
        return None
    path = as_path(adapter, "adapter")
    return adapter if isinstance(adapter, str) else str(path.absolute())


@plain_torch()
def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle. Every byte is checked, and nothing in the file is executed. Raises ``BundleError``,
    ``UsageError`` for what is no path."""
    stored = read_bundle(as_path(path, "path"))
    return Bundle(stored.manifest, stored.content, stored.path)
