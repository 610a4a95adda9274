"""The vision half of every family: loading it, and encoding frames with results that do not depend on the batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.initialization import no_init_weights

from freres_cli.backbones.base import EncoderIdentity
from freres_cli.backbones.checkpoint import Checkpoint, digest_json, fingerprint, load_submodule
from freres_cli.backbones.fused import start_compiling_kernels
from freres_cli.backbones.fused_layers import use_kernels
from freres_cli.backbones.halves import FamilyFiles, MatricesOnMeta, check_decoder, loading, read_config
from freres_cli.devices import Device, choose_dtype, fit_attention, memory_errors_as
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize

# On the CPU, matrix products of few rows use other kernels, which round differently (3e-7 to 6e-6 measured below 64).
_LEAST_TOKENS_PER_PASS = 64


@dataclass(frozen=True)
class PixelRule:
    """How uint8 pixels are normalized, and how many pixels a frame may have, as the checkpoint's processor has it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    rescale_factor: float = 1 / 255

    @property
    def sha256(self) -> str:
        """Digest of the rule."""
        return digest_json(asdict(self))

    def read(self, checkpoint: Checkpoint) -> PixelRule:
        """The checkpoint's rule, with the values of this one for whatever its file does not give."""
        return self.fill(checkpoint.read_processor())

    def fill(self, stored: dict[str, Any]) -> PixelRule:
        """This rule with the values that ``stored``, an image processor's settings, has of its own."""
        size = stored.get("size") or {}
        return PixelRule(
            tuple(stored.get("image_mean") or self.mean),
            tuple(stored.get("image_std") or self.std),
            stored.get("min_pixels") or size.get("shortest_edge") or self.min_pixels,
            stored.get("max_pixels") or size.get("longest_edge") or self.max_pixels,
            stored.get("rescale_factor") or self.rescale_factor,
        )

    def normalize(self, channels_first: Tensor) -> Tensor:
        """uint8 (..., 3, h, w) -> float32, like the Pil processors: scaled in float64, normalized in float32."""
        # A GPU's queue is not waited for, as it is where a tensor is made on it from a list.
        mean, std = (
            torch.tensor(values).view(3, 1, 1).to(channels_first.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        return channels_first.to(torch.float64).mul_(self.rescale_factor).to(torch.float32).sub_(mean).div_(std)


class FrameEncoder(ABC):
    """The vision tower and projector of one family. See ``base.VisionEncoder``.

    A subclass defines how its tower is built, which sizes it takes, and how frames become features.

    ``tower`` is the vision half with its weights and ``pixel_rule`` the normalization of its pixels. ``fingerprint``:
    what identifies the checkpoint. ``notes``: what the user should know. ``attention``: the kernel, one of sdpa, flash
    and eager.
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
        self.pixels_sha256 = pixel_rule.sha256
        self.fingerprint = fingerprint
        kernels_note = use_kernels(self.tower, self.device, self.dtype)
        self.notes = notes if kernels_note is None else (*notes, kernels_note)
        self.set_up()

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> Self:
        """Read the vision half of a checkpoint, without reading other weights. Refuses a model whose other half is."""
        config = read_config(checkpoint, cls.files)
        check_decoder(checkpoint, config.text_config)
        chosen, attention, notes = cls._choose_precision(checkpoint, device, dtype)
        start_compiling_kernels(torch.device(device.name), chosen)
        with loading(checkpoint, "vision tower"):
            with no_init_weights():
                tower = cls.build_tower(config, chosen)
            load_submodule(checkpoint, tower, cls.files.vision, chosen, torch.device(device.name))
        digests = fingerprint(checkpoint, cls.files.projector)
        if not {"image_mean", "image_std"} <= checkpoint.read_processor().keys():
            notes += (
                "the model's files have no mean and deviation of pixels: those of its family's first release are used",
            )
        return cls(tower, cls.default_rule.read(checkpoint), digests, notes, attention)

    @classmethod
    def load_without_weights(cls, checkpoint: Checkpoint) -> Self:
        """The vision half on torch's meta device, which holds no values: it knows sizes, and cannot encode.

        Only the config and the preprocessor's config are read.
        """
        config = read_config(checkpoint, cls.files)
        with MatricesOnMeta(), no_init_weights():
            tower = cls.build_tower(config, torch.float32)
        return cls(tower.to("meta"), cls.default_rule.read(checkpoint), {})

    @classmethod
    def identify(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> EncoderIdentity:
        """What identifies the encoder that ``load`` would return, without reading the tower."""
        chosen, attention, _ = cls._choose_precision(checkpoint, device, dtype)
        rule = cls.default_rule.read(checkpoint)
        return EncoderIdentity(fingerprint(checkpoint, cls.files.projector), chosen, attention, rule.sha256)

    @classmethod
    def _choose_precision(
        cls, checkpoint: Checkpoint, device: Device, dtype: str | None
    ) -> tuple[torch.dtype, str, tuple[str, ...]]:
        """Precision and attention kernel of the tower, and notes that say why they were chosen."""
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
        """The vision half without its weights, and without any part of the language half."""

    @abstractmethod
    def set_up(self) -> None:
        """Set ``width`` and everything else that follows from the tower's config."""

    @abstractmethod
    def check_frames(self, pixels: Tensor) -> tuple[int, int]:
        """The token grid (H, W) of frames of this shape. Raises BackboneError if the tower does not take it."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Latents (n, H*W, C) of frames (n, h, w, 3) uint8 that passed ``check_frames``."""

    @abstractmethod
    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """The size in pixels to resize a frame to, and its token grid. See ``base.VisionEncoder``."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of frames, each encoded by itself: (n, h, w, 3) uint8 -> (n, H, W, C), with the tower's dtype and device.

        A batch with very few tokens is filled up with black frames, so that latents do not depend on the batch size.
        Raises BackboneError for frames that the tower does not take, ResourceError if memory runs out.
        """
        rows, columns = self.check_frames(pixels)
        n, height, width, _ = pixels.shape
        what, hint = f"encoding {n} frames of {width}x{height} px", "encode fewer or smaller frames at a time"
        with memory_errors_as(what, hint):
            pixels = pixels.to(self.device, non_blocking=True)
            if num_black := max(0, math.ceil(_LEAST_TOKENS_PER_PASS / (rows * columns)) - n):
                pixels = torch.cat([pixels, pixels.new_zeros(num_black, height, width, 3)])
            latents = self.features(pixels)
        return latents.view(n + num_black, rows, columns, -1)[:n]


def build_without_decoder(model_class: Any, decoder_name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """transformers' own model of both halves, without weights and without its decoder.

    ``model_class`` is the model, ``decoder_name`` the attribute that holds its decoder, ``config`` its config and
    ``dtype`` the precision of its parameters.
    """
    text = config.text_config
    # A decoder with no layers and a vocabulary of one, which is deleted below.
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
