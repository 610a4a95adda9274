"""Qwen3-VL: ``<t seconds>`` before every frame, and DeepStack: rows added to visual tokens after the first layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from freres_cli.backbones.frame_runs import FrameRunLanguageModel, FrameTexts
from freres_cli.backbones.halves import FamilyFiles, qwen_files
from freres_cli.backbones.qwen_vision import QwenVisionEncoder
from freres_cli.backbones.vision import PixelRule
from freres_cli.records import VideoTokens

FILES = qwen_files("qwen3_vl", "Qwen3-VL", Qwen3VLConfig)

# The values of the released models, used if preprocessor_config.json does not give them.
_PIXELS = PixelRule(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), min_pixels=256 * 256, max_pixels=4096 * 4096)


class Qwen3VLVisionEncoder(QwenVisionEncoder):
    """The vision tower and mergers of a Qwen3-VL checkpoint. Channels: D, then D per DeepStack layer, in order."""

    files = FILES
    tower_class: ClassVar[Any] = Qwen3VLVisionModel
    default_rule = _PIXELS


class TimestampLanguageModel(FrameRunLanguageModel):
    """The prompt of Qwen3-VL and its successors: ``<1.5 seconds><|vision_start|>tokens<|vision_end|>`` per frame.

    The template's own vision_start and vision_end stay around all frames, as in transformers' processor since 5.10. The
    first processor for Qwen3-VL (transformers 4.57) replaced that pair with the frames.
    """

    def frame_texts(self, video: VideoTokens) -> FrameTexts:
        """A frame's time is in seconds after the first frame of the file, with one decimal."""
        start, end = (self.config.vision_start_token_id, self.config.vision_end_token_id)
        times = [f"<{seconds:.1f} seconds>" for seconds in video.frame_seconds.tolist()]
        before = [[*ids, start] for ids in self.ids_of_each(times)]
        return FrameTexts(before, [[end]] * len(before))


class DeepStackLanguageModel(TimestampLanguageModel):
    """A decoder that adds a further row to every visual token after each of its first layers."""

    @classmethod
    def count_deep_layers(cls, config: Any) -> int:
        return len(config.vision_config.deepstack_visual_indexes)

    def deep_inputs(self, embeds: Tensor) -> dict[str, Any]:
        """See ``DecoderLanguageModel``. All rows are treated as visual: text rows add zeros, which changes nothing."""
        deep = embeds[:, self.width :]
        if not deep.shape[1]:
            return {}
        # All rows of the only sequence, as an index. With a mask, the host would wait twice a layer, to count its rows.
        everywhere = torch.zeros(1, dtype=torch.int64, device=embeds.device)
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": list(deep.split(self.width, dim=1))}


class Qwen3VLLanguageModel(DeepStackLanguageModel):
    """The decoder, head and tokenizer of a Qwen3-VL checkpoint."""

    files: ClassVar[FamilyFiles] = FILES
