"""Where motion goes through the absorber: maps that hold what tokens received, and the picture of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from freres_cli.bundle.adapter import write_adapter
from freres_cli.bundle.store import read_bundle
from freres_cli.cli.compress import make_options
from freres_cli.method.absorption import map_absorption
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.tokens import dynamic_latents, evaluate_dynamic, order_dynamic
from freres_cli.pipeline.adapters import load_modules
from freres_cli.pipeline.compressor import Compressor
from freres_cli.video.picture import SCALE_RGB, draw_maps, encode_png
from freres_cli.workflows.absorption import MAX_GOPS_SHOWN, PictureRequest, draw_absorption
from freres_cli.world.bundled_model import bundled_adapter
from freres_cli.world.make import CODECS, encode_scene
from freres_cli.world.scene import SIDE, Background, Scene, Shot, Thing
from tests.compressed_clips import compress, smooth_clip
from tests.loaded_models import loaded_models
from tests.runner import check_failure, run_freres

FRAMES, FPS, RADIUS = 32, 8, 11.0


def listening(width, seed=0):
    """Modules whose absorber adds something; the rest as before training."""
    torch.manual_seed(seed)
    modules = FreResModules(ModuleShape(width, 8, 8))
    torch.nn.init.ones_(modules.absorber.gamma)
    return modules


def one_thing_moves():
    """A red circle goes right in the lower left of a plain frame; nothing else happens."""
    centre = np.stack([np.linspace(18, 50, FRAMES), np.full(FRAMES, 72.0)], -1)
    thing = Thing("circle", "red", RADIUS, centre, np.ones(FRAMES, bool), np.zeros(FRAMES, bool))
    speckles = np.zeros((48, 48))
    plain = Background("plain", (70.0, 60.0, 65.0), 20.0, 12.0, True, (0.0, 0.0), (0.0, 0.0), speckles)
    return Scene(FRAMES, FPS, [Shot(0, FRAMES, plain)], [thing], np.ones(FRAMES))


def cells_passed(scene, pooled_grid):
    """Cells that the object touched in any frame: (rows, columns) bool."""
    rows, columns = pooled_grid
    x, y = scene.things[0].centre.T[..., None, None]
    left, top = np.arange(columns)[None, None] * SIDE / columns, np.arange(rows)[None, :, None] * SIDE / rows
    dx = x - np.clip(x, left, left + SIDE / columns)
    dy = y - np.clip(y, top, top + SIDE / rows)
    return (dx**2 + dy**2 < scene.things[0].radius ** 2).any(0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    encode_scene(path, one_thing_moves(), *CODECS[0][1:])
    return path


def compress_clip(clip, path, budget, **settings):
    options = make_options({"method": "fre-res", "budget_tokens": budget, **settings}, None, None, device="cpu")
    Compressor.from_options(options, loaded_models()).compress(clip).save(path)
    return path


@pytest.fixture(scope="module")
def bundle(clip, tmp_path_factory):
    """At a budget for the strongest coefficients only: the tower answers a moving object everywhere, a little."""
    return compress_clip(clip, tmp_path_factory.mktemp("bundle") / "bundle.pt", 40, static_per_gop=0)


@pytest.fixture(scope="module")
def adapter(bundle, tmp_path_factory):
    path, model = tmp_path_factory.mktemp("adapter") / "a.safetensors", read_bundle(bundle).manifest["model"]
    modules = listening(model["width"])
    write_adapter(path, modules.state_dict(), {"model": model, "shape": modules.shape.to_dict()})
    return path


def read_picture(path):
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 1
    return frames[0]


# --- the maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_mass_lies_where_the_object_passed(bundle, seed):
    tracks = read_bundle(bundle).tracks
    passed = cells_passed(one_thing_moves(), tracks.pooled_grid)
    maps = map_absorption(tracks, listening(tracks.width, seed))
    assert passed.mean() < 0.35
    for found in (maps.absorbed, maps.energy):
        whole = found.sum(0).numpy()
        assert whole[passed].sum() > 0.8 * whole.sum() > 0


@pytest.mark.parametrize("budget", [40, 80])
def test_the_shipped_adapter_looks_where_the_object_moved(clip, tmp_path, budget):
    made = read_bundle(compress_clip(clip, tmp_path / "b.pt", budget))
    modules = load_modules(
        bundled_adapter(), made.manifest["model"], "absorber", made.tracks.width, made.tracks.num_bands
    )
    passed = cells_passed(one_thing_moves(), made.tracks.pooled_grid)
    maps = map_absorption(made.tracks, modules)
    # Trained for answers, not for place: it spreads more than what there was to absorb, which lies on the object.
    for found, times_its_share in ((maps.absorbed, 1.4), (maps.energy, 2.7)):
        whole = found.sum(0).numpy()
        assert whole[passed].sum() > times_its_share * passed.mean() * whole.sum() > 0


def clip_tracks():
    return compress(smooth_clip(40, (8, 8)), 300)[0]


@pytest.mark.parametrize("variant", ["absorber", "iquery"])
def test_a_map_sums_to_what_the_tokens_received(variant):
    tracks, modules = clip_tracks(), listening(16)
    runs = order_dynamic(tracks)
    plain = dynamic_latents(tracks, runs, variant)
    with torch.no_grad():
        received = (modules.absorb(plain, tracks, runs.gop, runs.cell) - plain).norm(dim=1).double()
    expected = torch.zeros(len(tracks.gop_anchor_frame), dtype=torch.float64).index_add_(0, runs.gop, received)
    maps = map_absorption(tracks, modules, variant)
    assert expected.sum() > 0 and torch.allclose(maps.absorbed.sum((1, 2)), expected, rtol=1e-4)
    assert maps.energy.sum() == pytest.approx(float(tracks.coefficient_energy.sum()), rel=1e-5)


def test_nothing_is_absorbed_where_nothing_was_kept_nor_with_gamma_zero():
    tracks, modules = clip_tracks(), listening(16)
    maps = map_absorption(tracks, modules)
    kept = torch.zeros(maps.energy.shape, dtype=torch.bool)
    columns = tracks.pooled_grid[1]
    kept[tracks.coefficient_gop, tracks.coefficient_cell // columns, tracks.coefficient_cell % columns] = True
    assert 0 < kept.sum() < kept.numel()
    for found in (maps.energy, maps.absorbed):
        assert (found[kept] > 0).all() and (found[~kept] == 0).all()
    torch.nn.init.zeros_(modules.absorber.gamma)
    silent = map_absorption(tracks, modules)
    assert not silent.absorbed.any() and torch.equal(silent.energy, maps.energy)


def test_attention_of_each_token_sums_to_one_over_its_kept_neighbours():
    tracks, modules = clip_tracks(), listening(16)
    runs = order_dynamic(tracks)
    inputs = modules.absorber_inputs(evaluate_dynamic(tracks, runs), tracks, runs.gop, runs.cell)
    tokens, slots = inputs[0], inputs[3]
    with torch.no_grad():
        added, weights = modules.absorber.attend(*inputs)
        assert torch.equal(modules.absorber(*inputs), tokens + added)
    assert weights.shape == slots.shape and (weights[slots < 0] == 0).all() and (weights >= 0).all()
    assert torch.allclose(weights.sum((1, 2)), torch.ones(len(tokens)), atol=1e-5)
    assert (slots < 0).any() and (weights.flatten(1) > 0).sum(1).max() > 1


def test_what_is_absorbed_counts_for_the_cell_it_came_from():
    """An absorber made to look at the cell to the right: there a token takes all, else evenly from what is kept."""
    tracks, modules = clip_tracks(), listening(16)
    absorber = modules.absorber
    with torch.no_grad():
        absorber.query_norm.weight.zero_()
        absorber.query_norm.bias.fill_(1.0)  # every query is the same
        absorber.key.weight.zero_()
        query = absorber.query(absorber.query_norm.bias)
        absorber.offset[5] = 1000 * query / query.norm()
    runs = order_dynamic(tracks)
    plain = evaluate_dynamic(tracks, runs)
    with torch.no_grad():
        received = (modules.absorb(plain, tracks, runs.gop, runs.cell) - plain).norm(dim=1)
    rows, columns = tracks.pooled_grid
    waves = ~tracks.is_impulse
    num_kept = Counter(
        zip(tracks.coefficient_gop[waves].tolist(), tracks.coefficient_cell[waves].tolist(), strict=True)
    )
    expected, looked_right = torch.zeros(len(tracks.gop_anchor_frame), rows, columns), 0
    for gop, cell, norm in zip(runs.gop.tolist(), runs.cell.tolist(), received.tolist(), strict=True):
        h, w = divmod(cell, columns)
        around = [(i, j) for i in (h - 1, h, h + 1) for j in (w - 1, w, w + 1) if 0 <= i < rows and 0 <= j < columns]
        sources = {(i, j): num_kept[gop, i * columns + j] for i, j in around}
        if sources.get((h, w + 1)):
            sources = {(h, w + 1): 1}
            looked_right += 1
        for (i, j), count in sources.items():
            expected[gop, i, j] += norm * count / sum(sources.values())
    assert 0 < looked_right < len(received)
    assert torch.allclose(map_absorption(tracks, modules).absorbed.float(), expected, rtol=1e-3, atol=1e-5)


# --- the picture ------------------------------------------------------------------------------------------------------


def test_inspect_draws_the_maps_and_gives_them_as_numbers(bundle, adapter, tmp_path):
    out = tmp_path / "out.png"
    drawn = run_freres("inspect", bundle, "--absorber", out, "--adapter", adapter, "--json").json["absorber"]
    pixels = read_picture(out)
    assert pixels.shape == (drawn["height_px"], drawn["width_px"], 3) and drawn["picture"] == str(out)
    tracks = read_bundle(bundle).tracks
    maps = map_absorption(tracks, listening(tracks.width))
    assert torch.allclose(torch.tensor([gop["absorbed"] for gop in drawn["gops"]]).double(), maps.absorbed)
    assert torch.allclose(torch.tensor([gop["energy"] for gop in drawn["gops"]]).double(), maps.energy)
    text = run_freres("inspect", bundle, "--absorber", tmp_path / "again.png", "--adapter", adapter)
    num_gops = len(drawn["gops"])
    assert f"{drawn['width_px']}x{drawn['height_px']} px: {num_gops} of {num_gops} GoPs" in text.out and text.err == ""
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


def test_a_cell_has_the_colour_of_its_value(tmp_path):
    """In each column by its own largest value, over all rows; the map's corner is found by its first cell."""
    maps = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
    maps[0, 0, 0, 0], maps[1, 0, 1, 2], maps[1, 0, 0, 1] = 8.0, 4.0, 2.0
    (tmp_path / "maps.png").write_bytes(encode_png(draw_maps(maps, ["0.00 s", "1.00 s"], ["left", "right"], "note")))
    pixels = read_picture(tmp_path / "maps.png").astype(int)
    top, left = np.argwhere((pixels == SCALE_RGB[-1]).all(-1))[0]
    below = 2 * 64 + 12
    for row, h, w, colour in ((0, 0, 0, 4), (1, 1, 2, 2), (1, 0, 1, 1), (0, 1, 1, 0), (1, 0, 0, 0)):
        y, x = top + row * below + h * 64, left + w * 64
        assert (pixels[y : y + 64, x : x + 64] == SCALE_RGB[colour]).all()
    second = pixels[top : top + 128, left + 3 * 64 + 12 :][:, : 3 * 64]
    assert (second == SCALE_RGB[0]).all(), "a column of zeros stays black"


