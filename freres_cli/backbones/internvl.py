"""InternVL (2.5, 3 and 3.5 in transformers' layout): ``Frame1: <img>tokens</img>`` per frame, one-axis positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLModel

from freres_cli.backbones.frame_runs import FrameRunLanguageModel, FrameTexts
from freres_cli.backbones.halves import FamilyFiles
from freres_cli.backbones.square_vision import SquareVisionEncoder
from freres_cli.backbones.vision import PixelRule
from freres_cli.records import VideoTokens

_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
FILES = FamilyFiles(
    "internvl",
    "InternVL",
    InternVLConfig,
    vision={"vision_tower.": ("model.vision_tower.", "vision_tower."), "multi_modal_projector.": _PROJECTOR},
    projector=_PROJECTOR,
    decoder=("model.language_model.", "language_model.model."),
    head=("lm_head.", "language_model.lm_head."),
)


class InternVLVisionEncoder(SquareVisionEncoder):
    """The vision tower, pixel shuffle and projector of an InternVL checkpoint."""

    files = FILES
    model_class = InternVLModel
    default_rule = PixelRule((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), min_pixels=0, max_pixels=0)

    @classmethod
    def tokens_per_side(cls, config: Any, patches_per_side: int) -> int:
        return int(patches_per_side * config.downsample_ratio)

    def features(self, pixels: Tensor) -> Tensor:
        """See ``FrameEncoder.features``."""
        features: Tensor = self.tower.get_image_features(self.prepare(pixels), return_dict=True).pooler_output
        return features


class InternVLLanguageModel(FrameRunLanguageModel):
    """The decoder, head and tokenizer of an InternVL checkpoint."""

    files = FILES
    num_axes = 1
    counts_raster = True
    video_token = "<video>"

    def plain_prompt(self, question: str, system: str | None, video: str) -> str:
        """ChatML, without a default system text."""
        opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{opening}<|im_start|>user\n{video}\n{question}<|im_end|>\n<|im_start|>assistant\n"

    def frame_texts(self, video: VideoTokens) -> FrameTexts:
        """Frames are numbered from 1, each on its own line."""
        start = getattr(self.tokenizer, "start_image_token", None) or "<img>"
        end = getattr(self.tokenizer, "end_image_token", None) or "</img>"
        first = self.ids_of_each([f"Frame1: {start}"], after="\n")
        others = self.ids_of_each((f"\nFrame{frame}: {start}" for frame in range(2, video.grid[0] + 1)), after=end)
        before = [*first, *others]
        return FrameTexts(before, [self.ids_of(end)] * len(before))
