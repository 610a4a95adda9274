"""Qwen3-VL with a mixture of experts in its decoder; everything else is the same as Qwen3-VL."""

from __future__ import annotations

from transformers import Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from freres_cli.backbones.halves import qwen_files
from freres_cli.backbones.qwen3_vl import DeepStackLanguageModel, Qwen3VLVisionEncoder

# Released checkpoints store the experts' matrices transposed, compared with transformers 5.
_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
FILES = qwen_files("qwen3_vl_moe", "Qwen3-VL-MoE", Qwen3VLMoeConfig, transposed=_EXPERTS)


class Qwen3VLMoeVisionEncoder(Qwen3VLVisionEncoder):
    """The vision tower and mergers of a Qwen3-VL-MoE checkpoint."""

    files = FILES
    tower_class = Qwen3VLMoeVisionModel


class Qwen3VLMoeLanguageModel(DeepStackLanguageModel):
    """The decoder, head and tokenizer of a Qwen3-VL-MoE checkpoint."""

    files = FILES