def test_a_scale_grows_lighter_throughout():
    luma = np.array(SCALE_RGB) @ (0.299, 0.587, 0.114)
    assert (np.diff(luma) > 20).all()


def test_a_tall_picture_shows_the_gops_of_most_energy_and_says_so(bundle, adapter, tmp_path):
    whole = read_bundle(bundle)
    width = whole.tracks.width
    tracks = compress(smooth_clip(120, (8, 8), width), 1600, anchors=30, events=False)[0]
    forged = replace(whole, content=tracks)
    num_gops = len(tracks.gop_anchor_frame)
    drawn = draw_absorption(forged, PictureRequest(tmp_path / "out.png", str(adapter)))
    assert num_gops > MAX_GOPS_SHOWN == len(drawn["gops_shown"]) and len(drawn["gops"]) == num_gops
    assert len(drawn["notes"]) == 1 and f"of {num_gops}" in drawn["notes"][0]
    energy = np.array([gop["energy"] for gop in drawn["gops"]]).sum((1, 2))
    hidden = sorted(set(range(num_gops)) - set(drawn["gops_shown"]))
    assert drawn["gops_shown"] == sorted(drawn["gops_shown"])
    assert energy[drawn["gops_shown"]].min() >= energy[hidden].max()
    pixels = read_picture(tmp_path / "out.png")
    assert pixels.shape[:2] == (drawn["height_px"], drawn["width_px"])
    assert (pixels[-40:] == 0).any(), "the last line says how many are shown"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_existing_picture_stays_without_force(bundle, adapter, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    flags = ("inspect", bundle, "--absorber", out, "--adapter", adapter)
    refused = run_freres(*flags)
    check_failure(refused, 2, "already exists")
    assert "another file with --absorber" in refused.err and out.read_bytes() == b"mine"
    assert run_freres(*flags, "--force").status == 0
    read_picture(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(bundle, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, status, text in (
        (("--absorber", "out.jpg", "--adapter", adapter), 2, ".png"),
        (("--adapter", adapter), 2, "--adapter: expected --absorber"),
        (("--force",), 2, "--force: expected --absorber"),
        (("--absorber", "no/such/folder.png", "--adapter", adapter), 2, "does not exist"),
        (("--absorber", "out.png", "--adapter", "gone"), 5, "no such file: expected an adapter"),
        (("--absorber", "out.png", "--adapter", "none"), 2, "expected trained modules"),
    ):
        check_failure(run_freres("inspect", bundle, *arguments), status, text)
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.png").write_bytes(bundle.read_bytes())
    check_failure(run_freres("inspect", "b.png", "--absorber", "b.png", "--adapter", adapter, "--force"), 2, "itself")
    assert (tmp_path / "b.png").read_bytes() == bundle.read_bytes()


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("concat", "no absorber"),
        ("sparse-idct", "no absorber"),
        ("idct", "no absorber"),
        ("anchors", "no coefficient kept"),
    ],
)
def test_a_bundle_without_anything_to_absorb_is_refused(clip, adapter, tmp_path, variant, text):
    path, out = compress_clip(clip, tmp_path / "b.pt", 40, variant=variant), tmp_path / "out.png"
    check_failure(run_freres("inspect", path, "--absorber", out, "--adapter", adapter), 4, text)
    assert not out.exists()


def test_adapters_that_do_not_fit_are_refused(bundle, tmp_path):
    model = read_bundle(bundle).manifest["model"]
    out, path = tmp_path / "out.png", tmp_path / "a.safetensors"
    modules = listening(model["width"])
    header = {"model": model, "shape": modules.shape.to_dict()}
    write_adapter(path, modules.state_dict(), {**header, "model": {**model, "projector_sha256": "0"}})
    check_failure(run_freres("inspect", bundle, "--absorber", out, "--adapter", path), 5, "another model")
    torch.nn.init.constant_(modules.absorber.output.weight, torch.inf)
    write_adapter(path, modules.state_dict(), header, force=True)
    check_failure(run_freres("inspect", bundle, "--absorber", out, "--adapter", path), 5, "not finite")
    assert not out.exists()


def test_an_adapter_that_adds_nothing_is_drawn_with_a_note(bundle, tmp_path):
    model = read_bundle(bundle).manifest["model"]
    modules = FreResModules(ModuleShape(model["width"], 8, 8))
    path = tmp_path / "zero.safetensors"
    write_adapter(path, modules.state_dict(), {"model": model, "shape": modules.shape.to_dict()})
    run = run_freres("inspect", bundle, "--absorber", tmp_path / "out.png", "--adapter", path)
    assert run.status == 0 and "gamma is 0" in run.err
