"""What a model family must provide: a vision encoder for ``compress`` and a language model for ``ask``.

The two halves are separate objects because each command loads only one of them. To add a family, write one file with
both classes and add one line to ``registry.py``.

All families store a visual token as ``C = D*(1 + n_deep)`` channels. The first D are the token's embedding in the
prompt; the others are the rows that the family adds to it after its first language layers (DeepStack).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from freres_cli.backbones.locks import ThreadLock
from freres_cli.devices import Storage
from freres_cli.records import FrameSize, VideoTokens

# Host memory that a GPU copies rows from at a time (ours): little to pin, and enough for the speed of the bus.
UPLOAD_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Rows of a prompt, (n, C), that are not copied before they are needed: those of ``table`` (m, C) at ``index`` (n,), or
    all of them. An index is in host memory, or where the table is."""

    table: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.table) if self.index is None else len(self.index)

    @property
    def rows(self) -> Tensor:
        """The rows themselves."""
        return self.table if self.index is None else self.table[self.index]

    def has_values(self) -> bool:
        """Whether any of these rows is not zero. The first one nearly always tells, and saves gathering all."""
        return any(bool(part.rows.any()) for part in (self.cut(0, 1), self))

    def cut(self, start: int, stop: int) -> Piece:
        """The rows from ``start`` to before ``stop``."""
        if self.index is None:
            return Piece(self.table[start:stop])
        return Piece(self.table, self.index[start:stop])

    def channels(self, part: slice) -> Piece:
        """A part of the channels of these rows."""
        return Piece(self.table[:, part], self.index)


