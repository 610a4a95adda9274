"""Trends of stretches: each is the slope of a straight line through its latents, however it was merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freres_cli.method import adaptive
from freres_cli.method.adaptive import StretchCompressor, cut_stretches
from freres_cli.method.stretch_means import box_sizes
from freres_cli.stretches import STRETCH_COLUMNS
from tests.test_adaptive import assert_equal
from tests.test_merging import D, walk


def compress(clip, budget, batch=None, keeps_trends=True):
    compressor = StretchCompressor(tuple(clip.shape[1:3]), D, budget, None, keeps_trends)
    seconds = torch.arange(len(clip)).double() / 8
    for part, times in zip(clip.split(batch or len(clip)), seconds.split(batch or len(clip)), strict=True):
        compressor.push(part, times.tolist())
    return compressor.finish()


def fit_lines(clip, boxes):
    """What numpy's least squares says of each box: slope times the spread of its frames, and how much error the line
    takes off that of the mean."""
    trends, gains = [], []
    for t0, t1, h0, h1, w0, w1 in boxes.tolist():
        box = clip[t0:t1, h0:h1, w0:w1, :D].double().flatten(1, 2)
        frames, values = np.repeat(np.arange(t0, t1), box.shape[1]), box.flatten(0, 1).numpy()
        around = ((values - values.mean(0)) ** 2).sum()
        if t1 - t0 == 1:
            trends.append(np.zeros(D))
            gains.append(0.0)
            continue
        (slope, at_0), left, *_ = np.polyfit(frames, values, 1, full=True)
        left = ((values - slope * frames[:, None] - at_0) ** 2).sum()
        trends.append(slope * np.arange(t0, t1).std())
        gains.append(around - left)
    return torch.tensor(np.array(trends)), torch.tensor(gains)


@pytest.mark.parametrize("budget", [191, 100, 40, 12, 3, 1])
def test_a_trend_is_the_slope_of_the_line_through_all_latents_of_the_box(budget):
    clip = torch.cat([walk(16, 3, 4), torch.randn(16, 3, 4, 2 * D)], dim=-1)  # with other channels after the main ones
    made = compress(clip, budget)
    trends, gains = fit_lines(clip, made.boxes)
    assert made.trends.abs().max() > 0.1 and made.trends.shape == (budget, D)
    assert torch.allclose(made.trends.double(), trends, atol=1e-5)
    told = made.trends.double().square().sum(1) * box_sizes(made.boxes)
    assert torch.allclose(told, gains, rtol=1e-4, atol=1e-5)


def test_trends_hold_in_bounded_memory_too(monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 40)
    clip = walk(20, 3, 3)
    made = compress(clip, 17)
    assert torch.allclose(made.trends.double(), fit_lines(clip, made.boxes)[0], atol=1e-5)
    assert_equal(made, compress(clip, 17, batch=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cutting_equals_compressing_anew_with_trends_too(dtype):
    clip = walk(16, 3, 4).to(dtype)
    whole = compress(clip, 150)
    for budget in (149, 97, 12, 1):
        assert_equal(cut_stretches(whole, budget), compress(clip, budget))
    assert_equal(cut_stretches(cut_stretches(whole, 60), 13), cut_stretches(whole, 13))


def test_trends_change_nothing_else():
    clip = walk(16, 3, 4)
    with_trends, without = compress(clip, 50), compress(clip, 50, keeps_trends=False)
    assert with_trends.has_trends and not without.has_trends and without.trends.shape == (50, 0)
    for name in set(STRETCH_COLUMNS) - {"trends"}:
        assert torch.equal(getattr(with_trends, name), getattr(without, name)), name


def test_a_trend_does_not_overflow_where_latents_do_not():
    """1,000 frames from the least to the largest float16: their sum of products is beyond it, their trend is not."""
    ends = torch.linspace(-60000, 60000, 1000)[:, None, None, None].expand(1000, 2, 2, D)
    made = compress(ends.to(torch.float16), 1)
    assert made.trends.isfinite().all()
    assert made.trends.float() == pytest.approx(ends[:, 0, 0, 0].std(correction=0).expand(1, D).numpy(), rel=0.01)
