"""A checkpoint without weight files, whose weights are drawn at random on the device: what it costs, not what it knows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from freres_cli.backbones.checkpoint import Checkpoint, config_dtype, resolve_checkpoint
from freres_cli.backbones.halves import read_config
from freres_cli.backbones.registry import FAMILIES, import_half

# As most released models were initialized; logits stay finite in every dtype.
DRAWN_STD = 0.02
DRAWN_NOTE = "weights drawn at random: times and memory are those of the model, answers mean nothing"


@dataclass(frozen=True)
class DrawnCheckpoint(Checkpoint):
    """A folder with a config and a tokenizer. ``device``: where the weights are drawn when they are read, a torch device.

    The same tensor of the same config has the same values whenever it is read on the same kind of device, so both halves
    are of one model. It goes through the same loading as stored weights, except that no file is read.
    """

    device: str = "cpu"

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of both halves, by its name in a checkpoint."""
        language, vision = (import_half(self.model_type, half) for half in ("language", "vision"))
        with torch.device("meta"), no_init_weights():
            decoder, prefixes = language.build_half(read_config(self, language.files), torch.float32)
            tower = vision.build_tower(read_config(self, vision.files), torch.float32)
        return _stored_names(tower, vision.files.vision) | _stored_names(decoder, prefixes)

    @cached_property
    def files_by_key(self) -> dict[str, Path]:
        """See ``Checkpoint``. No file is ever opened: the config stands for all of them."""
        return dict.fromkeys(self.shapes, self.directory / "config.json")

    @property
    def weight_bytes(self) -> int:
        """See ``Checkpoint``: as the config says they are stored."""
        return sum(shape.numel() for shape in self.shapes.values()) * config_dtype(self.config).itemsize

    def stored_dtype(self, candidates: tuple[str, ...]) -> torch.dtype:
        """See ``Checkpoint``: what the config names."""
        return config_dtype(self.config)

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """See ``Checkpoint``. Matrices have a standard deviation of 0.02, biases are 0 and other vectors 1."""
        dtype = config_dtype(self.config)
        for key in keys:
            drawn = torch.empty(self.shapes[key], dtype=dtype, device=self.device)
            if drawn.ndim > 1:
                drawn.normal_(
                    std=DRAWN_STD, generator=torch.Generator(self.device).manual_seed(zlib.crc32(key.encode()))
                )
            else:
                drawn.fill_(0.0 if key.endswith("bias") else 1.0)
            yield key, drawn


def _stored_names(module: nn.Module, prefixes: dict[str, tuple[str, ...]]) -> dict[str, torch.Size]:
    """The tensors of a module under the first of the prefixes that a checkpoint may have for each of its own."""
    found = {}
    for name, tensor in module.state_dict().items():
        own = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
        found[prefixes[own][0] + name.removeprefix(own)] = tensor.shape
    return found


def draw_checkpoint(folder: str, device: str) -> DrawnCheckpoint:
    """Return the model of a folder's config with random weights, which are drawn on ``device`` when they are loaded.

    Raises BackboneError if the folder has no config of a supported family.
    """
    found = resolve_checkpoint(folder, tuple(FAMILIES))
    name = f"{found.model_id} (random weights)"
    return DrawnCheckpoint(name, None, found.directory, found.config, device=device)
