"""The stock transformers path of every family for one clip: pixels in, features, logits and answers out.

What ``freres verify`` and the contract tests compare ours with. Nothing here uses our encoders, positions or decoder loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from freres_cli.backbones.checkpoint import Checkpoint
from freres_cli.devices import Device
from freres_cli.errors import BackboneError

_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
_MINICPM = ("minicpmv4_6", "minicpmv4_7")
# Families whose visual tokens form one run, without text around each frame.
_ONE_RUN = ("qwen2_vl", "qwen2_5_vl", "llava_onevision")


def load_stock_model(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> Any:
    """Both halves of a checkpoint as transformers loads them, in evaluation mode.

    ``checkpoint``: a folder, or a hub model, whose weights are downloaded. ``device``, ``dtype``: where and in which
    precision it runs, with PyTorch's attention. Raises BackboneError if transformers cannot load it.
    """
    checkpoint.fetch_files(sorted({path.name for path in checkpoint.files_by_key.values()}))
    logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint.directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"{checkpoint.model_id}: transformers cannot load it: {reason}") from error
    return model.eval().requires_grad_(False).to(device.name)


@dataclass(frozen=True)
class StockClip:
    """A clip as the stock model takes it.

    ``ids``: (L,) the whole prompt, from the stock processor; none if only features are wanted. ``pixels``: from the stock
    image processor. ``grid``: (T, H, W) of the frames' tokens. ``side_patches``: patches per token along one side.
    ``period_s``: seconds between two frames.
    """

    family: str
    ids: tuple[int, ...]
    pixels: Tensor
    grid: tuple[int, int, int]
    side_patches: int
    period_s: float


class StockPath:
    """The stock pixel path of one family for one clip.

    ``stock``: the model from transformers. ``clip``: what it is asked about. ``ids``: (1, L), with every visual token.
    ``is_visual``: (L,) bool, where those are.
    """

    def __init__(self, stock: Any, clip: StockClip) -> None:
        self.stock, self.clip, self.family = stock, clip, clip.family
        self.device = stock.device
        self.pixels = clip.pixels.to(self.device)
        self.ids = torch.tensor([clip.ids], dtype=torch.long, device=self.device)
        config = stock.config
        names = {"internvl": "image_token_id", "smolvlm": "image_token_id", "llava_onevision": "video_token_index"}
        self.pad = int(getattr(config, names.get(self.family, "video_token_id")))
        self.is_visual = self.ids[0] == self.pad
        if self.family == "llava_onevision":  # the newline row is not a visual token, and always present
            self.is_visual[self.is_visual.nonzero()[-1:]] = False
        num_frames, rows, columns = clip.grid
        sides = [rows * clip.side_patches, columns * clip.side_patches]
        self.frame_sides = torch.tensor([[num_frames, *sides]], device=self.device)
        # On the CPU, because that tower reads the sizes in Python.
        self.sizes = torch.tensor([sides] * num_frames)

    @torch.no_grad()
    def features(self) -> Tensor:
        """(T*H*W, C): the visual tokens from the stock call, with DeepStack rows after the first D channels."""
        model, pixels = self.stock, self.pixels
        if self.family in _QWEN:
            out = model.get_video_features(pixels, self.frame_sides, return_dict=True)
            deep = [torch.cat(list(rows)) for rows in getattr(out, "deepstack_features", None) or ()]
            return torch.cat([torch.cat(list(out.pooler_output)), *deep], dim=-1)
        if self.family in _MINICPM:
            return torch.cat(list(model.get_video_features(pixels, self.sizes, return_dict=True).pooler_output))
        if self.family == "internvl":
            found = model.get_image_features(pixels.to(model.dtype), return_dict=True).pooler_output
        elif self.family == "llava_onevision":
            found = model.get_video_features(pixels[None].to(model.dtype), return_dict=True).pooler_output[0, :-1]
        else:
            found = model.get_image_features(pixels[None], return_dict=True).pooler_output[0]
        features: Tensor = found.reshape(-1, found.shape[-1])
        return features

    def forward_inputs(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of the stock model for the clip and a prompt, (1, L), that may go on after the question."""
        kinds = (ids == self.pad).int() * 2
        inputs: dict[str, Any]
        if self.family in _QWEN:
            inputs = {
                "pixel_values_videos": self.pixels,
                "video_grid_thw": self.frame_sides,
                "mm_token_type_ids": kinds,
            }
            if self.family == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = [self.clip.period_s]
        elif self.family in _MINICPM:
            inputs = {"pixel_values_videos": self.pixels, "target_sizes_videos": self.sizes}
            if self.family == "minicpmv4_7":
                inputs["mm_token_type_ids"] = kinds
        elif self.family == "internvl":
            inputs = {"pixel_values": self.pixels}
        else:
            key = "pixel_values_videos" if self.family == "llava_onevision" else "pixel_values"
            inputs = {key: self.pixels[None]}
        return {"input_ids": ids, **inputs}

    def positions(self, ids: Tensor) -> Tensor:
        """The stock positions: (3, 1, L) of families with three axes, else (1, L)."""
        plain = torch.arange(ids.shape[1], device=self.device)
        if self.family == "minicpmv4_6":
            return plain.expand(3, 1, -1)
        if self.family not in (*_QWEN, *_MINICPM):
            return plain[None]
        inputs = self.forward_inputs(ids)
        names = ("video_grid_thw", "second_per_grid_ts", "target_sizes_videos")
        extra = {name: inputs[name] for name in names if name in inputs}
        found: Tensor = self.stock.model.get_rope_index(ids, inputs["mm_token_type_ids"], **extra)[0]
        return found

    def is_left(self, keep: Tensor) -> Tensor:
        """(L,) bool: what is left of the prompt with these visual tokens. Later frames without any lose their text too.

        ``keep``: (K,) int64 into the T*H*W tokens. It holds one of the first frame.
        """
        places = self.is_visual.nonzero()[:, 0]
        kept = torch.zeros_like(self.is_visual)
        kept[places[keep]] = True
        left = ~self.is_visual | kept
        if self.family not in _ONE_RUN:
            # A frame's text ends with one token after its own; what follows belongs to the next frame.
            runs = places.view(self.clip.grid[0], -1)
            for before, run in zip(runs[:-1], runs[1:], strict=True):
                if not kept[run].any():
                    left[int(before[-1]) + 2 : int(run[-1]) + 2] = False
        return left

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(L, vocabulary): the stock forward pass over the whole prompt."""
        found: Tensor = self.stock(**self.forward_inputs(self.ids)).logits[0]
        return found

    @torch.no_grad()
    def answer(self, num_tokens: int, stop_ids: Iterable[int]) -> tuple[list[int], Tensor]:
        """Greedy ids from the stock ``generate``, without penalties, and the logits that each was picked from.

        ``num_tokens``: at most so many. ``stop_ids``: that end the answer. A checkpoint without a generation config names
        fewer than its tokenizer does.
        """
        told = self.stock.generate(
            **self.forward_inputs(self.ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(stop_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
        return told.sequences[0, self.ids.shape[1] :].tolist(), torch.cat(list(told.logits)).float()

    @torch.no_grad()
    def masked_steps(self, keep: Tensor, num_steps: int) -> tuple[list[int], Tensor]:
        """Greedy steps over the full sequence, without a cache, with a mask that hides all other visual tokens.

        Also hidden is the text around frames that have no tokens left. ``keep``: as in ``is_left``. ``num_steps``: how many.
        Returns the ids and the logits that each was picked from, (num_steps, vocabulary). No id is a visual token's, which
        would need features.
        """
        hidden = (~self.is_left(keep)).nonzero()[:, 0]
        ids, told, steps = self.ids, [], []
        for _ in range(num_steps):
            length = ids.shape[1]
            mask = torch.full((length, length), -torch.inf, device=self.device, dtype=self.stock.dtype).triu(1)
            mask[:, hidden] = -torch.inf
            mask[hidden, hidden] = 0.0
            inputs = self.forward_inputs(ids) | {"attention_mask": self._as_mask(mask[None, None])}
            logits = self.stock(**inputs, position_ids=self.positions(ids), use_cache=False).logits[0, -1].float()
            steps.append(logits)
            told.append(int(logits.index_fill(0, self._visual_ids(), -torch.inf).argmax()))
            ids = torch.cat([ids, ids.new_tensor([[told[-1]]])], dim=1)
        return told, torch.stack(steps)

    def _visual_ids(self) -> Tensor:
        config = self.stock.config
        names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
        found = {getattr(config, name, None) for name in names}
        return torch.tensor(sorted(number for number in found if number is not None), device=self.device)

    def _as_mask(self, mask: Tensor) -> Any:
        """A 4-D mask as this family's decoder takes it."""
        is_named = self.family in ("qwen2_vl", "qwen2_5_vl", "internvl", "llava_onevision")
        return {"full_attention": mask} if is_named else mask
