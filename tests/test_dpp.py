"""DPP and CDPruner: greedy picks of the largest determinant, with or without the relevance to a question."""

from __future__ import annotations

import pytest
import torch

from freres_cli.baselines.cdpruner import measure_relevance, pick_relevant
from freres_cli.baselines.dpp import keep_diverse_tokens, pick_diverse


def random_units(count, width, seed):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def pick_by_determinants(units, relevance, count):
    """The definition, written out: each pick makes the determinant of the kernel of all picks as large as possible."""
    units = torch.nn.functional.normalize(units.double(), dim=1)
    kernel = units @ units.T
    kernel.fill_diagonal_(1.0)
    kernel = relevance.double()[:, None] * kernel * relevance.double()
    picks = []
    for _ in range(count):
        rest = [i for i in range(len(units)) if i not in picks]
        volumes = [float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]])) for i in rest]
        picks.append(rest[volumes.index(max(volumes))])
    return picks


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_active", [1, 3, 1024])
@pytest.mark.parametrize("has_relevance", [False, True])
def test_picks_are_those_of_the_largest_determinant(seed, num_active, has_relevance, monkeypatch):
    monkeypatch.setattr("freres_cli.baselines.falling.NUM_ACTIVE", num_active)
    units = random_units(12, 8, seed)
    relevance = torch.rand(12, generator=torch.Generator().manual_seed(seed)) if has_relevance else torch.ones(12)
    assert pick_diverse(units, relevance, 8).tolist() == pick_by_determinants(units, relevance, 8)


@pytest.mark.parametrize("count", [1, 5, 6, 17, 40, 41])
def test_picks_are_distinct_and_as_many_as_asked(count):
    """Also beyond the number of directions, with repeated tokens, tokens of no length and tokens of no relevance."""
    units = random_units(40, 5, 1)
    units[10:20] = units[:10]
    units[20:24] = 0.0
    relevance = torch.ones(40)
    relevance[24:30] = 0.0
    picks = pick_diverse(units, relevance, count).tolist()
    assert len(picks) == len(set(picks)) == min(count, 40) and min(picks) >= 0 and max(picks) < 40


def test_once_every_direction_is_spent_the_search_starts_over():
    units, relevance = random_units(30, 6, 7), torch.rand(30, generator=torch.Generator().manual_seed(7)) + 0.5
    first, later = pick_diverse(units, relevance, 12).split(6)
    assert first.tolist() == pick_by_determinants(units, relevance, 6)
    rest = torch.tensor([i for i in range(30) if i not in first.tolist()])
    assert later.tolist() == rest[pick_by_determinants(units[rest], relevance[rest], 6)].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_whose_scores_wait_are_picked_as_if_all_followed(dtype, monkeypatch):
    """Over several rounds, with chunks that end anywhere, and tokens of any length."""
    generator = torch.Generator().manual_seed(3)
    tokens = (torch.randn(300, 24, generator=generator) * torch.rand(300, 1, generator=generator)).to(dtype)
    relevance = torch.rand(300, generator=generator)
    monkeypatch.setattr("freres_cli.baselines.falling.NUM_ACTIVE", 300)
    wanted = pick_diverse(tokens, relevance, 80)
    monkeypatch.setattr("freres_cli.baselines.falling.NUM_ACTIVE", 7)
    monkeypatch.setattr("freres_cli.baselines.falling.CHUNK_VALUES", 24 * 41)
    assert torch.equal(pick_diverse(tokens, relevance, 80), wanted)


def test_a_repeated_frame_adds_nothing_until_the_first_is_spent():
    frame = torch.eye(6).view(1, 2, 3, 6)
    tokens = keep_diverse_tokens(frame.repeat(4, 1, 1, 1), torch.arange(4, dtype=torch.float64), 9, 6)
    _, counts = tokens.latents.unique(dim=0, return_counts=True)
    assert len(tokens) == 9 and sorted(counts.tolist()) == [1, 1, 1, 2, 2, 2]


def test_relevance_runs_from_the_least_to_the_most_relevant_token():
    units, words = random_units(30, 8, 2), random_units(4, 8, 3)
    relevance = measure_relevance(units, words)
    cosine = torch.stack([torch.nn.functional.cosine_similarity(units, word[None]) for word in words]).mean(0)
    assert float(relevance.min()) == 0.0 and float(relevance.max()) == 1.0
    assert torch.allclose(relevance, (cosine - cosine.min()) / (cosine.max() - cosine.min()), atol=1e-6)
    assert torch.equal(measure_relevance(units[:1].repeat(3, 1), words), torch.ones(3))
    with pytest.raises(ValueError, match="at least one word"):
        measure_relevance(units, words[:0])


def test_the_first_pick_is_the_most_relevant_and_the_question_decides_it():
    tokens, words = 3 * random_units(30, 8, 4), random_units(5, 8, 5)
    for word in words:
        nearest = int(torch.nn.functional.cosine_similarity(tokens, word[None]).argmax())
        assert pick_relevant(tokens, 7 * word[None], 1).tolist() == [nearest]
    kept = pick_relevant(tokens, words, 12)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 12
    assert kept.tolist() != pick_diverse(random_units(30, 8, 4), torch.ones(30), 12).sort().values.tolist()
