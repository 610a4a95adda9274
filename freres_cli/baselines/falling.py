"""Greedy picks among scores that only fall: exact, with most tokens looked at once in many picks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

NUM_ACTIVE = 1024  # tokens whose scores follow every pick
CHUNK_VALUES = 2**22  # values in float32 at a time


def inverse_norms(tokens: Tensor) -> Tensor:
    """Return one over the norm of each of ``tokens`` (N, D), (N,) float32; 0 for zero tokens."""
    step = max(1, CHUNK_VALUES // tokens.shape[1])
    norms = torch.cat([part.to(torch.float32).norm(dim=-1) for part in tokens.split(step)])
    return torch.where(norms > 0, 1 / norms, 0.0)


def scaled_parts(tokens: Tensor, scale: Tensor, beside: int) -> Iterator[Tensor]:
    """Yield ``tokens`` (N, D) of any dtype, times ``scale`` (N,), a part at a time in float32. ``beside``: how many values a
    row that are made of a part take."""
    step = max(1, CHUNK_VALUES // max(tokens.shape[1], beside))
    parts = zip(tokens.split(step), scale.split(step), strict=True)
    return (part.to(torch.float32) * own[:, None] for part, own in parts)


class FallingScores:
    """Scores of N tokens that fall, or stay, with every pick (ours: lazy greedy search as in Minoux, 1978, in blocks).

    Only the ``NUM_ACTIVE`` highest scores follow each pick; an old score of any other token is at least its new one. As
    long as the best active score is above all old ones, it is the best of all; else every score is brought up to date.
    So the picks are those of a search that updates every score after each pick.
    """

    def __init__(
        self, tokens: Tensor, scale: Tensor, scores: Tensor, fall: Callable[[Tensor, Tensor, int], Tensor]
    ) -> None:
        """``tokens``: (N, D), any dtype. ``scale``: (N,) float32, the factor of each row in the vectors given to ``fall``.
        ``scores``: (N,) float32 before any pick; -inf is never picked.

        ``fall(vectors, scores, since)`` returns the scores (n,) of ``vectors`` (n, D) float32 that have seen the first
        ``since`` picks, after all picks made. It is called after each pick and its ``count``.
        """
        self._tokens, self._scale, self._fall = tokens, scale, fall
        self._scores = scores.clone()
        self._num_picks = self._num_seen = 0
        self._active: Tensor
        self._active_scores: Tensor
        self._vectors: Tensor
        self._choose_active()

    def find_best(self) -> tuple[int, float]:
        """Return the token with the highest score and this score; of equal ones, the first token."""
        place = int(self._active_scores.argmax())
        best = float(self._active_scores[place])
        if best <= self._most_of_rest and self._num_seen < self._num_picks:
            self._update_all()
            return self.find_best()
        return int(self._active[place]), best

    def pick(self, token: int) -> None:
        """Take out ``token``, one that ``find_best`` returned. ``fall`` must know it by now."""
        self._active_scores[self._active == token] = -torch.inf
        self._scores[token] = -torch.inf
        self._active_scores = self._fall(self._vectors, self._active_scores, self._num_picks)
        self._num_picks += 1

    def _update_all(self) -> None:
        done = 0
        for vectors in scaled_parts(self._tokens, self._scale, self._num_picks - self._num_seen):
            part = slice(done, done + len(vectors))
            self._scores[part] = self._fall(vectors, self._scores[part], self._num_seen)
            done = part.stop
        self._num_seen = self._num_picks
        self._choose_active()

    def _choose_active(self) -> None:
        order = self._scores.argsort(descending=True, stable=True)
        # In order of place, so that the first of equal scores comes first.
        self._active = order[:NUM_ACTIVE].sort().values
        self._most_of_rest = float(self._scores[order[NUM_ACTIVE]]) if len(order) > NUM_ACTIVE else -torch.inf
        self._active_scores = self._scores[self._active]
        self._vectors = self._tokens[self._active].to(torch.float32) * self._scale[self._active, None]
