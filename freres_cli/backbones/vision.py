"""The vision half of every family: loading it, and encoding frames so that the batch never shows in the result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.initialization import no_init_weights

from freres_cli.backbones.base import EncoderIdentity
from freres_cli.backbones.checkpoint import Checkpoint, fingerprint, load_submodule
from freres_cli.backbones.halves import FamilyFiles, loading, read_config
from freres_cli.devices import Device, choose_dtype, fit_attention, memory_errors_as
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize

# Matrix products of few rows take other kernels on the CPU, which round differently (3e-7 to 6e-6 measured below 64).
_LEAST_TOKENS_PER_PASS = 64


@dataclass(frozen=True)
class PixelRule:
    """How uint8 pixels become numbers, and how many pixels a frame may have, from ``preprocessor_config.json``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    rescale_factor: float = 1 / 255

    def read(self, checkpoint: Checkpoint) -> PixelRule:
        """The checkpoint's rule. Where its file is silent, these values hold."""
        stored = checkpoint.read_json("preprocessor_config.json")
        size = stored.get("size") or {}
        return PixelRule(
            tuple(stored.get("image_mean") or self.mean),
            tuple(stored.get("image_std") or self.std),
            stored.get("min_pixels") or size.get("shortest_edge") or self.min_pixels,
            stored.get("max_pixels") or size.get("longest_edge") or self.max_pixels,
            stored.get("rescale_factor") or self.rescale_factor,
        )

    def normalize(self, channels_first: Tensor) -> Tensor:
        """uint8 (..., 3, h, w) -> float32, as the Pil processors: scaled in float64, normalised in float32."""
        mean, std = (torch.tensor(v, device=channels_first.device).view(3, 1, 1) for v in (self.mean, self.std))
        return channels_first.to(torch.float64).mul_(self.rescale_factor).to(torch.float32).sub_(mean).div_(std)


class FrameEncoder(ABC):
    """The vision tower and projector of one family. See ``base.VisionEncoder``.

    A family says how its tower is built, what sizes it takes, and how frames become features.
    """

    files: ClassVar[FamilyFiles]
    default_rule: ClassVar[PixelRule]
    num_deep_layers = 0
    width: int

    def __init__(
        self,
        tower: nn.Module,
        pixel_rule: PixelRule,
        fingerprint: dict[str, str | None],
        notes: tuple[str, ...] = (),
        attention: str = "sdpa",
    ) -> None:
        self.attention = attention
        self.tower: Any = tower.eval()
        self.pixel_rule = pixel_rule
        self.fingerprint = fingerprint
        self.notes = notes
        self.set_up()

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> Self:
        """Read the vision half of a checkpoint, and nothing else of its weights."""
        config = read_config(checkpoint, cls.files)
        chosen, attention, notes = cls._choose_precision(checkpoint, device, dtype)
        with loading(checkpoint, "vision tower"):
            with no_init_weights():
                tower = cls.build_tower(config, chosen)
            load_submodule(checkpoint, tower, cls.files.vision, chosen, torch.device(device.name))
        digests = fingerprint(checkpoint, cls.files.projector)
        return cls(tower, cls.default_rule.read(checkpoint), digests, notes, attention)

    @classmethod
    def identify(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> EncoderIdentity:
        """What ``load`` would give, without reading the tower."""
        chosen, attention, _ = cls._choose_precision(checkpoint, device, dtype)
        return EncoderIdentity(fingerprint(checkpoint, cls.files.projector), chosen, attention)

    @classmethod
    def _choose_precision(
        cls, checkpoint: Checkpoint, device: Device, dtype: str | None
    ) -> tuple[torch.dtype, str, tuple[str, ...]]:
        """Precision and attention kernel of the tower, and notes that say why."""
        stored = checkpoint.stored_dtype(cls.files.first_vision_prefixes)
        chosen, dtype_note = choose_dtype(dtype, device, stored, checkpoint.weight_bytes)
        attention, attention_note = fit_attention(device, chosen)
        return chosen, attention, tuple(filter(None, (device.note, dtype_note, attention_note)))

    @property
    def family(self) -> str:
        return self.files.family

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    @classmethod
    @abstractmethod
    def build_tower(cls, config: Any, dtype: torch.dtype) -> nn.Module:
        """The unfilled vision half, without anything of the language half."""

    @abstractmethod
    def set_up(self) -> None:
        """Set ``width`` and what else follows from the tower's config."""

    @abstractmethod
    def check_frames(self, pixels: Tensor) -> tuple[int, int]:
        """The token grid (H, W) of frames of this shape. Raises BackboneError for a shape the tower cannot take."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Latents (n, H*W, C) of legal frames (n, h, w, 3) uint8."""

    @abstractmethod
    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """Pixels to resize a frame to, and its token grid. See ``base.VisionEncoder``."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of frames, each on its own: (n, h, w, 3) uint8 -> (n, H, W, C), in the tower's dtype and place.

        A pass of very few tokens is filled up with black frames, so that latents do not depend on how many frames are
        encoded at a time. Raises BackboneError for frames the tower cannot take, ResourceError if memory runs out.
        """
        rows, columns = self.check_frames(pixels)
        n, height, width, _ = pixels.shape
        what, hint = f"encoding {n} frames of {width}x{height} px", "encode fewer frames at a time, or smaller ones"
        with memory_errors_as(what, hint):
            pixels = pixels.to(self.device)
            if num_black := max(0, math.ceil(_LEAST_TOKENS_PER_PASS / (rows * columns)) - n):
                pixels = torch.cat([pixels, pixels.new_zeros(num_black, height, width, 3)])
            latents = self.features(pixels)
        return latents.view(n + num_black, rows, columns, -1)[:n]


def build_without_decoder(model_class: Any, decoder_name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """transformers' own model of both halves, unfilled, without the decoder that it calls ``decoder_name``."""
    text = config.text_config
    # A decoder of no layers and one word, dropped at once.
    config.text_config = LlamaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=1,
        num_hidden_layers=0,
        vocab_size=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    delattr(model, decoder_name)
    return model


def refuse_frames(pixels: Tensor, expected: str) -> BackboneError:
    """The error for frames of the wrong shape or dtype."""
    return BackboneError(
        f"frames: expected (n, h, w, 3) uint8 with {expected}, got {tuple(pixels.shape)} {pixels.dtype}"
    )
