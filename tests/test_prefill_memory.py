"""A prefill holds weights, cache and one pass on the device, however long the prompt is; the rest is in host memory."""

from __future__ import annotations

import copy

import pytest
import torch

from freres_cli.backbones import attention, base, engine
from freres_cli.backbones.base import Piece, PromptRows
from freres_cli.backbones.cache import LEAST_SPARE, ROOM_STEP, SPARE_PART
from freres_cli.backbones.pruning import Pruning
from freres_cli.backbones.qwen3_vl import Qwen3VLLanguageModel
from freres_cli.backbones.released import write_weightless
from freres_cli.backbones.sizes import measure_decoder
from freres_cli.devices import Storage
from freres_cli.pipeline.costs import ask_parts
from freres_cli.pipeline.session import Session
from tests.family_contract import CASES, by_family
from tests.family_contract import folders as folders
from tests.family_contract import load as load
from tests.family_contract import one_thread as one_thread
from tests.labelled_device import LabelledTensor, count_waits, labelled_device, strip
from tests.live_bytes import DeviceBytes
from tests.test_plan import flatten
from tests.tiny_models import CPU, open_checkpoint, video_tokens

# One that has no text in the video, and one with text around every frame and DeepStack rows.
QUICK = ("qwen2_5_vl", "qwen3_vl")
CHUNK = 32
REPEAT_HEADS = attention._repeat_heads
QUESTIONS = ["What moves?", "What is it, and where?"]

each_family = by_family(QUICK)


@pytest.fixture
def device(monkeypatch):
    # On CUDA no kernel takes grouped heads in float32; those that take 16 bits need no copy of the cache.
    monkeypatch.setattr(attention, "_repeat_heads", lambda tensor, num_heads: tensor)
    with labelled_device(monkeypatch) as found:
        yield found


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


def states_of(cache):
    """Bytes of the states of linear attention."""
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("conv_states", "recurrent_states"))
    return sum(value.nbytes for state in states for value in flatten(state))


def measure(model, name, num_frames):
    """The most bytes beyond the cache while so many frames are prefilled, and the number of rows."""
    tokens = tokens_of(model, name, num_frames)
    with DeviceBytes() as live:
        prefix = prefill(model, tokens)
    return live.peak - room_of(prefix.cache), prefix.num_tokens


@each_family
def test_memory_beyond_the_cache_does_not_grow_with_the_prompt(load, device, name):
    model = load(name, device).language_model
    (short, num_short), (long, num_long) = (measure(model, name, num_frames) for num_frames in (6, 18))
    assert num_long > 2 * num_short > 6 * CHUNK and short > CHUNK * model.width * model.dtype.itemsize
    assert short == long, f"{long - short} bytes more for {num_long - num_short} rows"


def test_a_plan_has_the_heads_that_are_repeated_in_float32(load, device, monkeypatch):
    """On the device alone, where 16 bits need none. Without them it has a layer of the cache that moves."""
    made, num_rows = [], 100

    def repeat(tensor, num_heads):
        made.append(REPEAT_HEADS(tensor, num_heads))
        return made[-1]

    monkeypatch.setattr(attention, "_repeat_heads", repeat)
    model = load("qwen2_5_vl", device).language_model
    with torch.no_grad():
        model.decode(model.text_rows(list(range(num_rows)), 0, 0.0), model.new_cache())
    sizes = measure_decoder(model)

    def planned(itemsize, is_cuda):
        parts = ask_parts(sizes, 0, num_rows, 1000, itemsize, is_cuda=is_cuda)
        return next(part.num_bytes for part in parts if part.name == "prefill activations")

    moved = num_rows * sizes.kv_layer_values * 4
    assert sum(strip(tensor).nbytes for tensor in made[:2]) == planned(4, True) - planned(4, False) + moved > moved
    assert planned(2, True) == planned(2, False)


