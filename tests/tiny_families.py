"""A tiny random checkpoint of every family, and its stock pixel path: what the contract test compares us with."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from freres_cli.world.bundled_model import make_tokenizer
from tests.tiny_models import FACTOR, MERGE, PATCH_PX

HIDDEN, PERIOD_S = 48, 2.5


@dataclass(frozen=True)
class FamilyCase:
    """One family. ``config``: (token id by name, vocabulary size) -> config. ``classes``: what its two classes' names
    begin with. ``stock_path``: the class below that runs its stock pixel path. ``tokens``: special tokens to add."""

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
    stock_path: Any = None
    chat_template: str | None = None

    @property
    def vision_class(self) -> Any:
        return self._class("VisionEncoder")

    @property
    def language_class(self) -> Any:
        return self._class("LanguageModel")

    def _class(self, suffix: str) -> Any:
        return getattr(importlib.import_module(f"freres_cli.backbones.{self.name}"), self.classes + suffix)

    def frames(self, num_frames: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (num_frames, *self.frame_px, 3), dtype=torch.uint8, generator=generator)

    def make(self, directory: Path) -> Any:
        """Write the checkpoint with a byte tokenizer; weights are large, so that logits are."""
        tokenizer = make_tokenizer()
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


class QwenStock:
    """The stock pixel path of the Qwen families for one video of T frames."""

    def __init__(self, case: FamilyCase, stock: Any, prompt: Any, frames: Tensor, encoder: Any) -> None:
        self.case, self.stock = case, stock
        self.num_frames, (self.rows, self.columns) = len(frames), case.grid
        self.patches = encoder.patches(frames)
        self.grid = torch.tensor([[self.num_frames, self.rows * MERGE, self.columns * MERGE]])
        pad, cells = stock.config.video_token_id, self.rows * self.columns
        if case.name in ("qwen2_vl", "qwen2_5_vl"):
            middle = [pad] * (self.num_frames * cells)
        else:
            start, end = stock.config.vision_start_token_id, stock.config.vision_end_token_id
            middle = []
            for frame in range(self.num_frames):
                middle += [*f"<{frame * PERIOD_S:.1f} seconds>".encode(), start, *[pad] * cells, end]
        self.ids = torch.tensor([[*prompt.prefix, *middle, *prompt.suffix]])
        self.is_visual = self.ids[0] == pad
        self.prefix_length = len(prompt.prefix)

    def features(self) -> Tensor:
        """(T*H*W, C) from the stock call."""
        out = self.stock.get_video_features(self.patches, self.grid, return_dict=True)
        deep = [torch.cat(rows) for rows in out.deepstack_features] if self.case.num_deep else []
        return torch.cat([torch.cat(out.pooler_output), *deep], dim=-1)

    def processed(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What we feed the tower, and what the family's own image processor makes of the same frames."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        rule = self.case.vision_class.default_rule
        processor = Qwen2VLImageProcessorPil(
            patch_size=PATCH_PX, merge_size=MERGE, do_resize=False, image_mean=list(rule.mean), image_std=list(rule.std)
        )
        images = [frame.permute(2, 0, 1).numpy() for frame in frames]
        expected = processor(images, input_data_format="channels_first")["pixel_values"]
        return self.patches, torch.as_tensor(np.asarray(expected))

    def forward_inputs(self, ids: Tensor) -> dict[str, Any]:
        kinds = (ids == self.stock.config.video_token_id).int() * 2
        inputs = {
            "input_ids": ids,
            "pixel_values_videos": self.patches,
            "video_grid_thw": self.grid,
            "mm_token_type_ids": kinds,
        }
        if self.case.name == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = [PERIOD_S]
        return inputs

    def positions(self, ids: Tensor) -> Tensor:
        """(3, 1, L), from the stock rule."""
        inputs = self.forward_inputs(ids)
        extra = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if "second_per_grid_ts" in inputs else {}
        kinds = inputs["mm_token_type_ids"]
        return self.stock.model.get_rope_index(ids, kinds, video_grid_thw=self.grid, **extra)[0]

    def frame_stretches(self) -> list[Tensor]:
        """Indices of each frame with its own text, where frames have text."""
        if self.case.name in ("qwen2_vl", "qwen2_5_vl"):
            return []
        ends = (self.ids[0] == self.stock.config.vision_end_token_id).nonzero()[:, 0].tolist()
        starts = [self.prefix_length, *[end + 1 for end in ends]]
        return [torch.arange(start, end + 1) for start, end in zip(starts, ends, strict=False)]

    def as_mask(self, mask: Tensor) -> Any:
        """A 4-D mask as this family's decoder takes it."""
        return {"full_attention": mask} if self.case.name in ("qwen2_vl", "qwen2_5_vl") else mask


