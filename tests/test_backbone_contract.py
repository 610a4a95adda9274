"""The contract of every model family, on tiny random checkpoints: our results are those of transformers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from freres_cli.backbones import attention, engine
from freres_cli.backbones.generation import generate
from freres_cli.backbones.registry import FAMILIES
from freres_cli.records import nearest_frames
from tests import family_contract
from tests.family_contract import STEPS, T, Tiny, difference
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, MERGE, open_checkpoint, open_recording_checkpoint, random_frames

tiny, one_thread = family_contract.tiny, family_contract.one_thread


def test_every_family_has_its_row():
    assert [case.name for case in FAMILY_CASES] == list(FAMILIES)


# Vision


def test_pixels_equal_the_familys_image_processor(tiny):
    prepare = getattr(tiny.vision, "patches", None) or tiny.vision.prepare
    ours = prepare(tiny.frames)
    assert ours.shape == tiny.pixels.shape and torch.equal(ours, tiny.pixels)


@pytest.mark.parametrize("chunk", [1, 3])
def test_latents_do_not_depend_on_how_many_frames_are_encoded_at_a_time(tiny, chunk):
    parts = torch.cat([tiny.vision.encode(part) for part in tiny.frames.split(chunk)])
    assert torch.equal(tiny.latents, parts)


def test_latents_equal_stock_features(tiny):
    channels = tiny.vision.width * (1 + tiny.case.num_deep)
    assert tiny.latents.shape == (T, *tiny.case.grid, channels)
    assert tiny.vision.num_deep_layers == tiny.model.num_deep_layers == tiny.case.num_deep
    assert torch.equal(tiny.latents.reshape(-1, channels), tiny.path.features())


def test_a_frame_size_is_one_that_the_tower_takes(tiny):
    size = tiny.vision.frame_size(1280, 720, None, 40)
    frame = torch.zeros(1, size.height_px, size.width_px, 3, dtype=torch.uint8)
    assert tiny.vision.encode(frame).shape[1:3] == (size.grid_h, size.grid_w)


# Language


def test_positions_equal_stock(tiny):
    rows = tiny.whole_prompt(tiny.tokens())
    assert rows.positions.dtype == torch.float32
    expected = tiny.path.positions(tiny.path.ids).float()
    if tiny.case.num_axes == 1:
        assert torch.equal(rows.positions[0], expected)
    else:
        assert torch.equal(rows.positions[1:], expected)
        assert torch.equal(rows.positions[0, 0], torch.arange(len(rows)).float())


def test_logits_and_greedy_tokens_equal_stock_when_all_tokens_are_kept(tiny):
    inputs = tiny.path.forward_inputs(tiny.path.ids)
    rows = tiny.whole_prompt(tiny.tokens())
    ours = tiny.model.logits(tiny.model.decode(rows, tiny.model.new_cache()))
    stock = tiny.stock(**inputs).logits[0]
    assert stock.abs().max() > 3
    assert difference(ours, stock) == 0.0
    told = tiny.stock.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(told)) > 3
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(), "hf")
    answer = generate(tiny.model, prefix, tiny.prompt.suffix, 16)
    list(answer)
    assert answer.ids == told


def test_a_subset_answers_as_the_full_sequence_with_the_others_hidden(tiny):
    if tiny.case.is_hybrid:
        pytest.skip("a recurrent state has no masked tokens: leaving them out is not hiding them")
    told, expected = tiny.path.masked_steps(tiny.keep, STEPS)
    ours = tiny.steps(tiny.whole_prompt(tiny.tokens(tiny.keep)), told[:-1])
    assert len(expected) == STEPS and difference(ours, expected) < 1e-4
    everything = tiny.last_logits(tiny.whole_prompt(tiny.tokens()))
    assert difference(everything, expected[0]) > 1e-2


def test_the_comparison_sees_positions(tiny):
    rows = tiny.whole_prompt(tiny.tokens(tiny.keep))
    plain = torch.arange(len(rows), dtype=torch.float32).expand(rows.positions.shape)
    compacted = replace(rows, positions=plain)
    assert difference(tiny.last_logits(compacted), tiny.last_logits(rows)) > 1e-2


def test_the_comparison_sees_deepstack(tiny):
    if not tiny.case.num_deep:
        pytest.skip("no DeepStack in this family")
    width, right = tiny.vision.width, tiny.last_logits(tiny.whole_prompt(tiny.tokens()))
    main, deep = tiny.latents[..., :width], tiny.latents[..., width:]
    wrong_order = torch.cat([main, *reversed(deep.split(width, dim=-1))], dim=-1)
    for wrong in (torch.cat([main, torch.zeros_like(deep)], dim=-1), wrong_order):
        assert difference(tiny.last_logits(tiny.whole_prompt(tiny.tokens(latents=wrong))), right) > 1e-2


@pytest.mark.parametrize("chunk_tokens", [3, 33])
def test_prefill_in_chunks(tiny, chunk_tokens):
    rows = tiny.whole_prompt(tiny.tokens())
    assert difference(tiny.last_logits(rows, chunk_tokens), tiny.last_logits(rows)) < 1e-4


def test_a_prefix_is_reused_and_left_untouched(tiny):
    video = tiny.tokens(tiny.keep)
    expected = tiny.last_logits(tiny.whole_prompt(video))
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video, "hf")
    assert getattr(prefix.cache, "is_croppable", True) != tiny.case.is_hybrid
    before = copy.deepcopy(prefix.cache)
    for _ in range(2):
        rows = tiny.model.text_rows(tiny.prompt.suffix, prefix.num_tokens, prefix.next_position)
        with engine.lend_cache(prefix) as cache:
            reused = tiny.model.logits(engine.prefill(tiny.model, rows, cache))[0]
        assert difference(reused, expected) < 1e-4
    for layer, old in zip(prefix.cache.layers, before.layers, strict=True):
        for name in ("keys", "values"):
            assert not hasattr(old, name) or torch.equal(getattr(layer, name), getattr(old, name))


def test_fractional_positions_run(tiny):
    video = tiny.tokens(tiny.keep)
    whole = tiny.last_logits(tiny.whole_prompt(video))
    video.positions.add_(torch.tensor([0.25, 0.25, 0.5]))
    moved = tiny.last_logits(tiny.whole_prompt(video))
    assert moved.isfinite().all() and difference(moved, whole) > 0


def test_bfloat16_keeps_rope_frequencies(tiny):
    vision = tiny.case.vision_class.load(tiny.checkpoint, CPU, "bfloat16")
    model = tiny.case.language_class.load(tiny.checkpoint, CPU, "bfloat16")
    assert vision.dtype == model.dtype == torch.bfloat16
    stock = dict(tiny.stock.named_buffers())
    found = 0
    for module in (vision.tower, model.decoder):
        for name, buffer in module.named_buffers():
            if name.endswith("inv_freq"):
                assert buffer.dtype == torch.float32
                assert any(n.endswith(name) and torch.equal(buffer, b) for n, b in stock.items())
                found += 1
    assert found >= 2
    latents = vision.encode(tiny.frames)
    assert latents.dtype == torch.bfloat16
    prefix = engine.prefill_video(model, tiny.prompt.prefix, tiny.tokens(latents=latents))
    assert engine.score_options(model, prefix, tiny.prompt.suffix, [(1, 2)]).isfinite().all()


def test_each_half_reads_only_its_own_tensors(tiny):
    checkpoint = open_recording_checkpoint(tiny.checkpoint.directory)
    everything = sum(parameter.numel() for parameter in tiny.stock.parameters())
    projector = tiny.case.language_class.files.projector
    _, keys = tiny.checkpoint.keys_under(projector)
    digest = sum(tensor.numel() for _, tensor in tiny.checkpoint.tensors(list(keys.values())))
    assert digest > 0
    vision = tiny.case.vision_class.load(checkpoint, CPU)
    assert sum(count for _, count in checkpoint.read) == sum(p.numel() for p in vision.tower.parameters()) + digest
    checkpoint.read.clear()
    model = tiny.case.language_class.load(checkpoint, CPU)
    own = sum(p.numel() for p in model.decoder.parameters()) + model.head_weight.numel()
    assert own <= sum(count for _, count in checkpoint.read) - digest <= own + model.width
    both = own + sum(p.numel() for p in vision.tower.parameters())
    assert both <= everything <= both + model.width


def test_kv_bytes_per_token_is_what_the_cache_holds(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(tiny.keep))
    layers = [layer for layer in prefix.cache.layers if getattr(layer, "keys", None) is not None]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert held == prefix.num_tokens * tiny.model.kv_bytes_per_token


def test_a_chunk_of_the_prefill_is_as_long_as_its_activations_allow(tiny, monkeypatch):
    outputs = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: outputs.append(out.nbytes))
        for module in tiny.model.decoder.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, tiny.tokens(tiny.keep))
    for hook in hooks:
        hook.remove()
    widest = prefix.num_tokens * tiny.model.activation_bytes_per_token
    # Experts are no linear layers, and take more than these.
    assert 3 * max(outputs) == widest or (3 * max(outputs) < widest and tiny.case.name == "qwen3_vl_moe")
    assert engine.choose_chunk(tiny.model, 1) * tiny.model.activation_bytes_per_token <= engine.PREFILL_CHUNK_BYTES
    monkeypatch.setattr(engine, "PREFILL_CHUNK_BYTES", 1)
    assert engine.choose_chunk(tiny.model, 1) == engine.PREFILL_CHUNK_TOKENS


# What only some families have


def test_experts_stored_the_other_way_round_load_the_same(tmp_path):
    """Released Qwen3-VL-MoE checkpoints store the experts' matrices transposed; transformers 5 transposes them on loading."""
    case = next(case for case in FAMILY_CASES if case.name == "qwen3_vl_moe")
    case.make(tmp_path)
    expected = case.language_class.load(open_checkpoint(tmp_path), CPU).decoder.state_dict()
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    turned = {k: (v.mT.contiguous() if ".experts." in k else v.clone()) for k, v in weights.items()}
    path.unlink()
    save_file(turned, path, metadata={"format": "pt"})
    ours = case.language_class.load(open_checkpoint(tmp_path), CPU).decoder.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """The one family whose attention is within windows of a frame."""
    case = next(case for case in FAMILY_CASES if case.name == "qwen2_5_vl")
    return Tiny(case, tmp_path_factory.mktemp("windowed"))


