"""Score answers so that gradients reach the visual tokens, as training on a frozen model needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from freres_cli.backbones.base import LanguageModel, PromptRows
from freres_cli.backbones.engine import check_context
from freres_cli.records import VideoTokens

Ids = Sequence[int]


def score_answers(
    model: LanguageModel,
    prefix_ids: tuple[int, ...],
    video: VideoTokens,
    text_after: str,
    questions: Sequence[tuple[Ids, Sequence[Ids]]],
) -> list[Tensor]:
    """Log-likelihoods like those of ``engine.score_options``, with their graph: (k,) float32 for each question.

    ``model`` reads the text before the video, ``prefix_ids``, and the visual tokens, ``video``; ``text_after`` is the
    rule for the positions of later text, as in ``base.LanguageModel.splice``. ``questions``: for each, the token ids
    after the video, and those of its k possible answers. Answers whose last tokens alone differ share a text. The video is
    read once for all texts, or once per text if the cache cannot be shared (recurrent states). Memory grows with the
    activations of the whole prompt. Raises ContextError if a prompt exceeds the model's context.
    """
    rows = model.splice(prefix_ids, video, text_after)
    texts = [[(*suffix, *answer[:-1]) for answer in answers] for suffix, answers in questions]
    # Lettered options are a token each, which no text holds: all the options of a question follow one text.
    distinct = list(dict.fromkeys(text for own in texts for text in own))
    check_context(model, len(rows) + max(map(len, distinct)), rows.next_position)
    cache = model.new_cache()
    if getattr(cache, "is_croppable", True):
        hidden = _branch_off(model, rows, distinct, cache)
    else:
        hidden = [_read_whole(model, rows, text) for text in distinct]
    states = dict(zip(distinct, hidden, strict=True))
    return [
        torch.stack([_likelihood(model, states[text], len(suffix), a) for text, a in zip(own, answers, strict=True)])
        for own, (suffix, answers) in zip(texts, questions, strict=True)
    ]


def _branch_off(model: LanguageModel, rows: PromptRows, texts: Sequence[Ids], cache: object) -> list[Tensor]:
    """Hidden states of each text, reading the video once. Texts are padded at the end, where no earlier token can see
    it."""
    model.decode(rows, cache)
    for layer in cache.layers:  # type: ignore[attr-defined]
        layer.keys, layer.values = (x.expand(len(texts), -1, -1, -1) for x in (layer.keys, layer.values))
    longest = max(map(len, texts))
    parts = [model.text_rows(text, len(rows), rows.next_position) for text in texts]
    spare = [longest - len(text) for text in texts]
    embeds = torch.stack([pad(part.embeds, (0, 0, 0, n)) for part, n in zip(parts, spare, strict=True)])
    positions = torch.cat([pad(part.positions, (0, n)) for part, n in zip(parts, spare, strict=True)], dim=1)
    hidden = model.decode_batch(embeds, positions, None, cache)
    return [states[: len(text)] for states, text in zip(hidden, texts, strict=True)]


def _read_whole(model: LanguageModel, rows: PromptRows, text: Ids) -> Tensor:
    whole = rows.then(model.text_rows(text, len(rows), rows.next_position))
    return model.decode(whole, model.new_cache())[len(rows) :]


def _likelihood(model: LanguageModel, hidden: Tensor, num_prompt: int, answer: Ids) -> Tensor:
    """Log-likelihood of an answer. ``hidden``: states (n, D) of its prompt and of all its tokens but the last."""
    logits = model.logits(hidden[num_prompt - 1 :])
    ids = torch.tensor(answer, device=logits.device)
    return logits.log_softmax(-1).gather(1, ids[:, None]).sum()
