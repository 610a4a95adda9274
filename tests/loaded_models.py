"""Models that tests inject: loaded once for the whole run, or wrapped to count calls, stop or fail."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from freres_cli.backbones.base import LanguageModel, PromptRows, VisionEncoder
from freres_cli.pipeline.models import Models, make_source
from freres_cli.records import VideoTokens


def loaded_models(dtype: str | None = None) -> Models:
    """Both halves of the bundled model on the CPU. All tests share them: wrap or copy a half before you change it."""
    return _load(dtype)


@functools.cache
def _load(dtype: str | None) -> Models:
    lazy = Models(make_source("bundled", "cpu", dtype))
    return Models(lazy.source, lazy.encoder, lazy.language_model)


def models_with(encoder: VisionEncoder | None = None, language_model: LanguageModel | None = None) -> Models:
    """The bundled model with one half or both replaced."""
    models = loaded_models()
    return Models(models.source, encoder or models.encoder, language_model or models.language_model)


class Wrapped:
    """Half of a model that passes everything on to another one, except what a subclass overrides."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CountingEncoder(Wrapped):
    """A tower that notes how many frames each call encodes; ``stop_at`` is the call that Ctrl-C interrupts."""

    def __init__(self, inner: VisionEncoder, stop_at: int | None = None) -> None:
        super().__init__(inner)
        self.num_frames: list[int] = []
        self.stop_at = stop_at

    def encode(self, pixels: Tensor) -> Tensor:
        self.num_frames.append(len(pixels))
        if len(self.num_frames) == self.stop_at:
            raise KeyboardInterrupt
        return self.inner.encode(pixels)


class CountingLanguageModel(Wrapped):
    """A language model that notes how many visual tokens each video has that it reads.

    A video of more than ``max_video_tokens`` does not fit in memory.
    """

    def __init__(self, inner: LanguageModel, max_video_tokens: int | None = None) -> None:
        super().__init__(inner)
        self.num_video_tokens: list[int] = []
        self.max_video_tokens = max_video_tokens

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        self.num_video_tokens.append(len(video))
        if self.max_video_tokens is not None and len(video) > self.max_video_tokens:
            raise MemoryError
        return self.inner.splice(prefix_ids, video, text_after)
