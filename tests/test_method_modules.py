"""The trainable parts: untrained they change nothing, and each part does its job."""

from __future__ import annotations

import pytest
import torch

from freres_cli.method.absorber import SpatialGuidedAbsorber, neighbours_of
from freres_cli.method.compress import compress_latents
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.tokens import ANCHOR, DYNAMIC, SUMMARY, build_tokens
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


def test_absorber_equals_a_plain_loop_and_hears_only_its_neighbourhood():
    torch.manual_seed(0)
    absorber = SpatialGuidedAbsorber(width=8, dim=4, num_bands=3)
    torch.nn.init.ones_(absorber.gamma)
    torch.nn.init.normal_(absorber.band)
    torch.nn.init.normal_(absorber.offset)
    tokens, coefficients = torch.randn(5, 8), torch.randn(7, 8)
    slots = torch.full((5, 9, 3), -1)
    slots[0, 4, 0], slots[0, 2, 1], slots[1, 4, 2], slots[3, 0, 0] = 2, 5, 6, 0
    with torch.no_grad():
        got = absorber(tokens, coefficients, slots)
        keyed = absorber.key_norm(coefficients)
        for row in range(5):
            pairs = [(int(slots[row, o, k]), o, k) for o in range(9) for k in range(3) if slots[row, o, k] >= 0]
            if not pairs:
                assert torch.equal(got[row], tokens[row])
                continue
            query = absorber.query(absorber.query_norm(tokens[row]))
            keys = torch.stack([absorber.key(keyed[c]) + absorber.offset[o] + absorber.band[k] for c, o, k in pairs])
            weights = (keys @ query / 2.0).softmax(0)
            values = torch.stack([absorber.value(keyed[c]) for c, _, _ in pairs])
            assert torch.allclose(got[row], tokens[row] + absorber.output(weights @ values), atol=1e-5)
        changed = coefficients.clone()
        changed[[1, 3, 4]] += 10.0
        assert torch.equal(absorber(tokens, changed, slots), got), "masked coefficients are not attended to"


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
