"""Texts that continue one video are attended to as if each had the video's rows of its own, and none has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from freres_cli.backbones import batches, engine, shared_prefix
from freres_cli.backbones.cache import ReservedLayer
from freres_cli.backbones.shared_prefix import Shared, attend_shared, can_share, share
from freres_cli.devices import choose_device
from freres_cli.pipeline import session as session_module
from freres_cli.pipeline.query import Query
from tests.labelled_device import cuda
from tests.largest_made import LargestMade
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.tiny_models import CPU, video_tokens

on_both = pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=cuda)])

NUM_VIDEO, NUM_TEXTS, HEADS, KV_HEADS, WIDTH = 700, 3, 4, 2, 24


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_of_video(dtype, place):
    layer = ReservedLayer()
    layer.update(*(draw(1, KV_HEADS, NUM_VIDEO, WIDTH, seed=seed, dtype=dtype).to(place) for seed in (1, 2)))
    return Cache(layers=[layer])


def padding(num_own, num_pads, is_first):
    """Where rows are tokens: after the padding that a text begins with; in a later pass there is also some in the middle."""
    is_token = torch.arange(num_own) >= torch.tensor(num_pads)[:, None]
    if not is_first:
        is_token[1, num_own // 2 : num_own // 2 + 2] = False
    return is_token


@on_both
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_pads", [(0, 0, 0), (0, 4, 2)], ids=["no padding", "padding"])
@pytest.mark.parametrize(("num_own", "num_queries"), [(9, 9), (9, 4), (300, 300), (300, 270)])
@torch.no_grad()
def test_both_parts_are_the_attention_to_all_rows(monkeypatch, place, kernel, dtype, num_pads, num_own, num_queries):
    monkeypatch.setattr(shared_prefix, "SCORE_BYTES", 4 * HEADS * NUM_VIDEO * 5)  # several parts of what is written out
    cache, is_first = share(cache_of_video(dtype, place)), num_queries == num_own
    key, value = (draw(NUM_TEXTS, KV_HEADS, num_own, WIDTH, seed=seed, dtype=dtype).to(place) for seed in (3, 4))
    query = draw(NUM_TEXTS, HEADS, num_queries, WIDTH, seed=5, dtype=dtype).to(place)
    is_token = padding(num_own, num_pads, is_first).to(place) if any(num_pads) else None
    shared = Shared(cache, is_token, num_pads if is_first else None)
    with LargestMade() as made:
        out = attend_shared(query, key, value, 0.3, 0, shared, kernel)
    video = cache.parts[0].read_video(dtype)
    keys, values = (
        torch.cat([rows.expand(NUM_TEXTS, -1, -1, -1), own], 2) for rows, own in zip(video, (key, value), strict=True)
    )
    seen = torch.ones(num_queries, NUM_VIDEO + num_own, dtype=torch.bool, device=place).tril(
        NUM_VIDEO + num_own - num_queries
    )
    seen = seen[None, None].expand(NUM_TEXTS, 1, -1, -1).clone()
    if is_token is not None:
        seen[..., NUM_VIDEO:] &= is_token[:, None, None]
    whole = scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=seen, scale=0.3, enable_gqa=True
    )
    assert out.dtype == dtype
    assert (out - whole).abs().max() < {torch.float32: 4e-6, torch.bfloat16: 2**-7}[dtype]
    # Neither the scores of a long text nor those of the video are there at once.
    assert made.numel <= max(query.numel(), keys.numel(), shared_prefix.SCORE_BYTES // 4)


@pytest.fixture(scope="module")
def video():
    """The embedded model and a video of 800 tokens that it has prefilled."""
    model = loaded_models().language_model
    latents = draw(50, 4, 4, model.width, seed=6)
    ids = model.prompt("?").prefix
    return model, engine.prefill_video(model, ids, video_tokens(latents, torch.arange(800), width=model.width))


def test_no_question_or_option_copies_the_video(video):
    model, prefix = video
    suffixes = [model.prompt(f"What is {n}?").suffix for n in range(6)]
    options = [[(3, 4), (5, 6, 7)]] * 6
    layer = prefix.cache.layers[0]
    before = layer.keys.data_ptr(), layer.keys.clone()
    of_one = 2 * layer.keys.numel()
    with LargestMade() as made:
        batches.score_options_batch(model, prefix, suffixes, options)
        batches.answer_batch(model, prefix, suffixes, 4)
    assert made.numel < of_one
    assert (layer.keys.data_ptr(), layer.keys.shape) == (before[0], before[1].shape)
    assert torch.equal(layer.keys, before[1])


def test_texts_are_picked_again_and_again(video):
    _, prefix = video
    cache = share(prefix.cache)
    assert cache.get_seq_length() == cache.num_video_rows == prefix.num_tokens
    heads, width = prefix.cache.layers[0].keys.shape[1], prefix.cache.layers[0].keys.shape[3]
    cache = cache.pick(torch.tensor([0, 0, 0]))
    own = draw(3, heads, 2, width, seed=7)
    for layer in cache.layers:
        layer.update(own, own)
    twice = cache.pick(torch.tensor([2, 0, 2, 1]))
    keys, _ = twice.layers[0].update(own[[0, 0, 0, 0]], own[[0, 0, 0, 0]])
    assert torch.equal(keys[:, :, :2], own[[2, 0, 2, 1]]) and torch.equal(keys[0, :, 2:], own[0])
    assert (cache.get_seq_length(), twice.get_seq_length()) == (prefix.num_tokens + 2, prefix.num_tokens + 4)


def test_a_layer_that_is_no_list_of_rows_is_not_shared(video):
    _, prefix = video
    cache = copy.copy(prefix.cache)
    assert can_share(cache)
    cache.layers = [*cache.layers, object()]
    assert not can_share(cache)


LONG = "word " * 40


@pytest.fixture
def session(bundle):
    return session_module.open_session(session_module.AskRequest(bundle, CPU))


def bound_rows(session, monkeypatch, num_rows):
    monkeypatch.setattr(session_module, "MAX_BATCH_BYTES", num_rows * session.model.kv_bytes_per_token)
    assert len(session.tokens) > num_rows


def test_how_many_are_asked_together_does_not_depend_on_the_video(session, monkeypatch):
    queries = [Query(f"What is {n}?") for n in range(7)]
    _, suffix = session._prompt(queries[0])
    bound_rows(session, monkeypatch, 3 * (len(suffix) + 4))
    sizes, answer = [], batches.answer_batch
    monkeypatch.setattr(batches, "answer_batch", lambda *args: sizes.append(len(args[2])) or answer(*args))
    together = session.ask_many(queries, max_new_tokens=4)
    assert sizes == [3, 3, 1]
    assert [one.text for one in together] == [session.ask(query.question, max_new_tokens=4).text for query in queries]


@pytest.mark.parametrize("choices", [(), ("left", "right and up", "nowhere at all, I think", "up")])
def test_rows_of_questions_and_options_are_bounded_in_any_order(session, monkeypatch, choices):
    queries = [Query(text, choices) for text in ("Why?", LONG, "Who?", "What?", LONG, "Where?", "When?", "How?")]
    num_rows = 2 * len(session.model.prompt(LONG).suffix) + 40
    bound_rows(session, monkeypatch, num_rows)
    most, run = [], type(session.model).decode_batch

    def watch(model, embeds, positions, mask, cache):
        out = run(model, embeds, positions, mask, cache)
        most.append(len(embeds) * (cache.get_seq_length() - cache.num_video_rows))
        return out

    monkeypatch.setattr(type(session.model), "decode_batch", watch)
    together = session.ask_many(queries, max_new_tokens=4)
    assert 0 < max(most) <= num_rows
    for query, answer in zip(queries, together, strict=True):
        alone = session.ask(query.question, choices=choices, max_new_tokens=4)
        assert answer.text == alone.text and answer.choices == pytest.approx(alone.choices, abs=1e-4)


@on_both
def test_in_16_bits_kernels_read_the_video_and_long_questions(bundle, monkeypatch, place):
    request = session_module.AskRequest(bundle, choose_device(place), dtype="bfloat16")
    session = session_module.open_session(request)
    texts = ("Why?", "word " * (shared_prefix.LEAST_ROWS_OF_KERNEL + 9), "Where is it?")
    queries = [Query(text, ("left", "right and up", "nowhere at all")) for text in texts]
    alone = [session.ask(query.question, choices=query.choices).choices for query in queries]
    called, attend = [], shared_prefix.attend_flash
    monkeypatch.setattr(shared_prefix, "attend_flash", lambda *args: called.append(args[4]) or attend(*args))
    together = session.ask_many(queries)
    assert set(called) == {True, False}
    for own, answer in zip(alone, together, strict=True):
        assert answer.choices == pytest.approx(own, abs=0.02)