class SquareStock:
    """The stock pixel path of the families with square frames and one-axis positions."""

    def __init__(self, case: FamilyCase, stock: Any, prompt: Any, frames: Tensor, encoder: Any) -> None:
        self.case, self.stock = case, stock
        self.prefix_length, self.cells = len(prompt.prefix), case.grid[0] * case.grid[1]
        self.pixels = encoder.prepare(frames)
        config = stock.config
        self.pad = getattr(config, "video_token_index", None) or config.image_token_id
        self.middle, self.stretches = [], []
        getattr(self, f"write_{case.name}")(len(frames), encoder)
        self.ids = torch.tensor([[*prompt.prefix, *self.middle, *prompt.suffix]])
        self.is_visual = self.ids[0] == self.pad
        if case.name == "llava_onevision":  # the newline row is no visual token, and always there
            self.is_visual[self.is_visual.nonzero()[-1]] = False

    def add_frame(self, before: str, after: str, token: Callable[[str], list[int]]) -> None:
        start = self.prefix_length + len(self.middle)
        self.middle += [*token(before), *[self.pad] * self.cells, *token(after)]
        self.stretches.append(torch.arange(start, self.prefix_length + len(self.middle)))

    def encode_text(self, text: str) -> list[int]:
        """Bytes are their own ids here; special tokens come after them, in the order of the family's list."""
        ids: list[int] = []
        while text:
            name = next((n for n in self.case.tokens if text.startswith(n)), None)
            ids += [264 + self.case.tokens.index(name)] if name else list(text[0].encode())
            text = text[len(name or text[0]) :]
        return ids

    def write_internvl(self, num_frames: int, encoder: Any) -> None:
        for frame in range(num_frames):
            line = f"Frame{frame + 1}: <img>"
            self.add_frame(line if frame == 0 else "\n" + line, "</img>", self.encode_text)

    def write_llava_onevision(self, num_frames: int, encoder: Any) -> None:
        self.middle = [self.pad] * (num_frames * self.cells + 1)

    def write_smolvlm(self, num_frames: int, encoder: Any) -> None:
        self.middle += self.encode_text(
            " You are provided the following series of four frames from a 0:00:07 [H:MM:SS] video.\n"
        )
        for seconds in ("00:00", "00:02", "00:05", "00:07"):
            line = f"\nFrame from {seconds}:<fake_token_around_image><global-img>"
            self.add_frame(line, "<fake_token_around_image>", self.encode_text)

    def features(self) -> Tensor:
        if self.case.name == "internvl":
            out = self.stock.get_image_features(self.pixels, return_dict=True).pooler_output
        elif self.case.name == "llava_onevision":
            out = self.stock.get_video_features(self.pixels[None], return_dict=True).pooler_output[0, :-1]
        else:
            out = self.stock.get_image_features(self.pixels[None], return_dict=True).pooler_output[0]
        return out.reshape(-1, out.shape[-1])

    def processed(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        rule = self.case.vision_class.default_rule
        options: dict[str, Any] = {"do_resize": False, "image_mean": list(rule.mean), "image_std": list(rule.std)}
        images = [frame.permute(2, 0, 1).numpy() for frame in frames]
        if self.case.name == "smolvlm":
            processor = SmolVLMImageProcessorPil(
                **options, do_image_splitting=False, do_pad=False, max_image_size={"longest_edge": frames.shape[1]}
            )
        else:
            classes = {"internvl": GotOcr2ImageProcessorPil, "llava_onevision": SiglipImageProcessorPil}
            processor = classes[self.case.name](**options)
        expected = processor(images, input_data_format="channels_first")["pixel_values"]
        return self.pixels, torch.as_tensor(np.asarray(expected)).reshape(self.pixels.shape)

    def forward_inputs(self, ids: Tensor) -> dict[str, Any]:
        if self.case.name == "internvl":
            return {"input_ids": ids, "pixel_values": self.pixels}
        key = "pixel_values_videos" if self.case.name == "llava_onevision" else "pixel_values"
        return {"input_ids": ids, key: self.pixels[None]}

    def positions(self, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1])[None]

    def frame_stretches(self) -> list[Tensor]:
        return self.stretches

    def as_mask(self, mask: Tensor) -> Any:
        return {"full_attention": mask} if self.case.name != "smolvlm" else mask


def square_config(**own: Any) -> Callable[..., dict[str, Any]]:
    def make(token: Callable[[str], int], vocabulary: int) -> dict[str, Any]:
        ids = {key: token(name) for key, name in own.items() if key.endswith(("_id", "_index"))}
        text = text_config(vocabulary, **own.get("text", {}), pad_token_id=None)
        rest = {key: value for key, value in own.items() if key not in ids and key not in ("text", "vision")}
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        return {"text_config": text, "vision_config": {**tower, **own["vision"]}, **ids, **rest}

    return make


VIDEO_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
SMOL_TOKENS = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")
QWEN2_TEXT = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

FAMILY_CASES = [
    FamilyCase(
        "qwen2_vl",
        qwen_config(rope([2, 2, 2]), {"embed_dim": 32, "hidden_size": HIDDEN}),
        "Qwen2VL",
        preprocessor=QWEN_PIXELS,
        stock_path=QwenStock,
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
        stock_path=QwenStock,
    ),
    FamilyCase(
        "qwen3_vl",
        qwen_config(QWEN3_TEXT, QWEN3_TOWER),
        "Qwen3VL",
        preprocessor=QWEN_PIXELS,
        stock_path=QwenStock,
        num_deep=3,
    ),
    FamilyCase(
        "qwen3_vl_moe",
        qwen_config({**QWEN3_TEXT, **MOE}, QWEN3_TOWER),
        "Qwen3VLMoe",
        preprocessor=QWEN_PIXELS,
        stock_path=QwenStock,
        num_deep=3,
    ),
    FamilyCase(
        "qwen3_5",
        qwen_config(HYBRID, {**TOWER, "num_position_embeddings": 36}),
        "Qwen35",
        preprocessor=QWEN_PIXELS,
        stock_path=QwenStock,
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
        stock_path=SquareStock,
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
        stock_path=SquareStock,
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
        stock_path=SquareStock,
    ),
]
