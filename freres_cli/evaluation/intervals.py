"""Accuracy and its uncertainty: bootstrap intervals over questions that come in clusters."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
RESAMPLES_AT_ONCE = 100  # bounds memory for many clusters


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval, as shares of one. The interval is ``None`` for fewer than two clusters."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class GroupedEstimates:
    """Estimates for one method: over all questions, in each group, and the plain mean of the groups."""

    overall: Estimate
    groups: tuple[Estimate, ...]
    mean_over_groups: Estimate


def estimate_shares(
    correct: np.ndarray, total: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = SEED, lowest: int = 0
) -> GroupedEstimates:
    """Return shares of right answers with 95 % percentile bootstrap intervals.

    ``correct`` and ``total``: (V, K), right answers and questions about cluster (video) v in group (category) k; every
    group has a question. Answers about one video are correlated, so whole videos are resampled with replacement,
    ``num_resamples`` times. A group without questions in a resample has no share there, and counts in the mean of the groups
    with the share that it has in all videos (ours: without it the mean would jump to that of the others). The same ``seed``
    draws the same videos, so methods that answered the same questions are compared on the same resamples. The ``correct``
    of one method minus that of another gives their difference, paired by video, with -1 as the ``lowest`` of an answer.

    Where all n videos agree, as when every answer is right, no resample differs, and the interval is exact in place of that
    (ours): the one-sided Clopper-Pearson bound says that fewer than 1 - 0.05**(1/n) of all videos do otherwise, and they may
    have any share. Videos count, not questions, so it is wide rather than narrow. All right is at least 0.05**(1/n). The mean
    of groups that each agree lies between the means of their bounds.
    """
    totals = total.sum(0)
    shares = correct.sum(0) / totals
    overall, mean = float(correct.sum() / total.sum()), float(shares.mean())
    if len(total) < 2:
        bare = tuple(Estimate(float(share), None, None) for share in shares)
        return GroupedEstimates(Estimate(overall, None, None), bare, Estimate(mean, None, None))
    right, asked = resample_sums(correct, total, num_resamples, seed)
    with np.errstate(invalid="ignore"):  # 0 / 0 if a group is left out
        by_group = right / asked
    all_shares = right.sum(1) / np.maximum(asked.sum(1), 1)
    in_group = np.count_nonzero(total, axis=0)
    bounds = [_bound(float(share), int(n), lowest) for share, n in zip(shares, in_group, strict=True)]
    groups = tuple(
        # With one video in the group, drawing it again and again says nothing about others.
        _with_interval(bound, column) if n > 1 else replace(bound, low=None, high=None)
        for bound, column, n in zip(bounds, by_group.T, in_group, strict=True)
    )
    of_means = Estimate(mean, *(float(np.mean([getattr(bound, end) for bound in bounds])) for end in ("low", "high")))
    means = np.where(np.isnan(by_group), shares, by_group).mean(axis=1)
    return GroupedEstimates(
        _with_interval(_bound(overall, len(total), lowest), all_shares), groups, _with_interval(of_means, means)
    )


def resample_sums(
    correct: np.ndarray, total: np.ndarray, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the column sums over ``num_resamples`` draws of V rows with replacement: two arrays of (R, K) float64.

    ``correct`` and ``total``: (V, K). ``seed``: of the draws, which are the same for both.
    """
    columns = np.concatenate([correct, total], axis=1).astype(np.float64)  # whole numbers, so the sums are exact
    sums = np.concatenate([times_drawn @ columns for times_drawn in _draw(len(total), num_resamples, seed)])
    return sums[:, : correct.shape[1]], sums[:, correct.shape[1] :]


@functools.lru_cache(maxsize=1)  # every pair of methods is compared on the same draws
def _draw(num_rows: int, num_resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return how often each row is drawn, (n, V) at a time, ``num_resamples`` in all, in as few bytes as that takes."""
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, num_resamples - start)
        times_drawn = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=size)
        drawn.append(times_drawn.astype(np.min_scalar_type(num_rows)))
    return tuple(drawn)


def _bound(value: float, num_videos: int, lowest: int) -> Estimate:
    """A share that all of ``num_videos`` have, with its exact interval. ``lowest``: the least that another may have."""
    others = 1 - (1 - LEVEL) ** (1 / num_videos)
    return Estimate(value, value + (lowest - value) * others, value + (1 - value) * others)


def _with_interval(exact: Estimate, resampled: np.ndarray) -> Estimate:
    """The interval of the resamples, or the ``exact`` one if all of them agree."""
    if np.nanmin(resampled) == np.nanmax(resampled):
        return exact
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return replace(exact, low=float(low), high=float(high))
