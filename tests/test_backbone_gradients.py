"""Training on every family: the same likelihoods as ``ask``, with gradients for the tokens and none for the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.gradients import score_answers
from freres_cli.errors import BackboneError
from tests import family_contract
from tests.family_contract import difference

tiny, one_thread = family_contract.tiny, family_contract.one_thread

ANSWERS = [[(65,), (66,), (67,)], [(65, 66, 67), (68,)]]
STEP = 1e-2


def score(tiny, video, answers):
    suffixes = [tiny.model.prompt(question).suffix for question in ("Which way?", "What colour has it?")]
    asked = list(zip(suffixes, answers, strict=True))
    return score_answers(tiny.model, tiny.prompt.prefix, video, "hf", asked), asked


def test_likelihoods_are_those_of_asking(tiny):
    video = tiny.tokens(tiny.keep)
    found, asked = score(tiny, video, ANSWERS)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video, "hf")
    for scores, (suffix, answers) in zip(found, asked, strict=True):
        assert difference(scores, engine.score_options(tiny.model, prefix, suffix, answers)) < 1e-4


def test_gradients_reach_the_tokens_and_stop_there(tiny):
    video = tiny.tokens(tiny.keep)
    latents = video.latents.clone().requires_grad_()
    found, _ = score(tiny, replace(video, latents=latents), ANSWERS)
    (gradient,) = torch.autograd.grad(found[1][0], latents)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tiny.model.half.parameters())
    # A step along the gradient changes the likelihood as the gradient predicts.
    direction = gradient / gradient.norm()
    up, down = (
        score(tiny, replace(video, latents=video.latents + sign * STEP * direction), ANSWERS)[0][1][0]
        for sign in (1, -1)
    )
    assert ((up - down) / (2 * STEP)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_lettered_options_share_one_pass(tiny, monkeypatch):
    """As single tokens that no text holds, they are all read after the same one."""
    video, read = tiny.tokens(tiny.keep), []
    text_rows = tiny.model.text_rows
    monkeypatch.setattr(tiny.model, "text_rows", lambda text, *rest: (read.append(text), text_rows(text, *rest))[1])
    letters = [(65,), (66,), (67,), (68,)]
    suffix = tiny.model.prompt("Which way?").suffix
    [scores] = score_answers(tiny.model, tiny.prompt.prefix, video, "hf", [(suffix, letters)])
    assert read.count(suffix) == 1
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video, "hf")
    assert difference(scores, engine.score_options(tiny.model, prefix, suffix, letters)) < 1e-4


def test_a_prompt_beyond_the_context_is_refused(tiny):
    with pytest.raises(BackboneError, match="more tokens than the model's context"):
        score(tiny, tiny.tokens(tiny.keep), [[(65,)], [(65,) * 5000]])
