"""Readers: what is rebuilt from tokens follows from the readers' definitions, and shares of energy from those of variance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from freres_cli.baselines.full import keep_every_token
from freres_cli.baselines.registry import BUNDLE_METHODS, METHODS
from freres_cli.evaluation.fidelity import (
    READERS,
    find_nearest,
    find_places,
    hold,
    interpolate,
    lost_by_second,
    measure_energy,
    measure_loss,
)
from freres_cli.evaluation.fidelity import share_kept as share_of
from tests.compressed_clips import smooth_clip
from tests.test_baselines import GRID_CASES, some_latents
from tests.tiny_models import video_tokens

PEERS = [name for name in BUNDLE_METHODS if METHODS[name].compress is not None]
T, H, W, C = 9, 3, 4, 5
N = H * W


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


def tokens_of(method, latents, budget, width=None):
    seconds = torch.arange(latents.shape[0], dtype=torch.float64) / 4
    if not METHODS[method].has_budget:
        budget = latents.shape[:3].numel()
    return METHODS[method].compress(latents, seconds, budget, width or latents.shape[-1])


def rebuilt(reading):
    return reading.frames(slice(None))


def kept(latents, reading):
    width = reading.rows.shape[1]
    return share_of(float(measure_loss(latents, reading.frames, width).sum()), measure_energy(latents, width))


# --- readers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRID_CASES)
@pytest.mark.parametrize("method", PEERS)
def test_from_all_tokens_every_reader_rebuilds_the_clip(read, method, grid):
    latents, _ = some_latents(grid)
    reading = read(tokens_of(method, latents, latents.shape[:3].numel()))
    assert torch.equal(rebuilt(reading), latents.flatten(1, 2)) and kept(latents, reading) == 1


@pytest.mark.parametrize("method", ["full", "uniform", "evs", "dtd"])
def test_a_still_clip_is_rebuilt_from_one_token_a_cell(read, method):
    latents = some_latents((1, H, W))[0].repeat(T, 1, 1, 1)
    # A budget that is no whole number of frames makes uniform drop tokens from all of them.
    for budget in (N, 3 * N) if method == "uniform" else (N, N + 1, 2 * N + 3):
        assert kept(latents, read(tokens_of(method, latents, budget))) == 1


@pytest.mark.parametrize(("method", "segments"), [("tome", 4), ("holitom-norm", 4), ("prunevid", 8)])
def test_still_shots_are_rebuilt_from_one_token_a_cell_and_segment(method, segments):
    """PruneVid cuts eight segments of 32 frames, whatever they show."""
    latents = some_latents((4, 6, 6), 32)[0].repeat_interleave(8, 0)
    tokens = tokens_of(method, latents, segments * 36)
    assert kept(latents, hold(tokens)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("method", "count", "edge"), [("flashvid-div", 3, 1), ("fastvid-norm", 5, 4)])
def test_cells_that_a_token_averages_show_it(read, method, count, edge):
    """Rows of ten cells, which but for their first few are of one colour, averaged into one token each; the first few are
    kept as they are: by FlashVID because they differ, by FastVID because they are the largest."""
    colours = torch.nn.functional.normalize(some_latents((4, 1, 2), 32)[0], dim=-1)
    latents = colours[:, :, 1:].repeat(1, 1, 10, 1)
    latents[:, :, :edge] = 5 * colours[:, :, :1]
    if method == "flashvid-div":
        latents[:, :, 9:] = -latents[:, :, :1]
    assert kept(latents, read(tokens_of(method, latents, 4 * count))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 8])
def test_hold_shows_the_nearest_earlier_frame(num_frames):
    latents, _ = some_latents((T, H, W))
    tokens = tokens_of("uniform", latents, num_frames * N)
    held = tokens.positions[:, 0].unique().long().numpy()
    nearest = held[np.maximum(np.searchsorted(held, np.arange(T), side="right") - 1, 0)]
    assert np.array_equal(rebuilt(hold(tokens)).numpy(), latents.flatten(1, 2).numpy()[nearest])


@pytest.mark.parametrize("method", ["uniform", "evs", "dtd"])
def test_linear_is_numpys_interpolation_of_each_cell(method):
    latents, _ = some_latents((T, H, W), C)
    for budget in (N, 2 * N, 5 * N, T * N):
        tokens = tokens_of(method, latents, budget)
        result = rebuilt(interpolate(tokens)).numpy()
        place = (tokens.positions[:, 1] * W + tokens.positions[:, 2]).long().numpy()
        for own in range(N):
            times, values = tokens.positions[place == own, 0].numpy(), tokens.latents[place == own].numpy()
            for channel in range(C):
                expected = np.interp(np.arange(T), times, values[:, channel])
                np.testing.assert_allclose(result[:, own, channel], expected, atol=1e-6)


def test_a_clip_that_is_linear_in_time_is_rebuilt_from_its_ends():
    first, slope = some_latents((2, H, W), C)[0].double()
    latents = (first + torch.arange(T)[:, None, None, None] * slope).float()
    ends = torch.cat([torch.arange(N), torch.arange((T - 1) * N, T * N)])
    tokens = video_tokens(latents, ends)
    assert kept(latents, interpolate(tokens)) == pytest.approx(1, abs=1e-12)
    assert kept(latents, hold(tokens)) < 0.9


def test_a_cell_without_tokens_shows_the_mean_of_the_nearest_frame(read):
    latents, _ = some_latents((T, H, W), C)
    keep = torch.tensor([2 * N, 2 * N + 3, 6 * N + 3])
    result = rebuilt(read(video_tokens(latents, keep)))
    flat = latents.flatten(1, 2)
    early, late = flat[2, [0, 3]].double().mean(0).float(), flat[6, 3]
    for frame in range(T):
        # Frame 4 is as near to 2 as to 6: the earlier counts.
        assert torch.equal(result[frame, 7], early if frame <= 4 else late)
    assert torch.equal(result[:, 0], flat[2, 0].expand(T, C))


def random_boxes(count, seed):
    """Tokens that stand for overlapping boxes, each somewhere in time within its own."""
    generator = torch.Generator().manual_seed(seed)

    def ends(size, longest):
        first = torch.randint(0, size, (count,), generator=generator)
        return first, (first + 1 + torch.randint(0, longest, (count,), generator=generator)).clamp(max=size)

    spans = [*ends(T, 4), *ends(H, 2), *ends(W, 3)]
    boxes = torch.stack(spans, 1)
    # Quarters of a frame, so that some instants coincide.
    inside = torch.randint(0, 5, (count,), generator=generator) / 4
    positions = (boxes[:, 0::2] + boxes[:, 1::2] - 1) / 2
    positions[:, 0] = boxes[:, 0] + inside * (boxes[:, 1] - 1 - boxes[:, 0])
    latents = torch.randn(T, H, W, C, generator=generator)
    tokens = video_tokens(latents, torch.arange(count))
    return replace(tokens, positions=positions, boxes=boxes)


def preference(boxes, index):
    return -(boxes[index][3] - boxes[index][2]) * (boxes[index][5] - boxes[index][4]), boxes[index][0], index


def mean_of_nearest_frame(tokens, frame):
    boxes = tokens.boxes.tolist()
    held = {t: [i for i, b in enumerate(boxes) if b[0] <= t < b[1]] for t in range(T)}
    nearest = min((t for t in held if held[t]), key=lambda t: (abs(t - frame), t))
    return tokens.latents[held[nearest]].double().mean(0).float()


def hold_one(tokens, frame, h, w):
    """What ``hold`` shows at one place of one frame, by its definition."""
    boxes = tokens.boxes.tolist()

    def best(t):
        found = [i for i, b in enumerate(boxes) if b[0] <= t < b[1] and b[2] <= h < b[3] and b[4] <= w < b[5]]
        return max(found, key=lambda i: preference(boxes, i), default=None)

    for t in [*range(frame, -1, -1), *range(frame + 1, T)]:
        if (index := best(t)) is not None:
            return tokens.latents[index]
    return mean_of_nearest_frame(tokens, frame)


def interpolate_one(tokens, frame, h, w):
    boxes = tokens.boxes.tolist()
    covering = [i for i, b in enumerate(boxes) if b[2] <= h < b[3] and b[4] <= w < b[5]]
    by_time = {}
    for index in sorted(covering, key=lambda i: preference(boxes, i)):
        by_time[float(tokens.positions[index, 0])] = tokens.latents[index].numpy()
    if not by_time:
        return mean_of_nearest_frame(tokens, frame)
    times = sorted(by_time)
    values = np.stack([by_time[t] for t in times])
    return torch.tensor([np.interp(frame, times, values[:, c]) for c in range(C)])


@pytest.mark.parametrize("count", [1, 3, 10, 60])
def test_boxes_are_read_by_definition_at_every_place(count):
    for seed in range(5):
        tokens = random_boxes(count, seed)
        held, line = (rebuilt(read(tokens)).reshape(T, H, W, C) for read in (hold, interpolate))
        for frame, h, w in np.ndindex(T, H, W):
            assert torch.equal(held[frame, h, w], hold_one(tokens, frame, h, w))
            torch.testing.assert_close(line[frame, h, w].double(), interpolate_one(tokens, frame, h, w).double())


def test_a_clip_cut_into_means_loses_the_variance_within_its_boxes():
    """Boxes that tile the clip: hold shows the mean of each, so the lost energy is the sum of squares within them."""
    latents, _ = some_latents((T, H, W), C)
    cuts = [(t, h, w) for t in ((0, 2), (2, 3), (3, T)) for h in ((0, 1), (1, H)) for w in ((0, 3), (3, W))]
    parts = [latents[t[0] : t[1], h[0] : h[1], w[0] : w[1]].double() for t, h, w in cuts]
    rows = torch.stack([part.mean((0, 1, 2)) for part in parts]).float()
    boxes = torch.tensor([[*t, *h, *w] for t, h, w in cuts])
    tokens = replace(video_tokens(latents, torch.arange(len(cuts))), latents=rows, boxes=boxes)
    within = sum(float((part - part.mean((0, 1, 2))).square().sum()) for part in parts)
    whole = float((latents.double() - latents.double().mean((0, 1, 2))).square().sum())
    assert kept(latents, hold(tokens)) == pytest.approx(1 - within / whole, abs=1e-6)


# --- energy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_is_the_variance_of_the_main_channels(dtype):
    latents = (some_latents((T, H, W), 3 * C)[0] + 50).to(dtype)
    flat = latents[..., :C].double().reshape(-1, C).numpy()
    assert measure_energy(latents, C) == pytest.approx(flat.var(0).sum() * len(flat), rel=1e-9)


def test_the_mean_token_in_every_place_keeps_nothing():
    latents, _ = some_latents((T, H, W), C)
    mean = latents.double().mean((0, 1, 2)).float()
    lost = measure_loss(latents, lambda part: mean.expand(T, N, C)[part], C)
    assert share_of(float(lost.sum()), measure_energy(latents, C)) == pytest.approx(0, abs=1e-6)


def test_shares_do_not_depend_on_units_or_deep_rows(read):
    latents, _ = some_latents((T, H, W), 3 * C)
    tokens = tokens_of("evs", latents, 40, C)
    share = kept(latents, read(tokens))
    doubled = kept(latents * 8, read(replace(tokens, latents=tokens.latents * 8)))
    main = kept(latents[..., :C], read(replace(tokens, latents=tokens.latents[:, :C])))
    assert doubled == main == share and share < 1


def test_long_clips_are_compared_in_parts(monkeypatch, read):
    latents, _ = some_latents((T, H, W), C)
    tokens = tokens_of("dtd", latents, 40)
    whole = measure_loss(latents, read(tokens).frames, C), measure_energy(latents, C)
    monkeypatch.setattr("freres_cli.evaluation.fidelity.CHUNK_VALUES", 2 * N * C + 1)
    parts = measure_loss(latents, read(tokens).frames, C), measure_energy(latents, C)
    assert torch.equal(whole[0], parts[0]) and parts[1] == pytest.approx(whole[1], rel=1e-12)


def test_a_clip_without_energy_has_nothing_to_lose():
    latents = torch.full((T, H, W, C), 0.1)
    assert measure_energy(latents, C) == 0 and share_of(0, 0) == 1
    # Nor has one of equal tokens that were rounded apart, as a tower's are.
    apart = latents * (1 + 1e-6 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)))
    assert measure_energy(apart, C) == 0 < measure_energy(latents + 1e-3 * (apart > latents), C)
    assert lost_by_second(torch.zeros(T).double(), 0, range(T)) == [0] * T


def test_frames_that_are_there_several_times_are_met_in_the_middle():
    values = torch.tensor([0.0, 1, 1, 1, 1, 2, 3, 3, 3])
    for wanted, places in [
        ([0, 1, 2, 3], [0, 3, 5, 7]),
        ([1, 1], [2, 4]),
        ([0.4, 0.6, 1.2, 9], [0, 2, 4, 7]),
        ([1] * 4, [1, 2, 3, 4]),
    ]:
        assert find_places(values, torch.tensor(wanted, dtype=torch.float32)).tolist() == places
    once = torch.tensor([0.0, 0.5, 2])
    wanted = torch.linspace(-1, 3, 41)
    assert torch.equal(find_places(once, wanted), find_nearest(once, wanted))


def test_what_is_lost_by_second_adds_up():
    generator = torch.Generator().manual_seed(0)
    lost = torch.rand(40, generator=generator, dtype=torch.float64)
    # 2.3 - 0.3 is a little less than 2.
    seconds = [0.3 + frame / 10 for frame in range(40)]
    curve = lost_by_second(lost, 50.0, seconds)
    assert len(curve) == 4 and math.isclose(sum(curve), 1 - share_of(float(lost.sum()), 50.0))
    assert curve == pytest.approx([float(lost[s : s + 10].sum()) / 50 for s in range(0, 40, 10)])
    # A second without a frame loses nothing.
    assert lost_by_second(torch.tensor([1.0, 2.0]).double(), 4.0, [0.5, 2.6]) == [0.25, 0, 0.5]


@pytest.mark.parametrize("method", [name for name in PEERS if METHODS[name].has_budget])
def test_more_tokens_keep_more_of_a_smooth_clip(read, method):
    latents = smooth_clip(24, (6, 6))
    shares = [kept(latents, read(tokens_of(method, latents, budget))) for budget in (36, 144, 432, 864)]
    assert shares == sorted(shares) and shares[0] < shares[2] < shares[3] == 1


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRID_CASES)
def test_a_token_of_lowres_is_the_mean_of_its_box(grid):
    latents, _ = some_latents(grid)
    full = latents.shape[:3].numel()
    for budget in {1, 2, 3, grid[0], grid[0] * 2 + 1, full // 2, full - 1} - {0}:
        tokens = tokens_of("lowres", latents, budget)
        for row, (t0, t1, h0, h1, w0, w1) in zip(tokens.latents, tokens.boxes.tolist(), strict=True):
            torch.testing.assert_close(row, latents[t0:t1, h0:h1, w0:w1].mean((0, 1, 2)))
        covered = torch.zeros(grid, dtype=torch.bool)
        for t0, t1, h0, h1, w0, w1 in tokens.boxes.tolist():
            covered[t0:t1, h0:h1, w0:w1] = True
        assert bool(covered[tokens.boxes[:, 0]].all())


@pytest.mark.parametrize(
    "change",
    [
        lambda boxes: boxes[:-1],
        lambda boxes: boxes[:, :5],
        lambda boxes: boxes.float(),
        lambda boxes: boxes - torch.tensor([1, 0, 0, 0, 0, 0]),
        lambda boxes: boxes + torch.tensor([0, 0, 0, 0, 0, 1]),
        lambda boxes: boxes[:, [1, 0, 2, 3, 4, 5]],
    ],
)
def test_boxes_that_are_not_on_the_grid_are_refused(change):
    latents, seconds = some_latents((1, H, W))
    tokens = keep_every_token(latents, seconds, N, 8)
    boxes = torch.tensor([[0, 1, h, h + 1, w, w + 1] for h in range(H) for w in range(W)])
    assert torch.equal(replace(tokens, boxes=boxes).boxes, boxes) and tokens.boxes is None
    with pytest.raises(ValueError, match="boxes: expected"):
        replace(tokens, boxes=change(boxes))
