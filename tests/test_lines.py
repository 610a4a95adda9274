"""Frames that lie on the line between two others: which they are, and that only the others pass the tower."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from freres_cli.bench.clock import StageTimer
from freres_cli.method.adaptive import build_stretch_tokens, cut_stretches
from freres_cli.pipeline.between import LineStream
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import LatentStream, VideoSource
from freres_cli.records import Frames
from freres_cli.video.lines import MOST_APART, KeyFinder, draw_line, measure_colours
from tests import clips
from tests.loaded_models import CountingEncoder, loaded_models, models_with
from tests.runner import check_failure, run_freres
from tests.token_checks import same_tokens

CPU_TIMER = StageTimer(torch.device("cpu"))
FADE, FLASH, CUT = 30, 40, 50  # frames: a fade ends, a flash lasts one, a shot begins


def draw_frames(count: int = 64, side: int = 96) -> torch.Tensor:
    """(count, side, side, 3) uint8: a fade, a flash and a cut, and a square that moves all the time."""
    frames = torch.full((count, side, side, 3), 60, dtype=torch.uint8)
    for index in range(count):
        frames[index] += min(index, FADE) * 4
        frames[index, 8 + index // 2 : 24 + index // 2, 30:50] = 10
    frames[FLASH, 60:, 60:] = 250
    frames[CUT:] = 255 - frames[CUT:]
    return frames


@pytest.fixture(scope="module")
def frames():
    return draw_frames()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pictures = [*draw_frames().numpy(), *clips.solid(30, (200, 30, 30), 96, 96)]
    return clips.write_clip(tmp_path_factory.mktemp("lines") / "clip.mp4", pictures=pictures)


def find_keys(colours: torch.Tensor, levels: float) -> list[int]:
    finder = KeyFinder(levels)
    found = [index - 1 for index, own in enumerate(colours) if finder.observe(own)]
    return sorted({0, *found, len(colours) - 1})


class PlainTower:
    """Its latents are the mean colours of the cells of a 2x2 grid: as linear as a tower can be."""

    def __init__(self) -> None:
        self.frames: list[torch.Tensor] = []

    def encode(self, pixels):
        self.frames += list(pixels)
        cells = pixels.to(torch.float32).unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4))
        return cells.contiguous()


def stream(frames, levels, sizes=(1000,), tower=None):
    """The latents of frames read in batches of these sizes, the times, and the stream."""
    lines = LineStream(LatentStream(tower or PlainTower(), CPU_TIMER, "plain"), (2, 2), levels)
    bounds = [min(at, len(frames)) for at in accumulate([*sizes, len(frames)], initial=0)]
    batches = [
        Frames(frames[a:b], tuple(map(float, range(a, b))), tuple(range(a, b)), tuple(range(a, b)))
        for a, b in pairwise(bounds)
        if b > a
    ]
    found = list(lines.encode(batches))
    assert len(found) == len(batches), "a checkpoint counts the batches"
    return torch.cat([latents for _, latents in found]), [s for seconds, _ in found for s in seconds], lines


# --- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 8, 40])
def test_every_other_frame_is_on_its_line_and_no_line_could_be_longer(levels):
    steps = torch.randn(90, 12, generator=torch.Generator().manual_seed(levels))
    colours = (128 + 6 * steps.cumsum(0) * torch.rand(90, 1, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    keys = find_keys(colours, levels)

    def furthest(a, b):
        """What numpy's interpolation leaves between two key frames."""
        t = np.arange(a, b + 1)
        straight = [np.interp(t, [a, b], colours[[a, b], i].numpy()) for i in range(12)]
        return float(np.abs(np.stack(straight, 1) - colours[a : b + 1].numpy()).max())

    for a, b in pairwise(keys):
        assert b - a <= MOST_APART and furthest(a, b) <= levels + 1e-3
        if b < 89:
            assert b + 1 - a > MOST_APART or furthest(a, b + 1) > levels - 1e-3
    assert 2 < len(keys) <= 90


def test_an_even_change_needs_only_its_ends_and_a_flash_and_a_cut_are_seen(frames):
    colours = measure_colours(frames, (2, 2))
    assert find_keys(torch.linspace(0, 255, 49)[:, None].expand(49, 12), 0.01) == [0, 16, 32, 48]
    keys = find_keys(colours, 12)
    assert {FLASH - 1, FLASH, FLASH + 1, CUT - 1, CUT} <= set(keys) and len(keys) < 20


