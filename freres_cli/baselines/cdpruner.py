"""CDPruner: tokens that differ from one another, and more of those that are near the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.dpp import pick_diverse

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def pick_relevant(tokens: Tensor, question: Tensor, count: int) -> Tensor:
    """Return the indices of min(``count``, S) tokens for a question, (n,) int64, increasing.

    They are those of ``dpp.pick_diverse`` with the relevance of ``measure_relevance``. ``tokens``: (S, D).
    ``question``: (Q, D), the embeddings of its words in the same space. Raises ``ValueError`` for a question without
    words.
    """
    units = torch.nn.functional.normalize(tokens.to(torch.float32), dim=-1)
    words = torch.nn.functional.normalize(question.to(torch.float32), dim=-1)
    return pick_diverse(tokens, measure_relevance(units, words), count).sort().values


def measure_relevance(units: Tensor, words: Tensor) -> Tensor:
    """Return the relevance of each token, (S,) in [0, 1]: its mean cosine to the words, from the least to the most
    relevant token of the clip (CDPruner); 1 for all where all are equal.

    ``units``: (S, D), ``words``: (Q, D), rows of norm 1. Raises ``ValueError`` if there are no words.
    """
    if not len(words):
        raise ValueError("question: expected at least one word, got none")
    cosine = units @ words.mean(dim=0)
    if not len(cosine) or bool((cosine == cosine[0]).all()):
        return torch.ones_like(cosine)
    low, high = cosine.aminmax()
    return (cosine - low) / (high - low)


METHOD = Method(
    name="cdpruner",
    summary="the tokens that differ most from one another, weighted by how near they are to the question",
    source="CDPruner, arXiv 2506.10967",
    needs=("question",),
    makes_bundles=False,
    deviations="relevance is the cosine to the language model's own input embeddings of the question (without its options; "
    "under lmms-eval, of the whole prompt, which has them), because there is no CLIP text tower, and it is not negated as "
    "that of CLIP is; one selection over the whole clip, not one for each frame; once every direction is spent, the search "
    "starts over among the rest",
    pick_for_question=pick_relevant,
)
