"""Retention and differences against a plain count of the answers, and intervals where a category is rare."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from freres_cli.evaluation.cells import Budget, Cell
from freres_cli.evaluation.intervals import estimate_shares
from freres_cli.evaluation.questions import Question, QuestionFile
from freres_cli.evaluation.scores import _ttft_seconds, summarize

HALF, QUARTER = Budget(Fraction(1, 2)), Budget(Fraction(1, 4))
# The full tokens do not come first, as in a run that asks for them last.
CELLS = [Cell("uniform", HALF), Cell("evs", HALF), Cell("evs", QUARTER), Cell("full", None)]
# The categories of the questions of each video.
ASKED = ["aab", "ab", "aaa", "c", "aac"]

FIGURES = ("budget_tokens", "visual_tokens", "context_tokens", "num_frames", "encoded_tokens")
FIGURES += ("compress_s", "prefill_s", "kv_cache_bytes", "peak_memory_bytes")
READ = ("full_tokens", "decode_s", "encode_s")


def asked_questions():
    return [
        Question(f"{v}.{j}", f"{v}.mp4", Path(f"{v}.mp4"), category, "?", (), "yes", 1)
        for v, categories in enumerate(ASKED)
        for j, category in enumerate(categories)
    ]


def summary_of(right):
    """``right``: for each cell the videos that it answered, each with whether each answer is right."""
    rows = []
    for v in range(len(ASKED)):
        parts = [
            {"status": "ok", "answers": {f"{v}.{j}": ["", is_right, 0.1] for j, is_right in enumerate(cell[v])}}
            | dict.fromkeys(FIGURES, 1)
            if v in cell
            else {"status": "failed", "message": "no"}
            for cell in right
        ]
        row = {"video": f"{v}.mp4", "status": "ok", "lost_s": 0, "notes": [], "cells": parts}
        rows.append(row | dict.fromkeys(READ, 1))
    return summarize(QuestionFile(Path("q.jsonl"), "0", tuple(asked_questions())), rows, CELLS)


def shares_of(cell, videos, categories="abc"):
    """Shares of right answers of a cell about some videos: of all, the mean of the categories, and each."""
    answers = [(c, cell[v][j]) for v in videos for j, c in enumerate(ASKED[v])]
    each = {c: [is_right for other, is_right in answers if other == c] for c in categories}
    each = {c: sum(found) / len(found) if found else None for c, found in each.items()}
    known = [share for share in each.values() if share is not None]
    overall = sum(is_right for _, is_right in answers) / len(answers) if answers else None
    return [overall, sum(known) / len(known) if known else None, *each.values()], len(answers)


def some_answers(seed):
    rng = np.random.default_rng(seed)
    return [
        {v: [bool(rng.random() < 0.6) for _ in categories] for v, categories in enumerate(ASKED) if rng.random() < 0.7}
        for _ in CELLS
    ]


@pytest.mark.parametrize("seed", range(12))
def test_retention_is_over_the_videos_that_a_row_shares_with_full(seed):
    """Of none, of a category that none of these asks about, or of 0, there is none; a row with no right answer keeps 0."""
    right = some_answers(seed)
    full = right[3]
    for cell, row in zip(right, summary_of(right)["rows"], strict=True):
        shared = sorted(set(cell) & set(full))
        own, of_full = shares_of(cell, shared)[0], shares_of(full, shared)[0]
        expected = [a / b if a is not None and b else None for a, b in zip(own, of_full, strict=True)]
        found = [row, row["mean_over_categories"], *(row["by_category"][c] for c in "abc")]
        assert [part["retention"] for part in found] == pytest.approx(expected)


def test_these_answers_have_every_kind_of_retention():
    kinds = set()
    for seed in range(12):
        *cells, full = some_answers(seed)
        for cell in cells:
            shared = sorted(set(cell) & set(full))
            kinds |= set(zip(shares_of(cell, shared)[0], shares_of(full, shared)[0], strict=True))
    assert {(None, None), (0, 1), (1, 0), (0, 0), (1, 1)} <= kinds


@pytest.mark.parametrize("seed", range(12))
def test_differences_are_over_the_videos_that_both_answered(seed):
    right = some_answers(seed)
    expected = {}
    for minus, own in [(3, 0), (3, 1), (3, 2), (0, 1)]:
        shared = sorted(set(right[own]) & set(right[minus]))
        (one, num_questions), (other, _) = (shares_of(right[i], shared) for i in (own, minus))
        both = [a - b if a is not None else None for a, b in zip(one, other, strict=True)]
        name = (CELLS[own].method, CELLS[minus].method, CELLS[own].budget.number)
        expected[name] = (num_questions, *both[:2])
    found = {
        (row["method"], row["minus"], row["budget"]): (
            row["num_questions"],
            row["difference"],
            row["mean_over_categories"]["difference"],
        )
        for row in summary_of(right)["differences"]
    }
    assert found.keys() == expected.keys()
    for name, figures in found.items():
        assert figures == pytest.approx(expected[name]), name


def test_two_rows_that_never_differ_may_differ_either_way_on_other_videos():
    """Five videos: fewer than 1 - 0.05**(1/5) of all videos do otherwise, for better or for worse."""
    answers = {v: [j % 2 == 0 for j, _ in enumerate(categories)] for v, categories in enumerate(ASKED)}
    others = 1 - 0.05 ** (1 / 5)
    # Four videos ask about a, two about b, two about c.
    in_mean = np.mean([1 - 0.05 ** (1 / n) for n in (4, 2, 2)])
    for row in summary_of([answers] * 4)["differences"]:
        assert [row[key] for key in ("difference", "ci_low", "ci_high")] == pytest.approx([0, -others, others])
        mean = row["mean_over_categories"]
        assert [mean[key] for key in ("difference", "ci_low", "ci_high")] == pytest.approx([0, -in_mean, in_mean])


def every_resample(num_videos):
    """How often each video is drawn, and how likely that is."""
    for drawn in itertools.product(range(num_videos + 1), repeat=num_videos):
        if sum(drawn) == num_videos:
            ways = math.factorial(num_videos) / math.prod(map(math.factorial, drawn))
            yield np.array(drawn), ways / num_videos**num_videos


def interval_of(values, odds):
    """The 2.5th and the 97.5th of a hundred parts of what is known."""
    order = np.argsort(values)
    order = order[: np.count_nonzero(~np.isnan(values))]
    below = np.cumsum(odds[order]) / odds[order].sum()
    return [values[order][np.searchsorted(below, part)] for part in (0.025, 0.975)]


def test_a_group_that_a_resample_leaves_out_counts_in_the_mean_as_it_is():
    """Two of six videos ask about the second group: one resample in eleven has neither."""
    total = np.array([[3, 2], [3, 2], [3, 0], [3, 0], [3, 0], [3, 0]])
    correct = np.array([[3, 1], [2, 2], [3, 0], [1, 0], [2, 0], [0, 0]])
    odds, shares = [], []
    for drawn, likely in every_resample(6):
        right, asked = drawn @ correct, drawn @ total
        odds.append(likely)
        shares.append([a / b if b else np.nan for a, b in zip(right, asked, strict=True)])
    odds, shares = np.array(odds), np.array(shares)
    assert 0.08 < odds[np.isnan(shares[:, 1])].sum() < 0.1
    found = estimate_shares(correct, total)
    whole = correct.sum(0) / total.sum(0)
    means = [
        np.mean([own if np.isnan(share) else share for share, own in zip(row, whole, strict=True)]) for row in shares
    ]
    for part, values in zip((*found.groups, found.mean_over_groups), (*shares.T, np.array(means)), strict=True):
        assert [part.low, part.high] == pytest.approx(interval_of(values, odds), abs=0.03)


def test_a_rare_group_whose_videos_agree_is_bounded_by_their_number():
    """Also where some resamples leave it out; the mean of two such groups lies between the means of their bounds, also
    where one is all right and the other all wrong."""
    total = np.array([[1, 2], [1, 2], [1, 0], [1, 0], [1, 0], [1, 0]])
    apart = estimate_shares(total * [1, 0], total)
    ends = [(0.05 ** (1 / 6) + 0) / 2, (1 + 1 - 0.05 ** (1 / 2)) / 2]
    assert [apart.mean_over_groups.low, apart.mean_over_groups.high] == pytest.approx(ends)
    found = estimate_shares(total, total)
    bounds = [0.05 ** (1 / 6), 0.05 ** (1 / 2)]
    assert [group.low for group in found.groups] == pytest.approx(bounds) and found.groups[1].high == 1
    assert (found.mean_over_groups.low, found.mean_over_groups.high) == (pytest.approx(np.mean(bounds)), 1)
    assert found.overall.low == pytest.approx(bounds[0])


def test_parts_of_one_file_are_resampled_together():
    """As questions about one video, which they would be if it were read whole."""

    def summary(names):
        """Two questions about each of 20 videos; ``names``: the clip of each question."""
        questions, rows = [], {}
        for number in range(40):
            video = Path(f"{number // 2}.mp4")
            questions.append(Question(str(number), names(number), video, "a", "?", (), "yes", 1))
            rows.setdefault(names(number), {})[str(number)] = ["", number % 6 < 3, 0.1]
        figures = dict.fromkeys(FIGURES, 1)
        cells = [[{"status": "ok", "answers": answers} | figures for _ in CELLS[:2]] for answers in rows.values()]
        clips = [
            {"video": name, "status": "ok", "lost_s": 0, "notes": [], "cells": own, **dict.fromkeys(READ, 1)}
            for name, own in zip(rows, cells, strict=True)
        ]
        return summarize(QuestionFile(Path("q.jsonl"), "0", tuple(questions)), clips, CELLS[:2])

    whole, parts = summary(lambda i: f"{i // 2}.mp4"), summary(lambda i: f"{i // 2}.mp4 [{i % 2} s, {i % 2 + 1} s)")
    assert parts["num_videos"] == 40 and whole["num_videos"] == 20
    for key in ("accuracy", "ci_low", "ci_high", "mean_over_categories"):
        assert parts["rows"][0][key] == whole["rows"][0][key]
    assert parts["rows"][0]["ci_low"] < parts["rows"][0]["accuracy"] < parts["rows"][0]["ci_high"]
    assert parts["differences"] == whole["differences"]


def test_seconds_to_the_first_token_are_of_first_questions_and_of_the_others():
    listed = [[q for q in asked_questions() if q.video_name == f"{v}.mp4"] for v in range(len(ASKED))]
    parts = [{"answers": {q.id: ["", True, 1.0 if i else 9.0] for i, q in enumerate(own)}} for own in listed]
    first, later = _ttft_seconds(parts, listed)
    assert first == [9.0] * len(ASKED) and later == [1.0] * (sum(map(len, ASKED)) - len(ASKED))


def test_the_most_tokens_are_those_that_were_kept():
    """Of two videos, not of their budgets, which a method may not use up."""
    asked = tuple(Question(str(v), f"{v}.mp4", Path(f"{v}.mp4"), "a", "?", (), "yes", 1) for v in range(2))
    rows = []
    for v, kept in enumerate((5, 7)):
        part = {"status": "ok", "answers": {str(v): ["", True, 0.1]}, **dict.fromkeys(FIGURES, 1)}
        part |= {"budget_tokens": 9, "visual_tokens": kept}
        row = {"video": f"{v}.mp4", "status": "ok", "lost_s": 0, "notes": [], "cells": [part]}
        rows.append(row | dict.fromkeys(READ, 1))
    (found,) = summarize(QuestionFile(Path("q.jsonl"), "0", asked), rows, [Cell("evs", HALF)])["rows"]
    assert (found["visual_tokens"], found["visual_tokens_max"], found["budget_tokens_max"]) == (6, 7, 9)