def test_colours_are_means_of_half_tokens_and_noise_averages_out():
    pixels = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = measure_colours(pixels, (2, 3)).reshape(3, 3, 4, 6)
    assert own[1, 2, 3, 5].item() == pytest.approx(pixels[1, 24:, 40:, 2].double().mean().item(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_line_ends_at_its_end_and_between_equal_ends_nothing_moves(dtype):
    start, stop = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = draw_line(start, stop, 5)
    assert drawn.dtype == dtype and torch.equal(drawn[-1], stop)
    wanted = np.linspace(start.float().numpy(), stop.float().numpy(), 6)[1:]
    assert np.allclose(drawn.float().numpy(), wanted, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert all(torch.equal(row, stop) for row in draw_line(stop, stop, 7))


# --- the stream ------------------------------------------------------------------------------------------------------


def test_latents_of_a_tower_that_is_linear_are_as_near_as_the_colours(frames):
    true = PlainTower().encode(frames)
    tower = PlainTower()
    latents, seconds, lines = stream(frames, 12, (7, 30), tower)
    assert seconds == list(map(float, range(64)))
    assert (latents - true).abs().max() <= 12 + 1e-3
    keys = find_keys(measure_colours(frames, (2, 2)), 12)
    assert torch.equal(latents[keys], true[keys]), "frames that pass the tower keep their latents"
    assert torch.equal(torch.stack(tower.frames), frames[keys]) and lines.waiting.num_encoded == len(keys)


@pytest.mark.parametrize("sizes", [[1] * 64, [5] * 20, [63, 1], [64]])
def test_batches_do_not_change_the_latents(frames, sizes):
    assert torch.equal(stream(frames, 12, sizes)[0], stream(frames, 12)[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_clips_are_whole(frames, count):
    latents, seconds, _ = stream(frames[:count], 64, [1, 1])
    assert len(latents) == len(seconds) == count
    assert torch.equal(latents[[0, -1]], PlainTower().encode(frames[:count])[[0, -1]])


def test_what_waits_is_bounded():
    still = torch.full((500, 8, 8, 3), 90, dtype=torch.uint8)
    lines = LineStream(LatentStream(PlainTower(), CPU_TIMER, "plain"), (2, 2), 5)
    batches = (Frames(still[i : i + 1], (float(i),), (i,), (i,)) for i in range(500))
    assert max(len(lines.waiting.seconds) for _ in lines.encode(batches)) <= MOST_APART


# --- the command -----------------------------------------------------------------------------------------------------


def compress(video, models=None, **settings):
    given = {"seconds": [i / 8 for i in range(len(video))]} if isinstance(video, torch.Tensor) else {}
    return Compressor(models=models or loaded_models(), **{"budget_tokens": 300, **settings}).compress(video, **given)


def test_only_key_frames_pass_the_tower_and_the_bundle_says_how_many(clip):
    tower = CountingEncoder(loaded_models().encoder)
    bundle = compress(clip, models_with(encoder=tower), line_levels=16)
    count = sum(tower.num_frames)
    assert bundle.manifest["tokens"]["encoded_tokens"] == 36 * count and 5 < count < 40
    assert bundle.manifest["settings"]["line_levels"]["value"] == 16 and bundle.num_visual_tokens == 300
    (note,) = (note for note in bundle.notes if "line_levels" in note)
    assert f"{count} of 94 frames were encoded" in note and "16 levels" in note


def test_where_no_frame_is_between_others_nothing_changes():
    noise = torch.randint(0, 256, (20, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with_lines, without = compress(noise, line_levels=1), compress(noise)
    assert with_lines.manifest["tokens"] == without.manifest["tokens"]
    for name, tensor in vars(without.content).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, getattr(with_lines.content, name)), name


def test_a_still_clip_is_its_first_frame(frames):
    bundle = compress(frames[:1].expand(40, -1, -1, -1), line_levels=16, budget_tokens=36)
    assert bundle.manifest["tokens"]["encoded_tokens"] == 36
    alone = compress(frames[:1], budget_tokens=36)
    assert torch.equal(bundle.content.latents, alone.content.latents)


def test_a_smaller_bundle_is_what_compressing_to_it_gives(clip):
    large, small = (compress(clip, line_levels=16, budget_tokens=budget).content for budget in (300, 90))
    same_tokens(build_stretch_tokens(cut_stretches(large, 90)), build_stretch_tokens(small))


def test_eval_has_the_tokens_of_the_command_and_measures_against_every_frame(clip):
    models = loaded_models()
    options = Compressor(models=models, budget_tokens=200, line_levels=16).options
    tower = CountingEncoder(models.encoder)
    encoded = EncodedClip(VideoSource(clip), options, tower, CPU_TIMER)
    plain = EncodedClip(VideoSource(clip), replace(options, settings=Compressor().options.settings), tower, CPU_TIMER)
    assert torch.equal(encoded.latents, plain.latents)
    tower.num_frames.clear()
    bundle = compress(clip, line_levels=16, budget_tokens=200)
    same_tokens(encoded.build_tokens("adaptive", 200), build_stretch_tokens(bundle.content))
    for method in ("fre-res", "uniform"):
        same_tokens(encoded.build_tokens(method, 200), plain.build_tokens(method, 200))
    without = encoded.with_settings({"line_levels": 0})
    same_tokens(without.build_tokens("adaptive", 200), plain.build_tokens("adaptive", 200))
    assert not tower.num_frames, "every frame was encoded before"
    _, manifest = encoded.make_bundle(200, models.language_model, "adaptive")
    assert manifest["tokens"]["encoded_tokens"] == bundle.manifest["tokens"]["encoded_tokens"]
    assert not torch.equal(bundle.content.latents, compress(clip, budget_tokens=200).content.latents)


@pytest.mark.parametrize("settings", [{"budget_tokens": 20 * 36}, {"method": "fre-res"}, {"method": "uniform"}])
def test_elsewhere_every_frame_is_encoded_and_a_note_says_so(frames, settings):
    bundle = compress(frames[:20], line_levels=16, **settings)
    assert "line_levels has no effect: every frame is encoded" in bundle.notes
    assert bundle.manifest["tokens"] == compress(frames[:20], **settings).manifest["tokens"]


def test_the_plan_says_that_frames_may_be_left_out(clip):
    run = run_freres("plan", clip, "--budget", 200, "--tflops", 1, "--set", "line_levels=16", "--json")
    assert any("within 16 levels of the line between two others, are not encoded" in note for note in run.json["notes"])


def test_levels_that_are_none_are_refused(clip, tmp_path):
    for value in (-1, 65, "half"):
        run = run_freres("compress", clip, "--set", f"line_levels={value}", "-o", tmp_path / "b.pt")
        check_failure(run, 2, "line_levels: expected")
    assert not list(tmp_path.iterdir())
