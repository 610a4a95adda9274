"""Many questions about one video in one training sequence: the video is read once, and no question sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "freres_packed_questions"


@dataclass(frozen=True)
class Layout:
    """What each row holds where: in the first ``video`` places the text before the video and the video, padded at the
    end; then ``questions`` blocks of ``block`` places. ``seen``: (B, video) bool, the places that are not padding."""

    video: int
    questions: int
    block: int
    seen: Tensor


@dataclass(frozen=True)
class View:
    """The visual tokens of one example: ``latents`` (S, D), ``positions`` (S, 3). ``traces``: (S, 13), what is learned
    about each token (``labels.TRACES``), NaN where unknown."""

    latents: Tensor
    positions: Tensor
    traces: Tensor


@dataclass(frozen=True)
class Item:
    """One question in training: token ids of the prompt after the video, and of the answer. ``name``: what its score
    is counted under."""

    prompt: list[int]
    answer: list[int]
    name: str


@dataclass(frozen=True)
class Pack:
    """A batch. ``ids``, ``is_video``, ``targets`` (-100 where nothing is learned), ``weights``: (B, L). ``positions``:
    (3, B, L). ``latents``, ``traces``: (all visual tokens, D or 13). ``firsts``: for each item the row and the place
    that predict its answer, its name, and the answer's first token."""

    layout: Layout
    ids: Tensor
    is_video: Tensor
    latents: Tensor
    traces: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    firsts: list[tuple[int, int, str, int]]

    def to(self, device: torch.device) -> Pack:
        """Return the same batch on a device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("layout", "firsts")}
        return Pack(replace(self.layout, seen=self.layout.seen.to(device)), **tensors, firsts=self.firsts)


def pack(
    views: Sequence[View],
    items: Sequence[Sequence[Item]],
    prefix: Sequence[int],
    end: int,
    grid: int,
    end_weight: float,
) -> Pack:
    """Lay out a batch: ``views`` of clips, with the ``items`` asked about each.

    ``prefix``: ids of the text before the video. ``end``: id of the token that ends an answer; its weight in the loss is
    ``end_weight``. ``grid``: larger side of the token grid, in tokens. Positions after the video continue from ``grid``,
    as in transformers 5.24 (``text_after: hf``): close enough to the video to tell rows and columns apart, however long
    the clip is.
    """
    batch, p = len(views), len(prefix)
    video = p + max(len(view.latents) for view in views)
    questions = max(map(len, items))
    block = max(len(item.prompt) + len(item.answer) + 1 for part in items for item in part)
    length = video + questions * block
    ids = torch.zeros(batch, length, dtype=torch.long)
    targets = torch.full((batch, length), -100)
    weights, positions = torch.zeros(batch, length), torch.zeros(3, batch, length)
    is_video = torch.zeros(batch, length, dtype=torch.bool)
    seen = torch.zeros(batch, video, dtype=torch.bool)
    firsts = []
    for b, (view, part) in enumerate(zip(views, items, strict=True)):
        n = p + len(view.latents)
        ids[b, :p] = torch.tensor(prefix)
        is_video[b, p:n] = True
        seen[b, :n] = True
        positions[:, b, :p] = torch.arange(p)
        positions[:, b, p:n] = view.positions.T + p
        start = p + grid
        for number, item in enumerate(part):
            at = video + number * block
            whole = torch.tensor([*item.prompt, *item.answer, end])
            ids[b, at : at + len(whole)] = whole
            positions[:, b, at : at + block] = torch.arange(block) + start
            learnt = slice(at + len(item.prompt) - 1, at + len(whole) - 1)
            targets[b, learnt] = torch.tensor([*item.answer, end])
            weights[b, learnt] = torch.tensor([*[1.0] * len(item.answer), end_weight])
            firsts.append((b, learnt.start, item.name, item.answer[0]))
    latents = torch.cat([view.latents for view in views])
    traces = torch.cat([view.traces for view in views])
    return Pack(
        Layout(video, questions, block, seen), ids, is_video, latents, traces, positions, targets, weights, firsts
    )


def use_packed_attention(decoder: Any) -> None:
    """Make a decoder attend according to the layout of a pack."""
    decoder.config._attn_implementation = ATTENTION


def run_pack(decoder: Any, batch: Pack) -> Tensor:
    """Return the logits of all places with a target, (n, vocabulary), in order of row and place."""
    embeds = decoder.embed_tokens(batch.ids)
    embeds = embeds.masked_scatter(batch.is_video[..., None], batch.latents)
    plain = torch.arange(batch.ids.shape[1], dtype=torch.float32, device=batch.ids.device).expand(1, *batch.ids.shape)
    out = decoder(
        inputs_embeds=embeds,
        # Four-dimensional masks reach the attention function untouched; ours reads the layout instead.
        attention_mask=batch.layout.seen[:, None, None],
        position_ids=torch.cat([plain, batch.positions]),
        use_cache=False,
        layout=batch.layout,
    )
    return F.linear(out.last_hidden_state[batch.targets >= 0], decoder.embed_tokens.weight)


def pack_loss(logits: Tensor, batch: Pack) -> tuple[Tensor, list[tuple[str, bool]]]:
    """Return the weighted mean cross-entropy, and for each item its name and whether its answer starts right."""
    known = batch.targets >= 0
    losses = F.cross_entropy(logits, batch.targets[known], reduction="none")
    weights = batch.weights[known]
    row_of = torch.full(batch.targets.shape, -1)
    row_of[known.cpu()] = torch.arange(int(known.sum()))
    best = logits.argmax(-1).cpu()
    right = [(name, bool(best[row_of[b, place]] == target)) for b, place, name, target in batch.firsts]
    return (losses * weights).sum() / weights.sum(), right


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """(B, heads, L, d) -> (B, L, heads, d). The video is causal; a question sees the video and its own past."""
    layout: Layout = kwargs["layout"]
    batch, heads, _, d = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    v, n, block = layout.video, layout.questions, layout.block
    # Padding comes after the video's own tokens, so causality alone hides it from them.
    of_video = F.scaled_dot_product_attention(query[:, :, :v], key[:, :, :v], value[:, :, :v], is_causal=True)

    def blocks(x: Tensor) -> Tensor:
        return x[:, :, v:].reshape(batch, heads, n, block, d)

    asked = query[:, :, v:] * d**-0.5
    hidden = torch.zeros(layout.seen.shape, device=query.device).masked_fill_(~layout.seen, float("-inf"))
    to_video = asked @ key[:, :, :v].mT + hidden[:, None, None]
    later = torch.full((block, block), float("-inf"), device=query.device).triu(1)
    to_own = asked.view(batch, heads, n, block, d) @ blocks(key).mT + later
    weights = torch.cat([to_video, to_own.flatten(2, 3)], -1).softmax(-1)
    of_text = weights[..., :v] @ value[:, :, :v]
    own = weights[..., v:].unflatten(2, (n, block)) @ blocks(value)
    return torch.cat([of_video, of_text + own.flatten(2, 3)], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
