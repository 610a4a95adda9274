"""Qwen2.5-VL: like Qwen2-VL, with attention in windows of a frame and temporal positions that follow real time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from freres_cli.backbones.halves import qwen_files
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel
from freres_cli.backbones.qwen_vision import QwenVisionEncoder
from freres_cli.records import VideoTokens

FILES = qwen_files("qwen2_5_vl", "Qwen2.5-VL", Qwen2_5_VLConfig)

# Relative distance within which a measured frame rate is rounded to a whole number, such as 29.97 to 30.
_NOMINAL_TOLERANCE = 0.01


class Qwen25VLVisionEncoder(QwenVisionEncoder):
    """The vision tower and merger of a Qwen2.5-VL checkpoint."""

    files = FILES
    tower_class: ClassVar = Qwen2_5_VisionTransformerPretrainedModel


class Qwen25VLLanguageModel(Qwen2VLLanguageModel):
    """The decoder, head and tokenizer of a Qwen2.5-VL checkpoint."""

    files = FILES

    def time_positions(self, frames: Tensor, video: VideoTokens) -> Tensor:
        """Temporal positions of sampled frames, which may be fractional, (n,) float32.

        transformers' rule for evenly sampled frames: frame t is at floor(t * tokens_per_second * seconds per frame). A
        fractional frame is interpolated between its neighbours.
        """
        interval = self.config.vision_config.tokens_per_second * seconds_per_frame(video.frame_seconds)
        # The same operations as in get_rope_index, so that rounding is the same.
        whole = (torch.arange(video.grid[0]) * interval).long().float()
        clamped = frames.clamp(0, video.grid[0] - 1)
        low, high = clamped.floor().long(), clamped.ceil().long()
        return torch.lerp(whole[low], whole[high], clamped - low)


def seconds_per_frame(frame_seconds: Tensor) -> float:
    """Mean period of the sampled frames, rounded to a whole rate or period within one percent. 1 for a single frame.

    transformers uses the requested rate. The times of real frames scatter around it, and a period just below a whole
    number would put two frames at the same position.
    """
    if len(frame_seconds) < 2 or float(frame_seconds[-1]) <= float(frame_seconds[0]):
        return 1.0
    period = float(frame_seconds[-1] - frame_seconds[0]) / (len(frame_seconds) - 1)
    nominal = 1 / round(1 / period) if period < 1 else float(round(period))
    return nominal if abs(nominal / period - 1) <= _NOMINAL_TOLERANCE else period
