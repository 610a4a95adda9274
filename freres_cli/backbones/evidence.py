"""Which visual tokens the model attends to as it begins an answer. Ours; attention is not proof of evidence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import VideoPrefix, check_scores, lend_cache, memory_of, prefill
from freres_cli.records import VideoTokens

# The part of the layers that is read, from the middle to just before the end. Measured on 20 questions about something
# brief, with the bundled model: its instant had 16 % of Fre-Res's tokens, and of their attention 16 % in the first of 6
# layers, 77 to 88 % in the fourth and fifth, and 68 % in the last.
FIRST_SHARE, LAST_SHARE = 0.5, 0.9


@dataclass(frozen=True)
class Evidence:
    """What the last row of a prompt attends to. ``shares``: (S,) float64, of its attention to visual tokens; they sum to
    1. ``visual_share``: how much of all its attention goes to them. ``num_layers``: how many layers were read."""

    shares: Tensor
    visual_share: float
    num_layers: int


def why_no_evidence(model: LanguageModel) -> str | None:
    """Return why attention cannot say where this model looks, or ``None`` if it can."""
    if not model.keeps_state:
        return None
    return f"{model.family} cannot say where it looks: most of its layers keep a running state, not attention to tokens"


@torch.no_grad()
def find_evidence(
    model: LanguageModel, prefix: VideoPrefix, place_of_token: Tensor, suffix_ids: tuple[int, ...]
) -> Evidence:
    """Return what the row that predicts the answer's first token attends to, mean over heads and layers.

    Only that row's weights are computed, in a pass of its own over the question.

    ``model`` and ``prefix`` are the language model and the video it has prefilled. ``place_of_token``: (S,) rows of the
    prompt, from ``find_places``. ``suffix_ids``: the token ids after the video. Raises BackboneError if scores are not
    finite, ResourceError if memory runs out.
    """
    with lend_cache(prefix) as cache:
        rows = model.text_rows(suffix_ids, prefix.num_tokens, prefix.next_position)
        last = rows.pick(slice(-1, None))
        if len(rows) > 1:
            prefill(model, rows.pick(slice(-1)), cache)
        with memory_of(model, prefix.num_tokens + len(rows)):
            weights = check_scores(model.attend_from_last(last, cache))
    count = len(weights)
    picked = weights[int(FIRST_SHARE * count) : max(1, round(LAST_SHARE * count))]
    visual = picked[:, place_of_token.to(picked.device)].to("cpu", torch.float64).mean(0)
    return Evidence(visual / visual.sum(), float(visual.sum()), len(picked))


def find_places(
    model: LanguageModel, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max"
) -> Tensor:
    """Return the row of the prompt at which each visual token is: (S,) int64, whatever order the family puts them in.

    Found by trial, so that no family has to say: rows of text stay as they are when the latents are replaced by numbers.
    ``model``: the language half. ``prefix_ids``: the token ids before the video. ``video``: its tokens. ``text_after``:
    as in ``base.LanguageModel.splice``.
    """
    base = 128  # such digits are exact in every dtype
    index = torch.arange(len(video))
    digits = torch.stack([index // base**power % base + (power == 0) for power in range(4)], dim=1)
    blank = torch.zeros(len(video), video.latents.shape[1])
    coded = blank.clone()
    coded[:, :4] = digits.to(blank.dtype)
    first, second = (
        model.splice(prefix_ids, replace(video, latents=latents), text_after).channels(slice(4)).embeds.float().cpu()
        for latents in (blank, coded)
    )
    differs = (second - first).round().long()
    rows = (differs[:, 0] > 0).nonzero().squeeze(1)
    powers = torch.tensor([base**power for power in range(4)])
    order = (differs[rows] * powers).sum(1) - 1
    places = torch.empty(len(video), dtype=torch.int64)
    places[order] = rows
    return places
