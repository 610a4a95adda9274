"""Pruning after some layers of the decoder equals stock transformers run by hand, and every family as it is if all tokens
are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from freres_cli.backbones import attention, batches, engine
from freres_cli.backbones.generation import generate
from freres_cli.backbones.pruning import Pruning
from freres_cli.baselines.registry import METHODS
from freres_cli.errors import BackboneError
from tests import family_contract
from tests.family_contract import Tiny, difference
from tests.tiny_families import FAMILY_CASES

one_thread = family_contract.one_thread

HYBRIDS = [case for case in FAMILY_CASES if case.is_hybrid]
BY_HAND = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # the stock layers of the others take other arguments
PRUNERS = ("fastv", "framefusion-prune")
OPTIONS = [tuple(b"yes"), tuple(b"n"), tuple("vielleicht ü".encode())]
NUM_KEPT, STEPS = 11, 4


@pytest.fixture(
    scope="module", params=[case for case in FAMILY_CASES if not case.is_hybrid], ids=lambda case: case.name
)
def tiny(request, tmp_path_factory):
    return Tiny(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(params=PRUNERS)
def method(request):
    return METHODS[request.param]


def prefill_pruned(tiny, method, num_kept, video=None, **flags):
    pruning = Pruning(method.num_full_layers, num_kept, method.pick_attended, method.name)
    return engine.prefill_video(tiny.model, tiny.prompt.prefix, video or tiny.tokens(), "hf", pruning=pruning, **flags)


def test_with_every_token_kept_nothing_changes(tiny, method):
    """To the bit: answers, and the scores of options."""
    plain, pruned = tiny.ask(tiny.tokens())[0], prefill_pruned(tiny, method, 10**6)
    for suffix in (tiny.prompt.suffix, tiny.model.prompt("Why?").suffix):
        expected = engine.score_options(tiny.model, plain, suffix, OPTIONS)
        assert torch.equal(engine.score_options(tiny.model, pruned, suffix, OPTIONS), expected)
        logits = []
        for prefix in (plain, pruned):
            with engine.lend_cache(prefix) as cache:
                logits.append(tiny.model.logits(engine.read_question(tiny.model, prefix, suffix, cache)))
        assert torch.equal(*logits)


def test_rows_of_a_prompt_know_which_are_visual_tokens(tiny):
    """Not the family's own text, nor a row that ends every video."""
    video = tiny.tokens()
    rows = tiny.whole_prompt(video)
    assert torch.equal(rows.embeds[rows.visual_mask], video.latents) and len(rows.visual_mask) == len(rows)


@pytest.mark.parametrize("case", HYBRIDS, ids=lambda case: case.name)
def test_layers_with_a_state_are_refused(case, tmp_path):
    hybrid = Tiny(case, tmp_path)
    for name in PRUNERS:
        with pytest.raises(BackboneError, match=f"{name}: cannot prune {case.name}"):
            prefill_pruned(hybrid, METHODS[name], NUM_KEPT)


class ByHand:
    """The stock decoder with eager attention over the whole sequence, without any cache, layer by layer."""

    def __init__(self, tiny, directory, method):
        self.stock = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").eval()
        self.tiny, self.method = tiny, method
        self.decoder = self.stock.model.language_model
        path = tiny.path
        self.length, self.visual = path.ids.shape[1], path.is_visual
        main, *self.deep = path.features().split(tiny.vision.width, dim=1)
        self.embeds = self.stock.get_input_embeddings()(path.ids)
        self.embeds[0, self.visual] = main
        self.positions = path.positions(path.ids).float()

    def logits(self, tokens, num_kept):
        """(steps, vocabulary) after the prompt and each of these further tokens, and the visual tokens that are kept."""
        embeds = torch.cat([self.embeds, self.stock.get_input_embeddings()(torch.tensor([tokens]).long())], dim=1)
        later = self.positions[..., -1:] + 1 + torch.arange(len(tokens))
        positions = torch.cat([self.positions, later], dim=-1)
        visual = torch.cat([self.visual, torch.zeros(len(tokens), dtype=torch.bool)])
        hidden, weights, left, kept = embeds, [], torch.arange(embeds.shape[1]), torch.arange(int(visual.sum()))
        for number, layer in enumerate(self.decoder.layers):
            seen = []
            hook = layer.self_attn.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[1]))
            cos_sin = self.decoder.rotary_emb(hidden, positions[..., left])
            mask = torch.full((len(left), len(left)), -torch.inf).triu(1)[None, None]
            hidden = layer(hidden, position_embeddings=cos_sin, attention_mask=mask)
            hook.remove()
            if number < len(self.deep):
                hidden[0, visual[left]] += self.deep[number][kept]
            if number < self.method.num_full_layers:
                weights.append(seen[0][0, :, self.length - 1].mean(0))
            if number == self.method.num_full_layers - 1:
                counted = weights[-1] if self.method.name == "fastv" else sum(weights)
                kept = counted[visual].topk(num_kept).indices.sort().values
                is_left = ~visual
                is_left[visual.nonzero()[:, 0][kept]] = True
                left = is_left.nonzero()[:, 0]
                hidden = hidden[:, left]
        return self.stock.lm_head(self.decoder.norm(hidden))[0, -1 - len(tokens) :], kept


