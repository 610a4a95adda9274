"""Shared by the tests on Qwen2-VL: a tiny random model, both of our halves of it, and one encoded video."""

from __future__ import annotations

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.generation import generate
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel, Qwen2VLVisionEncoder
from tests.tiny_models import CPU, make_qwen2_vl, open_checkpoint, random_frames, stock_inputs

T, H, W = 4, 4, 5
QUESTION = "What is it? Ünïcödé"
SYSTEM = "Be brief."
# Places of the visual tokens that are kept where a test drops the others.
KEEP = torch.tensor([0, 3, 7, 8, 22, 23, 24, 41, 45, 59, 60, 78])


class Tiny:
    """A stock model, both of our halves of it, and one encoded video."""

    def __init__(self, directory):
        self.directory = directory
        self.stock = make_qwen2_vl(directory)
        self.checkpoint = open_checkpoint(directory)
        self.vision = Qwen2VLVisionEncoder.load(self.checkpoint, CPU)
        self.model = Qwen2VLLanguageModel.load(self.checkpoint, CPU)
        self.frames = random_frames(T, (H, W))
        self.latents = self.vision.encode(self.frames)
        self.prompt = self.model.prompt(QUESTION, SYSTEM)

    def inputs(self, num_frames=T):
        patches = self.vision.patches(self.frames[:num_frames])
        return stock_inputs(self.stock, self.prompt, (num_frames, H, W), patches)

    def whole_prompt(self, video, text_after="max"):
        rows = self.model.splice(self.prompt.prefix, video, text_after)
        return rows.then(self.model.text_rows(self.prompt.suffix, len(rows), rows.next_position))

    def last_logits(self, rows, chunk_tokens=10**6):
        return self.model.logits(engine.prefill(self.model, rows, self.model.new_cache(), chunk_tokens))[0]

    def greedy(self, video, num_tokens, text_after="max"):
        prefix = engine.prefill_video(self.model, self.prompt.prefix, video, text_after)
        answer = generate(self.model, prefix, self.prompt.suffix, num_tokens)
        list(answer)
        return answer.ids


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("qwen2_vl"))


def largest_difference(a, b):
    return (a - b).abs().max().item()
