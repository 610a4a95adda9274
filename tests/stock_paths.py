"""The stock transformers pixel path of every family for one video, which the contract tests compare us with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tests.tiny_models import MERGE, PATCH_PX

if TYPE_CHECKING:
    from tests.tiny_families import FamilyCase

# Seconds between two sampled frames.
PERIOD_S = 2.5


class StockPath:
    """What the paths of all families share. ``ids``: (1, L), with every visual token. ``is_visual``: (L,), where they are."""

    case: FamilyCase
    stock: Any
    ids: Tensor
    is_visual: Tensor

    def frame_stretches(self) -> list[Tensor]:
        return []

    def is_left(self, keep: Tensor) -> Tensor:
        """(L,) bool: what is left of the prompt with these visual tokens. Frames without any lose their text too."""
        kept = torch.zeros(self.ids.shape[1], dtype=torch.bool)
        kept[self.is_visual.nonzero()[:, 0][keep]] = True
        left = ~self.is_visual | kept
        for stretch in self.frame_stretches():
            if not kept[stretch].any():
                left[stretch] = False
        return left

    def injected(self, keep: Tensor, latents: Tensor) -> dict[str, Any]:
        """The arguments of the public model and its ``generate`` for these visual tokens alone, (K, C), at their stock
        positions, without pixels."""
        left = self.is_left(keep)
        positions = self.positions(self.ids)[..., left].float()
        if len(positions) == 3:
            positions = torch.cat([torch.arange(int(left.sum())).float()[None, None], positions])
        return {
            "input_ids": self.ids[:, left],
            "attention_mask": torch.ones(1, int(left.sum()), dtype=torch.long),
            "position_ids": positions,
            "mm_encoder_outputs": self.encoder_outputs(latents),
        }

    def encoder_outputs(self, latents: Tensor) -> dict[str, Any]:
        """Visual tokens (K, C) in the container that the family's model takes."""
        main, *deep = latents.split(latents.shape[1] // (1 + self.case.num_deep), dim=1)
        if deep:
            return {
                "video": BaseModelOutputWithDeepstackFeatures(
                    pooler_output=[main], deepstack_features=[[d] for d in deep]
                )
            }
        if self.case.name == "llava_onevision":
            main = torch.cat([main, self.stock.model.image_newline[None]])
        kind = "image" if self.case.name in ("internvl", "smolvlm") else "video"
        is_tensor = self.case.name in ("internvl", "llava_onevision")
        return {kind: BaseModelOutputWithPooling(pooler_output=main[None] if is_tensor else [main])}


class QwenStock(StockPath):
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
        """Our input for the tower, and that of the family's own image processor for the same frames."""
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
        ends = (self.ids[0] == self.stock.config.vision_end_token_id).nonzero()[: self.num_frames, 0].tolist()
        starts = [self.prefix_length, *[end + 1 for end in ends[:-1]]]
        return [torch.arange(start, end + 1) for start, end in zip(starts, ends, strict=True)]

    def as_mask(self, mask: Tensor) -> Any:
        """A 4-D mask as this family's decoder takes it."""
        return {"full_attention": mask} if self.case.name in ("qwen2_vl", "qwen2_5_vl") else mask


class SquareStock(StockPath):
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
        if case.name == "llava_onevision":  # the newline row is not a visual token, and always present
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


class MiniCPMStock(StockPath):
    """The stock pixel path of MiniCPM-V: frames side by side in one strip."""

    def __init__(self, case: FamilyCase, stock: Any, prompt: Any, frames: Tensor, encoder: Any) -> None:
        self.case, self.stock = case, stock
        self.strip = encoder.patches(frames)
        (rows, columns), merge = case.grid, encoder.merge
        self.sizes = torch.tensor([[rows * merge, columns * merge]] * len(frames))
        pad = stock.config.video_token_id
        start, end = (264 + case.tokens.index(name) for name in ("<image>", "</image>"))
        middle = [start, *[pad] * (rows * columns), end] * len(frames)
        if case.name == "minicpmv4_7":  # here the line feed after the video is part of it
            middle.append(10)
        self.ids = torch.tensor([[*prompt.prefix, *middle, *prompt.suffix]])
        self.is_visual = self.ids[0] == pad
        cells, start = rows * columns + 2, len(prompt.prefix)
        self.stretches = list((start + torch.arange(len(frames) * cells)).split(cells))

    def frame_stretches(self) -> list[Tensor]:
        return self.stretches

    def features(self) -> Tensor:
        return torch.cat(self.stock.get_video_features(self.strip, self.sizes, return_dict=True).pooler_output)

    def processed(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

        rule = self.case.vision_class.default_rule
        processor = MiniCPMV4_6ImageProcessorPil(
            do_resize=False, slice_mode=False, patch_size=PATCH_PX, image_mean=list(rule.mean), image_std=list(rule.std)
        )
        images = [frame.permute(2, 0, 1).numpy() for frame in frames]
        return self.strip, torch.as_tensor(processor(images, input_data_format="channels_first")["pixel_values"])

    def forward_inputs(self, ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "pixel_values_videos": self.strip, "target_sizes_videos": self.sizes}
        if self.case.name == "minicpmv4_7":
            inputs["mm_token_type_ids"] = (ids == self.stock.config.video_token_id).int() * 2
        return inputs

    def positions(self, ids: Tensor) -> Tensor:
        if self.case.name == "minicpmv4_6":
            return torch.arange(ids.shape[1]).expand(3, 1, -1)
        kinds = self.forward_inputs(ids)["mm_token_type_ids"]
        return self.stock.model.get_rope_index(ids, kinds, target_sizes_videos=self.sizes)[0]
