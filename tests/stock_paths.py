"""The public way to give a stock model visual tokens in place of pixels, which our decoder loop is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from freres_cli.backbones.stock import StockPath


def injected(path: StockPath, keep: Tensor, latents: Tensor, num_deep: int) -> dict[str, Any]:
    """The arguments of the public model and its ``generate`` for these visual tokens alone, (K, C), at their stock
    positions, without pixels."""
    left = path.is_left(keep)
    positions = path.positions(path.ids)[..., left].float()
    if len(positions) == 3:
        positions = torch.cat([torch.arange(int(left.sum())).float()[None, None], positions])
    return {
        "input_ids": path.ids[:, left],
        "attention_mask": torch.ones(1, int(left.sum()), dtype=torch.long),
        "position_ids": positions,
        "mm_encoder_outputs": encoder_outputs(path, latents, num_deep),
    }


def encoder_outputs(path: StockPath, latents: Tensor, num_deep: int) -> dict[str, Any]:
    """Visual tokens (K, C) in the container that the family's model takes."""
    main, *deep = latents.split(latents.shape[1] // (1 + num_deep), dim=1)
    if deep:
        rows = [[row] for row in deep]
        return {"video": BaseModelOutputWithDeepstackFeatures(pooler_output=[main], deepstack_features=rows)}
    if path.family == "llava_onevision":
        main = torch.cat([main, path.stock.model.image_newline[None]])
    kind = "image" if path.family in ("internvl", "smolvlm") else "video"
    is_tensor = path.family in ("internvl", "llava_onevision")
    return {kind: BaseModelOutputWithPooling(pooler_output=main[None] if is_tensor else [main])}
