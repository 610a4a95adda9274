"""Rotary frequencies that depend on the length of the prompt, and contexts that scaled angles reach."""

from __future__ import annotations

import json

import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.batches import answer_batch, score_options_batch
from freres_cli.backbones.generation import generate
from freres_cli.backbones.saved_prefix import open_prefix
from tests.family_contract import Tiny, difference
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, open_checkpoint

CASES = {case.name: case for case in FAMILY_CASES}
LIMIT = 64
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, LIMIT
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 6,
    "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": LIMIT,
}


def scale(directory, name, rope, **text):
    """Make a tiny checkpoint whose config scales rotary angles."""
    stock = CASES[name].make(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    part = config["text_config"]
    part |= {"rope_parameters": {**part["rope_parameters"], **rope}, **text}
    path.write_text(json.dumps(config))
    return stock


@pytest.fixture(scope="module", params=[DYNAMIC, (LONG, 16 * LIMIT)], ids=["dynamic", "longrope"])
def dynamic(request, tmp_path_factory):
    rope, length = request.param
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("dynamic")
    tiny = Tiny(CASES["internvl"], directory)
    stock = scale(directory, "internvl", rope, max_position_embeddings=length)
    tiny.load = lambda: CASES["internvl"].language_class.load(open_checkpoint(directory), CPU)
    tiny.load_stock = lambda: type(stock).from_pretrained(directory).eval()
    return tiny


def logits_of(model, prefix, question):
    with engine.lend_cache(prefix) as cache:
        return model.logits(engine.read_question(model, prefix, model.prompt(question).suffix, cache))[0]


@pytest.mark.parametrize("chunk_tokens", [10**6, 7])
def test_a_prompt_has_the_frequencies_of_the_stock_model_however_it_is_cut(dynamic, chunk_tokens):
    rows = dynamic.whole_prompt(dynamic.tokens())
    assert rows.positions.max() > LIMIT
    decoder = dynamic.load_stock().get_decoder()
    expected = decoder(inputs_embeds=rows.embeds[None], position_ids=rows.positions[0].long()).last_hidden_state[0, -1:]
    dynamic.model = dynamic.load()
    assert difference(dynamic.last_logits(rows, chunk_tokens), dynamic.model.logits(expected)[0]) < 1e-4


def test_an_answer_depends_on_no_question_or_video_before(dynamic):
    model = dynamic.model = dynamic.load()
    few, _ = dynamic.ask(dynamic.tokens(dynamic.keep))
    expected = logits_of(model, few, "what moves?")
    # A longer video, and a long answer, which let the frequencies of transformers grow.
    rows = dynamic.whole_prompt(dynamic.tokens())
    engine.prefill(model, engine.PromptRows(rows.pieces, rows.positions * 3, 3 * rows.next_position), model.new_cache())
    assert torch.equal(logits_of(model, few, "what moves?"), expected)
    list(generate(model, few, model.prompt("tell all").suffix, 40))
    assert torch.equal(logits_of(model, few, "what moves?"), expected)
    assert torch.equal(logits_of(model, dynamic.ask(dynamic.tokens(dynamic.keep))[0], "what moves?"), expected)


def test_questions_asked_together_get_the_answers_of_one_at_a_time(dynamic):
    model = dynamic.model = dynamic.load()
    prefix, _ = dynamic.ask(dynamic.tokens(dynamic.keep))
    suffixes = [model.prompt(question).suffix for question in ("what?", "what moves at the end?")]
    together = answer_batch(model, prefix, suffixes, 12)
    for suffix, ids in zip(suffixes, together, strict=True):
        one = generate(model, prefix, suffix, 12)
        list(one)
        assert one.ids == [token for token in ids if token not in model.stop_ids]
    options = [[(5, 6, 7), (8,)]] * 2
    scores = score_options_batch(model, prefix, suffixes, options)
    for suffix, own, score in zip(suffixes, options, scores, strict=True):
        assert difference(engine.score_options(model, prefix, suffix, own), score) < 1e-4


def test_what_settles_the_frequencies_is_told(dynamic):
    assert any(f"rotary frequencies change past position {LIMIT}" in note for note in dynamic.load().notes)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            64,
        ),  # named by the config as well
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "default"}, 64),
    ],
)
def test_scaled_angles_reach_further(tmp_path, rope, most):
    scale(tmp_path, "internvl", rope, max_position_embeddings=64)
    model = CASES["internvl"].language_class.load_without_weights(open_checkpoint(tmp_path))
    assert model.max_context_tokens == most


def test_a_prefix_that_is_read_has_the_frequencies_of_the_one_that_was_saved(dynamic, tmp_path):
    model = dynamic.model = dynamic.load()
    given = model.prompt("what?").prefix, dynamic.tokens(), "max", tmp_path / "p"
    saved, read = (open_prefix(model, *given) for _ in range(2))
    assert any(note.startswith("prefix read from") for note in read.notes)
    for question in ("what moves?", "what moves at the end?"):
        assert torch.equal(logits_of(model, read, question), logits_of(model, saved, question))
