"""Generating an answer: timing, stopping, sampling, and text in whole characters. On a tiny Qwen2-VL."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from freres_cli.backbones import engine, generation, token_steps
from freres_cli.backbones.generation import Sampling, TextStream, generate, pick_token
from freres_cli.errors import UsageError
from tests import tiny_qwen2_vl
from tests.tiny_models import video_tokens

tiny = tiny_qwen2_vl.tiny


def test_a_run_is_timed_and_stops(tiny):
    video = video_tokens(tiny.latents)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video)
    ids = tiny.greedy(video, 8)
    answer = generate(tiny.model, prefix, tiny.prompt.suffix, 8)
    assert "".join(answer) == answer.text == tiny.model.tokenizer.decode(ids, skip_special_tokens=True)
    assert (answer.ids, answer.finish_reason) == (ids, "length")
    assert answer.ttft_s > 0 and answer.tpot_s > 0
    model = copy.copy(tiny.model)
    model.stop_ids = frozenset(ids[2:3])
    stopped = generate(model, prefix, tiny.prompt.suffix, 8)
    list(stopped)
    assert (stopped.ids, stopped.finish_reason) == (ids[: ids.index(ids[2]) + 1], "stop")


def test_sampling_follows_its_seed(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents))
    runs = []
    for seed in (1, 1, 2):
        answer = generate(tiny.model, prefix, tiny.prompt.suffix, 8, Sampling(temperature=2.0, seed=seed))
        list(answer)
        runs.append(answer.ids)
    assert runs[0] == runs[1] != runs[2]


def test_top_p_draws_from_the_smallest_set():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {pick_token(logits, Sampling(1.0, 0.74), generator) for _ in range(200)}
    assert drawn == {1, 3}
    for least in (0.5, 1e-46):  # which is 0 in float32
        assert {pick_token(logits, Sampling(1.0, least), generator) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e-9}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_illegal_sampling_is_refused(bad):
    with pytest.raises(UsageError, match="expected"):
        Sampling(**bad)


@pytest.mark.parametrize("data", ["héllo € 𝄞 ab", b"\xe2\x82A\xff\xff\xe2", b"\xf0\x9f\x98", "a\nb  c"])
def test_text_comes_in_whole_characters(tiny, data):
    content = data.encode() if isinstance(data, str) else data
    stream = TextStream(tiny.model.tokenizer)
    pieces = [stream.add(byte) for byte in content]
    assert "".join(pieces) + stream.flush() == content.decode(errors="replace")
    if isinstance(data, str):
        assert "\ufffd" not in "".join(pieces)


def byte_fallback_tokenizer():
    """A tokenizer like that of Llama: a character without a token of its own is a token for each of its bytes."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581hello": 256, "a": 257, "b": 258, "<unk>": 259}
    made = Tokenizer(BPE(words, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", ["字", "字字b😀é", "ab字 b", "hé"])
def test_characters_come_whole_from_tokens_of_bytes(text):
    tokenizer = byte_fallback_tokenizer()
    ids = [256, *itertools.chain(*([{"a": 257, "b": 258}[c]] if c in "ab" else c.encode() for c in text))]
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) and tokenizer.decode(ids).endswith(text)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("after", ["", "ab€"])
def test_a_control_token_after_a_split_character_adds_nothing(tiny, after):
    tokenizer = tiny.model.tokenizer
    first, rest = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in ("é", after))
    ids = [*first, tokenizer.convert_tokens_to_ids("<|vision_start|>"), *rest]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.add, ids), stream.flush()]) == f"é{after}"


def test_tokens_are_drawn_as_often_as_the_temperature_says():
    """Drawn as often as softmax(logits / temperature) says."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    for temperature in (0.25, 4.0):
        generator = torch.Generator().manual_seed(0)
        drawn = [pick_token(logits, Sampling(temperature), generator) for _ in range(2000)]
        shares = torch.bincount(torch.tensor(drawn), minlength=3) / 2000
        assert torch.allclose(shares, (logits / temperature).softmax(-1), atol=0.05)


def test_the_time_of_a_token_is_that_of_the_steps_alone(tiny, monkeypatch):
    """On a clock that stands still but for a step of the decoder, 1 s, and the caller's own work, 10 s."""
    now, run = [0.0], token_steps.TokenSteps.run
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])

    def step(self, *given):
        now[0] += 1
        return run(self, *given)

    monkeypatch.setattr(token_steps.TokenSteps, "run", step)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents))
    answer = generate(tiny.model, prefix, tiny.prompt.suffix, 6)
    for _ in answer:
        now[0] += 10
    assert (answer.num_new_tokens, answer.ttft_s, answer.tpot_s) == (6, 0, 1)


def test_an_answer_that_ends_at_the_limit_has_stopped(tiny):
    """A stop token in the last place that is allowed ends the answer, and is none of its text."""
    video = video_tokens(tiny.latents)
    prefix, ids = engine.prefill_video(tiny.model, tiny.prompt.prefix, video), tiny.greedy(video, 3)
    model = copy.copy(tiny.model)
    model.stop_ids = frozenset(ids[2:])
    limit = ids.index(ids[2]) + 1
    answer = generate(model, prefix, tiny.prompt.suffix, limit)
    list(answer)
    expected = model.tokenizer.decode(ids[: limit - 1], skip_special_tokens=True)
    assert (answer.ids, answer.finish_reason, answer.text) == (ids[:limit], "stop", expected)
