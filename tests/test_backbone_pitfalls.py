"""Cases in which transformers is silently wrong and we are not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.errors import BackboneError
from tests import family_contract
from tests.family_contract import Tiny, difference
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, open_checkpoint, video_tokens

CASES = {case.name: case for case in FAMILY_CASES}
folders = family_contract.folders


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    torch.set_num_threads(1)
    return Tiny(CASES["internvl"], tmp_path_factory.mktemp("internvl"))


def test_gaps_between_positions_do_not_cut_the_sequence(internvl):
    """Without a cache or a mask, transformers takes a gap for the start of another sequence."""
    rows = internvl.whole_prompt(internvl.tokens(internvl.keep))
    ours = internvl.last_logits(rows)
    decoder, embeds, positions = internvl.stock.get_decoder(), rows.embeds[None], rows.positions[0]
    whole = decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=torch.ones(1, len(rows)))
    cut = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    assert difference(internvl.model.logits(whole.last_hidden_state[0, -1:])[0], ours) < 1e-4
    assert difference(internvl.model.logits(cut.last_hidden_state[0, -1:])[0], ours) > 1e-2


def test_a_question_has_at_least_one_token(internvl):
    prefix, _ = internvl.ask(internvl.tokens(internvl.keep))
    with pytest.raises(BackboneError, match="at least one token after the video"):
        engine.score_options(internvl.model, prefix, (), [(1,)])


def test_an_answer_does_not_depend_on_the_video_before(internvl):
    """The stock model keeps the position offset of the last video."""
    first = internvl.last_logits(internvl.whole_prompt(internvl.tokens(internvl.keep)))
    internvl.last_logits(internvl.whole_prompt(internvl.tokens()))
    assert torch.equal(internvl.last_logits(internvl.whole_prompt(internvl.tokens(internvl.keep))), first)


def test_pixels_that_become_zero_are_refused(tmp_path):
    """SmolVLM's stock model drops frames of zeros, which is what black frames become if the mean is zero."""
    CASES["smolvlm"].make(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    with pytest.raises(BackboneError, match="no shade of grey that normalizes to zero"):
        CASES["smolvlm"].vision_class.load(open_checkpoint(tmp_path), CPU)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_token_half_way_between_two_is_told_half_way(name, axis, folders):
    """Where all tokens are one run, in time as in space. Counted in frames of half a second."""
    model = CASES[name].language_class.load(open_checkpoint(folders(name)), CPU)
    places = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 1]])
    places[:, axis] += torch.tensor([0, 0.5, 1])
    video = video_tokens(torch.zeros(3, 4, 4, model.width), torch.arange(3), period_s=0.5)
    rows = model.splice(model.prompt("Why?").prefix, replace(video, positions=places))
    first, middle, last = rows.positions[-model.num_axes :, 0, rows.visual_mask].T
    assert torch.equal(middle, (first + last) / 2) and not torch.equal(first, last)
