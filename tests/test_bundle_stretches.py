"""Bundles of stretches: what no clip can have is refused by name, fast and in little memory; what is accepted can be cut."""

from __future__ import annotations

import random
import resource
import time

import pytest
import torch

from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.errors import ExitStatus
from freres_cli.stretches import STRETCH_COLUMNS, Stretches
from freres_cli.tracks import LATENT_DTYPES
from tests.forged_bundles import MANIFEST, WIDTH, edit_manifest, forge, make_stretches, manifest_for, smooth_latents
from tests.runner import check_failure, fails, run_freres

BUDGET = 120
WITHOUT_TRENDS = {**MANIFEST["settings"], "method": {"value": "adaptive", "source": "flag"}}
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
REAL = [name for name, column in STRETCH_COLUMNS.items() if column.dtype != "int64"]


def latents_with_a_cut():
    latents = smooth_latents()
    latents[20:] = smooth_latents().flip(2)[20:] - 9.0
    return latents


@pytest.fixture(scope="module")
def stretches():
    """A clip of 40 frames of 8x8 tokens with a cut, in 120 stretches."""
    made = make_stretches(latents_with_a_cut(), BUDGET)
    sides = (made.boxes[:, 1::2] - made.boxes[:, ::2]).amax(0)
    assert made.cut_frame.tolist() == [20] and sides[0] > 1 and sides[1:].max() > 1
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "b.pt"


def tensors_of(content: Stretches) -> dict[str, torch.Tensor]:
    return {name: getattr(content, name).clone() for name in STRETCH_COLUMNS}


def check_refused(path, stretches, changes, text, **sections):
    """The file with these tensors is refused, by a message with this text, by every verb that reads it."""
    forge(path, stretches, {**tensors_of(stretches), **changes}, **sections)
    with fails(ExitStatus.BUNDLE, f"{path}: damaged bundle: {text}"):
        read_bundle(path)
    return path


def changed(stretches, name, edit):
    """One tensor with an edit made in place."""
    tensor = getattr(stretches, name).clone()
    edit(tensor)
    return {name: tensor}


def set_to(row, value):
    return lambda tensor: tensor.__setitem__(row, torch.as_tensor(value, dtype=tensor.dtype))


# --- written and read -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(path, stretches):
    write_bundle(path, stretches, manifest_for(stretches))
    read = read_bundle(path)
    assert read.schema_version == 4 and read.manifest["content"] == "stretches"
    assert isinstance(read.content, Stretches) and read.content.grid == stretches.grid
    for name in STRETCH_COLUMNS:
        assert torch.equal(getattr(read.content, name), getattr(stretches, name)), name
    assert read.manifest["tokens"]["quality"] == read.content.quality == stretches.quality


def test_without_trends_a_bundle_is_as_small_as_one_of_version_3(path, tmp_path, stretches):
    without = make_stretches(latents_with_a_cut(), BUDGET, keeps_trends=False)
    write_bundle(path, without, manifest_for(without))
    write_bundle(tmp_path / "larger.pt", stretches, manifest_for(stretches))
    read = read_bundle(path).content
    assert not read.has_trends and read.trends.shape == (BUDGET, 0)
    assert all(torch.equal(getattr(read, n), getattr(stretches, n)) for n in STRETCH_COLUMNS if n != "trends")
    added = (tmp_path / "larger.pt").stat().st_size - path.stat().st_size
    assert added == pytest.approx(stretches.latents.nbytes, rel=0.1), "a trend is as large as a mean"


def test_a_bundle_of_version_3_has_no_trends_and_can_be_cut(path, tmp_path, stretches):
    forge(path, stretches, tensors_of(stretches), version=3, settings=WITHOUT_TRENDS)
    read = read_bundle(path)
    assert read.schema_version == 3 and not read.content.has_trends and "trends" in read.manifest["settings"]
    assert run_freres("repack", path, "--budget", 30, "-o", tmp_path / "small.pt").status == 0
    small = read_bundle(tmp_path / "small.pt")
    assert small.schema_version == 4 and not small.content.has_trends and len(small.content) == 30


@pytest.mark.parametrize("num_frames", [1, 2, 40])
@pytest.mark.parametrize("budget", [1, 2, 63, 64, 2**20])
def test_every_budget_gives_a_bundle_that_is_accepted(path, num_frames, budget):
    made = make_stretches(smooth_latents(num_frames), budget)
    assert len(made) == min(budget, num_frames * 64)
    forge(path, made, tensors_of(made))
    baseline = {**manifest_for(made)["sampling"], "baseline_frames": num_frames}
    tokens = {**manifest_for(made)["tokens"], "full_tokens": num_frames * 64}
    forge(path, made, tensors_of(made), sampling=baseline, tokens=tokens)
    assert len(read_bundle(path).content) == len(made)


