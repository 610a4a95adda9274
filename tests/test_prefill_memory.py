"""A prefill holds weights, cache and one pass on the device, however long the prompt is; the rest is in host memory."""

from __future__ import annotations

import copy

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.saved_prefix import open_prefix
from freres_cli.devices import Storage
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.session import Session
from tests.family_contract import folders as folders
from tests.family_contract import one_thread as one_thread
from tests.labelled_device import LABELLED, LabelledTensor, count_waits, labelled_device, strip
from tests.live_bytes import DeviceBytes
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, video_tokens

CASES = {case.name: case for case in FAMILY_CASES}
QUICK = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
CHUNK = 32
QUESTIONS = ["What moves?", "What is it, and where?"]

each_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)


@pytest.fixture(scope="module")
def load(folders):
    """A family's language model on a device, each loaded once."""
    made = {}

    def model(name, device):
        key = name, device.description
        if key not in made:
            made[key] = Models(ModelSource(str(folders(name)), device)).language_model
        return made[key]

    return model


def tokens_of(model, name, num_frames):
    """Tokens that are not in the order of their frames, but for the first, at places drawn at random."""
    channels = model.width * (1 + model.num_deep_layers)
    drawn = torch.Generator().manual_seed(num_frames)
    latents = torch.randn(num_frames, *CASES[name].grid, channels, generator=drawn) / 8
    order = torch.randperm(latents[..., 0].numel(), generator=drawn)
    return video_tokens(latents, order, width=model.width)


def prefill(model, tokens):
    return engine.prefill_video(model, model.prompt(QUESTIONS[0]).prefix, tokens, chunk_tokens=CHUNK)


def room_of(cache):
    """Bytes of the cache, with its spare rows; of a state, which has one size."""
    return sum(buffer.nbytes for layer in cache.layers for buffer in getattr(layer, "_buffers", None) or ())


@each_family
def test_memory_beyond_the_cache_does_not_grow_with_the_prompt(load, name, monkeypatch):
    found, lengths = [], []
    with labelled_device(monkeypatch) as device:
        model = load(name, device)
        for num_frames in (12, 36):
            tokens = tokens_of(model, name, num_frames)
            with DeviceBytes() as live:
                prefix = prefill(model, tokens)
            found.append(live.peak - room_of(prefix.cache))
            lengths.append(prefix.num_tokens)
            del prefix
    assert lengths[0] > 6 * CHUNK and found[0] > CHUNK * model.width * model.dtype.itemsize
    assert found[0] == found[1], (found, lengths)
