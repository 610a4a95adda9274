"""Qwen2-VL: the visual tokens of all frames in one run, three-axis positions, no DeepStack (C = D)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from freres_cli.backbones.base import Piece, PromptRows
from freres_cli.backbones.halves import qwen_files
from freres_cli.backbones.language import DecoderLanguageModel
from freres_cli.backbones.qwen_vision import QwenVisionEncoder
from freres_cli.records import VideoTokens

FILES = qwen_files("qwen2_vl", "Qwen2-VL", Qwen2VLConfig)


class Qwen2VLVisionEncoder(QwenVisionEncoder):
    """The vision tower and merger of a Qwen2-VL checkpoint."""

    files = FILES
    tower_class = Qwen2VisionTransformerPretrainedModel
    width_key = "hidden_size"


class Qwen2VLLanguageModel(DecoderLanguageModel):
    """The decoder, head and tokenizer of a Qwen2-VL checkpoint."""

    files = FILES

    def video_rows(self, video: VideoTokens, index: int, position: float, text_after: str) -> PromptRows:
        """See ``DecoderLanguageModel.video_rows``. Tokens are at (base + t, base + h, base + w), base = ``position``.

        For a full grid, positions equal those of ``get_rope_index`` in transformers; otherwise they may be fractional.
        Later text starts one past the largest position of the full grid under ``max`` (how the released models were
        trained, and transformers 4), and at base + max(H, W) under ``hf`` (transformers 5.24).
        """
        num_frames, grid_h, grid_w = video.grid
        axes = video.positions.T.to(torch.float32).clone()
        axes[0] = self.time_positions(axes[0], video)
        last = float(self.time_positions(torch.tensor([num_frames - 1.0]), video)[0])
        span = max(last + 1, grid_h, grid_w) if text_after == "max" else max(grid_h, grid_w)
        return self.visual_rows(Piece(video.latents), index, axes + position, position + span)

    def time_positions(self, frames: Tensor, video: VideoTokens) -> Tensor:
        """Temporal positions of sampled frames, which may be fractional: their own numbers, (n,) float32."""
        return frames
