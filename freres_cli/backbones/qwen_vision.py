"""The vision towers of the Qwen families: frames of any aspect ratio, cut into patches that are merged in blocks."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from freres_cli.backbones.attention import PACKED_FRAMES, use_attention
from freres_cli.backbones.vision import FrameEncoder, PixelRule, refuse_frames
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize

# The values of the released models, used if preprocessor_config.json does not give them.
CLIP_PIXELS = PixelRule(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 1280,
)


def fit_grid(width_px: int, height_px: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (rows, columns) of a grid of square cells that keeps the aspect ratio and stays within the pixel limits.

    ``width_px`` and ``height_px`` are the size of the frame, ``factor`` is the side of a cell in pixels, and
    ``min_pixels`` and ``max_pixels`` limit the area. This is ``smart_resize`` of transformers, except that the upper limit
    always holds: for very long frames, which have at least one row of cells, and where it is close to the lower one, which
    may then be missed.
    """
    rows, columns = (max(1, round(side / factor)) for side in (height_px, width_px))
    area, cells = height_px * width_px, max_pixels // factor**2
    if rows * columns > cells:
        shrink = math.sqrt(area / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height_px, width_px))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / area)
        sides = [side * grow / factor for side in (height_px, width_px)]
        # The largest of these that the upper limit allows: the first, unless the limits are close to each other.
        up_or_down = [(math.ceil(side), max(1, math.floor(side))) for side in sides]
        near = [*product(*up_or_down), (rows, columns)]
        rows, columns = max((grid for grid in near if math.prod(grid) <= cells), key=math.prod, default=near[3])
    if rows * columns > cells:
        rows, columns = (1, min(columns, cells)) if rows < columns else (min(rows, cells), 1)
    return rows, columns


class QwenVisionEncoder(FrameEncoder):
    """A Qwen tower. Each sampled frame is a separate temporal step, repeated if a patch spans two steps.

    ``width_key``: the config field that holds D.
    """

    tower_class: ClassVar[Any]
    width_key: ClassVar[str] = "out_hidden_size"
    default_rule = CLIP_PIXELS

    @classmethod
    def build_tower(cls, config: Any, dtype: torch.dtype) -> nn.Module:
        tower: nn.Module = cls.tower_class._from_config(config.vision_config, dtype=dtype)
        return tower

    def set_up(self) -> None:
        use_attention(self.tower, PACKED_FRAMES, self.attention)
        config = self.tower.config
        self.width = int(getattr(config, self.width_key))
        self.patch_px = int(config.patch_size)
        self.merge = int(config.spatial_merge_size)
        self.num_deep_layers = len(getattr(config, "deepstack_visual_indexes", None) or ())

    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """See ``base.VisionEncoder``. Both sides are multiples of patch*merge px.

        Without ``grid``, the aspect ratio is kept, within the checkpoint's pixel limits and ``max_tokens`` tokens.
        Raises BackboneError for a grid or limit below one token.
        """
        factor = self.patch_px * self.merge
        if max_tokens is not None and max_tokens < 1:
            raise BackboneError(f"tokens per frame: expected at least 1, got {max_tokens}")
        if grid is None:
            most = self.pixel_rule.max_pixels
            most = most if max_tokens is None else min(most, max_tokens * factor**2)
            grid = fit_grid(width_px, height_px, factor, min(self.pixel_rule.min_pixels, most), most)
        if min(grid) < 1:
            raise BackboneError(f"token grid: expected at least 1x1, got {grid[0]}x{grid[1]}")
        return FrameSize(grid[0] * factor, grid[1] * factor, grid[0], grid[1])

    def check_frames(self, pixels: Tensor) -> tuple[int, int]:
        """See ``FrameEncoder.check_frames``."""
        _, height, width, channels = pixels.shape
        factor = self.patch_px * self.merge
        if height % factor or width % factor or channels != 3 or pixels.dtype != torch.uint8:
            raise refuse_frames(pixels, f"h and w multiples of {factor}")
        return height // factor, width // factor

    def patches(self, pixels: Tensor) -> Tensor:
        """Frames as input for the tower: (n, h, w, 3) uint8 -> (n*gh*gw, 3*2*p*p) float32, gh = h/p, gw = w/p.

        Patches come in blocks of merge x merge, and a frame fills both steps of the temporal patch. Bit-identical to
        ``Qwen2VLImageProcessorPil`` without resizing. Raises BackboneError unless h and w are multiples of patch*merge.
        """
        rows, columns = self.check_frames(pixels)
        n, p, m = len(pixels), self.patch_px, self.merge
        cells = pixels.to(self.device).view(n, rows, m, p, columns, m, p, 3)
        # (n, rows, columns, m, m, 3, p, p), rearranged while still uint8
        values = self.pixel_rule.normalize(cells.permute(0, 1, 4, 2, 5, 7, 3, 6).contiguous())
        steps = int(self.tower.config.temporal_patch_size)
        doubled = values.unsqueeze(6).expand(*values.shape[:6], steps, p, p)
        return doubled.reshape(n * rows * columns * m * m, 3 * steps * p * p)

    def features(self, pixels: Tensor) -> Tensor:
        """See ``FrameEncoder.features``. DeepStack rows follow the merged features, in order."""
        rows, columns = self.check_frames(pixels)
        shape = torch.tensor([[len(pixels), rows * self.merge, columns * self.merge]])
        grid = shape.to(self.device, non_blocking=True)
        out = self.tower(self.patches(pixels).to(self.dtype), grid_thw=grid, return_dict=True)
        deep = out.deepstack_features if self.num_deep_layers else []
        return torch.cat([out.pooler_output, *deep], dim=-1).view(len(pixels), rows * columns, -1)
