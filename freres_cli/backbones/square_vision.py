"""Vision towers that only take frames of one square size."""

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

    The tower is transformers' own model of both halves, without its decoder, so that the original code computes the
    features. ``decoder_name``: the decoder's attribute name there. ``side_px`` and ``side``: a frame's side in pixels
    and in tokens.
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
        """The side of the token grid."""

    def set_up(self) -> None:
        use_attention(self.tower, WHOLE_FRAMES, self.attention)
        config = self.tower.config
        self.width = int(config.text_config.hidden_size)
        self.side_px = _one_side(config.vision_config.image_size)
        self.side = self.tokens_per_side(config, self.side_px // _one_side(config.vision_config.patch_size))
        squeezed = (
            f"frames are squeezed to {self.side_px}x{self.side_px} px, which gives {self.side}x{self.side} tokens"
        )
        self.notes = (*self.notes, f"{squeezed}: {self.files.title} has no other size, and other grids have no effect")

    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """See ``base.VisionEncoder``. Always the same size, whatever is requested; ``notes`` says so."""
        if max_tokens is not None and max_tokens < 1:
            raise BackboneError(f"tokens per frame: expected at least 1, got {max_tokens}")
        return FrameSize(self.side_px, self.side_px, self.side, self.side)

    def check_frames(self, pixels: Tensor) -> tuple[int, int]:
        """See ``FrameEncoder.check_frames``. There is only one grid."""
        if tuple(pixels.shape[1:]) != (self.side_px, self.side_px, 3) or pixels.dtype != torch.uint8:
            raise refuse_frames(pixels, f"h and w {self.side_px}")
        return self.side, self.side

    def prepare(self, pixels: Tensor) -> Tensor:
        """Frames as input for the tower: (n, h, w, 3) uint8 -> (n, 3, h, w) float32."""
        return self.pixel_rule.normalize(pixels.to(self.device).permute(0, 3, 1, 2).contiguous())


def _one_side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)
