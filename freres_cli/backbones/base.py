"""What a model family must offer: a vision encoder for ``compress``, a language model for ``ask``.

The two halves are separate objects because each command loads only one of them. A new family is one file with both
classes and one line in ``registry.py``.

Convention for all of them: a stored visual token has ``C = D*(1 + n_deep)`` channels. The first D are what takes the
token's place in the prompt, the others are rows that the family adds after its first language layers (DeepStack).
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
    """A stretch of the prompt as the decoder takes it.

    ``embeds``: (L, C), text rows hold zeros in their DeepStack channels. ``positions``: (R, 1, L) float32; for M-RoPE
    families R = 4: plain index, t, h, w. ``next_position``: what the text after it counts from.
    """

    embeds: Tensor
    positions: Tensor
    next_position: float

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def then(self, other: PromptRows) -> PromptRows:
        """This stretch followed by ``other``."""
        return PromptRows(
            torch.cat([self.embeds, other.embeds]),
            torch.cat([self.positions, other.positions], dim=-1),
            other.next_position,
        )


@dataclass(frozen=True)
class PromptIds:
    """A chat prompt cut at the place of the video: token ids before it and after it."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class EncoderIdentity:
    """What decides the latents besides the frames: the model's fingerprint, the tower's precision and its attention
    kernel."""

    fingerprint: dict[str, str | None]
    dtype: torch.dtype
    attention: str


class VisionEncoder(Protocol):
    """The frozen vision tower and projector of one family.

    Contract test: ``tests/test_backbone_contract.py``, part "vision". A new family is a row there and passes its laws:
    patches equal the family's own image processor to the bit, latents equal its own features to the bit, and the
    latents of a frame depend neither on the other frames nor on how many are encoded at a time.
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
        """Pixels to resize a frame of this shape to, and its token grid.

        ``grid`` (rows, columns) is taken exactly, and the frame is squeezed into it. Without it the aspect ratio is
        kept and a frame has at most ``max_tokens`` tokens. A family whose frames have one size gives that size, and
        says so in ``notes``.
        """
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of frames, each on its own: (n, h, w, 3) uint8 RGB -> (n, H, W, C) in ``dtype`` on ``device``."""
        ...


class LanguageModel(Protocol):
    """The language half of one family: tokenizer, prompt format, positions and decoder. ``engine.py`` runs it.

    Contract test: ``tests/test_backbone_contract.py``, part "language". A new family is a row there and passes its laws:
    with every token kept, logits and greedy tokens equal its own pixel path, and a subset of tokens answers as the
    full sequence with the others masked.

    ``choices_as``: what options are scored by, the ``letters`` they are listed under, as released models are asked, or
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
    num_parameters: int
    stop_ids: frozenset[int]
    tokenizer: Any

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The family's chat prompt around one video and one question."""
        ...

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        """The text before the video and the visual tokens at their positions, as rows for the decoder.

        ``text_after``: ``max`` puts later text one after the largest position of the full grid, as the released models
        were trained; ``hf`` puts it where transformers does. They differ for Qwen2-VL and Qwen2.5-VL only.
        """
        ...

    def text_rows(self, ids: Sequence[int], index: int, position: float) -> PromptRows:
        """Text as rows for the decoder. ``index``: how many rows come before it. ``position``: where it counts from."""
        ...

    def new_cache(self) -> Any:
        """An empty KV cache."""
        ...

    def decode(self, rows: PromptRows, cache: Any) -> Tensor:
        """Run rows through the decoder on top of the cache, which grows. Returns last hidden states (L, D)."""
        ...

    def decode_batch(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Run text rows of several sequences at once, (B, L, C) at (R, B, L), on top of a cache of B sequences.

        ``mask``: (B, cached + L) bool, False where there is padding; None where there is none. Returns (B, L, D).
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) hidden states -> (n, vocabulary) float32 logits."""
        ...
