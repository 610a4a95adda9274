"""What a model family must provide: a vision encoder for ``compress`` and a language model for ``ask``.

The two halves are separate objects because each command loads only one of them. To add a family, write one file with
both classes and add one line to ``registry.py``.

All families store a visual token as ``C = D*(1 + n_deep)`` channels. The first D are the token's embedding in the
prompt; the others are the rows that the family adds to it after its first language layers (DeepStack).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from freres_cli.records import FrameSize, VideoTokens


@dataclass(frozen=True)
class PromptRows:
    """A part of the prompt as input rows for the decoder.

    ``embeds``: (L, C); the DeepStack channels of text rows are zero. ``positions``: (R, 1, L) float32, where R = 4 for
    M-RoPE families (plain index, t, h, w) and 1 for the others. ``next_position``: the position of the next text token.
    """

    embeds: Tensor
    positions: Tensor
    next_position: float

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def then(self, other: PromptRows) -> PromptRows:
        """These rows followed by those of ``other``."""
        return PromptRows(
            torch.cat([self.embeds, other.embeds]),
            torch.cat([self.positions, other.positions], dim=-1),
            other.next_position,
        )


@dataclass(frozen=True)
class PromptIds:
    """A chat prompt split where the video goes: the token ids before it and after it."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class EncoderIdentity:
    """What determines the latents of given frames: the model's fingerprint, and the tower's precision and attention
    kernel."""

    fingerprint: dict[str, str | None]
    dtype: torch.dtype
    attention: str


class VisionEncoder(Protocol):
    """The frozen vision tower and projector of one family.

    Contract test: ``tests/test_backbone_contract.py``, part "vision". A new family gets a row there and must pass it:
    patches are bit-identical to those of the family's own image processor, latents are bit-identical to its own
    features, and the latents of a frame depend neither on the other frames nor on the batch size.
    """

    family: str
    width: int
    num_deep_layers: int
    dtype: torch.dtype
    device: torch.device
    attention: str
    fingerprint: dict[str, str | None]
    notes: tuple[str, ...]

    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """The size in pixels to resize a frame to, and its token grid.

        ``width_px`` and ``height_px`` are the size of the upright frame. A ``grid`` (rows, columns) is used exactly, and
        the frame is squeezed into it. Without one, the aspect ratio is kept and a frame gets at most ``max_tokens``
        tokens. A family with a single frame size returns that size, and says so in ``notes``.
        """
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of frames, each encoded by itself: (n, h, w, 3) uint8 RGB -> (n, H, W, C), ``dtype`` on ``device``."""
        ...


class LanguageModel(Protocol):
    """The language half of one family: tokenizer, prompt format, positions and decoder. ``engine.py`` runs it.

    Contract test: ``tests/test_backbone_contract.py``, part "language". A new family gets a row there and must pass it:
    with every token kept, logits and greedy tokens equal those of the family's own pixel path, and a subset of tokens
    gives the answer of the full sequence with the other tokens masked.

    ``choices_as``: how options are scored, by the ``letters`` they are listed under, as released models expect, or by
    their own ``words``, for models trained to answer in words.
    """

    family: str
    width: int
    num_deep_layers: int
    dtype: torch.dtype
    device: torch.device
    attention: str
    fingerprint: dict[str, str | None]
    notes: tuple[str, ...]
    max_context_tokens: int
    choices_as: str
    kv_bytes_per_token: int
    activation_bytes_per_token: int
    num_parameters: int
    stop_ids: frozenset[int]
    tokenizer: Any

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The family's chat prompt around one video and one question."""
        ...

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        """The text before the video and the visual tokens at their positions, as rows for the decoder.

        ``text_after`` decides where the text after the video starts: ``max`` is one past the largest position of the
        full grid, as the released models were trained; ``hf`` is where transformers puts it. They differ only for
        Qwen2-VL and Qwen2.5-VL.
        """
        ...

    def text_per_frame(self, video: VideoTokens) -> Tensor:
        """How many text tokens the family writes around each of the T sampled frames if it holds tokens, (T,) int64."""
        ...

    def text_rows(self, ids: Sequence[int], index: int, position: float) -> PromptRows:
        """Text as rows for the decoder. ``index``: number of rows before it. ``position``: position of its first token."""
        ...

    def new_cache(self) -> Any:
        """An empty KV cache."""
        ...

    def decode(self, rows: PromptRows, cache: Any) -> Tensor:
        """Run rows through the decoder on top of the cache, extending it. Returns the last hidden states (L, D)."""
        ...

    def decode_batch(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Run the text rows of B sequences at once, on top of ``cache``, which holds as many sequences and grows.

        ``embeds``: (B, L, C). ``positions``: (R, B, L). ``mask``: (B, cached + L) bool, False for padding, or None if
        there is no padding. Returns the last hidden states (B, L, D).
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) hidden states -> (n, vocabulary) float32 logits."""
        ...