def test_windows_of_a_frame_are_one_call_for_each_length(windowed, monkeypatch):
    calls = []
    real = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape[0]) or real(*a, **k)
    )
    windowed.vision.encode(windowed.frames)
    # windows of 3x3, 3x2, 1x3 and 1x2 tokens of each frame; then the whole frames
    assert [sorted(calls[:4]), calls[4]] == [[4, 4, 4, 4], 4] and len(calls) == 10


@pytest.mark.parametrize(
    ("seconds", "period"),
    [
        ([0.0], 1.0),
        ([3.0, 3.5, 4.0], 0.5),
        ([0.0, 0.0334, 0.0667], 1 / 30),
        ([0.0, 0.4995, 0.999], 0.5),
        ([0.0, 0.75, 1.5], 0.75),
        ([0.0, 2.004, 4.004], 2.0),
        ([0.0, 0.0], 1.0),
    ],
)
def test_the_period_of_frames_is_the_nominal_one(seconds, period):
    from freres_cli.backbones.qwen2_5_vl import seconds_per_frame

    assert seconds_per_frame(torch.tensor(seconds, dtype=torch.float64)) == pytest.approx(period, abs=1e-9)


def test_numbers_in_words():
    from freres_cli.backbones.smolvlm import in_words

    words = {
        0: "zero",
        16: "sixteen",
        40: "forty",
        64: "sixty-four",
        100: "one hundred",
        128: "one hundred and twenty-eight",
    }
    words |= {
        1000: "one thousand",
        1024: "one thousand and twenty-four",
        2345: "two thousand, three hundred and forty-five",
    }
    assert {number: in_words(number) for number in words} == words


