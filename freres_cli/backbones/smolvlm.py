"""SmolVLM and SmolVLM2: a sentence about the clip, then ``Frame from MM:SS:`` for each frame; one-axis positions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from transformers import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMModel

from freres_cli.backbones.base import PromptIds
from freres_cli.backbones.frame_runs import FrameRunLanguageModel, FrameTexts
from freres_cli.backbones.halves import FamilyFiles
from freres_cli.backbones.square_vision import SquareVisionEncoder
from freres_cli.backbones.vision import PixelRule
from freres_cli.errors import BackboneError
from freres_cli.records import VideoTokens

_PROJECTOR = ("model.connector.", "connector.")
FILES = FamilyFiles(
    "smolvlm",
    "SmolVLM",
    SmolVLMConfig,
    vision={"vision_model.": ("model.vision_model.", "vision_model."), "connector.": _PROJECTOR},
    projector=_PROJECTOR,
    decoder=("model.text_model.", "text_model."),
)

_AROUND, _GLOBAL, _END = "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
_ONES, _TENS = _WORDS.split()[:20], _WORDS.split()[20:]


class SmolVLMVisionEncoder(SquareVisionEncoder):
    """The vision tower and connector of a SmolVLM checkpoint."""

    files = FILES
    model_class = SmolVLMModel
    decoder_name = "text_model"
    default_rule = PixelRule((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_pixels=0, max_pixels=0)

    @classmethod
    def tokens_per_side(cls, config: Any, patches_per_side: int) -> int:
        return patches_per_side // int(config.scale_factor)

    def set_up(self) -> None:
        super().set_up()
        # The stock model takes a frame of zeros for padding and silently drops it.
        shades = self.pixel_rule.normalize(torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1))
        if bool((shades == 0).all(dim=1).any()):
            raise BackboneError(
                f"pixels: expected no shade of grey that normalizes to zero, got image_mean {self.pixel_rule.mean}"
            )

    def features(self, pixels: Tensor) -> Tensor:
        """See ``FrameEncoder.features``."""
        out = self.tower.get_image_features(self.prepare(pixels)[None], return_dict=True)
        latents: Tensor = out.pooler_output[0]
        return latents.view(len(pixels), self.side**2, -1)


class SmolVLMLanguageModel(FrameRunLanguageModel):
    """The decoder, head and tokenizer of a SmolVLM checkpoint."""

    files = FILES
    num_axes = 1
    counts_raster = True
    video_token = "<image>"

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The chat prompt that the processor uses for videos, whatever template the tokenizer has.

        The space before the video and the line feeds after it are tokenized together with the text next to them.
        """
        place = self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        opening = f"System: {system}{_END}\n" if system else ""
        text = f"<|im_start|>{opening}User:{place}\n\n{question}{_END}\nAssistant:"
        return self.split_prompt(text)

    def frame_texts(self, video: VideoTokens) -> FrameTexts:
        """A frame's time is in minutes and seconds after the first frame of the file; the clip's length is the time of its
        last frame."""
        seconds = video.frame_seconds.tolist()
        length = timedelta(seconds=int(seconds[-1]))
        count = in_words(len(seconds))
        intro = f" You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n"
        lines = [f"\nFrame from {int(s // 60):02d}:{int(s % 60):02d}:{_AROUND}{_GLOBAL}" for s in seconds]
        before = self.ids_of_each(lines)
        return FrameTexts(before, [self.ids_of(_AROUND)] * len(before), intro=self.ids_of(intro))


def in_words(number: int) -> str:
    """A whole number below a million in English words, spelled like ``num2words``."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{_ONES[number // 100]} hundred{rest}"
    thousands, rest_number = divmod(number, 1000)
    joint = " and " if rest_number < 100 else ", "
    return f"{in_words(thousands)} thousand" + (f"{joint}{in_words(rest_number)}" if rest_number else "")
