"""What is special to MiniCPM-V: one area for every frame, two token densities, line feeds that belong to the video."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, PATCH_PX, open_checkpoint

CASES = {case.name: case for case in FAMILY_CASES if case.module == "minicpm_v"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("minicpm")
    CASES["minicpmv4_7"].make(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({"scale_resolution": 96}))
    return directory


@pytest.mark.parametrize("size", [(1920, 1080), (96, 64), (64, 64), (30, 2000), (333, 500)])
@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_frame_sizes_equal_the_image_processors(folder, size, mode, monkeypatch):
    encoder = CASES["minicpmv4_7"].vision_class.load(open_checkpoint(folder), CPU)
    encoder.tower.config.downsample_mode = mode
    encoder.set_up()
    processor = MiniCPMV4_6ImageProcessorPil()
    expected = processor.find_best_resize(size[::-1], 96, PATCH_PX, mode, allow_upscale=True)
    got = encoder.frame_size(*size)
    assert (got.height_px, got.width_px) == tuple(expected)
    assert encoder.frame_size(*size, None, 7).num_tokens <= 7


def test_four_times_the_tokens(folder):
    """``downsample_mode`` 4x leaves out the merger inside the tower."""
    case = CASES["minicpmv4_6"]
    checkpoint = open_checkpoint(folder)
    checkpoint.config["downsample_mode"] = "4x"
    encoder = CASES["minicpmv4_7"].vision_class.load(checkpoint, CPU)
    frames = case.frames(2)
    latents = encoder.encode(frames)
    assert latents.shape[1:3] == (2 * case.grid[0], 2 * case.grid[1])
    sizes = torch.tensor([[2 * side for side in latents.shape[1:3]]] * 2)
    encoder.tower.vision_tower.config._attn_implementation = "sdpa"
    stock = encoder.tower.get_image_features(encoder.patches(frames), sizes, downsample_mode="4x").pooler_output
    assert torch.equal(latents.flatten(0, 2), torch.cat(stock))


def test_line_feeds_after_the_video_are_the_videos(folder):
    model = CASES["minicpmv4_7"].language_class.load(open_checkpoint(folder), CPU)
    assert model.line_feeds == (10,)
    assert model.prompt("\n\nWhy?") == model.prompt("Why?")
    assert model.tokenizer.decode(model.prompt("Why?").suffix).startswith("Why?")