@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (9, 2), (1, 1)])
def test_any_grid_is_accepted(path, grid):
    latents = torch.randn(11, *grid, WIDTH, generator=torch.Generator().manual_seed(1))
    for budget in (1, 5, 11):
        made = make_stretches(latents, budget)
        sampling = {**manifest_for(made)["sampling"], "baseline_frames": 11}
        tokens = {**manifest_for(made)["tokens"], "full_tokens": latents[..., 0].numel()}
        forge(path, made, tensors_of(made), sampling=sampling, tokens=tokens)
        assert read_bundle(path).content.grid == (11, *grid)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRETCH_COLUMNS)
def test_a_column_that_is_missing_or_of_another_type_or_shape_is_refused(path, stretches, name):
    column, tensor = STRETCH_COLUMNS[name], getattr(stretches, name)
    for dtype in ("float64", "float32", "bfloat16", "int64", "uint8"):
        if dtype not in (LATENT_DTYPES if column.is_latent else (column.dtype,)):
            forged = tensor.to(getattr(torch, dtype))
            check_refused(path, stretches, {name: forged}, f"{name}: expected ")
    for forged in (tensor[:-1], tensor[:0], tensor[..., None], tensor.flatten()[:0].reshape(0, 3)):
        if name == "cut_frame" and forged.ndim == 1:
            continue  # fewer cuts are a clip's too
        forge(path, stretches, {**tensors_of(stretches), name: forged.contiguous()})
        with fails(ExitStatus.BUNDLE, f"{path}: damaged bundle: "):
            read_bundle(path)
    without = tensors_of(stretches)
    del without[name]
    forge(path, stretches, without)
    check_failure(run_freres("inspect", path), ExitStatus.BUNDLE, f"damaged bundle: tensor {name} is missing")


@pytest.mark.parametrize("name", REAL)
def test_a_real_column_is_finite(path, stretches, name):
    for value in NOT_FINITE:
        changes = changed(stretches, name, lambda tensor, value=value: tensor.view(-1)[-1:].fill_(value))
        check_refused(path, stretches, changes, f"{name}: expected finite numbers, got NaN or infinity")


def test_trends_that_no_stretch_has_are_refused(path, stretches):
    trends, many = stretches.trends, make_stretches(latents_with_a_cut(), 2000)
    moments = (many.boxes[:, 1] - many.boxes[:, 0] == 1).nonzero().squeeze(1)
    for moment in moments[[0, -1]].tolist():
        changes = changed(many, "trends", set_to((moment, 3), 0.5))
        check_refused(path, many, changes, "trends: expected 0 for a stretch of one frame")
    check_refused(path, stretches, {"trends": trends.bfloat16()}, "trends: expected torch.float32, as the latents")
    half = trends[:, : WIDTH // 2].contiguous()
    check_refused(path, stretches, {"trends": half}, f"trends: expected ({BUDGET}, {WIDTH}), got")
    check_refused(path, stretches, {"trends": trends[:, :0].contiguous()}, f"trends: expected {WIDTH} channels")
    told = "trends: expected 0 channels, as settings.trends is drop"
    check_refused(path, stretches, {}, told, settings=WITHOUT_TRENDS)


@pytest.mark.parametrize(
    ("column", "value"), [(0, -1), (0, 40), (1, 41), (1, 0), (2, -1), (3, 9), (4, -(2**63)), (5, 2**63 - 1), (5, 0)]
)
def test_a_box_that_leaves_the_grid_or_holds_nothing_is_refused(path, stretches, column, value):
    changes = changed(stretches, "boxes", set_to((7, column), value))
    check_refused(path, stretches, changes, "boxes: expected at least one cell each, on the grid")


def test_boxes_that_overlap_or_leave_a_gap_are_refused_even_if_their_sizes_sum_up(path, stretches):
    """Time edges that two neighbours of a cell share are moved apart, so that the sizes of two pairs make up for it."""
    boxes = stretches.boxes
    rows = {tuple(row): i for i, row in enumerate(boxes.tolist())}
    follows = [(i, j) for a, i in rows.items() for b, j in rows.items() if a[1] == b[0] and a[2:] == b[2:]]
    sizes = boxes[:, 1::2] - boxes[:, ::2]
    single = [(i, j) for i, j in follows if sizes[i, 1:].prod() == 1 and sizes[[i, j], 0].min() > 2]
    (a, _), (_, d) = single[0], next(pair for pair in single if not set(pair) & set(single[0]))
    forged = boxes.clone()
    forged[a, 1] += 1  # overlaps with what follows it
    forged[d, 0] += 1  # leaves a gap before it
    assert int((forged[:, 1::2] - forged[:, ::2]).prod(1).sum()) == 40 * 64
    order = sorted(range(BUDGET), key=lambda i: (forged[i, ::2] + forged[i, 1::2]).tolist())
    names = torch.empty(BUDGET, dtype=torch.int64).scatter_(0, torch.tensor(order), torch.arange(BUDGET))
    merges = torch.cat([names, torch.arange(BUDGET, 2 * BUDGET)])[stretches.merges]
    check_refused(path, stretches, {"boxes": forged[order], "merges": merges}, "merges: expected two that")


@pytest.mark.parametrize("column", [2, 3, 4, 5])
def test_a_gap_at_the_edge_of_a_box_is_refused(path, column):
    """The last merge of all seems to give the whole clip, but one of its two halves is smaller than the other."""
    made = make_stretches(latents_with_a_cut(), 2)
    assert made.merges.tolist() == [[0, 1]] and made.boxes[:, 2:].tolist() == [[0, 8, 0, 8]] * 2
    changes = changed(made, "boxes", set_to((1, column), 1 if column % 2 == 0 else 7))
    check_refused(path, made, changes, "merges: expected two that make a box")


def test_boxes_out_of_order_are_refused(path, stretches):
    swapped = [1, 0, *range(2, len(stretches))]
    names = torch.tensor([*swapped, *range(len(stretches), 2 * len(stretches))])
    changes = {"boxes": stretches.boxes[swapped], "latents": stretches.latents[swapped]}
    changes["merges"] = names[stretches.merges]
    check_refused(path, stretches, changes, "boxes: expected the order of the sequence")


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ((0, 0), -1),
        ((0, 1), BUDGET),
        ((5, 0), BUDGET + 5),
        ((-1, 1), 2 * BUDGET),
        ((-1, 0), 2**62),
        ((3, 0), "the row before"),
    ],
)
def test_merges_that_repeat_a_row_or_need_a_later_one_are_refused(path, stretches, row, value):
    value = stretches.merges[2, 0] if isinstance(value, str) else value
    check_refused(path, stretches, changed(stretches, "merges", set_to(row, value)), "merges: expected each row once")