@pytest.mark.parametrize("name", ["qwen3_5", "minicpmv4_6", "qwen2_5_vl"])
def test_a_plan_has_the_copy_that_a_question_takes_of_states(load, name):
    """Only of caches that cannot be cut back afterwards."""
    model = load(name, CPU).language_model
    prefix = prefill(model, tokens_of(model, name, 6))
    with engine.lend_cache(prefix) as cache:
        copied = 0 if cache is prefix.cache else room_of(cache) + states_of(cache)
    sizes = measure_decoder(model)
    parts = {part.name: part.num_bytes for part in ask_parts(sizes, 0, prefix.num_tokens, 1, model.dtype.itemsize)}
    planned = parts.get("copy of the cache", 0)
    if planned:  # it takes the place of the prefill's rows and activations
        planned += parts["prompt rows"] + parts["prefill activations"]
    spare = (ROOM_STEP + prefix.num_tokens // SPARE_PART + LEAST_SPARE) * model.kv_bytes_per_token
    assert copied - spare <= planned <= copied and bool(planned) == (name != "qwen2_5_vl")


def test_a_cache_in_8_bits_adds_one_layer_in_the_precision_of_the_model(load, device):
    model = copy.copy(load("qwen2_5_vl", device).language_model)
    model.storage = Storage("int8")
    (short, num_short), (long, num_long) = (measure(model, "qwen2_5_vl", num_frames) for num_frames in (6, 18))
    config = model.decoder.config
    layer = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads * model.dtype.itemsize
    assert 0 < long - short <= (num_long - num_short) * layer


@pytest.mark.parametrize("kv", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_what_comes_in_parts_is_what_the_cpu_has_and_waits_do_not_grow(load, device, monkeypatch, kv):
    model, there = (copy.copy(load("qwen3_vl", place).language_model) for place in (CPU, device))
    model.storage = there.storage = Storage(kv)
    # A pass comes in several blocks, and the last of them is not full.
    monkeypatch.setattr(base, "UPLOAD_BYTES", 5 * 4 * model.width * (1 + model.num_deep_layers))
    found = []
    for num_frames in (3, 9):
        tokens = tokens_of(model, "qwen3_vl", num_frames)
        with count_waits() as waits:
            ours = prefill(there, tokens)
        found.append(sum(waits.values()))
        theirs = prefill(model, tokens)
        assert (ours.num_tokens, ours.next_position) == (theirs.num_tokens, theirs.next_position)
        for mine, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            assert isinstance(mine.keys, LabelledTensor) and not isinstance(other.keys, LabelledTensor)
            assert torch.equal(strip(mine.keys), other.keys) and torch.equal(strip(mine.values), other.values)
    assert found[0] == found[1] == 2, "the host gets the embeddings of the text before the video, and of that in it"


def test_answers_are_those_of_the_cpu_alone_and_together_and_from_a_file(load, device, tmp_path):
    answers = []
    for place in (device, CPU):
        model = load("qwen3_vl", place).language_model
        tokens = tokens_of(model, "qwen3_vl", 3)
        kept = Session(
            model, tokens, len(tokens), "max", 0.0, prefix_file=tmp_path / f"{model.device.type}.safetensors"
        )
        alone = [kept.ask(question, max_new_tokens=5).text for question in QUESTIONS]
        together = [answer.text for answer in kept.ask_many(QUESTIONS, max_new_tokens=5)]
        kept.forget_prefix()
        again = kept.ask(QUESTIONS[0], max_new_tokens=5)
        assert any("prefix read from" in note for note in again.notes) and again.text == alone[0]
        answers.append((alone, together))
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_a_pruned_video_gives_the_answers_of_the_cpu(load, device, name):
    pruning = Pruning(1, 20, lambda weights, count: weights.mean((0, 1)).topk(count).indices.sort().values, "some")
    answers = []
    for place in (device, CPU):
        model = load(name, place).language_model
        tokens = tokens_of(model, name, 3)
        session = Session(model, tokens, len(tokens), "max", 0.0, pruning=pruning)
        answers.append([session.ask(question, max_new_tokens=5).text for question in QUESTIONS])
    assert answers[0] == answers[1]


@pytest.mark.slow
@torch.no_grad()
def test_the_papers_prompt_takes_the_weights_the_cache_and_five_percent(tmp_path, monkeypatch):
    """Qwen3-VL-8B on torch's meta device, which computes nothing, and 46,102 rows in host memory. The kernel is taken to hold
    only its result."""
    folder = write_weightless("Qwen3-VL-8B", tmp_path)
    model = Qwen3VLLanguageModel.load_without_weights(open_checkpoint(folder))
    model.half.to(torch.bfloat16)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    monkeypatch.setattr(attention, "_causal_lower_right", lambda *_: None)
    num_rows = 46_102
    row = torch.ones(1, model.width * (1 + model.num_deep_layers), dtype=torch.bfloat16)
    piece = Piece(row, torch.zeros(num_rows, dtype=torch.int64))
    with DeviceBytes() as live:
        prefix = engine.prefill_rows(model, PromptRows((piece,), torch.zeros(4, 1, num_rows), 0.0), num_rows)
    weights, held = sum(parameter.nbytes for parameter in model.half.parameters()), num_rows * model.kv_bytes_per_token
    assert held < room_of(prefix.cache) < live.peak and weights + live.peak < 1.05 * (weights + held)
