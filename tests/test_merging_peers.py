"""Fourier Compressor, ToMe and ApET: what they mix follows from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch

from freres_cli.baselines.apet import choose_basis, measure_error, merge_into_unusual_tokens
from freres_cli.baselines.fourier import crop_frequencies, make_crop
from freres_cli.baselines.fourier_raw import crop_raw_frequencies
from freres_cli.baselines.tome import merge_similar_tokens, place_groups
from tests.test_change_baselines import kept_indices, one_minus_cosine

D = 6
MERGING = [merge_similar_tokens]


def random_clip(*grid, channels=D, seed=0):
    return torch.randn(*grid, channels, generator=torch.Generator().manual_seed(seed)), torch.arange(grid[0]).double()


def place_clip(*grid):
    """The latent of a token is its own place, so a mean of latents is a mean of places."""
    axes = [torch.arange(n, dtype=torch.float32) for n in grid]
    return torch.cartesian_prod(*axes).reshape(*grid, 3) + 1, torch.arange(grid[0]).double()


@pytest.mark.parametrize(("cells", "h", "w"), [(4, 2, 2), (16, 4, 4), (36, 6, 6), (12, 3, 4), (64, 8, 8), (1, 1, 1)])
def test_fourier_is_a_crop_of_the_orthonormal_2d_dct(cells, h, w):
    """Against scipy. Grids on which the cells are h by w."""
    grid_h, grid_w = (6, 8) if (h, w) == (3, 4) else (8, 8)
    latents, seconds = random_clip(3, grid_h, grid_w)
    spectrum = scipy.fft.dctn(latents.double().numpy(), axes=(1, 2), norm="ortho")[:, :h, :w]
    raw = torch.from_numpy(scipy.fft.idctn(spectrum, axes=(1, 2), norm="ortho")).float().flatten(0, 2)
    assert torch.allclose(crop_raw_frequencies(latents, seconds, 3 * cells, D).latents, raw, atol=1e-5)
    scale = math.sqrt(h * w / (grid_h * grid_w))
    assert torch.allclose(crop_frequencies(latents, seconds, 3 * cells, D).latents, scale * raw, atol=1e-5)


def test_the_crop_at_full_size_is_the_identity():
    latents, seconds = random_clip(3, 5, 7)
    for method in (crop_frequencies, crop_raw_frequencies):
        assert torch.equal(method(latents, seconds, 3 * 35, D).latents, latents.flatten(0, 2))
    for size in (1, 2, 7):
        assert torch.equal(make_crop(size, size, True), torch.eye(size))


def test_constant_frames_stay_constant_only_if_they_are_rescaled():
    latents = torch.tensor([2.0, -1, 0, 3, 5, 1]).expand(4, 6, 6, D)
    seconds = torch.arange(4).double()
    for budget in (2, 4, 16, 31, 36, 51, 100):
        assert torch.allclose(crop_frequencies(latents, seconds, budget, D).latents, latents[0, 0, 0], atol=1e-5)
    raw = crop_raw_frequencies(latents, seconds, 36, D).latents
    assert torch.allclose(raw, 2 * latents[0, 0, 0], atol=1e-5)
    assert torch.allclose(crop_raw_frequencies(latents, seconds, 4, D).latents, 6 * latents[0, 0, 0], atol=1e-5)


def test_what_is_smooth_survives_the_crop_at_its_new_places():
    """The lowest waves of the DCT, read at the centres of fewer cells, are themselves."""
    centres = (torch.arange(12) + 0.5) / 12
    wave = torch.cos(math.pi * centres)[:, None] * torch.cos(2 * math.pi * centres)
    cropped = crop_frequencies(wave.reshape(1, 12, 12, 1), torch.zeros(1).double(), 36, 1)
    h, w = ((cropped.positions[:, axis] + 0.5) / 12 for axis in (1, 2))
    assert torch.allclose(cropped.latents[:, 0], torch.cos(math.pi * h) * torch.cos(2 * math.pi * w), atol=1e-5)


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("grid", [(1, 4, 5), (6, 3, 4), (7, 2, 3), (13, 1, 1)], ids=str)
def test_a_merged_token_is_the_mean_of_what_it_holds_at_its_mean_place(method, grid):
    latents, seconds = place_clip(*grid)
    for budget in (1, 2, 5, 11):
        tokens = method(latents, seconds, budget, 3)
        assert torch.allclose(tokens.latents - 1, tokens.positions, atol=1e-4)
        assert torch.allclose(tokens.seconds, tokens.positions[:, 0].double(), atol=1e-5)


@pytest.mark.parametrize("method", MERGING)
def test_one_token_is_the_mean_of_the_clip_so_every_token_weighs_the_same(method):
    latents, seconds = random_clip(11, 3, 4)
    tokens = method(latents, seconds, 1, D)
    assert torch.allclose(tokens.latents[0], latents.mean((0, 1, 2)), atol=1e-5)
    assert tokens.positions.tolist() == [[5.0, 1.0, 1.5]] and tokens.boxes.tolist() == [[0, 11, 0, 3, 0, 4]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("frames", [2, 4, 5])
def test_tome_merges_the_most_similar_pair_of_a_pair_of_frames_first(frames, seed):
    latents, seconds = random_clip(frames, 2, 3, seed=seed)
    flat = latents.flatten(0, 2)
    pairs = [
        (a, b) for t in range(0, frames - 1, 2) for b in range(6 * t, 6 * t + 6) for a in range(6 * t + 6, 6 * t + 12)
    ]
    one, two = min(pairs, key=lambda pair: one_minus_cosine(flat[pair[0]], flat[pair[1]]))
    tokens = merge_similar_tokens(latents, seconds, 6 * frames - 1, D)
    merged = (flat[one] + flat[two]) / 2
    left = torch.stack([row for index, row in enumerate(flat) if index not in (one, two)] + [merged])
    assert torch.allclose(tokens.latents.sort(0).values, left.sort(0).values, atol=1e-6)
    assert bool((tokens.latents - merged).abs().amax(1).min() < 1e-6)


def tome_by_definition(latents, budget):
    """The latents that each token holds, in order of the first: rounds of links, one at a time."""
    num_frames, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    flat, held = latents.flatten(0, 2), [[index] for index in range(num_frames * per_frame)]
    num_rounds, done = math.ceil(math.log2(num_frames)), 0
    while len(held) > budget:
        units = [torch.nn.functional.normalize(flat[own].sum(0), dim=0) for own in held]
        links = []
        for later, own in enumerate(held):
            frame = own[0] // per_frame
            pair = frame >> (done + 1)  # of groups of frames
            before = [n for n in range(later) if held[n][0] // per_frame >> (done + 1) == pair]
            if done == 0 and num_frames > 1:
                before = [n for n in before if held[n][0] // per_frame < frame]
            if before:
                best = max(before, key=lambda n: (float(units[later] @ units[n]), -n))
                links.append((float(units[later] @ units[best]), later, best))
        done += 1
        goal = max(budget, len(held) - len(held) // 2)
        if done < num_rounds:
            goal = max(goal, int(len(flat) * (budget / len(flat)) ** (done / num_rounds)))
        into = list(range(len(held)))
        for _, later, earlier in sorted(links, key=lambda link: -link[0])[: max(0, len(held) - goal)]:
            into[later] = earlier
        for later in range(len(held)):
            into[later] = into[into[later]]
        held = [[i for n, own in enumerate(held) if into[n] == head for i in own] for head in sorted(set(into))]
    return held


@pytest.mark.parametrize(("frames", "budget"), [(4, 5), (4, 9), (5, 7), (8, 4), (8, 20), (7, 12), (1, 3), (2, 3)])
def test_tome_is_its_definition(frames, budget):
    latents, seconds = random_clip(frames, 2, 3, seed=frames + budget)
    tokens = merge_similar_tokens(latents, seconds, budget, D)
    held = tome_by_definition(latents, budget)
    means = torch.stack([latents.flatten(0, 2)[own].mean(0) for own in held])
    assert len(tokens) == len(held) == budget
    assert torch.allclose(tokens.latents.sort(0).values, means.sort(0).values, atol=1e-5)


def test_tome_spreads_merging_over_its_rounds():
    """Half of each picture is in all frames, half of it in every second. All that is merged is equal, because frames 0 and
    1 need not give up what they do not share before they are compared with 2 and 3."""
    one, two = random_clip(1, 1, 4, seed=1)[0], random_clip(1, 1, 4, seed=2)[0]
    two[:, :, :2] = one[:, :, :2]
    shown = torch.cat([one, two[:, :, 2:]], 2).flatten(0, 2)
    for budget in (9, 12):
        tokens = merge_similar_tokens(torch.cat([one, two, one, two]), torch.arange(4).double(), budget, D)
        apart = (tokens.latents[:, None] - shown).abs().amax(-1).min(1).values
        assert len(tokens) == budget and float(apart.max()) < 1e-5


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_tome_finds_all_that_is_alike_before_it_merges_what_is_not(length, noise):
    """Four still shots, and as many tokens as they have cells. Deep rows say of which cell and shot a token is."""
    shots = random_clip(4, 6, 6, channels=144)[0].repeat_interleave(length, 0)
    shots = shots + noise * random_clip(4 * length, 6, 6, channels=144, seed=1)[0]
    marks = torch.eye(144).reshape(4, 6, 6, 144).repeat_interleave(length, 0)
    tokens = merge_similar_tokens(torch.cat([shots, marks], -1), torch.arange(4 * length).double(), 144, 144)
    assert len(tokens) == 144 and float(tokens.latents[:, 144:].amax(1).min()) > 0.999


@pytest.mark.parametrize("frames", [2, 3, 4, 7, 8])
def test_tome_makes_one_picture_of_a_still_clip(frames):
    picture, _ = random_clip(1, 3, 4)
    tokens = merge_similar_tokens(picture.expand(frames, 3, 4, D), torch.arange(frames).double(), 12, D)
    assert torch.allclose(tokens.latents, picture.flatten(0, 2), atol=1e-5)
    assert tokens.boxes[:, :2].tolist() == [[0, frames]] * 12
    assert tokens.positions[:, 0].tolist() == [(frames - 1) / 2] * 12


def test_groups_that_fill_a_box_have_it_and_others_their_time():
    latents, seconds = random_clip(3, 2, 2)
    # A cell over time, a cell with a gap, a row of a frame, and two corners of frames that follow each other.
    owner = torch.tensor([[[0, 1], [2, 2]], [[0, 3], [4, 5]], [[0, 1], [3, 5]]]).flatten()
    tokens = place_groups(latents, seconds, owner, D)
    boxes = {tuple(place): box for place, box in zip(tokens.positions.tolist(), tokens.boxes.tolist(), strict=True)}
    assert boxes == {
        (1, 0, 0): [0, 3, 0, 1, 0, 1],
        (1, 0, 1): [0, 3, 0, 1, 1, 2],
        (0, 1, 0.5): [0, 1, 1, 2, 0, 2],
        (1.5, 0.5, 0.5): [1, 3, 1, 2, 1, 2],
        (1, 1, 0): [1, 2, 1, 2, 0, 1],
        (1.5, 1, 1): [1, 3, 1, 2, 1, 2],
    }
    assert tokens.positions.tolist() == sorted(tokens.positions.tolist())


def test_apet_samples_its_basis_farthest_point_first():
    tokens = torch.randn(60, D, generator=torch.Generator().manual_seed(0))
    points = tokens.double().numpy()
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmax())]
    while len(chosen) < 10:
        apart = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(1)
        chosen.append(int(apart.argmax()))
    assert choose_basis(tokens).tolist() == chosen
    assert sorted(choose_basis(tokens[:7]).tolist()) == list(range(7))
    assert len(set(choose_basis(torch.ones(20, D)).tolist())) == 10


def test_the_error_of_apet_is_what_least_squares_leaves():
    tokens = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    basis = choose_basis(tokens)
    rows = tokens[basis].double().numpy()
    weights = np.linalg.lstsq(rows.T, tokens.double().numpy().T, rcond=None)[0]
    left = np.linalg.norm(tokens.double().numpy() - weights.T @ rows, axis=1)
    ours = measure_error(tokens, basis)
    assert np.allclose(ours, left, atol=1e-4) and float(ours[basis].max()) < 1e-4
    # A mix of basis tokens tells nothing new.
    assert float(measure_error(torch.cat([tokens, 3 * tokens[basis[:1]] - tokens[basis[1:2]]]), basis)[-1]) < 1e-3


def test_apet_keeps_seeds_and_the_largest_errors_and_merges_the_others_into_the_most_similar_of_these():
    latents, seconds = random_clip(4, 3, 4, channels=16)
    flat = latents.flatten(0, 2)
    basis = choose_basis(flat)
    error = measure_error(flat, basis)
    for budget, num_seeds in ((2, 0), (9, 2), (33, 10)):
        seeds = basis[:num_seeds].tolist()
        others = [i for i in range(48) if i not in seeds]
        kept = sorted(others, key=lambda i: -float(error[i]))[: budget - num_seeds]
        groups = {i: [i] for i in kept}
        for i in others:
            if i not in groups:
                groups[min(kept, key=lambda j: one_minus_cosine(flat[i], flat[j]))].append(i)
        groups |= {i: [i] for i in seeds}
        tokens = merge_into_unusual_tokens(latents, seconds, budget, 16)
        assert kept_indices(tokens) == sorted(groups)
        means = torch.stack([flat[groups[i]].mean(0) for i in sorted(groups)])
        torch.testing.assert_close(tokens.latents, means, atol=1e-5, rtol=0)


def test_apet_loses_nothing_that_is_there_once():
    """Things unlike all else are the basis itself; they have no error, and are kept all the same."""
    generator = torch.Generator().manual_seed(0)
    latents = (torch.randn(64, generator=generator) + 0.01 * torch.randn(12, 6, 6, 64, generator=generator)).clone()
    things = torch.randn(6, 64, generator=generator)
    for place, thing in enumerate(things):
        latents[2 * place, place, place] = thing
    tokens = merge_into_unusual_tokens(latents, torch.arange(12.0).double(), 43, 64)
    units = torch.nn.functional.normalize(tokens.latents, dim=1)
    assert float((torch.nn.functional.normalize(things, dim=1) @ units.T).amax(1).min()) > 0.999