def test_merges_of_stretches_that_are_not_neighbours_are_refused(path, stretches):
    """Any two rows that are used by different merges are exchanged, with a few seeds."""
    dice = random.Random(0)
    refused = 0
    for _ in range(20):
        i, j = dice.sample(range(len(stretches.merges)), 2)
        forged = stretches.merges.clone()
        forged[i, 0], forged[j, 0] = stretches.merges[j, 0], stretches.merges[i, 0]
        forge(path, stretches, {**tensors_of(stretches), "merges": forged})
        with fails(ExitStatus.BUNDLE, "damaged bundle: merges: expected "):
            read_bundle(path)
        refused += 1
    assert refused == 20
    backwards = stretches.merges.flip(1).contiguous()
    check_refused(path, stretches, {"merges": backwards}, "merges: expected two that")


def test_losses_and_energies_below_zero_are_refused(path, stretches):
    for name in ("merge_loss", "energy"):
        changes = changed(stretches, name, set_to(-1, -1e-9))
        check_refused(path, stretches, changes, f"{name}: expected 0 or more")
    huge = {"merge_loss": torch.full_like(stretches.merge_loss, 1e308)}
    check_refused(path, stretches, huge, "merge_loss: expected 0 or more, with a finite sum")


def test_a_curve_that_is_none_is_refused(path, stretches):
    def swap(tensor):
        tensor[[3, 4]] = tensor[[4, 3]]

    for edit in (swap, set_to(3, int(stretches.curve_tokens[4]))):
        check_refused(path, stretches, changed(stretches, "curve_tokens", edit), "curve_tokens: expected fewer in")
    for row, value in ((0, BUDGET - 1), (0, 40 * 64 + 1), (-1, 2), (-1, 0), (-1, -5)):
        changes = changed(stretches, "curve_tokens", set_to(row, value))
        check_refused(path, stretches, changes, "curve_tokens: expected ")
    check_refused(path, stretches, changed(stretches, "curve_loss", swap), "curve_loss: expected 0 or more, and more")
    check_refused(path, stretches, changed(stretches, "curve_loss", set_to(0, -1.0)), "curve_loss: expected 0 or more")
    empty = {name: getattr(stretches, name)[:0] for name in ("curve_tokens", "curve_loss")}
    check_refused(path, stretches, empty, "curve_tokens: expected ")


@pytest.mark.parametrize("cuts", [[0], [-1], [40], [20, 20], [25, 20], [2**62], [39, 40]])
def test_cuts_that_are_no_frames_in_order_are_refused(path, stretches, cuts):
    check_refused(path, stretches, {"cut_frame": torch.tensor(cuts)}, "cut_frame: expected frames")


