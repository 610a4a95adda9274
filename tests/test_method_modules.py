"""The trainable parts: untrained they change nothing, and each part does its job."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.stats
import torch

from freres_cli.method.absorber import NORMED, VALUES, SpatialGuidedAbsorber, neighbours_of
from freres_cli.method.compress import compress_latents
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.residuals import pool_to_cells
from freres_cli.method.tokens import (
    ANCHOR,
    DYNAMIC,
    SUMMARY,
    build_tokens,
    dynamic_latents,
    evaluate_dynamic,
    order_dynamic,
)
from freres_cli.presets import VARIANTS
from tests.compressed_clips import compress, smooth_clip

SHAPE = ModuleShape(width=16, rank=4, num_bands=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_modules_are_the_identity(variant):
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300, variant=variant)
    with torch.no_grad():
        plain, fused = build_tokens(tracks, variant), build_tokens(tracks, variant, FreResModules(SHAPE))
    assert torch.equal(plain.latents, fused.latents)
    assert torch.equal(plain.positions, fused.positions)


def test_deepstack_rows_pass_the_modules_untouched():
    main = smooth_clip(40, (8, 8))
    deep = torch.randn(40, 8, 8, 32)
    settings_tracks, plan, settings = compress(main, 300)
    tracks = compress_latents(torch.cat([main, deep], -1), [i / 10 for i in range(40)], plan, settings, 16)
    assert torch.equal(tracks.coefficient_cell, settings_tracks.coefficient_cell), "the main channels decide"
    modules = FreResModules(SHAPE)
    torch.nn.init.normal_(modules.adapters[ANCHOR].up.weight)
    with torch.no_grad():
        plain, fused = build_tokens(tracks), build_tokens(tracks, modules=modules)
    assert torch.equal(plain.latents[:, 16:], fused.latents[:, 16:])
    assert not torch.equal(plain.latents[:, :16], fused.latents[:, :16])


def test_neighbours_stay_inside_the_grid():
    around = neighbours_of(torch.tensor([0, 4, 8]), (3, 3))
    assert around[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, 3, 4]
    assert around[1].tolist() == list(range(9))
    assert around[2].tolist() == [4, 5, -1, 7, 8, -1, -1, -1, -1]


@pytest.mark.parametrize("values", VALUES)
def test_absorber_equals_a_plain_loop_and_hears_only_its_neighbourhood(values):
    torch.manual_seed(0)
    absorber = SpatialGuidedAbsorber(width=8, dim=4, num_bands=3, values=values)
    torch.nn.init.ones_(absorber.gamma)
    torch.nn.init.normal_(absorber.band)
    torch.nn.init.normal_(absorber.offset)
    tokens, coefficients, scale = torch.randn(5, 8), torch.randn(7, 8), torch.rand(7)
    slots = torch.full((5, 9, 3), -1)
    slots[0, 4, 0], slots[0, 2, 1], slots[1, 4, 2], slots[3, 0, 0] = 2, 5, 6, 0
    with torch.no_grad():
        got = absorber(tokens, coefficients, scale, slots)
        keyed = absorber.key_norm(coefficients)
        valued = keyed if values == "normed" else coefficients * scale[:, None]
        for row in range(5):
            pairs = [(int(slots[row, o, k]), o, k) for o in range(9) for k in range(3) if slots[row, o, k] >= 0]
            if not pairs:
                assert torch.equal(got[row], tokens[row])
                continue
            query = absorber.query(absorber.query_norm(tokens[row]))
            keys = torch.stack([absorber.key(keyed[c]) + absorber.offset[o] + absorber.band[k] for c, o, k in pairs])
            weights = (keys @ query / 2.0).softmax(0)
            heard = weights @ torch.stack([absorber.value(valued[c]) for c, _, _ in pairs])
            assert torch.allclose(got[row], tokens[row] + absorber.output(heard), atol=1e-5)
        changed = coefficients.clone()
        changed[[1, 3, 4]] += 10.0
        assert torch.equal(absorber(tokens, changed, scale, slots), got), "masked coefficients are not attended to"


def absorbed(tracks, **shape):
    """What an absorber that listens adds to each dynamic token, and the runs of those."""
    torch.manual_seed(1)
    modules = FreResModules(ModuleShape(16, 8, 8, **shape))
    torch.nn.init.ones_(modules.absorber.gamma)
    runs = order_dynamic(tracks)
    with torch.no_grad():
        inputs = modules.absorber_inputs(evaluate_dynamic(tracks, runs), tracks, runs.gop, runs.cell)
        return modules.absorber.attend(*inputs)[0], runs


def test_what_is_added_goes_to_zero_with_what_moved():
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    whole = absorbed(tracks)[0].norm()
    added = [
        float(absorbed(replace(tracks, coefficient_values=tracks.coefficient_values * share))[0].norm() / whole)
        for share in (0.3, 0.1, 0.01)
    ]
    assert added == pytest.approx([0.3, 0.1, 0.01], rel=0.5) and 0 < added[2] < added[1] < added[0] < 1


def test_more_is_added_where_more_moved():
    """Cells of a row move ten times as much as those of the row two above, over four decades of energy."""
    generator = torch.Generator().manual_seed(2)
    moves = torch.randn(40, 8, 8, 16, generator=generator).cumsum(0) * 10.0 ** (torch.arange(8) / 2 - 3)[:, None, None]
    latents = 3.0 + torch.randn(8, 8, 16, generator=generator) + moves
    tracks, _, _ = compress(latents, 1500, static_per_gop=0, pooled_side=8, reference_budget_tokens=1500)
    added, runs = absorbed(tracks)
    energy = torch.zeros(8).index_add(0, tracks.coefficient_cell // 8, tracks.coefficient_energy)
    rows = torch.stack([added[runs.cell // 8 == row].norm(dim=1).mean() for row in range(8)])
    assert (energy.diff() > 0).all() and (rows[::2].diff() > 0).all()
    assert scipy.stats.spearmanr(added.norm(dim=1), tracks.coefficient_energy[runs.order]).statistic > 0.5


def test_the_unit_of_what_is_added_is_a_token_whatever_the_scale_of_latents_and_the_length_of_gops():
    clip = smooth_clip(41, (8, 8))
    plain = absorbed(compress(clip, 300)[0])[0]
    assert torch.allclose(absorbed(compress(clip * 100, 300)[0])[0], plain, rtol=1e-2, atol=1e-3)
    still, jump = clip[:1], torch.randn(1, 8, 8, 16, generator=torch.Generator().manual_seed(6))
    short, long = (torch.cat([still, (still + jump).expand(n, -1, -1, -1)]) for n in (9, 81))
    knobs = {"anchors": 1, "reference_budget_tokens": 90, "static_per_gop": 0, "max_coefficients": 1}
    few, many = (absorbed(compress(frames, 90, **knobs)[0])[0].norm(dim=1).mean() for frames in (short, long))
    assert few == pytest.approx(float(many), rel=0.05)


def test_an_adapter_of_an_earlier_release_adds_what_it_was_trained_to():
    """Its shape does not name the values: then only the direction of a coefficient counts, as when it was trained."""
    assert ModuleShape.from_dict({"width": 16, "rank": 4, "num_bands": 8}).values == NORMED
    assert ModuleShape.from_dict(SHAPE.to_dict()) == SHAPE and SHAPE.values != NORMED
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    small = replace(tracks, coefficient_values=tracks.coefficient_values * 0.5)
    whole, half = (absorbed(part, values=NORMED)[0].norm() for part in (tracks, small))
    assert half == pytest.approx(float(whole), rel=0.1)
    with pytest.raises(ValueError, match="expected normed or amplitude, got 'later'"):
        ModuleShape(16, 4, 8, "later")


def listening_modules():
    torch.manual_seed(1)
    modules = FreResModules(SHAPE)
    torch.nn.init.ones_(modules.absorber.gamma)
    torch.nn.init.normal_(modules.adapters[DYNAMIC].up.weight)
    return modules


@torch.no_grad()
def test_the_sparse_inverse_dct_is_the_absorber_without_attention():
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    modules = listening_modules()
    sparse, whole = (build_tokens(tracks, variant, modules) for variant in ("sparse-idct", "absorber"))
    assert (sparse.latents - whole.latents)[sparse.kind == DYNAMIC].abs().amax(1).min() > 0
    torch.nn.init.zeros_(modules.absorber.gamma)
    assert torch.equal(build_tokens(tracks, "absorber", modules).latents, sparse.latents)
    assert torch.equal(whole.positions, sparse.positions)


@torch.no_grad()
@torch.no_grad()
def test_impulses_are_not_listened_to():
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    keep = tracks.is_impulse
    columns = {name: t[keep] for name, t in tracks.tensors().items() if name.startswith("coefficient")}
    alone, modules = replace(tracks, **columns), listening_modules()
    assert keep.any() and alone.num_bands == 0
    runs = order_dynamic(alone)
    plain = evaluate_dynamic(alone, runs)
    assert torch.equal(modules.absorb(plain, alone, runs.gop, runs.cell), plain)


def test_i_token_queries_are_the_pooled_anchor_and_know_nothing_else():
    clip = smooth_clip(40, (8, 8))
    tracks, _, _ = compress(clip, 300)
    tokens, runs = build_tokens(tracks, "iquery"), order_dynamic(tracks)
    pooled = pool_to_cells(clip, 4, 4)[tracks.gop_anchor_frame]
    i_tokens, waves = pooled[runs.gop, runs.cell], ~tracks.is_impulse[runs.order]
    assert torch.allclose(dynamic_latents(tracks, runs, "iquery")[waves], i_tokens[waves], atol=1e-5)
    found = tokens.latents[tokens.kind == DYNAMIC]
    assert (torch.cdist(found, pooled.flatten(0, 1)).amin(1) < 1e-2).sum() == waves.sum() > 0
    assert torch.equal(tokens.positions, build_tokens(tracks, "absorber").positions)
    modules = listening_modules()
    added = modules.absorb(i_tokens, tracks, runs.gop, runs.cell) - i_tokens
    assert added.norm(dim=1).min() > 0 and runs.sizes.max() > 1
    for run in range(len(runs.sizes)):
        alike = added[runs.group == run]
        assert torch.allclose(alike, alike[:1].expand_as(alike), atol=1e-5), "the same question has the same answer"


def test_gradients_reach_every_part_that_the_variant_uses():
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    modules = FreResModules(SHAPE)
    build_tokens(tracks, modules=modules).latents.square().sum().backward()
    for name in ("absorber.gamma", "type_embedding", "gates", "adapters.0.up.weight", f"adapters.{SUMMARY}.up.weight"):
        gradient = dict(modules.named_parameters())[name].grad
        assert gradient is not None and gradient.abs().sum() > 0, name
    torch.nn.init.ones_(modules.absorber.gamma)
    build_tokens(tracks, modules=modules).latents[:, 0].sum().backward()
    for name in ("query", "key", "value", "output"):
        assert getattr(modules.absorber, name).weight.grad.abs().sum() > 0, name


def test_gates_scale_their_branch_only():
    tracks, _, _ = compress(smooth_clip(40, (8, 8)), 300)
    modules = FreResModules(SHAPE)
    with torch.no_grad():
        modules.gates[1] = 0.5
        plain, gated = build_tokens(tracks), build_tokens(tracks, modules=modules)
    anchors = plain.kind == ANCHOR
    assert torch.equal(plain.latents[anchors], gated.latents[anchors])
    assert torch.allclose(plain.latents[~anchors] * 0.5, gated.latents[~anchors])
    assert (plain.kind == DYNAMIC).any()