@pytest.mark.parametrize("num_kept", [1, NUM_KEPT])
def test_pruning_equals_stock_layers_run_by_hand(tiny, method, num_kept):
    if tiny.case.name not in BY_HAND:
        return
    hand = ByHand(tiny, tiny.checkpoint.directory, method)
    whole, _ = hand.logits([], int(hand.visual.sum()))
    inputs = tiny.path.forward_inputs(tiny.path.ids)
    assert difference(whole[0], tiny.stock(**inputs).logits[0, -1]) < 1e-4  # the reference is the model
    prefix = prefill_pruned(tiny, method, num_kept)
    answer = generate(tiny.model, prefix, tiny.prompt.suffix, STEPS)
    list(answer)
    expected, kept = hand.logits(answer.ids[:-1], num_kept)
    assert len(kept) == num_kept == prefix.num_answering_tokens
    assert answer.ids == expected.argmax(-1).tolist()
    with engine.lend_cache(prefix) as cache:
        hidden = [engine.read_question(tiny.model, prefix, tiny.prompt.suffix, cache)]
        position = prefix.next_position + len(tiny.prompt.suffix)
        for step, token in enumerate(answer.ids[:-1]):
            rows = tiny.model.text_rows([token], cache.get_seq_length(), position + step)
            hidden.append(engine.prefill(tiny.model, rows, cache))
        lengths = [layer.get_seq_length() for layer in cache.layers]
        ours = tiny.model.logits(torch.cat(hidden))
    assert difference(ours, expected) < 1e-4 < difference(ours[0], whole[0])
    dropped = int(hand.visual.sum()) - num_kept
    first = lengths[: method.num_full_layers]
    assert len(set(first)) == 1 and set(lengths[method.num_full_layers :]) == {first[0] - dropped}


def test_a_question_leaves_the_model_and_the_video_as_they_were(tiny, method):
    decoder = tiny.model.decoder
    parts, before = (
        (decoder.layers, decoder.norm),
        engine.score_options(tiny.model, tiny.ask(tiny.tokens())[0], tiny.prompt.suffix, OPTIONS),
    )
    prefix = prefill_pruned(tiny, method, NUM_KEPT)
    lengths = [layer.get_seq_length() for layer in prefix.cache.layers]
    kept = copy.deepcopy(prefix.cache.layers[0].keys)
    scores = engine.score_options(tiny.model, prefix, tiny.prompt.suffix, OPTIONS)
    list(generate(tiny.model, prefix, tiny.model.prompt("Why? And how?").suffix, 3))
    assert [layer.get_seq_length() for layer in prefix.cache.layers] == lengths
    assert lengths[0] == prefix.num_tokens and lengths[-1] == 0
    assert torch.equal(prefix.cache.layers[0].keys, kept)
    assert torch.equal(engine.score_options(tiny.model, prefix, tiny.prompt.suffix, OPTIONS), scores)
    assert decoder.layers is parts[0] and decoder.norm is parts[1] and not decoder._forward_hooks
    plain = tiny.ask(tiny.tokens())[0]
    assert torch.equal(engine.score_options(tiny.model, plain, tiny.prompt.suffix, OPTIONS), before)
    assert difference(scores, before) > 1e-3


def test_chunks_do_not_matter(tiny, method):
    whole = engine.score_options(tiny.model, prefill_pruned(tiny, method, NUM_KEPT), tiny.prompt.suffix, OPTIONS)
    chunked = prefill_pruned(tiny, method, NUM_KEPT, chunk_tokens=7)
    assert difference(engine.score_options(tiny.model, chunked, tiny.prompt.suffix, OPTIONS), whole) < 1e-3


def test_a_pruned_video_takes_one_question_at_a_time(tiny, method):
    prefix = prefill_pruned(tiny, method, NUM_KEPT)
    with pytest.raises(BackboneError, match="one at a time"):
        batches.answer_batch(tiny.model, prefix, [tiny.prompt.suffix] * 2, 2)
    deeper = Pruning(tiny.model.num_layers, 3, method.pick_attended, "deeper")
    with pytest.raises(BackboneError, match="more layers, got 4"):
        engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(), pruning=deeper)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_weights_of_the_last_query_are_those_of_eager_attention(kernel):
    query, key, value = (torch.randn(1, heads, 9, 8, generator=torch.Generator().manual_seed(1)) for heads in (6, 2, 2))
    attended = []
    out, _ = attention.batch_attention(None, query[:, :, -4:], key, value, None, kernel=kernel, attended=attended)
    values = value[0].repeat_interleave(3, dim=0)
    assert attended[0].shape == (6, 9) and torch.allclose(attended[0].sum(-1), torch.ones(6))
    assert torch.allclose((attended[0][:, None] @ values)[:, 0], out[0, -1], atol=1e-6)


def test_the_picks_follow_their_definitions():
    weights = torch.tensor([[[0.9, 0.0, 0.1, 0.0], [0.7, 0.1, 0.1, 0.1]], [[0.0, 0.2, 0.2, 0.2], [0.0, 0.4, 0.2, 0.3]]])
    assert METHODS["fastv"].pick_attended(weights, 2).tolist() == [1, 3]
    assert METHODS["framefusion-prune"].pick_attended(weights, 2).tolist() == [0, 1]
    assert METHODS["fastv"].pick_attended(weights.new_ones(1, 2, 5), 3).tolist() == [0, 1, 2]
