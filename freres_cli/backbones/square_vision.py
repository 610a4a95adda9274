"""Vision towers that take frames of one square size only."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from freres_cli.backbones.attention import WHOLE_FRAMES, use_attention
from freres_cli.backbones.vision import FrameEncoder, build_without_decoder, refuse_frames
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize


class SquareVisionEncoder(FrameEncoder):
    """A tower whose frames are squeezed into a square, as the video processors of these families do.

    The tower is transformers' own model of both halves without its decoder, so that its own code makes the features.
    ``decoder_name``: what the decoder is called there. ``side_px`` and ``side``: pixels and tokens of a frame's side.
    """

    model_class: ClassVar[Any]
    decoder_name: ClassVar[str] = "language_model"
    side_px: int
    side: int

    @classmethod
    def build_tower(cls, config: Any, dtype: torch.dtype) -> nn.Module:
        return build_without_decoder(cls.model_class, cls.decoder_name, config, dtype)

    @classmethod
    @abstractmethod
    def tokens_per_side(cls, config: Any, patches_per_side: int) -> int:
        """Side of the token grid."""

    def set_up(self) -> None:
        use_attention(self.tower, WHOLE_FRAMES, self.attention)
        config = self.tower.config
        self.width = int(config.text_config.hidden_size)
        self.side_px = _one_side(config.vision_config.image_size)
        self.side = self.tokens_per_side(config, self.side_px // _one_side(config.vision_config.patch_size))
        squeezed = f"frames are squeezed to {self.side_px}x{self.side_px} px and give {self.side}x{self.side} tokens"
        self.notes = (*self.notes, f"{squeezed}, the only size of {self.files.title}: other grids have no effect")

    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """The one size there is, whatever is asked for; ``notes`` says so."""
        if max_tokens is not None and max_tokens < 1:
            raise BackboneError(f"tokens per frame: expected at least 1, got {max_tokens}")
        return FrameSize(self.side_px, self.side_px, self.side, self.side)

    def check_frames(self, pixels: Tensor) -> tuple[int, int]:
        if tuple(pixels.shape[1:]) != (self.side_px, self.side_px, 3) or pixels.dtype != torch.uint8:
            raise refuse_frames(pixels, f"h and w {self.side_px}")
        return self.side, self.side

    def prepare(self, pixels: Tensor) -> Tensor:
        """Frames as the tower's input: (n, h, w, 3) uint8 -> (n, 3, h, w) float32."""
        return self.pixel_rule.normalize(pixels.to(self.device).permute(0, 3, 1, 2).contiguous())


def _one_side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)
