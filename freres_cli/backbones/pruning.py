"""Run a decoder so that only some visual tokens reach its later layers, those that the question attends to.

The first layers see every token. What they make of the video does not depend on the question, so it is kept. For each
question, its text runs through the first layers as well, tokens are picked by what its last token attends to there, and
the rest of the prompt runs through the later layers. Rows keep their positions, and so their rotary angles. The KV cache
of a later layer holds only the rows that reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from freres_cli.backbones.base import LanguageModel, Piece, PromptRows
from freres_cli.errors import BackboneError


@dataclass(frozen=True)
class Pruning:
    """Which visual tokens reach the later layers.

    ``num_full_layers``: k, the first layers, which see every token. ``num_kept``: most visual tokens in the layers after
    them. ``pick``: (attention (k, heads, S), count) -> the indices of the tokens to keep. ``name``: of the method, for
    messages.
    """

    num_full_layers: int
    num_kept: int
    pick: Callable[[Tensor, int], Tensor]
    name: str


@dataclass(frozen=True)
class PrunedVideo:
    """What the first layers made of [system text + video].

    ``rows``: hidden states after them, and the DeepStack channels that later layers add. ``pruning``: what follows.
    ``chunk_tokens``: rows per forward pass.
    """

    rows: PromptRows
    pruning: Pruning
    chunk_tokens: int

    @property
    def num_kept(self) -> int:
        """Visual tokens in the later layers."""
        return min(self.pruning.num_kept, int(self.rows.visual_mask.sum()))


def check_pruning(model: LanguageModel, pruning: Pruning, cache: Any) -> None:
    """Refuse a model whose layers cannot leave out tokens.

    ``cache``: an empty one of the model. Raises BackboneError for layers with a recurrent state, which has no rows, and
    for a model without any later layer.
    """
    if not getattr(cache, "is_croppable", True):
        raise BackboneError(
            f"method {pruning.name}: cannot prune {model.family}: some of its layers keep a state, not a row for each token",
            "choose a method that picks tokens before the decoder; see: freres methods",
        )
    if pruning.num_full_layers >= model.num_layers:
        raise BackboneError(
            f"method {pruning.name}: prunes after layer {pruning.num_full_layers}: expected a decoder with more layers, "
            f"got {model.num_layers}"
        )


@torch.no_grad()
def run_first_layers(
    model: LanguageModel, rows: PromptRows, cache: Any, pruning: Pruning, chunk_tokens: int
) -> PrunedVideo:
    """Run the rows of a video, with the text before it, through the first layers of ``model``.

    ``rows``: from ``splice``. ``cache``: an empty one, which grows in the first layers only. ``pruning``: says which
    layers those are. ``chunk_tokens``: rows per forward pass.
    """
    layers = range(pruning.num_full_layers)
    states = [model.decode_layers(part, cache, layers) for part in rows.split(chunk_tokens)]
    return PrunedVideo(_later_rows(model, rows, torch.cat(states), layers.stop), pruning, chunk_tokens)


@torch.no_grad()
def read_pruned(model: LanguageModel, video: PrunedVideo, rows: PromptRows, cache: Any) -> Tensor:
    """Run a question through all layers, and the tokens of the video that it attends to through the later ones.

    ``model``, ``cache``: those that ran the first layers on ``video``. ``rows``: the text after the video. Returns the
    last hidden state, (1, D). With every token kept, each pass runs the same rows as without a pruning, so the result is
    the same to the bit.
    """
    first, later = range(video.pruning.num_full_layers), range(video.pruning.num_full_layers, model.num_layers)
    attended: list[Tensor] = []
    states = []
    for part in rows.split(video.chunk_tokens):
        attended.clear()
        states.append(model.decode_layers(part, cache, first, attended))
    is_visual = video.rows.visual_mask
    weights = torch.stack(attended)[..., : len(is_visual)][..., is_visual]
    keep = video.pruning.pick(weights, video.num_kept)
    kept = ~is_visual
    kept[is_visual.nonzero()[:, 0][keep]] = True
    for part in video.rows.pick(kept).split(video.chunk_tokens):
        model.decode_layers(part, cache, later)
    for part in _later_rows(model, rows, torch.cat(states), first.stop).split(video.chunk_tokens):
        hidden = model.decode_layers(part, cache, later)
    return hidden[-1:]


@contextmanager
def only_layers(decoder: Any, layers: range) -> Iterator[None]:
    """Leave a decoder only some consecutive layers inside the block, and its last norm only if its last layer is among
    them."""
    every, norm = decoder.layers, decoder.norm
    try:
        decoder.layers = every[layers.start : layers.stop]
        decoder.norm = norm if layers.stop == len(every) else nn.Identity()
        yield
    finally:
        decoder.layers, decoder.norm = every, norm


def _later_rows(model: LanguageModel, rows: PromptRows, hidden: Tensor, num_layers: int) -> PromptRows:
    """Rows for the layers after the first ``num_layers``, which gave ``hidden`` (L, D). Those have added their DeepStack
    channels."""
    added = slice(model.width * (1 + min(num_layers, model.num_deep_layers)), None)
    rest = rows.channels(added).to(hidden.device)
    return replace(rest, pieces=(Piece(torch.cat([hidden, rest.embeds], dim=1)),))
