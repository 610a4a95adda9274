"""Confidence intervals: videos are resampled, differences are paired, and the seed decides."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from freres_cli.evaluation.intervals import estimate_shares


def test_the_interval_of_single_questions_is_scipys_and_the_binomial_one():
    answers = np.random.default_rng(1).random(400) < 0.7
    estimate = estimate_shares(answers[:, None].astype(int), np.ones((400, 1), dtype=int)).overall
    theirs = scipy.stats.bootstrap(
        (answers.astype(float),), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert estimate.value == pytest.approx(answers.mean())
    assert (estimate.low, estimate.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    spread = 1.96 * np.sqrt(answers.mean() * (1 - answers.mean()) / 400)
    assert estimate.high - estimate.low == pytest.approx(2 * spread, rel=0.08)


def test_questions_that_stand_or_fall_together_count_as_one():
    """Ten equal answers on each of 100 videos say no more than one answer each."""
    single = (np.random.default_rng(3).random((100, 1)) < 0.6).astype(int)
    ones = np.ones((100, 1), dtype=int)
    one, ten = estimate_shares(single, ones).overall, estimate_shares(10 * single, 10 * ones).overall
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high))
    flat = estimate_shares(np.repeat(single, 10, axis=0), np.ones((1000, 1), dtype=int)).overall
    assert (one.high - one.low) / (flat.high - flat.low) == pytest.approx(np.sqrt(10), rel=0.15)


def test_groups_have_intervals_of_their_own_and_the_mean_counts_each_once():
    rng = np.random.default_rng(4)
    total = np.concatenate([np.tile([9, 1], (60, 1)), np.tile([3, 0], (20, 1))])
    correct = rng.binomial(total, [0.9, 0.3])
    found = estimate_shares(correct, total)
    shares = correct.sum(0) / total.sum(0)
    assert [group.value for group in found.groups] == pytest.approx(list(shares))
    assert found.mean_over_groups.value == pytest.approx(shares.mean())
    assert found.overall.value == pytest.approx(correct.sum() / total.sum())
    assert found.groups[0].high - found.groups[0].low < found.groups[1].high - found.groups[1].low
    for part in (*found.groups, found.overall, found.mean_over_groups):
        assert part.low < part.value < part.high


def test_a_difference_is_paired_as_scipys():
    """Two methods that fail at the same hard videos differ by little, and surely."""
    rng = np.random.default_rng(6)
    first = rng.random(400) < 0.6
    second = first & (rng.random(400) < 0.95)
    ones = np.ones((400, 1), dtype=int)
    found = estimate_shares(second[:, None].astype(int) - first[:, None], ones).overall
    theirs = scipy.stats.bootstrap(
        (second.astype(float), first.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    alone = [estimate_shares(part[:, None].astype(int), ones).overall for part in (first, second)]
    assert found.high < 0 and alone[0].low < alone[1].high


def test_one_video_has_no_interval_and_the_seed_decides():
    one = estimate_shares(np.array([[1, 0]]), np.array([[2, 1]]))
    assert one.overall.low is None and one.groups[0].high is None and one.overall.value == pytest.approx(1 / 3)
    rare = estimate_shares(np.array([[1, 0], [1, 1]]), np.array([[2, 0], [2, 1]]))
    assert rare.groups[1].low is None and rare.groups[1].value == 1.0 and rare.mean_over_groups.low is not None
    correct, total = np.random.default_rng(5).random((50, 2)).round(2), np.ones((50, 2))
    assert estimate_shares(correct, total) == estimate_shares(correct, total)
    assert estimate_shares(correct, total) != estimate_shares(correct, total, seed=1)


@pytest.mark.parametrize("num_videos", [2, 30, 400])
def test_where_all_videos_agree_the_bound_is_scipys_exact_one_by_videos(num_videos):
    """Three questions on each video are no more certain than one: they may stand or fall together."""
    total = np.full((num_videos, 2), 3)
    theirs = scipy.stats.binomtest(num_videos, num_videos, alternative="greater").proportion_ci(0.95, "exact")
    right, wrong = estimate_shares(total, total), estimate_shares(0 * total, total)
    for found in (right.overall, right.mean_over_groups, *right.groups):
        assert (found.value, found.low, found.high) == (1, pytest.approx(theirs.low), 1)
    for found in (wrong.overall, wrong.mean_over_groups, *wrong.groups):
        assert (found.value, found.low, found.high) == (0, 0, pytest.approx(1 - theirs.low))
    equal = estimate_shares(0 * total, total, lowest=-1).overall  # two methods that never differ
    assert equal.high == -equal.low == pytest.approx(1 - theirs.low)
    ahead = estimate_shares(total, total, lowest=-1).overall
    assert (ahead.low, ahead.high) == (pytest.approx(2 * theirs.low - 1), 1)


def test_the_exact_bound_covers_and_one_wrong_answer_goes_back_to_resampling():
    """At the bound itself, all answers are right in 1 of 20 samples; no narrower bound would be exact."""
    low = estimate_shares(np.ones((30, 1)), np.ones((30, 1))).overall.low
    assert low**30 == pytest.approx(0.05)
    total = np.ones((30, 2), dtype=int)
    correct = total.copy()
    correct[4, 1] = 0
    found = estimate_shares(correct, total)
    assert found.groups[0].low == pytest.approx(low) and found.groups[1].high == 1
    assert found.groups[1].low == pytest.approx(0.9, abs=0.01), "three of 30, as the bootstrap has it"
