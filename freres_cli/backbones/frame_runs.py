"""Prompts in which the tokens of each frame form a separate run, with the family's text, such as a time, around it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from freres_cli.backbones.base import Piece, PromptRows, join_rows
from freres_cli.backbones.language import DecoderLanguageModel
from freres_cli.records import VideoTokens, nearest_frames

Ids = Sequence[int]


@dataclass(frozen=True)
class FrameTexts:
    """The family's own text inside a video, as token ids: ``before`` and ``after`` each of the T sampled frames, and
    ``intro`` and ``outro`` around all of them."""

    before: Sequence[Ids]
    after: Sequence[Ids]
    intro: Ids = ()
    outro: Ids = ()


class FrameRunLanguageModel(DecoderLanguageModel):
    """A family that writes text around every frame.

    A token belongs to the run of its nearest sampled frame, at its place in that frame. Everything keeps its position
    from the prompt of all T frames. A frame that has no tokens is left out together with its text: to the model that is
    the full prompt with that text masked as well as the tokens, and the prompt never announces a frame without tokens.
    ``pipeline.prompt_text`` chooses the frames of tokens that may move, so that there are not too many runs.
    ``counts_raster``: positions within a frame are raster indices, the same on every axis.
    """

    counts_raster: ClassVar[bool] = False

    @abstractmethod
    def frame_texts(self, video: VideoTokens) -> FrameTexts:
        """The text around the sampled frames in the full prompt."""

    def text_per_frame(self, video: VideoTokens) -> Tensor:
        """See ``base.LanguageModel``."""
        texts = self.frame_texts(video)
        return torch.tensor([len(before) + len(after) for before, after in zip(texts.before, texts.after, strict=True)])

    def text_in_video(self, video: VideoTokens) -> int:
        """See ``base.LanguageModel``."""
        texts = self.frame_texts(video)
        return len(texts.intro) + len(texts.outro)

    def video_rows(self, video: VideoTokens, index: int, position: float, text_after: str) -> PromptRows:
        """See ``DecoderLanguageModel.video_rows``. Runs are in order of time.

        ``text_after`` has no effect, because in these families text follows the largest position under either rule.
        """
        texts = self.frame_texts(video)
        num_frames, place = video.grid[0], video.latents.device
        around = [*texts.before, *texts.after, texts.intro, texts.outro]
        *pieces, intro, outro = self.text_pieces(around, place)
        parts: list[PromptRows] = []

        def add(part: PromptRows) -> None:
            nonlocal index
            parts.append(part)
            index += len(part)

        span = video.grid[1] * video.grid[2] if self.counts_raster else max(video.grid[1:])
        add(self.rows_of_text(intro, index, position))
        position += len(intro)
        for frame, mine in enumerate(self.tokens_of_frames(video)):
            before, after = pieces[frame], pieces[num_frames + frame]
            first = position + len(before)
            if len(mine):
                add(self.rows_of_text(before, index, position))
                axes = self.axes_in_frame(video.positions[mine], video.grid[2]) + first
                add(self.visual_rows(Piece(video.latents, mine), index, axes, first + span))
                add(self.rows_of_text(after, index, first + span))
            position = first + span + len(after)
        add(self.rows_of_text(outro, index, position))
        return join_rows(parts, position + len(outro))

    def tokens_of_frames(self, video: VideoTokens) -> tuple[Tensor, ...]:
        """The indices of the tokens in the run of each of the T sampled frames."""
        frames = nearest_frames(video.positions[:, 0], video.grid[0])
        order = torch.argsort(frames, stable=True)
        return order.split(frames.bincount(minlength=video.grid[0]).tolist())

    def axes_in_frame(self, positions: Tensor, grid_w: int) -> Tensor:
        """(num_axes, n) positions relative to the frame's first token: (0, row, column), or the raster index."""
        _, row, column = positions.to(torch.float32).unbind(1)
        if self.counts_raster:
            return (row * grid_w + column).expand(self.num_axes, -1)
        return torch.stack([torch.zeros_like(row), row, column])

    def ids_of(self, text: str) -> Ids:
        """Token ids of some text, without the tokens that a tokenizer adds around a whole prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
