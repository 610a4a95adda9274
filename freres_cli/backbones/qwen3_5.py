"""Qwen3.5: the prompt of Qwen3-VL without DeepStack, and a decoder whose linear-attention layers keep a state.

The state cannot be cropped, so each question copies the prefilled video. Leaving tokens out changes the state itself, so
the answer is not that of the full sequence with those tokens masked.
"""

from __future__ import annotations

from transformers import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

from freres_cli.backbones.halves import qwen_files
from freres_cli.backbones.qwen3_vl import Qwen3VLVisionEncoder, TimestampLanguageModel

FILES = qwen_files("qwen3_5", "Qwen3.5", Qwen3_5Config)


class Qwen35VisionEncoder(Qwen3VLVisionEncoder):
    """The vision tower and merger of a Qwen3.5 checkpoint."""

    files = FILES
    tower_class = Qwen3_5VisionModel


class Qwen35LanguageModel(TimestampLanguageModel):
    """The decoder, head and tokenizer of a Qwen3.5 checkpoint."""

    files = FILES
