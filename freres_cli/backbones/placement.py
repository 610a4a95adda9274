"""The video's part of a prompt as other runtimes take it: token ids, positions and latents, without weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from freres_cli.backbones.base import LanguageModel
from freres_cli.errors import BackboneError
from freres_cli.records import VideoTokens

# Families whose prompt is token ids and visual tokens alone, at three-axis positions.
PLACED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")


@dataclass(frozen=True)
class PlacedVideo:
    """The video's part of a prompt, in order, relative to its first row.

    ``ids``: (N,) int64, the family's own text and a placeholder for every visual token. ``is_visual``: (N,) bool, S of
    them. ``positions``: (3, N) float32, (t, h, w), possibly fractional; the prompt's number of rows before the video is
    still to be added. ``latents``: (S, C), in the order of the placeholders. ``width``: D, of which C is a multiple.
    ``next_position``: position of the text after the video.
    """

    ids: Tensor
    is_visual: Tensor
    positions: Tensor
    latents: Tensor
    width: int
    next_position: float

    @property
    def deep_rows(self) -> Tensor:
        """The DeepStack rows of every token, (number of layers, S, D); no layers in families without them."""
        return self.latents.view(len(self.latents), -1, self.width)[:, 1:].transpose(0, 1)


class _IdEmbedding(nn.Module):
    """Gives every token id itself as its row, so that a prompt can be read back from its rows."""

    dtype, device = torch.float64, torch.device("cpu")

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return ids[:, None].to(self.dtype)


def place_video(model: LanguageModel, video: VideoTokens, text_after: str = "max") -> PlacedVideo:
    """Place visual tokens by the rules of the family's own ``splice``.

    ``model``: the language half, with or without weights. ``video``: its tokens. ``text_after``: as ``splice`` takes it.
    Raises ``BackboneError`` for a family whose prompt is more than ids and visual tokens, or tokens of another width.
    """
    if model.family not in PLACED_FAMILIES:
        raise BackboneError(
            f"{model.family}: this family's prompt cannot be exported: expected one of {', '.join(PLACED_FAMILIES)}",
            "ask the bundle with freres ask",
        )
    channels = model.width * (1 + model.num_deep_layers)
    if video.latents.shape[1] != channels or video.width != model.width:
        got = f"{video.latents.shape[1]} (D = {video.width})"
        raise BackboneError(f"visual tokens: expected {channels} channels, got {got}")
    numbered = replace(video, latents=torch.arange(len(video), dtype=torch.float64)[:, None], width=1)
    reader: Any = copy.copy(model)
    reader.decoder, reader.width, reader.num_deep_layers = _IdEmbedding(), 1, 0
    rows = reader.splice((), numbered, text_after)
    values, is_visual = rows.embeds[:, 0].long(), rows.visual_mask
    ids = values.masked_fill(is_visual, reader.video_token_id)
    latents = video.latents[values[is_visual]]
    return PlacedVideo(ids, is_visual, rows.positions[1:, 0], latents, model.width, rows.next_position)
