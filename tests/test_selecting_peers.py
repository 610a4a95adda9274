"""DyCoke, VidCom2, DivPrune, KTV and TS-LLaVA: what they keep follows from their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from freres_cli.baselines.divprune import choose_diverse, keep_diverse_tokens
from freres_cli.baselines.dycoke import drop_similar_tokens, find_reference
from freres_cli.baselines.ktv import choose_frames, keep_key_tokens, score_tokens
from freres_cli.baselines.ts_llava import sample_with_thumbnail, spread_to_ends
from freres_cli.baselines.vidcom2 import find_calm_channels, keep_unusual_tokens, measure_likeness, share_budget
from tests.test_change_baselines import H, N, W, drifting_clip, kept_indices, one_minus_cosine

D = 6


def kept_of_frames(tokens):
    """The number of tokens of each frame."""
    return torch.bincount(tokens.positions[:, 0].long(), minlength=tokens.grid[0]).tolist()


def least_similar(frame, reference, count):
    """The places of a frame (N, D) that are least like the same ones of another, in order."""
    change = [one_minus_cosine(frame[n], reference[n]) for n in range(len(frame))]
    return sorted(sorted(range(len(frame)), key=lambda n: -change[n])[:count])


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6, 7, 8, 9, 11])
@pytest.mark.parametrize("count", [N // 3 + 1, N - 1])
def test_dycoke_prunes_pairs_and_then_windows_of_four(frames, count):
    """As in the paper: odd frames against the even ones before them, and the third of four against the first."""
    latents, seconds = drifting_clip(frames)
    flat = latents.flatten(1, 2)
    expected, budget = [], 0
    for t in range(frames):
        before = t - 1 if t % 2 else t - 2
        own = range(N) if t % 4 == 0 else least_similar(flat[t], flat[before], count)
        expected += [t * N + n for n in own]
        budget += len(own)
    assert kept_indices(drop_similar_tokens(latents, seconds, budget, D)) == expected


def test_dycoke_keeps_an_odd_last_frame():
    for frames in (1, 5, 9, 13):
        latents, seconds = drifting_clip(frames)
        kept = kept_of_frames(drop_similar_tokens(latents, seconds, -(-frames // 4) * N * 4 // 3, D))
        assert kept[-1] == N
    latents, seconds = drifting_clip(7)
    # Frame 6 has no partner, and is third of its window.
    assert kept_of_frames(drop_similar_tokens(latents, seconds, 2 * N + 15, D)) == [N, 3, 3, 3, N, 3, 3]


def test_dycoke_leaves_a_quarter_for_what_changes_or_doubles_its_windows():
    latents, seconds = drifting_clip(16)
    for budget, window in ((6 * N, 4), (4 * N, 8), (3 * N, 8), (2 * N, 16), (N, 16)):
        kept = kept_of_frames(drop_similar_tokens(latents, seconds, budget, D))
        assert [t for t, count in enumerate(kept) if count == N] == list(range(0, 16, window))
        others = [count for t, count in enumerate(kept) if t % window]
        assert max(others) - min(others) <= 1 and sum(kept) == budget
        assert len(others) == 15 or 4 * (sum(kept) - sum(others)) <= 3 * budget
    # The three tokens that are left over go to frames all over the clip.
    kept = kept_of_frames(drop_similar_tokens(latents, seconds, N + 3, D))
    assert [t for t, count in enumerate(kept) if count == 1] == [3, 8, 13]
    assert [find_reference(t) for t in range(1, 16)] == [0, 0, 2, 0, 4, 4, 6, 0, 8, 8, 10, 8, 12, 12, 14]


def test_vidcom2_keeps_what_is_least_like_clip_and_frame():
    """Against the formulas, in float64."""
    latents, seconds = drifting_clip(6, channels=8)
    flat = latents.flatten(1, 2).double().numpy()
    calm = np.sort(np.argsort(flat.reshape(-1, 8).var(0))[:4])
    units = flat[..., calm] / np.linalg.norm(flat[..., calm], axis=-1, keepdims=True)
    centres = [units.mean((0, 1)), units.mean(1, keepdims=True)]
    to_clip, to_frame = (
        sum(np.exp(-((units - c) ** 2).sum(-1) / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2)) for c in centres
    )
    scores = -to_clip.mean(1)
    p = np.exp((scores - scores.max()) / 0.01)
    p /= p.sum()
    for budget in (12, 18, 30):
        shares = budget / 6 * (1 + p - p.mean())
        tokens = keep_unusual_tokens(latents, seconds, budget, 8)
        counts = kept_of_frames(tokens)
        assert np.abs(np.array(counts) - shares).max() < 1
        order = (to_clip + to_frame).argsort(1)
        expected = [t * N + n for t, count in enumerate(counts) for n in sorted(order[t, :count].tolist())]
        assert kept_indices(tokens) == expected
    ours = measure_likeness(latents, 8)
    assert np.allclose(ours[0], to_clip, atol=1e-4) and np.allclose(ours[1], to_frame, atol=1e-4)


def test_vidcom2_looks_at_the_channels_that_vary_least():
    latents, _ = drifting_clip(channels=7)
    latents = latents * torch.tensor([10.0, 1, 1, 1, 10, 10, 1])
    assert find_calm_channels(latents, 7).tolist() == [1, 2, 3, 6]


def test_the_counts_of_vidcom2_add_up_to_the_budget():
    generator = torch.Generator().manual_seed(0)
    for frames in (1, 2, 7, 30):
        for scale in (0.0, 0.001, 0.01, 1.0):
            scores = scale * torch.randn(frames, generator=generator, dtype=torch.float64)
            for budget in {1, frames - 1, frames, 3 * frames + 1, 9 * frames, 10 * frames - 1, 10 * frames} - {0}:
                counts = share_budget(scores, 10, budget)
                assert int(counts.sum()) == budget and int(counts.min()) >= 0 and int(counts.max()) <= 10
                by_score = counts[scores.argsort(stable=True)]
                assert scale == 0.0 or bool((by_score.diff() >= 0).all())


def test_vidcom2_gives_an_unusual_frame_twice_its_share_and_never_more_than_it_has():
    scores = torch.zeros(10, dtype=torch.float64)
    scores[4] = 1.0
    # 19 tokens a frame on average; the softmax is 1 at one frame and 0 at the others.
    counts = share_budget(scores, 100, 190)
    assert abs(int(counts[4]) - 19 * 1.9) < 1 and {int(count) for count in counts} <= {17, 18, int(counts[4])}
    full = share_budget(scores, 100, 900)
    assert full[4] == 100 and {int(count) for count in full} == {100, 88, 89}


def brute_force_diverse(tokens, count):
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    apart = 1 - unit @ unit.T
    others = apart + torch.diag(torch.full((len(tokens),), math.inf, dtype=torch.float64))
    chosen = [int(others.min(1).values.argmax())]
    while len(chosen) < count:
        left = [i for i in range(len(tokens)) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(apart[i, chosen].min())))
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_active", [1, 5, 1024])
def test_divprune_is_the_greedy_of_max_min_distance(seed, num_active, monkeypatch):
    monkeypatch.setattr("freres_cli.baselines.falling.NUM_ACTIVE", num_active)
    if num_active == 5:  # blocks and parts that end anywhere
        monkeypatch.setattr("freres_cli.baselines.divprune.BLOCK_TOKENS", 7)
        monkeypatch.setattr("freres_cli.baselines.falling.CHUNK_VALUES", 9 * max(D, 7))
    tokens = torch.randn(40, D, generator=torch.Generator().manual_seed(seed))
    assert choose_diverse(tokens, 39).tolist() == brute_force_diverse(tokens, 39)
    latents, seconds = tokens.reshape(2, 4, 5, D), torch.zeros(2, dtype=torch.float64)
    for budget in (1, 2, 13):
        assert kept_indices(keep_diverse_tokens(latents, seconds, budget, D)) == sorted(
            brute_force_diverse(tokens, budget)
        )


@pytest.mark.parametrize("num_active", [4, 1024])
def test_divprune_takes_repeats_last_however_long_they_are(num_active, monkeypatch):
    monkeypatch.setattr("freres_cli.baselines.falling.NUM_ACTIVE", num_active)
    distinct = torch.randn(9, D, generator=torch.Generator().manual_seed(3))
    which = torch.randint(9, (200,), generator=torch.Generator().manual_seed(4))
    which[:9] = torch.arange(9)
    tokens = distinct[which] * 2.0 ** torch.randint(-3, 4, (200, 1), generator=torch.Generator().manual_seed(5))
    chosen = choose_diverse(tokens, 60).tolist()
    assert sorted(which[chosen[:9]].tolist()) == list(range(9))
    left = [index for index in range(200) if index not in chosen[:9]]
    assert chosen[9:] == left[:51]


def test_ktv_shows_every_scene():
    """Six scenes of unequal length, each with little motion: six key frames, one of each."""
    generator = torch.Generator().manual_seed(0)
    scene = torch.tensor([0] * 9 + [1] * 2 + [2] * 5 + [3] * 1 + [4] * 12 + [5] * 3)
    scenes = 5 * torch.randn(6, H, W, D, generator=generator)
    latents = scenes[scene] + 0.05 * torch.randn(32, H, W, D, generator=generator)
    for budget in (6, 12, 25, 36):
        counts = kept_of_frames(keep_key_tokens(latents, torch.arange(32).double(), budget, D))
        shown = [t for t, count in enumerate(counts) if count]
        assert sorted(scene[shown].tolist()) == list(range(6))
        assert {counts[t] for t in shown} <= {budget // 6, -(-budget // 6)}


def test_ktv_takes_the_frame_nearest_to_the_middle_of_its_cluster():
    features = torch.tensor([[0.0], [1.0], [1.4], [3.0], [50.0], [52.0], [52.5], [54.9]])
    assert sorted(choose_frames(features, 2).tolist()) == [2, 6]


def test_ktv_finds_different_frames_even_if_all_are_equal():
    for count in (1, 2, 5, 9):
        assert len(set(choose_frames(torch.ones(9, 4), count).tolist())) == count


def test_ktv_has_more_key_frames_where_six_would_be_more_than_half_kept():
    latents, seconds = drifting_clip(20)
    for budget, num_keys in ((3, 3), (6, 6), (36, 6), (37, 7), (60, 10), (119, 20), (240, 20)):
        counts = kept_of_frames(keep_key_tokens(latents, seconds, budget, D))
        assert sum(count > 0 for count in counts) == num_keys


def test_the_score_of_ktv_is_that_of_the_paper_with_norms():
    tokens = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    norms, alike = [float(token.norm()) for token in tokens], []
    for i in range(9):
        alike.append(sum(1 - one_minus_cosine(tokens[i], tokens[j]) for j in range(9) if j != i) / 8)

    def minmax(values):
        return [(value - min(values)) / (max(values) - min(values)) for value in values]

    expected = [0.2 * norm + 0.8 * (1 - own) for norm, own in zip(minmax(norms), minmax(alike), strict=True)]
    assert torch.allclose(score_tokens(tokens), torch.tensor(expected), atol=1e-5)
    assert score_tokens(torch.ones(4, D)).tolist() == pytest.approx([0.8] * 4)
    # Products round equal tokens apart, by their place.
    for width, count in ((7, 117), (64, 5), (64, 117), (192, 577)):
        equal = 3 * torch.randn(1, width, generator=torch.Generator().manual_seed(0)).expand(count, -1)
        assert score_tokens(equal).unique().numel() == 1


def test_ts_llava_is_a_thumbnail_of_six_frames_and_samples_from_end_to_end():
    """The latent of a token is its own place, so a mean of latents is a mean of places."""
    places = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in (16, 6, 8)]).reshape(16, 6, 8, 3)
    seconds = torch.arange(16, dtype=torch.float64)
    for budget in (96, 97, 200, 600):
        tokens = sample_with_thumbnail(places, seconds, budget, 3)
        assert torch.allclose(tokens.latents, tokens.positions, atol=1e-5)
        is_thumbnail = (tokens.boxes[:, 1::2] - tokens.boxes[:, 0::2]).prod(1) > 1
        frames, counts = tokens.positions[is_thumbnail, 0].unique(return_counts=True)
        assert frames.tolist() == [0, 3, 6, 9, 12, 15] and counts.tolist() == [8] * 6
        sampled = kept_indices_of(tokens.positions[~is_thumbnail], (16, 6, 8))
        steps = [b - a for a, b in zip(sampled, sampled[1:], strict=False)]
        assert sampled[0] == 0 and sampled[-1] == 16 * 48 - 1 and max(steps) - min(steps) <= 1
        covered = tokens.boxes[is_thumbnail]
        # The thumbnail shows the whole of each of its frames.
        assert int((covered[:, 1::2] - covered[:, 0::2]).prod(1).sum()) == 6 * 48


def kept_indices_of(positions, grid):
    t, h, w = positions.long().unbind(1)
    return ((t * grid[1] + h) * grid[2] + w).tolist()


def test_steps_from_end_to_end_are_those_of_a_rounded_line():
    for size in (1, 2, 7, 16, 100):
        for count in range(2, size + 1):
            exact = [Fraction(i * (size - 1), count - 1) for i in range(count)]
            assert spread_to_ends(count, size).tolist() == [math.floor(value + Fraction(1, 2)) for value in exact]
    assert spread_to_ends(1, 9).tolist() == [0] and spread_to_ends(0, 9).tolist() == []


def test_the_thumbnail_never_takes_more_than_half():
    latents, seconds = drifting_clip(9)
    for budget in (1, 2, 3, 10, 23):
        tokens = sample_with_thumbnail(latents, seconds, budget, D)
        is_thumbnail = (tokens.boxes[:, 1::2] - tokens.boxes[:, 0::2]).prod(1) > 1
        assert int(is_thumbnail.sum()) <= budget // 2
