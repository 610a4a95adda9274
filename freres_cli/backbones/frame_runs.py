"""Prompts in which the tokens of each frame form a separate run, with the family's text, such as a time, around it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
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
        *pieces, intro, outro = self.text_pieces([*texts.before, *texts.after, texts.intro, texts.outro], place)
        order, counts = self.order_tokens(video)
        span = video.grid[1] * video.grid[2] if self.counts_raster else max(video.grid[1:])
        # Of each frame the text before it, its tokens, and the text after it. For thousands of frames, one at a time takes a
        # tenth of a second.
        before, after = (torch.tensor([len(own) for own in side]) for side in (texts.before, texts.after))
        ends = (before + span + after).cumsum(0) + position + len(intro)
        starts = ends - (before + span + after)
        is_kept = counts > 0
        lengths = torch.stack([before, counts, after], dim=1)[is_kept].flatten()
        firsts = torch.stack([starts, starts + before, ends - after], dim=1)[is_kept].flatten().float()
        run = torch.arange(len(lengths)).repeat_interleave(lengths)
        steps = torch.arange(len(run)) - (lengths.cumsum(0) - lengths)[run]
        is_visual = run % 3 == 1
        axes = (firsts[run] + torch.where(is_visual, 0, steps)).repeat(self.num_axes, 1)
        axes[:, is_visual] += self.axes_in_frame(video.positions[order], video.grid[2])
        parts = zip(
            pieces[:num_frames], order.split(counts.tolist()), pieces[num_frames:], is_kept.tolist(), strict=True
        )
        rows = [piece for left, own, right, kept in parts if kept for piece in (left, Piece(video.latents, own), right)]
        end = float(ends[-1])
        index += len(intro)
        frames = PromptRows(tuple(rows), self._positions(axes, index).to(place), end, is_visual.to(place))
        first = self.rows_of_text(intro, index - len(intro), position)
        last = self.rows_of_text(outro, index + len(frames), end)
        return join_rows([first, frames, last], end + len(outro))

    def order_tokens(self, video: VideoTokens) -> tuple[Tensor, Tensor]:
        """The tokens in the order of the prompt, (n,), and how many are in the run of each of the T sampled frames, (T,)."""
        frames = nearest_frames(video.positions[:, 0], video.grid[0])
        return torch.argsort(frames, stable=True), frames.bincount(minlength=video.grid[0])

    def tokens_of_frames(self, video: VideoTokens) -> tuple[Tensor, ...]:
        """The indices of the tokens in the run of each of the T sampled frames."""
        order, counts = self.order_tokens(video)
        return order.split(counts.tolist())

    def axes_in_frame(self, positions: Tensor, grid_w: int) -> Tensor:
        """(num_axes, n) positions relative to the frame's first token: (0, row, column), or the raster index."""
        _, row, column = positions.to(torch.float32).unbind(1)
        if self.counts_raster:
            return (row * grid_w + column).expand(self.num_axes, -1)
        return torch.stack([torch.zeros_like(row), row, column])

    def ids_of(self, text: str) -> Ids:
        """Token ids of some text, without the tokens that a tokenizer adds around a whole prompt."""
        return self.ids_of_each([text])[0]

    def ids_of_each(self, texts: Iterable[str], after: str = "") -> list[list[int]]:
        """``ids_of`` several texts. One call for all takes a tenth of the time of one for each.

        ``after``: the end of what comes before each of them in the prompt. Tokenizers such as Llama's put a space before what
        begins a text, or follows a control token, and before nothing else.
        """
        before, *ids = self.tokenizer([after, *(after + text for text in texts)], add_special_tokens=False)["input_ids"]
        return [own[len(before) :] for own in ids]
