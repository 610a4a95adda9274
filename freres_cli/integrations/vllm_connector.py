"""How a chat request brings a bundle: ``{"type": "video_embeds", "video_embeds": URL}``, with a file:// URL below
--allowed-local-media-path, or the bundle itself as a data: URL or plain base64."""

from __future__ import annotations

import asyncio
import binascii
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.base import MediaIO
from vllm.multimodal.media.connector import MediaConnector

from freres_cli.errors import BundleError
from freres_cli.integrations.vllm_bundles import make_payload


class BundleIO(MediaIO[Any]):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """A bundle's bytes as a payload, unread."""

    def load_bytes(self, data: bytes) -> Any:
        """See ``MediaIO``. Raises ``VLLMValidationError``, which a client sees as a bad request."""
        return _make_payload(data)

    def load_base64(self, media_type: str, data: str) -> Any:
        """See ``MediaIO``. Raises ``VLLMValidationError``."""
        try:
            return _make_payload(binascii.a2b_base64(data, strict_mode=True))
        except binascii.Error as error:
            raise VLLMValidationError(f"video_embeds: expected a file:// or data: URL, or base64: {error}") from error

    def load_file(self, filepath: Path) -> Any:
        """See ``MediaIO``. ``filepath`` is below the allowed root. Raises ``VLLMValidationError``."""
        try:
            return _make_payload(filepath.read_bytes(), filepath.name)
        except OSError as error:
            raise VLLMValidationError(f"{filepath.name}: cannot be read: {error.strerror}") from error


class _Payload(dict[str, Tensor]):
    """A payload that says what is wrong where vLLM takes an object with embeddings of its own apart."""

    @property
    def ndim(self) -> int:
        raise VLLMValidationError(
            "video_embeds: expected one URL or base64 text with a bundle, got an object: VLLM_MEDIA_CONNECTOR=freres "
            "takes no other embeddings of videos"
        )


def _make_payload(content: bytes, name: str = "video_embeds") -> Any:
    try:
        return _Payload(make_payload(content, name))
    except BundleError as error:
        raise VLLMValidationError(error.message) from error


class BundleConnector(MediaConnector):  # type: ignore[misc]
    """vLLM's own connector, except that ``video_embeds`` names a bundle."""

    def fetch_video_embedding(self, data: str) -> Any:
        """Return the payload of a bundle. Raises ``VLLMValidationError`` for a path that is not allowed."""
        if not data.lower().startswith(("file:", "data:")):
            return BundleIO().load_base64("", data)
        try:
            return self.load_from_url(data, BundleIO())
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, VLLMValidationError):
                raise
            raise VLLMValidationError(f"video_embeds: {error}") from error

    async def fetch_video_embedding_async(self, data: str) -> Any:
        """See ``fetch_video_embedding``."""
        return await asyncio.to_thread(self.fetch_video_embedding, data)
