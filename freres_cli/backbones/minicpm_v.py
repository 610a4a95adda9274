"""MiniCPM-V 4.6 and 4.7: ``<image>tokens</image>`` for each frame, and the recurrent decoder of Qwen3.5.

A frame is encoded whole. These models cut large pictures into slices and number them, but their authors turn both off
for videos. 4.6 counts positions on one axis; 4.7 lays each frame out on a canvas with its two markers at the corners.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MiniCPMV4_6Config, MiniCPMV4_7Config
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6Model
from transformers.models.minicpmv4_7.modeling_minicpmv4_7 import MiniCPMV4_7Model

from freres_cli.backbones.attention import PACKED_FRAMES, use_attention
from freres_cli.backbones.base import Piece, PromptIds, PromptRows, join_rows
from freres_cli.backbones.frame_runs import FrameRunLanguageModel, FrameTexts
from freres_cli.backbones.halves import FamilyFiles
from freres_cli.backbones.qwen_vision import fit_grid
from freres_cli.backbones.vision import FrameEncoder, PixelRule, build_without_decoder, refuse_frames
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize, VideoTokens


def _files(family: str, title: str, config_class: Any) -> FamilyFiles:
    merger = ("model.merger.", "merger.")
    return FamilyFiles(
        family,
        title,
        config_class,
        vision={"vision_tower.": ("model.vision_tower.", "vision_tower."), "merger.": merger},
        projector=merger,
        decoder=("model.language_model.", "language_model."),
    )


FILES_4_6 = _files("minicpmv4_6", "MiniCPM-V 4.6", MiniCPMV4_6Config)
FILES_4_7 = _files("minicpmv4_7", "MiniCPM-V 4.7", MiniCPMV4_7Config)


class ScalePixelRule(PixelRule):
    """A rule whose ``max_pixels`` is the area that every frame is scaled to."""

    def fill(self, stored: dict[str, Any]) -> PixelRule:
        """See ``PixelRule``; the area is the one that ``scale_resolution`` gives."""
        side = stored.get("scale_resolution")
        rule = super().fill(stored)
        return replace(rule, max_pixels=side**2) if side else rule


class MiniCPMV46VisionEncoder(FrameEncoder):
    """The vision tower and merger of a MiniCPM-V 4.6 checkpoint. ``downsample_mode`` in its config sets the tokens."""

    files = FILES_4_6
    model_class: ClassVar[Any] = MiniCPMV4_6Model
    default_rule = ScalePixelRule((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_pixels=0, max_pixels=448**2)

    @classmethod
    def build_tower(cls, config: Any, dtype: torch.dtype) -> nn.Module:
        return build_without_decoder(cls.model_class, "language_model", config, dtype)

    def set_up(self) -> None:
        config = self.tower.config
        use_attention(self.tower.vision_tower, PACKED_FRAMES, self.attention)
        self.width = int(config.text_config.hidden_size)
        self.patch_px = int(config.vision_config.patch_size)
        window = 1 if config.downsample_mode == "4x" else int(config.vision_config.window_kernel_size[0])
        self.merge = window * int(config.merge_kernel_size[0]) ** int(config.merger_times)

    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """See ``base.VisionEncoder``. Both sides are multiples of patch*merge px.

        Without ``grid``, the aspect ratio is kept and every frame is scaled, up or down, to the area that the checkpoint
        specifies, as its image processor does. Raises BackboneError for a grid or limit below one token.
        """
        factor = self.patch_px * self.merge
        if max_tokens is not None and max_tokens < 1:
            raise BackboneError(f"tokens per frame: expected at least 1, got {max_tokens}")
        if grid is None:
            height = int(math.sqrt(self.pixel_rule.max_pixels * height_px / width_px))
            sides = (height, int(height * width_px / height_px))
            grid = (max(1, round(sides[0] / factor)), max(1, round(sides[1] / factor)))
            if max_tokens is not None and grid[0] * grid[1] > max_tokens:
                grid = fit_grid(width_px, height_px, factor, 0, max_tokens * factor**2)
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
        """Frames as input for the tower: (n, h, w, 3) uint8 -> (1, 3, p, n*gh*gw*p) float32, patches side by side."""
        n, height, width, _ = pixels.shape
        p = self.patch_px
        values = self.pixel_rule.normalize(pixels.to(self.device).permute(0, 3, 1, 2).contiguous())
        cells = values.view(n, 3, height // p, p, width // p, p)
        return cells.permute(1, 3, 0, 2, 4, 5).reshape(1, 3, p, -1)

    def features(self, pixels: Tensor) -> Tensor:
        """See ``FrameEncoder.features``."""
        rows, columns = self.check_frames(pixels)
        # On the CPU, because the tower reads the sizes in Python.
        sizes = torch.tensor([[rows * self.merge, columns * self.merge]]).repeat(len(pixels), 1)
        out = self.tower.get_image_features(self.patches(pixels), sizes, return_dict=True)
        return torch.stack(list(out.pooler_output))


class MiniCPMV47VisionEncoder(MiniCPMV46VisionEncoder):
    """The vision tower and merger of a MiniCPM-V 4.7 checkpoint."""

    files = FILES_4_7
    model_class = MiniCPMV4_7Model


class MiniCPMV46LanguageModel(FrameRunLanguageModel):
    """The decoder, head and tokenizer of a MiniCPM-V 4.6 checkpoint. Its decoder takes the one axis three times."""

    files: ClassVar[FamilyFiles] = FILES_4_6
    counts_raster = True

    def plain_prompt(self, question: str, system: str | None, video: str) -> str:
        """ChatML, without a default system text."""
        opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{opening}<|im_start|>user\n{video}\n{question}<|im_end|>\n<|im_start|>assistant\n"

    def markers(self) -> tuple[list[int], list[int]]:
        """Token ids before and after every frame."""
        start = getattr(self.tokenizer, "image_start_token", None) or "<image>"
        end = getattr(self.tokenizer, "image_end_token", None) or "</image>"
        return list(self.ids_of(start)), list(self.ids_of(end))

    def frame_texts(self, video: VideoTokens) -> FrameTexts:
        """The same two markers around every frame."""
        before, after = self.markers()
        return FrameTexts([before] * video.grid[0], [after] * video.grid[0])


class MiniCPMV47LanguageModel(MiniCPMV46LanguageModel):
    """The decoder, head and tokenizer of a MiniCPM-V 4.7 checkpoint.

    Line feeds right after a video share the position of its last frame. They come from the template, so here they are
    part of the video rather than of the question, and leading line feeds of a question are removed.
    """

    files = FILES_4_7
    counts_raster = False

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """See ``base.LanguageModel``. The line feeds right after the video are left out."""
        ids = super().prompt(question.lstrip("\n"), system)
        return PromptIds(ids.prefix, ids.suffix[len(self.line_feeds) :])

    @cached_property
    def line_feeds(self) -> tuple[int, ...]:
        """The tokens of the line feeds that the template puts right after the video."""
        suffix, newline = super().prompt("?").suffix, self.config.newline_id
        end = next((place for place, token in enumerate(suffix) if token != newline), len(suffix))
        return suffix[:end]

    def text_in_video(self, video: VideoTokens) -> int:
        """See ``base.LanguageModel``. The line feeds."""
        return len(self.line_feeds)

    def video_rows(self, video: VideoTokens, index: int, position: float, text_after: str) -> PromptRows:
        """See ``DecoderLanguageModel.video_rows``. ``text_after`` has no effect.

        Each frame has its own canvas of H by W positions from its base: tokens are at (base, base + h, base + w), with
        the marker before them just outside the first corner and the one after them just outside the last.
        """
        num_frames, height, width = video.grid
        frames = self.tokens_of_frames(video)
        before, after, feeds = self.text_pieces([*self.markers(), self.line_feeds], video.latents.device)
        parts: list[PromptRows] = []
        base = position
        for frame in range(num_frames):
            base = position + frame * (max(height, width) + 1)
            if not len(mine := frames[frame]):
                continue
            parts.append(self.pinned_rows(before, index, (base, max(base - 1, 0), max(base - 1, 0))))
            index += len(before)
            axes = self.axes_in_frame(video.positions[mine], width) + base
            parts.append(self.visual_rows(Piece(video.latents, mine), index, axes, base))
            index += len(mine)
            parts.append(self.pinned_rows(after, index, (base, base + height, base + width)))
            index += len(after)
        parts.append(self.pinned_rows(feeds, index, (base, base, base)))
        return join_rows(parts, base + max(height, width) + 1)

    def pinned_rows(self, piece: Piece, index: int, place: tuple[float, float, float]) -> PromptRows:
        """Text tokens that all have the same position, ``place``: (t, h, w)."""
        axes = torch.tensor(place, dtype=torch.float32, device=piece.table.device)[:, None].expand(-1, len(piece))
        return PromptRows((piece,), self._positions(axes, index), place[0])