@dataclass(frozen=True)
class PromptRows:
    """A part of the prompt as input rows for the decoder, on one device.

    ``pieces``: one after the other, L rows; the DeepStack channels of text rows are zero. ``positions``: (R, 1, L) float32,
    where R = 4 for M-RoPE families (plain index, t, h, w) and 1 for the others. ``next_position``: the position of the next
    text token. ``is_visual``: (L,) bool, which rows are tokens of the video; ``None`` if none is.
    """

    pieces: tuple[Piece, ...]
    positions: Tensor
    next_position: float
    is_visual: Tensor | None = None

    def __len__(self) -> int:
        return int(self.positions.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.positions.device

    @property
    def embeds(self) -> Tensor:
        """All rows, (L, C). They are copied, unless there is one piece with all rows of its table."""
        if len(self.pieces) == 1:
            return self.pieces[0].rows
        return _gather(self.pieces)

    def to(self, device: torch.device) -> PromptRows:
        """These rows on ``device``. From host memory to a GPU, without waiting for the copy."""
        if device == self.device:
            return self
        is_upload = self.device.type == "cpu" and device.type == "cuda"
        embeds = _upload(self.pieces, device) if is_upload else self.embeds.to(device)
        places = [self.positions, self.visual_mask]
        if is_upload:
            places = [tensor.contiguous().pin_memory() for tensor in places]
        positions, is_visual = (tensor.to(device, non_blocking=is_upload) for tensor in places)
        return PromptRows((Piece(embeds),), positions, self.next_position, is_visual)

    def channels(self, part: slice) -> PromptRows:
        """These rows with a part of their channels."""
        return replace(self, pieces=tuple(piece.channels(part) for piece in self.pieces))

    def then(self, other: PromptRows) -> PromptRows:
        """These rows followed by those of ``other``."""
        return join_rows([self, other], other.next_position)

    @property
    def visual_mask(self) -> Tensor:
        """``is_visual``, also where none is: (L,) bool."""
        if self.is_visual is None:
            return torch.zeros(len(self), dtype=torch.bool, device=self.device)
        return self.is_visual

    def pick(self, rows: Tensor | slice) -> PromptRows:
        """Some of these rows, at their positions. ``rows``: a slice without a step, indices, or a mask (L,)."""
        ends = rows.indices(len(self))[:2] if isinstance(rows, slice) else None
        pieces = (Piece(self.embeds[rows]),) if ends is None else _cut(self.pieces, *ends)
        is_visual = None if self.is_visual is None else self.is_visual[rows]
        return PromptRows(pieces, self.positions[..., rows], self.next_position, is_visual)

    def split(self, num_rows: int) -> Iterator[PromptRows]:
        """These rows, ``num_rows`` at a time."""
        for start in range(0, len(self), num_rows):
            yield self.pick(slice(start, start + num_rows))


def join_rows(parts: Sequence[PromptRows], next_position: float) -> PromptRows:
    """Parts of the prompt one after the other, where the first of them is. Rows that are there are not copied."""
    here = [part.to(parts[0].device) for part in parts]
    return PromptRows(
        tuple(piece for part in here for piece in part.pieces),
        torch.cat([part.positions for part in here], dim=-1),
        next_position,
        torch.cat([part.visual_mask for part in here]),
    )


def _cut(pieces: Sequence[Piece], start: int, stop: int) -> tuple[Piece, ...]:
    """The rows from ``start`` to before ``stop``, in at least one piece."""
    kept, first = [], 0
    for piece in pieces:
        last = first + len(piece)
        if first < stop and start < last:
            kept.append(piece.cut(max(0, start - first), min(len(piece), stop - first)))
        first = last
    return tuple(kept) or (pieces[0].cut(0, 0),)


def _gather(pieces: Sequence[Piece], *, is_pinned: bool = False) -> Tensor:
    """The rows of all pieces, (L, C), each copied once. ``is_pinned``: into memory that a GPU can read by itself."""
    table = pieces[0].table
    if _needs_gradients(pieces):
        return torch.cat([piece.rows for piece in pieces])
    lengths = [len(piece) for piece in pieces]
    shape = (sum(lengths), *table.shape[1:])
    rows = torch.empty(shape, dtype=table.dtype, device=table.device, pin_memory=is_pinned)
    for piece, part in zip(pieces, rows.split(lengths), strict=True):
        if piece.index is None:
            part.copy_(piece.table)
        else:
            torch.index_select(piece.table, 0, piece.index.to(table.device), out=part)
    return rows


def _upload(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """The rows of all pieces, (L, C), on a GPU, which copies a block while the host gathers the next."""
    if _needs_gradients(pieces):
        return _gather(pieces).to(device)
    table, count = pieces[0].table, sum(map(len, pieces))
    rows = torch.empty((count, *table.shape[1:]), dtype=table.dtype, device=device)
    step = max(1, UPLOAD_BYTES // max(1, table[:1].nbytes))
    for start in range(0, count, step):
        # PyTorch uses pinned memory again only after what copies it is done.
        block = _gather(_cut(pieces, start, min(count, start + step)), is_pinned=True)
        rows[start : start + step].copy_(block, non_blocking=True)
    return rows


def _needs_gradients(pieces: Sequence[Piece]) -> bool:
    return torch.is_grad_enabled() and any(piece.table.requires_grad for piece in pieces)


@dataclass(frozen=True)
class PromptIds:
    """A chat prompt split where the video goes: the token ids before it and after it."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class EncoderIdentity:
    """What determines the latents of given frames: the model's fingerprint, the tower's precision and attention kernel, and
    the digest of how pixels are normalized and how many a frame may have."""

    fingerprint: dict[str, str | None]
    dtype: torch.dtype
    attention: str
    pixels_sha256: str


class VisionEncoder(Protocol):
    """The frozen vision tower and projector of one family. ``tower``: the module, with its weights and config.
    ``pixels_sha256``: as in ``EncoderIdentity``.

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
    pixels_sha256: str
    notes: tuple[str, ...]
    tower: Any

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
    their own ``words``, for models trained to answer in words. ``storage``: how cache and weights are kept. ``decoder``: the
    module, with its weights and config. ``half``: the decoder and its head. ``lock``: to hold in each call that runs the
    decoder or the tokenizer, where several threads use the model: both change for a while as they run.
    """

    family: str
    width: int
    num_layers: int
    num_deep_layers: int
    dtype: torch.dtype
    device: torch.device
    attention: str
    fingerprint: dict[str, str | None]
    notes: tuple[str, ...]
    max_context_tokens: int
    choices_as: str
    storage: Storage
    kv_bytes_per_token: int
    activation_bytes_per_token: int
    num_parameters: int
    stop_ids: frozenset[int]
    tokenizer: Any
    decoder: Any
    half: Any
    lock: ThreadLock

    @property
    def keeps_state(self) -> bool:
        """Whether some layers keep a state that mixes all tokens so far, in place of attention to each of them."""
        ...

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The family's chat prompt around one video and one question."""
        ...

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        """The text before the video and the visual tokens at their positions, as rows for the decoder.

        ``text_after`` decides where the text after the video starts: ``max`` is one past the largest position of the
        full grid, as the released models were trained; ``hf`` is where transformers puts it. They differ only for
        Qwen2-VL and Qwen2.5-VL. The rows are where the latents are, or on the model's device if that is no GPU.
        """
        ...

    def text_per_frame(self, video: VideoTokens) -> Tensor:
        """How many text tokens the family writes around each of the T sampled frames if it holds tokens, (T,) int64."""
        ...

    def text_in_video(self, video: VideoTokens) -> int:
        """How many rows that are no visual tokens the family writes once for the whole video, whatever tokens it holds."""
        ...

    def text_rows(self, ids: Sequence[int], index: int, position: float) -> PromptRows:
        """Text as rows for the decoder. ``index``: number of rows before it. ``position``: position of its first token."""
        ...

    def step_rows(self, token: Tensor, place: Tensor, position: Tensor) -> PromptRows:
        """``text_rows`` of one token that the host need not know: ``token`` and ``place``, the number of rows before it, (1,)
        int64, and ``position``, float32 without axes. ``next_position`` is not set."""
        ...

    def new_cache(self) -> Any:
        """An empty KV cache."""
        ...

    def decode(self, rows: PromptRows, cache: Any, **of_attention: Any) -> Tensor:
        """Run rows, wherever they are, through the decoder on top of the cache, extending it. Returns the last hidden states
        (L, D). ``of_attention``: further arguments of the attention function."""
        ...

    def decode_layers(
        self, rows: PromptRows, cache: Any, layers: range, attended: list[Tensor] | None = None
    ) -> Tensor:
        """Run rows through some of the ``layers`` only, on top of ``cache``, which grows in these layers.

        ``rows``: what the layer before the first of ``layers`` gave, (L, D), followed by the DeepStack channels that are
        still to be added. ``attended``: gets what the last row attends to in each layer, (heads, rows in the cache).
        Returns the hidden states (L, D), normalized if the last layer is among ``layers``.
        """
        ...

    def attend_from_last(self, rows: PromptRows, cache: Any) -> Tensor:
        """As ``decode``, but returns the attention of the last row: (layers that have attention, cached + L) float32.

        Each layer's weights are the mean over its heads and sum to 1.
        """
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