@pytest.mark.parametrize(("t", "frame"), [(0.4, 0), (0.5, 1), (2.49, 2), (3.0, 3), (3.7, 3)])
def test_a_token_goes_to_its_nearest_frame(t, frame):
    assert nearest_frames(torch.tensor([t]), 4).tolist() == [frame]


@pytest.mark.parametrize("grid", [(3, 4), (1, 7), (2, 2), (6, 3)])
def test_windows_of_any_grid_equal_stock(windowed, grid):
    frames = random_frames(6, grid)
    stock_grid = torch.tensor([[6, grid[0] * MERGE, grid[1] * MERGE]])
    stock = windowed.stock.get_video_features(
        windowed.vision.patches(frames), stock_grid, return_dict=True
    ).pooler_output
    assert difference(windowed.vision.encode(frames).flatten(0, 2), torch.cat(stock)) < 2e-5


PLAIN_PROMPTS = {
    "minicpmv4_6": ("<|im_start|>user\n", "\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
    "minicpmv4_7": ("<|im_start|>user\n", "Why?<|im_end|>\n<|im_start|>assistant\n"),
    "internvl": ("<|im_start|>user\n", "\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
    "llava_onevision": ("<|im_start|>user ", "\nWhy?<|im_end|><|im_start|>assistant\n"),
    "smolvlm": ("<|im_start|>User:", "\n\nWhy?<end_of_utterance>\nAssistant:"),
}


def test_the_prompt_without_a_template_is_the_familys_own(tiny, monkeypatch):
    """Also for a template that cannot handle parts, like the text-only ones of some of these checkpoints."""
    qwen = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    default = (qwen + "<|vision_start|>", "<|vision_end|>Why?<|im_end|>\n<|im_start|>assistant\n")
    expected = PLAIN_PROMPTS.get(tiny.case.name, default)
    text_only = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    for template in (None, text_only):
        monkeypatch.setattr(tiny.model.tokenizer, "chat_template", template)
        prompt = tiny.model.prompt("Why?")
        assert tuple(map(tiny.model.tokenizer.decode, (prompt.prefix, prompt.suffix))) == expected


def test_a_template_beside_the_tokenizer_is_used(tmp_path):
    case = FAMILY_CASES[0]
    case.make(tmp_path)
    template = "{% for part in messages[0]['content'] %}{{ part.text or '<|video_pad|>' }}!{% endfor %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = case.language_class.load(open_checkpoint(tmp_path), CPU)
    prompt = model.prompt("Why?")
    assert (prompt.prefix, model.tokenizer.decode(prompt.suffix)) == ((), "!Why?!")
