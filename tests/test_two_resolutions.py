"""Residual frames on a smaller grid: anchors are those of the whole grid, and only they are encoded there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import UsageError
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import StreamingCompressor, compress_latents
from freres_cli.method.residuals import pool_to_cells
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource, shrink_frames
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.presets import load_settings
from freres_cli.records import FrameSize
from freres_cli.tracks import Tracks
from tests import clips
from tests.compressed_clips import make_settings, smooth_clip
from tests.loaded_models import CountingEncoder, loaded_models, models_with
from tests.runner import check_failure, run_freres
from tests.token_checks import same_tokens

GRID, SMALL = (8, 8), (4, 4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pictures = [*clips.numbered(60), *clips.solid(30, (200, 30, 30))]
    return clips.write_clip(tmp_path_factory.mktemp("two") / "clip.mp4", pictures=pictures)


def compress_both(latents, small, budget=200, size=7, **changes):
    """The tracks of a clip, residuals from ``small``; and the frames that were asked for whole."""
    settings = make_settings(events=True, **changes)
    plan = plan_budget(len(latents), GRID, settings, budget, tuple(small.shape[1:3]))
    compressor, asked = StreamingCompressor(plan, settings, latents.shape[-1]), []
    for first in range(0, len(latents), size):

        def whole(rows, first=first):
            asked.extend(first + row for row in rows)
            return latents[first : first + size][rows]

        part = small[first : first + size]
        compressor.push(part, range(first, first + len(part)), whole)
    return compressor.finish(), asked, plan, settings


def test_the_full_grid_is_the_special_case():
    """Where the small latents are those of the whole grid, every number is that of one resolution."""
    latents = torch.cat([smooth_clip(30, GRID, seed=1), smooth_clip(23, GRID, seed=2)])
    tracks, _, plan, settings = compress_both(latents, latents)
    one = compress_latents(latents, range(53), plan, settings, 16)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, getattr(tracks, name)), name


def test_pooled_latents_give_the_tokens_of_one_resolution():
    """A tower whose small latents were the means of its whole ones would lose nothing: pooling is linear."""
    latents = torch.cat([smooth_clip(30, GRID, seed=1), smooth_clip(23, GRID, seed=2)])
    small = pool_to_cells(latents, *SMALL).reshape(53, *SMALL, -1)
    tracks, asked, plan, settings = compress_both(latents, small)
    one = compress_latents(latents, range(53), plan, settings, 16)
    assert tracks.gop_anchor_frame.tolist() == one.gop_anchor_frame.tolist()
    # Anchors that moved to a cut were asked for as well.
    assert set(tracks.gop_anchor_frame.tolist()) <= set(asked) and len(asked) < 20
    ours, theirs = build_tokens(tracks), build_tokens(one)
    assert torch.equal(ours.positions, theirs.positions) and torch.equal(ours.kind, theirs.kind)
    assert torch.allclose(ours.latents, theirs.latents, atol=1e-4)


def test_batches_do_not_change_the_tracks():
    latents = torch.cat([smooth_clip(33, GRID, seed=1), smooth_clip(20, GRID, seed=2)])
    small = smooth_clip(53, SMALL, seed=3)
    whole, asked, _, _ = compress_both(latents, small, size=53)
    for size in (1, 5):
        tracks, own, _, _ = compress_both(latents, small, size=size)
        assert own == asked
        for name, tensor in whole.tensors().items():
            assert torch.equal(tensor, getattr(tracks, name)), name


@pytest.mark.parametrize("budget", [1, 37, 200, 700])
def test_anchors_are_whole_and_cells_are_no_finer_than_the_small_grid(budget):
    latents, small = smooth_clip(40, GRID, seed=1), smooth_clip(40, (2, 3), seed=2)
    tracks, _, _, _ = compress_both(latents, small, budget)
    tokens = build_tokens(tracks)
    assert len(tokens) == budget and tracks.pooled_grid == (2, 3)
    assert tokens.grid == (40, *GRID), "positions are on the grid of the anchors"
    assert tokens.positions[:, 1:].min() >= 0 and (tokens.positions[:, 1:] <= 7).all()
    frame = tracks.gop_anchor_frame[tracks.anchor_gop]
    assert torch.equal(tracks.anchor_latents, latents.flatten(1, 2)[frame, tracks.anchor_cell])


def test_frames_are_shrunk_without_aliasing():
    size = FrameSize(24, 32, 3, 4)
    flat = torch.full((2, 48, 64, 3), 77, dtype=torch.uint8)
    assert torch.equal(shrink_frames(flat, size), flat[:, :24, :32])
    stripes = torch.zeros(1, 96, 128, 3, dtype=torch.uint8)
    stripes[:, :, 1::4] = stripes[:, :, 2::4] = 200
    grey = shrink_frames(stripes, size)[:, :, 3:-3].float()
    assert grey.mean() == pytest.approx(100, abs=1.5) and grey.std() < 6, "the pixels at the middles are all 200"


# --- the command -----------------------------------------------------------------------------------------------------


def test_only_anchors_pass_the_tower_whole(clip):
    tower = CountingEncoder(loaded_models().encoder)
    shapes: list[tuple[int, ...]] = []
    encode = tower.encode
    tower.encode = lambda pixels: (shapes.append(tuple(pixels.shape)), encode(pixels))[1]
    models = models_with(encoder=tower)
    compressor = Compressor(models=models, budget_tokens=300, method="fre-res", residual_grid="half")
    bundle, budget = compressor.compress(clip), compressor.plan(clip).budget
    facts = bundle.manifest
    num_whole = sum(n for n, height, *_ in shapes if height == 96)
    num_small = sum(n for n, height, *_ in shapes if height == 48)
    assert num_small == 61, "60 pictures, and one that is shown 30 times"
    assert facts["tokens"]["num_gops"] <= num_whole < 20
    assert budget.num_anchors < num_whole <= budget.num_anchors + budget.max_events, "what freres plan counts"
    assert facts["tokens"]["encoded_tokens"] == 61 * 9 + num_whole * 36
    assert facts["geometry"]["residual_grid"] == [3, 3] and facts["geometry"]["grid"] == [90, 6, 6]
    assert facts["settings"]["residual_grid"]["value"] == "half"
    assert bundle.num_visual_tokens == 300
    assert any("3x3 tokens, anchors at 6x6" in note for note in bundle.notes)


def test_eval_has_the_tokens_of_the_command(clip):
    settings = load_settings("bundled", {"residual_grid": "4x3", "budget_tokens": 200})
    models = loaded_models()
    options = CompressOptions(models.source, settings, "fre-res")
    encoded = EncodedClip(VideoSource(clip), options, models.encoder, StageTimer(torch.device("cpu")))
    bundle = Compressor.from_options(options, models).compress(clip)
    assert isinstance(bundle.content, Tracks)
    same_tokens(encoded.build_tokens("fre-res", 200), build_tokens(bundle.content))
    for method in ("adaptive", "uniform"):  # these have one grid
        plain = replace(options, settings=load_settings("bundled", {}))
        one = EncodedClip(VideoSource(clip), plain, models.encoder, StageTimer(torch.device("cpu")))
        same_tokens(encoded.build_tokens(method, 100), one.build_tokens(method, 100))


def test_a_budget_for_every_token_has_one_grid(clip):
    bundle = Compressor(models=loaded_models(), budget_tokens=90 * 36, method="fre-res", residual_grid="half").compress(
        clip
    )
    assert bundle.manifest["geometry"]["residual_grid"] is None
    assert bundle.manifest["tokens"]["encoded_tokens"] == 61 * 36
    assert any("residual_grid has no effect" in note for note in bundle.notes)


@pytest.mark.parametrize("grid", ["7x6", "6x7", "24x24"])
def test_a_grid_that_is_finer_than_that_of_anchors_is_refused(clip, grid):
    with pytest.raises(UsageError, match=f"residual_grid: expected at most .* 6x6, got {grid}"):
        Compressor(models=loaded_models(), method="fre-res", residual_grid=grid).compress(clip)


@pytest.mark.parametrize("method", ["adaptive", "uniform", "full"])
def test_other_methods_refuse_it(clip, tmp_path, method):
    run = run_freres("compress", clip, "--method", method, "--residual-grid", "half", "-o", tmp_path / "b.pt")
    check_failure(run, 2, f"--residual-grid: a setting of method fre-res, got method {method}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["auto", "3", "0x3", "3x", "third"])
def test_a_grid_that_is_none_is_refused(clip, tmp_path, value):
    run = run_freres("compress", clip, "--residual-grid", value, "-o", tmp_path / "b.pt")
    check_failure(run, 2, "--residual-grid: expected ROWSxCOLUMNS")


def test_the_bundle_records_it_and_repack_keeps_it(clip, tmp_path):
    path, smaller = tmp_path / "b.pt", tmp_path / "s.pt"
    flags = ("--budget", 200, "-q", "--device", "cpu", "-o")
    assert run_freres("compress", clip, "--method", "fre-res", "--residual-grid", "half", *flags, path).status == 0
    assert run_freres("repack", path, "--budget", 90, "-q", "-o", smaller).status == 0
    for bundle, count in ((read_bundle(path), 200), (read_bundle(smaller), 90)):
        assert bundle.manifest["geometry"]["residual_grid"] == [3, 3]
        assert bundle.manifest["tokens"]["visual_tokens"] == count


def test_the_plan_counts_the_smaller_frames(clip):
    def flops(*flags):
        run = run_freres(
            "plan", clip, "--method", "fre-res", "--budget", 200, "--tflops", 1, "--device", "cpu", "--json", *flags
        )
        return next(s["flops"] for s in run.json["stages"] if s["name"] == "tower")

    full, small = flops(), flops("--set", "residual_grid=3x3")
    budget = plan_of(clip).budget
    num_whole = budget.num_anchors + budget.max_events
    # A quarter of the tokens is less than a quarter of the work, because attention is among all pairs.
    assert num_whole / 90 * full < small < (num_whole / 90 + 0.25) * full
    without = flops("--set", "residual_grid=3x3", "--set", "events=off")
    assert small - without == pytest.approx(budget.max_events / 90 * full)


def plan_of(clip):
    return Compressor(models=loaded_models(), budget_tokens=200, method="fre-res", residual_grid="3x3").plan(clip)


def test_the_energy_of_residuals_is_that_of_the_whole_grid():
    """Latents that are the same in every four places have the energy of the whole grid when a quarter is read."""
    small = smooth_clip(40, (4, 4))
    whole = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    settings = make_settings()
    plan = plan_budget(40, (8, 8), settings, 200, (4, 4))
    made = StreamingCompressor(plan, settings, 16)
    made.push(small, range(40), lambda rows: whole[rows])
    expected = compress_latents(whole, range(40), plan, settings, 16).gop_residual_energy
    assert torch.allclose(made.finish().gop_residual_energy, expected, rtol=1e-4)
