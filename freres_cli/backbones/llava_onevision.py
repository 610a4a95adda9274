"""LLaVA-OneVision: the visual tokens of all frames in one run, then a newline row; one-axis positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from freres_cli.backbones.base import Piece, PromptRows, join_rows
from freres_cli.backbones.halves import FamilyFiles, LanguageHalf
from freres_cli.backbones.language import DecoderLanguageModel
from freres_cli.backbones.square_vision import SquareVisionEncoder
from freres_cli.backbones.vision import PixelRule
from freres_cli.records import VideoTokens

_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
_NEWLINE = ("model.image_newline", "image_newline")
FILES = FamilyFiles(
    "llava_onevision",
    "LLaVA-OneVision",
    LlavaOnevisionConfig,
    vision={
        "vision_tower.": (
            "model.vision_tower.vision_model.",
            "vision_tower.vision_model.",
            "model.vision_tower.",
            "vision_tower.",
        ),
        "multi_modal_projector.": _PROJECTOR,
        "image_newline": _NEWLINE,
    },
    projector=_PROJECTOR,
    decoder=("model.language_model.", "language_model.model."),
    head=("lm_head.", "language_model.lm_head."),
)


class LlavaOnevisionVisionEncoder(SquareVisionEncoder):
    """The vision tower, projector and pooling of a LLaVA-OneVision checkpoint."""

    files = FILES
    model_class = LlavaOnevisionModel
    default_rule = PixelRule(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), min_pixels=0, max_pixels=0
    )

    @classmethod
    def tokens_per_side(cls, config: Any, patches_per_side: int) -> int:
        return -(-patches_per_side // 2)

    def features(self, pixels: Tensor) -> Tensor:
        """See ``FrameEncoder.features``. Leaves out the last row, the newline, which belongs to the prompt."""
        out = self.tower.get_video_features(self.prepare(pixels).to(self.dtype)[None], return_dict=True)
        latents: Tensor = out.pooler_output[0, :-1]
        return latents.view(len(pixels), self.side**2, -1)


class LlavaOnevisionLanguageModel(DecoderLanguageModel):
    """The decoder, head, tokenizer and newline row of a LLaVA-OneVision checkpoint."""

    files = FILES
    num_axes = 1

    @classmethod
    def build_half(
        cls, config: Any, dtype: torch.dtype, is_tied: bool | None = None
    ) -> tuple[LanguageHalf, dict[str, tuple[str, ...]]]:
        half, prefixes = super().build_half(config, dtype, is_tied)
        half.register_parameter("image_newline", nn.Parameter(torch.empty(config.text_config.hidden_size, dtype=dtype)))
        return half, prefixes | {"image_newline": _NEWLINE}

    @property
    def newline(self) -> Tensor:
        """The row that ends every video, (D,)."""
        return self.half.get_parameter("image_newline")

    def plain_prompt(self, question: str, system: str | None, video: str) -> str:
        """ChatML as in LLaVA-OneVision: a space before the video, and no line feeds between turns."""
        opening = f"<|im_start|>system\n{system}<|im_end|>" if system else ""
        return f"{opening}<|im_start|>user {video}\n{question}<|im_end|><|im_start|>assistant\n"

    def text_in_video(self, video: VideoTokens) -> int:
        """See ``base.LanguageModel``. The newline row."""
        return 1

    def video_rows(self, video: VideoTokens, index: int, position: float, text_after: str) -> PromptRows:
        """See ``DecoderLanguageModel.video_rows``. ``text_after`` has no effect.

        A token is at ``position`` plus its raster index in the whole clip, which may be fractional. The newline row is
        always after the full grid.
        """
        num_frames, grid_h, grid_w = video.grid
        t, row, column = video.positions.to(torch.float32).unbind(1)
        raster = (t * grid_h + row) * grid_w + column
        end = position + num_frames * grid_h * grid_w
        visual = self.visual_rows(Piece(video.latents), index, raster[None] + position, end)
        row_after = Piece(self.newline[None].to(video.latents.device))
        newline = self.visual_rows(row_after, index + len(visual), torch.tensor([[end]]), end + 1)
        return join_rows([visual, replace(newline, is_visual=None)], end + 1)
