"""``freres compress`` and ``freres ask`` with every model family, from a folder that ``save_pretrained`` wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freres_cli.bundle.store import read_bundle
from freres_cli.bundle.version_4 import tensors_of
from tests.clips import write_clip
from tests.runner import run_freres
from tests.tiny_families import FAMILY_CASES

NUM_FRAMES = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Three seconds of a square that moves over noise."""
    noise = np.random.default_rng(0).integers(0, 200, (64, 96, 3), dtype=np.uint8)
    pictures = []
    for frame in range(30):
        picture = noise.copy()
        picture[20:40, 2 * frame : 2 * frame + 20] = (255, 40, 40)
        pictures.append(picture)
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", size=(96, 64), pictures=pictures, fps=10)


@pytest.mark.parametrize("method", ["adaptive", pytest.param("fre-res", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_a_video_is_compressed_and_asked_about(case, method, clip, tmp_path):
    model, bundle = tmp_path / "model", tmp_path / "b.pt"
    case.make(model)
    rows, columns = case.grid
    full = NUM_FRAMES * rows * columns
    made = run_freres(
        *("compress", clip, "--model", model, "--frames", NUM_FRAMES, "--grid", f"{rows}x{columns}"),
        *("--method", method, "--budget", full // 2, "--device", "cpu", "-o", bundle),
    )
    assert made.status == 0, made.err
    assert ("squeezed" in made.err) == (case.num_axes == 1)
    manifest = read_bundle(bundle).manifest
    # 96x64 px: a grid of 4x5 is as near as whole tokens come, a square is not
    assert manifest["geometry"]["fit"] == ("exact" if case.frame_px[0] != case.frame_px[1] else "squeezed")
    assert manifest["geometry"]["source_aspect"] == 1.5
    assert manifest["geometry"]["frame_aspect"] == case.frame_px[1] / case.frame_px[0]
    assert manifest["model"]["family"] == case.name and manifest["model"]["num_deep_layers"] == case.num_deep
    assert manifest["tokens"]["full_tokens"] == full
    assert 0 < manifest["tokens"]["visual_tokens"] <= full // 2
    assert method == "fre-res" or manifest["tokens"]["visual_tokens"] == full // 2
    stored = tensors_of(read_bundle(bundle).content)
    assert stored["anchor_latents" if method == "fre-res" else "latents"].shape[1] == manifest["model"]["width"] * (
        1 + case.num_deep
    )
    asked = [run_freres("ask", bundle, "what moves?", "--max-new-tokens", 4, "--json") for _ in range(2)]
    assert asked[0].status == 0, asked[0].err
    assert asked[0].json["visual_tokens"] == manifest["tokens"]["visual_tokens"]
    assert asked[0].json["answer"] == asked[1].json["answer"]
    chosen = run_freres("ask", bundle, "what moves?", "--choices", "a square|nothing")
    assert chosen.status == 0 and chosen.out.splitlines()[0] in ("a square", "nothing"), chosen.err
