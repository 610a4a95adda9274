"""The trained modules of adaptive Fre-Res: untrained they change nothing, and each part does its job."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freres_cli.method import absorber, stretch_modules
from freres_cli.method.adaptive import build_stretch_tokens
from freres_cli.method.fusion import ModuleShape
from freres_cli.method.stretch_modules import KINDS, MOST_NEIGHBOURS, NUM_ORDERS, StretchModules, find_neighbours
from freres_cli.records import TOKEN_KINDS
from tests.test_merging import D, walk
from tests.test_trends import compress

SHAPE = ModuleShape(D, 4, NUM_ORDERS)


def moving_clip():
    """All cells move together, those of two columns on their own as well: (24, 4, 5, D)."""
    generator = torch.Generator().manual_seed(0)

    def walks(grid_w, size):
        return size * torch.randn(24, 4, grid_w, D, generator=generator).cumsum(0)

    together = torch.randn(24, 1, 1, D, generator=generator).cumsum(0)
    return together + walks(5, 0.3) + torch.cat([torch.zeros(24, 4, 3, D), walks(2, 2.0)], dim=2)


def loud():
    """Modules in which every part does something."""
    torch.manual_seed(1)
    modules = StretchModules(SHAPE)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return modules


def listening():
    """Modules of which only the absorber adds something."""
    torch.manual_seed(1)
    modules = StretchModules(SHAPE)
    torch.nn.init.ones_(modules.absorber.gamma)
    return modules


@pytest.fixture(scope="module")
def stretches():
    """Of both kinds, long and short."""
    made = compress(moving_clip(), 60)
    assert len(made.kind.unique()) == 2 and (made.boxes[:, 1] - made.boxes[:, 0]).unique().numel() > 3
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_modules_are_the_identity(dtype):
    made = compress(moving_clip().to(dtype), 60)
    with torch.no_grad():
        plain, fused = build_stretch_tokens(made), build_stretch_tokens(made, StretchModules(SHAPE))
    assert torch.equal(plain.latents, fused.latents) and fused.latents.dtype == dtype
    assert torch.equal(plain.positions, fused.positions)


def test_nothing_is_changed_where_every_latent_was_kept():
    made = compress(walk(6, 4, 5), 120)
    assert torch.equal(build_stretch_tokens(made, loud()).latents, made.latents)


def test_only_the_main_channels_change():
    made = compress(torch.cat([moving_clip(), torch.randn(24, 4, 5, 2 * D)], -1), 60)
    with torch.no_grad():
        fused = build_stretch_tokens(made, loud()).latents
    assert torch.equal(fused[:, D:], made.latents[:, D:]) and not torch.equal(fused[:, :D], made.latents[:, :D])


def test_a_gradient_reaches_every_parameter(stretches):
    modules = loud()
    modules(stretches).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in modules.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["adapters", "type_embedding", "gates"])
def test_each_kind_has_its_own_adapter_embedding_and_gate(stretches, kind, part):
    modules, row = StretchModules(SHAPE), KINDS.index(kind)
    with torch.no_grad():
        (modules.adapters[row].up.bias if part == "adapters" else getattr(modules, part)[row]).add_(1.0)
        changes = (modules(stretches) != stretches.latents).any(1)
    assert torch.equal(changes, stretches.kind == TOKEN_KINDS.index(kind))


def test_stretches_without_trends_are_refused(stretches):
    with pytest.raises(ValueError, match="trends"):
        loud()(replace(stretches, trends=stretches.trends[:, :0]))


def overlap(own, other):
    """Latents of ``other`` in the time of ``own`` and at most one cell from it, one by one."""
    t0, t1, h0, h1, w0, w1 = own
    return sum(
        t0 <= t < t1 and h0 - 1 <= h <= h1 and w0 - 1 <= w <= w1
        for t in range(*other[:2])
        for h in range(*other[2:4])
        for w in range(*other[4:])
    )


@pytest.mark.parametrize("most", [1, 4, 500])
def test_neighbours_are_those_around_with_the_most_energy(stretches, most, monkeypatch):
    monkeypatch.setattr(stretch_modules, "QUERIES_AT_ONCE", 7)
    slots, places = find_neighbours(stretches.boxes, stretches.trends, most)
    energy, boxes = stretches.trends.square().sum(1).tolist(), stretches.boxes.tolist()
    assert slots.shape == places.shape == (60, most)
    for own, row, at in zip(boxes, slots.tolist(), places.tolist(), strict=True):
        heard = {j: energy[j] * overlap(own, boxes[j]) for j in range(60)}
        wanted = sorted((j for j in heard if heard[j] > 0), key=lambda j: -heard[j])[:most]
        got = [j for j in row if j >= 0]
        assert sorted(got) == sorted(wanted) and row[len(got) :] == [-1] * (most - len(got))
        for j, place in zip(got, at, strict=False):
            rows, columns = ((boxes[j][k] >= own[k + 1]) - (boxes[j][k + 1] <= own[k]) for k in (2, 4))
            later = sum(boxes[j][:2]) - sum(own[:2])
            order = (later > 0) - (later < 0)
            assert place == ((rows + 1) * 3 + columns + 1) * NUM_ORDERS + order + 1


def test_a_stretch_hears_only_what_is_around_it(stretches):
    with torch.no_grad():
        before = listening()(stretches)
        for changed in range(0, 60, 7):
            trends = stretches.trends.clone()
            trends[changed] *= -3.0
            after = listening()(replace(stretches, trends=trends))
            boxes = stretches.boxes.tolist()
            is_far = torch.tensor([overlap(own, boxes[changed]) == 0 for own in boxes])
            assert is_far.any() and torch.equal(before[is_far], after[is_far])
            assert not stretches.trends[changed].any() or not torch.equal(before[~is_far], after[~is_far])


def test_without_trends_around_it_a_stretch_passes_through(stretches):
    with torch.no_grad():
        silent = replace(stretches, trends=torch.zeros_like(stretches.trends))
        assert torch.equal(listening()(silent), stretches.latents)


def test_what_is_added_goes_to_zero_with_what_was_merged_away(stretches):
    def added(share):
        with torch.no_grad():
            return float((listening()(replace(stretches, trends=stretches.trends * share)) - stretches.latents).norm())

    assert [added(share) / added(1.0) for share in (0.1, 0.01)] == pytest.approx([0.1, 0.01], rel=0.3)


def test_the_result_does_not_depend_on_chunks(stretches, monkeypatch):
    with torch.no_grad():
        whole = loud()(stretches)
        monkeypatch.setattr(stretch_modules, "QUERIES_AT_ONCE", 7)
        monkeypatch.setattr(absorber, "QUERIES_AT_ONCE", 9)
        assert torch.allclose(loud()(stretches), whole, atol=1e-6)


def test_extent_tells_how_much_a_token_stands_for(stretches):
    modules = StretchModules(SHAPE)
    with torch.no_grad():
        modules.extent[0, 0], modules.extent[1, 1] = 1.0, 1.0
        added = modules(stretches) - stretches.latents
    t, h, w = (stretches.boxes[:, 1::2] - stretches.boxes[:, ::2]).unbind(1)
    assert torch.allclose(added[:, 0], t.float().log2(), atol=1e-5)
    assert torch.allclose(added[:, 1], (h * w).float().log2(), atol=1e-5)
    assert torch.equal(added[(t == 1) & (h * w == 1)], torch.zeros(int(((t == 1) & (h * w == 1)).sum()), D))


def test_the_cost_is_bounded_however_many_lie_around():
    """One still cell beside one that changes in every frame: the first has more neighbours than it may hear."""
    clip = torch.zeros(80, 1, 2, D)
    clip[:, 0, 1] = torch.randn(80, D, generator=torch.Generator().manual_seed(0)) * 10
    clip[:, 0, 0] = torch.linspace(0, 1, 80)[:, None]
    made = compress(clip, 41)
    slots, _ = find_neighbours(made.boxes, made.trends)
    assert slots.shape == (41, MOST_NEIGHBOURS) and (slots >= 0).all(1).any()