@pytest.mark.parametrize("quality", [0.5, 1.0, 0, None, -3])
def test_a_quality_that_the_tensors_do_not_have_is_refused(path, stretches, quality):
    write_bundle(path, stretches, manifest_for(stretches))
    edit_manifest(path, lambda manifest: manifest["tokens"].update(quality=quality))
    check_failure(run_freres("inspect", path), ExitStatus.BUNDLE, f"tokens.quality: expected {stretches.quality}")


def test_other_contents_and_methods_have_no_stretches(path, stretches):
    write_bundle(path, stretches, manifest_for(stretches))
    edit_manifest(path, lambda m: m["settings"]["method"].update(value="uniform"))
    with fails(ExitStatus.BUNDLE, "content: method uniform does not make stretches"):
        read_bundle(path)
    edit_manifest(path, lambda m: (m.update(content="tokens"), m["tokens"].update(quality=None)))
    with fails(ExitStatus.BUNDLE, "damaged bundle: tensor "):
        read_bundle(path)


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ((2**31, 2**31, 2**31), "frame_seconds: expected"),
        ((40, 2**31, 2**31), "boxes: expected a grid with fewer cells"),
        ((40, 2**28, 2**28), "boxes: expected to cover the clip once"),
        ((40, 8, 9), "boxes: expected to cover the clip once"),
        ((40, 7, 8), "boxes: expected at least one cell each"),
    ],
)
def test_a_huge_or_another_grid_is_refused_in_no_time_and_little_memory(path, stretches, grid, text):
    geometry = {**manifest_for(stretches)["geometry"], "grid": list(grid)}
    tokens = manifest_for(stretches)["tokens"]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    check_refused(path, stretches, {}, text, geometry=geometry, tokens=tokens)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16, "64 MiB"


def test_many_stretches_are_checked_in_little_time(path):
    """20,000 single cells of one frame each, and merges one after the other, which cannot run together."""
    count = 20_000
    latents, merges = torch.zeros(count, WIDTH), torch.arange(1, count)[:, None].repeat(1, 2)
    merges[1:, 0] = torch.arange(count, 2 * count - 2)
    merges[0, 0] = 0
    time_of = torch.arange(count)
    made = Stretches(
        width=WIDTH,
        grid=(count, 1, 1),
        frame_seconds=time_of.double(),
        latents=latents,
        trends=torch.zeros(count, WIDTH),
        boxes=torch.stack([time_of, time_of + 1, *[torch.zeros_like(time_of), torch.ones_like(time_of)] * 2], dim=1),
        merges=merges,
        merge_loss=torch.zeros(count - 1, dtype=torch.float64),
        energy=torch.zeros(2, dtype=torch.float64),
        curve_tokens=torch.tensor([count, 1]),
        curve_loss=torch.zeros(2, dtype=torch.float64),
        cut_frame=torch.zeros(0, dtype=torch.int64),
    )
    sampling = {**manifest_for(made)["sampling"], "baseline_frames": count}
    tokens = {**manifest_for(made)["tokens"], "full_tokens": count}
    forge(path, made, tensors_of(made), sampling=sampling, tokens=tokens)
    start = time.process_time()
    assert len(read_bundle(path).content) == count
    assert time.process_time() - start < 3


# --- accepted, and cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", ["zero", "huge", "random", "no energy"])
def test_what_is_accepted_can_be_cut_whatever_its_numbers(path, tmp_path, stretches, losses):
    tensors = tensors_of(stretches)
    generator = torch.Generator().manual_seed(0)
    if losses == "no energy":
        tensors["energy"].zero_()
    else:
        random_losses = torch.rand(BUDGET - 1, generator=generator, dtype=torch.float64) * 1e9
        filled = {"zero": 0 * random_losses, "huge": torch.full_like(random_losses, 1e300)}
        tensors["merge_loss"] = filled.get(losses, random_losses)
    tensors["latents"] = torch.randn(tensors["latents"].shape, generator=generator) * 1e30
    made = Stretches(width=stretches.width, grid=stretches.grid, **tensors)
    forge(path, made, tensors)
    for number, flags in enumerate(
        [("--budget", n) for n in (1, 2, 60, 119)] + [("--quality", q) for q in (0, 0.5, 1)]
    ):
        small = tmp_path / f"{number}.pt"
        run = run_freres("repack", path, *flags, "-o", small)
        assert run.status == 0 and "Traceback" not in run.err, run.err
        count = len(read_bundle(small).content)
        assert flags[0] == "--quality" or count == flags[1]
    shown = run_freres("inspect", path, "--tokens")
    assert shown.status == 0 and "nan" not in shown.out.lower()
