"""Shared by the tests of all families: a stock model, both of our halves of it, and one encoded video."""

from __future__ import annotations

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.stock import StockClip, StockPath
from freres_cli.backbones.stock_processors import stock_pixels, stock_prompt_ids
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.workflows.verify import PERIOD_S, choose_subset, run_steps, whole_prompt
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, PATCH_PX, open_checkpoint, video_tokens

T, STEPS = 4, 12
QUESTION = "What is it? Ünïcödé"
CASES = {case.name: case for case in FAMILY_CASES}


class Tiny:
    """A stock model, both of our halves of it, and one encoded video."""

    def __init__(self, case, directory):
        self.case = case
        self.stock = case.make(directory)
        self.checkpoint = open_checkpoint(directory)
        self.vision = case.vision_class.load(self.checkpoint, CPU)
        self.model = case.language_class.load(self.checkpoint, CPU)
        self.frames = case.frames(T)
        self.latents = self.vision.encode(self.frames)
        self.prompt = self.model.prompt(QUESTION)
        grid, merge = (T, *case.grid), getattr(self.vision, "merge", 1)
        self.pixels = stock_pixels(case.name, self.frames, case.vision_class.default_rule, PATCH_PX, merge)
        ids = stock_prompt_ids(self.checkpoint, self.stock.config, self.model.tokenizer, grid, PERIOD_S, QUESTION)
        self.path = StockPath(self.stock, StockClip(case.name, tuple(ids), self.pixels, grid, merge, PERIOD_S))
        self.keep = choose_subset(case.grid[0] * case.grid[1])

    def tokens(self, keep=None, latents=None):
        latents = self.latents if latents is None else latents
        return video_tokens(latents, keep, width=self.vision.width, period_s=PERIOD_S)

    def whole_prompt(self, video):
        return whole_prompt(self.model, self.prompt.prefix, video, self.prompt.suffix)

    def last_logits(self, rows, chunk_tokens=10**6):
        return self.model.logits(engine.prefill(self.model, rows, self.model.new_cache(), chunk_tokens))[0]

    def ask(self, video, question=QUESTION):
        """The prefilled video, and the ids of a question about it."""
        return engine.prefill_video(self.model, self.prompt.prefix, video, "hf"), self.model.prompt(question).suffix

    def steps(self, rows, tokens):
        """Logits of the prompt and of each further token."""
        return run_steps(self.model, rows, tokens)


def by_family(quick):
    """A test of each family; those that are not ``quick`` take the same paths, and as long, and are slow."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
    return pytest.mark.parametrize("name", names)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small, threads cost more than they gain, especially on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each family's tiny checkpoint, made when first asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            CASES[name].make(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def load(folders):
    """A family's model on a device, each loaded once."""
    made = {}

    def models(name, device):
        key = name, device.description
        if key not in made:
            made[key] = Models(ModelSource(str(folders(name)), device))
        return made[key]

    return models


@pytest.fixture(scope="module", params=FAMILY_CASES, ids=lambda case: case.name)
def tiny(request, tmp_path_factory):
    return Tiny(request.param, tmp_path_factory.mktemp(request.param.name))


def difference(a, b):
    return (a - b).abs().max().item()
