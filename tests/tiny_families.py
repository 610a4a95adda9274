"""A tiny random checkpoint of every family, for the contract test."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.tiny_models import FACTOR, MERGE, PATCH_PX, make_byte_tokenizer

HIDDEN = 48


@dataclass(frozen=True)
class FamilyCase:
    """One family. ``config``: (token id by name, vocabulary size) -> config. ``classes``: what the names of its two
    classes begin with. ``tokens``: special tokens to add. ``token_names``: names that released tokenizers give to tokens.
    ``module``: the file of its classes, if it has another name."""

    name: str
    config: Callable[[Callable[[str], int], int], dict[str, Any]]
    classes: str
    grid: tuple[int, int] = (4, 5)
    frame_px: tuple[int, int] = (4 * FACTOR, 5 * FACTOR)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    num_axes: int = 3
    num_deep: int = 0
    is_hybrid: bool = False
    tokens: tuple[str, ...] = ()
    token_names: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    module: str = ""

    @property
    def vision_class(self) -> Any:
        return self._class("VisionEncoder")

    @property
    def language_class(self) -> Any:
        return self._class("LanguageModel")

    def _class(self, suffix: str) -> Any:
        return getattr(
            importlib.import_module(f"freres_cli.backbones.{self.module or self.name}"), self.classes + suffix
        )

    def frames(self, num_frames: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (num_frames, *self.frame_px, 3), dtype=torch.uint8, generator=generator)

    def make(self, directory: Path) -> Any:
        """Write the checkpoint with a byte tokenizer. Weights are large, to make logits large."""
        tokenizer = make_byte_tokenizer()
        tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.tokens)})
        raw = self.config(lambda name: int(tokenizer.convert_tokens_to_ids(name)), len(tokenizer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(self.name, **raw)
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
            model = model.eval().requires_grad_(False)
            for name, parameter in model.named_parameters():
                if "embed_tokens" in name:
                    parameter.normal_()
                elif parameter.ndim > 1 and "conv1d" not in name:
                    parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
                elif "bias" in name:
                    parameter.normal_(std=0.1)
        model.generation_config.eos_token_id = None
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        path = directory / "tokenizer_config.json"
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(stored | {"extra_special_tokens": self.token_names} if self.token_names else stored))
        (directory / "preprocessor_config.json").write_text(json.dumps(self.preprocessor))
        return model


def text_config(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 256,
        "eos_token_id": 258,
        **more,
    }


def qwen_token_ids(token: Callable[[str], int]) -> dict[str, int]:
    names = {"video_token_id": "video_pad", "image_token_id": "image_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: token(f"<|{name}|>") for key, name in names.items()}


def qwen_config(text: dict[str, Any], vision: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def make(token: Callable[[str], int], vocabulary: int) -> dict[str, Any]:
        return {
            "text_config": text_config(vocabulary, **text),
            "vision_config": {"num_heads": 2, "patch_size": PATCH_PX, "depth": 4, **vision},
            "tie_word_embeddings": False,
            **qwen_token_ids(token),
        }

    return make


def rope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section, **more}}


SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
QWEN_PIXELS = {"patch_size": PATCH_PX, "merge_size": MERGE, "size": {"shortest_edge": 64, "longest_edge": 65536}}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN}
QWEN3_TEXT = {"head_dim": 12, **rope([2, 2, 2], mrope_interleaved=True)}
QWEN3_TOWER = {**TOWER, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 3]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 24,
    **rope([1, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
}


def minicpm_config(**own: Any) -> Callable[..., dict[str, Any]]:
    def make(token: Callable[[str], int], vocabulary: int) -> dict[str, Any]:
        return {
            "text_config": {"model_type": "qwen3_5_text", **text_config(vocabulary, **HYBRID)},
            "vision_config": {**SIGLIP, "image_size": 32, "patch_size": PATCH_PX},
            "insert_layer_id": 1,
            "video_token_id": token("<|video_pad|>"),
            "image_token_id": token("<|image_pad|>"),
            **{key: token(value) if isinstance(value, str) else value for key, value in own.items()},
        }

    return make


def square_config(**own: Any) -> Callable[..., dict[str, Any]]:
    def make(token: Callable[[str], int], vocabulary: int) -> dict[str, Any]:
        ids = {key: token(name) for key, name in own.items() if key.endswith(("_id", "_index"))}
        text = text_config(vocabulary, **own.get("text", {}), pad_token_id=None)
        rest = {key: value for key, value in own.items() if key not in ids and key not in ("text", "vision")}
        return {"text_config": text, "vision_config": {**SIGLIP, **own["vision"]}, **ids, **rest}

    return make


VIDEO_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
MINICPM_PX = (4 * 4 * PATCH_PX, 5 * 4 * PATCH_PX)
SMOL_TOKENS = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
MINICPM_NAMES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
for _kind in ("image", "slice", "image_id"):
    MINICPM_NAMES |= {f"{_kind}_start_token": f"<{_kind}>", f"{_kind}_end_token": f"</{_kind}>"}
QWEN2_TEXT = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

FAMILY_CASES = [
    FamilyCase(
        "qwen2_vl",
        qwen_config(rope([2, 2, 2]), {"embed_dim": 32, "hidden_size": HIDDEN}),
        "Qwen2VL",
        preprocessor=QWEN_PIXELS,
    ),
    FamilyCase(
        "qwen2_5_vl",
        # windows of 3 x 3 tokens on a grid of 4 x 5: of four different sizes
        qwen_config(
            rope([2, 2, 2]),
            {**TOWER, "window_size": 3 * FACTOR, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
        ),
        "Qwen25VL",
        preprocessor=QWEN_PIXELS,
    ),
    FamilyCase(
        "qwen3_vl",
        qwen_config(QWEN3_TEXT, QWEN3_TOWER),
        "Qwen3VL",
        preprocessor=QWEN_PIXELS,
        num_deep=3,
    ),
    FamilyCase(
        "qwen3_vl_moe",
        qwen_config({**QWEN3_TEXT, **MOE}, QWEN3_TOWER),
        "Qwen3VLMoe",
        preprocessor=QWEN_PIXELS,
        num_deep=3,
    ),
    FamilyCase(
        "qwen3_5",
        qwen_config(HYBRID, {**TOWER, "num_position_embeddings": 36}),
        "Qwen35",
        preprocessor=QWEN_PIXELS,
        is_hybrid=True,
    ),
    FamilyCase(
        "internvl",
        square_config(
            text=QWEN2_TEXT,
            vision={"image_size": [32, 32], "patch_size": [4, 4]},
            image_token_id="<IMG_CONTEXT>",
            tie_word_embeddings=False,
        ),
        "InternVL",
        grid=(4, 4),
        frame_px=(32, 32),
        num_axes=1,
        tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        token_names=INTERNVL_NAMES,
        chat_template=VIDEO_TEMPLATE,
    ),
    FamilyCase(
        "llava_onevision",
        # 9 x 9 patches, pooled to 5 x 5 tokens
        square_config(
            text=QWEN2_TEXT,
            vision={"model_type": "siglip_vision_model", "image_size": 36, "patch_size": 4, "vision_use_head": False},
            video_token_index="<video>",
            image_token_index="<image>",
        ),
        "LlavaOnevision",
        grid=(5, 5),
        frame_px=(36, 36),
        num_axes=1,
        tokens=("<image>", "<video>"),
        chat_template=VIDEO_TEMPLATE,
    ),
    FamilyCase(
        "smolvlm",
        square_config(
            text={"model_type": "llama"},
            vision={"image_size": 32, "patch_size": 4},
            image_token_id="<image>",
            scale_factor=2,
        ),
        "SmolVLM",
        grid=(4, 4),
        frame_px=(32, 32),
        num_axes=1,
        tokens=SMOL_TOKENS,
    ),
    FamilyCase(
        "minicpmv4_6",
        minicpm_config(),
        "MiniCPMV46",
        frame_px=MINICPM_PX,
        is_hybrid=True,
        tokens=("<image>", "</image>"),
        token_names=MINICPM_NAMES,
        module="minicpm_v",
        chat_template=VIDEO_TEMPLATE.replace("<video>", "<|video_pad|>"),
    ),
    FamilyCase(
        "minicpmv4_7",
        minicpm_config(
            image_start_id="<image>",
            image_end_id="</image>",
            slice_start_id="<slice>",
            slice_end_id="</slice>",
            newline_id=10,
        ),
        "MiniCPMV47",
        frame_px=MINICPM_PX,
        is_hybrid=True,
        tokens=("<image>", "</image>", "<slice>", "</slice>"),
        token_names=MINICPM_NAMES,
        module="minicpm_v",
        chat_template=VIDEO_TEMPLATE.replace("<video>", "<|video_pad|>"),
    ),
]
