"""The contract of a model family, on a tiny random Qwen2-VL: what we run is what transformers runs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from freres_cli.backbones import attention, base, engine
from freres_cli.backbones.generation import Sampling, TextStream, generate, pick_token
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel, Qwen2VLVisionEncoder
from freres_cli.backbones.qwen_vision import fit_grid
from freres_cli.errors import BackboneError, ResourceError, UsageError
from freres_cli.presets import TEXT_AFTER
from tests.tiny_models import CPU, make_qwen2_vl, open_checkpoint, random_frames, stock_inputs, video_tokens

T, H, W = 4, 4, 5
QUESTION = "What is it? Ünïcödé"
SYSTEM = "Be brief."


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


# Vision


def test_patches_equal_the_image_processor(tiny):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, do_resize=False)
    expected = processor([frame.permute(2, 0, 1).numpy() for frame in tiny.frames], input_data_format="channels_first")
    assert torch.equal(tiny.vision.patches(tiny.frames), torch.as_tensor(np.asarray(expected["pixel_values"])))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 3), (H, W)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16])
def test_latents_do_not_depend_on_how_many_frames_are_encoded_at_a_time(tiny, chunk, grid):
    frames = random_frames(17, grid, seed=1)
    whole = tiny.vision.encode(frames)
    parts = torch.cat([tiny.vision.encode(part) for part in frames.split(chunk)])
    assert largest_difference(whole, parts) == 0.0


def test_latents_equal_stock_features(tiny):
    patches = tiny.vision.patches(tiny.frames)
    as_video = tiny.stock.get_video_features(patches, torch.tensor([[T, 2 * H, 2 * W]]), return_dict=True)
    as_images = tiny.stock.get_image_features(patches, torch.tensor([[1, 2 * H, 2 * W]] * T), return_dict=True)
    for stock in (as_video, as_images):
        assert torch.equal(tiny.latents.reshape(-1, tiny.vision.width), torch.cat(stock.pooler_output))


def test_attention_is_called_once_a_layer(tiny, monkeypatch):
    calls = []
    real = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k)
    )
    tiny.vision.encode(tiny.frames)
    assert [shape[0] for shape in calls] == [T] * 3


def test_frames_do_not_leak_into_each_other(tiny):
    changed = tiny.frames.clone()
    changed[1] = 255 - changed[1]
    difference = (tiny.vision.encode(changed) - tiny.latents).abs().amax(dim=(1, 2, 3))
    assert difference[1] > 0 and difference[[0, 2, 3]].max() == 0


def test_frame_size():
    # 1080p within 576 cells of 28 px, as smart_resize: 504 tokens, never more than asked.
    assert fit_grid(1920, 1080, 28, 56 * 56, 576 * 784) == (18, 32)
    assert fit_grid(10, 10, 28, 56 * 56, 10**6) == (2, 2)
    assert fit_grid(10_000, 20, 28, 56 * 56, 50 * 784) == (1, 50)


def test_smart_resize_agrees_where_its_limit_holds():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for width, height in [(1920, 1080), (1080, 1920), (640, 480), (37, 500), (333, 333), (3000, 20)]:
        expected = smart_resize(height, width, 28, 56 * 56, 400 * 784)
        assert fit_grid(width, height, 28, 56 * 56, 400 * 784) == (expected[0] // 28, expected[1] // 28)


def test_a_grid_is_taken_exactly(tiny):
    size = tiny.vision.frame_size(1920, 1080, grid=(3, 3))
    assert (size.height_px, size.width_px, size.num_tokens) == (24, 24, 9)
    assert tiny.vision.frame_size(1920, 1080, max_tokens=20).num_tokens <= 20


@pytest.mark.parametrize("call", [{"grid": (0, 3)}, {"max_tokens": 0}])
def test_a_frame_has_a_token(tiny, call):
    with pytest.raises(BackboneError, match="at least 1"):
        tiny.vision.frame_size(100, 100, **call)


def test_a_size_that_does_not_divide_is_refused(tiny):
    with pytest.raises(BackboneError, match="multiples of 8"):
        tiny.vision.encode(torch.zeros(1, 20, 24, 3, dtype=torch.uint8))


# Language


@pytest.mark.parametrize("frames", [1, T])
def test_positions_equal_stock(tiny, frames):
    inputs = tiny.inputs(frames)
    expected, _ = tiny.stock.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    rows = tiny.whole_prompt(video_tokens(tiny.latents[:frames]), "hf")
    assert rows.positions.dtype == torch.float32
    assert torch.equal(rows.positions[1:], expected.float())
    assert torch.equal(rows.positions[0, 0], torch.arange(len(rows)).float())


def test_text_after_a_long_video(tiny):
    video = video_tokens(torch.zeros(9, H, W, tiny.model.width))
    base_position = len(tiny.prompt.prefix)
    assert tiny.model.splice(tiny.prompt.prefix, video, "hf").next_position == base_position + W
    long = tiny.model.splice(tiny.prompt.prefix, video, "max")
    assert long.next_position == base_position + 9 == long.positions[1:].max() + 1


@pytest.mark.parametrize("text_after", TEXT_AFTER)
def test_logits_equal_stock_when_all_tokens_are_kept(tiny, text_after):
    rows = tiny.whole_prompt(video_tokens(tiny.latents), text_after)
    every_row = tiny.model.logits(tiny.model.decode(rows, tiny.model.new_cache()))
    stock = tiny.stock(**tiny.inputs()).logits[0]
    assert stock.abs().max() > 3
    assert largest_difference(every_row, stock) == 0.0
    # One row at a time is another matrix product, which may round differently: stock is asked for one row too.
    stock_last = tiny.stock(**tiny.inputs(), logits_to_keep=1).logits[0, -1]
    assert largest_difference(tiny.last_logits(rows), stock_last) == 0.0


def test_both_engines_say_what_stock_says(tiny):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    inputs = tiny.inputs()
    options = {"max_new_tokens": 24, "do_sample": False}
    stock = tiny.stock.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    video = video_tokens(tiny.latents)
    rows = tiny.whole_prompt(video)
    public = tiny.stock.generate(
        input_ids=inputs["input_ids"],
        mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=[video.latents])},
        position_ids=rows.positions,
        **options,
    )[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(stock)) > 3
    assert tiny.greedy(video, 24) == stock == public


def oracle(tiny, keep, num_tokens):
    """Greedy steps of the stock pixel path over the full sequence, dropped tokens hidden by a mask, without a cache."""
    inputs = tiny.inputs()
    start, ids = len(tiny.prompt.prefix), inputs["input_ids"]
    is_dropped = torch.ones(T * H * W, dtype=torch.bool)
    is_dropped[keep] = False
    dropped = start + is_dropped.nonzero()[:, 0]
    steps = []
    for _ in range(num_tokens):
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        mask[:, dropped] = float("-inf")
        mask[dropped, dropped] = 0.0
        kinds = (ids == tiny.stock.config.video_token_id).int() * 2
        inputs |= {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": {"full_attention": mask[None, None]}}
        positions, _ = tiny.stock.model.get_rope_index(ids, kinds, video_grid_thw=inputs["video_grid_thw"])
        logits = tiny.stock(**inputs, position_ids=positions, use_cache=False).logits[0, -1]
        steps.append(logits)
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    return steps


def our_steps(tiny, rows, tokens):
    cache = tiny.model.new_cache()
    steps = []
    for token in [*tokens, None]:
        steps.append(tiny.model.logits(engine.prefill(tiny.model, rows, cache))[0])
        if token is not None:
            rows = tiny.model.text_rows([token], cache.get_seq_length(), rows.next_position)
    return steps


KEEP = torch.tensor([0, 3, 7, 8, 22, 23, 24, 41, 45, 59, 60, 78])


def test_a_subset_answers_as_the_full_sequence_with_the_others_hidden(tiny):
    expected = oracle(tiny, KEEP, 12)
    rows = tiny.whole_prompt(video_tokens(tiny.latents, KEEP))
    ours = our_steps(tiny, rows, [int(step.argmax()) for step in expected[:-1]])
    assert max(map(largest_difference, ours, expected)) < 1e-4
    everything = tiny.last_logits(tiny.whole_prompt(video_tokens(tiny.latents)))
    assert largest_difference(everything, expected[0]) > 1e-2


def test_the_comparison_sees_positions(tiny):
    """Control: the same tokens at compacted positions, or text in the wrong place, give other logits."""
    rows = tiny.whole_prompt(video_tokens(tiny.latents, KEEP))
    right = tiny.last_logits(rows)
    plain = torch.arange(len(rows), dtype=torch.float32).expand(4, 1, -1)
    assert largest_difference(tiny.last_logits(base.PromptRows(rows.embeds, plain, 0.0)), right) > 1e-2
    long = video_tokens(tiny.latents.repeat(3, 1, 1, 1))
    rules = [tiny.last_logits(tiny.whole_prompt(long, rule)) for rule in TEXT_AFTER]
    assert largest_difference(*rules) > 1e-2


@pytest.mark.parametrize("chunk_tokens", [1, 7, 33])
def test_prefill_in_chunks(tiny, chunk_tokens):
    rows = tiny.whole_prompt(video_tokens(tiny.latents))
    assert largest_difference(tiny.last_logits(rows, chunk_tokens), tiny.last_logits(rows)) < 1e-4


def test_a_prefix_is_reused_and_left_untouched(tiny):
    video = video_tokens(tiny.latents, KEEP)
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video)
    before = copy.deepcopy(prefix.cache)
    rows = tiny.model.text_rows(tiny.prompt.suffix, prefix.num_tokens, prefix.next_position)
    with engine.lend_cache(prefix) as cache:
        reused = tiny.model.logits(engine.prefill(tiny.model, rows, cache))[0]
    assert largest_difference(reused, tiny.last_logits(tiny.whole_prompt(video))) < 1e-4
    answers = [list(generate(tiny.model, prefix, tiny.prompt.suffix, 5)) for _ in range(2)]
    assert answers[0] == answers[1]
    abandoned = iter(generate(tiny.model, prefix, tiny.prompt.suffix, 50))
    next(abandoned)
    with pytest.raises(RuntimeError, match="another question"):
        list(generate(tiny.model, prefix, tiny.prompt.suffix, 5))
    abandoned.close()
    for layer, old in zip(prefix.cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys) and torch.equal(layer.values, old.values)


def test_a_cache_that_cannot_be_cut_is_copied(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP))
    expected = engine.score_options(tiny.model, prefix, tiny.prompt.suffix, [(1, 2), (3, 4, 5)])
    prefix.cache.__class__ = type("Uncut", (type(prefix.cache),), {"is_croppable": False, "crop": None})
    assert torch.equal(engine.score_options(tiny.model, prefix, tiny.prompt.suffix, [(1, 2), (3, 4, 5)]), expected)
    assert prefix.cache.get_seq_length() == prefix.num_tokens


def test_fractional_positions_run(tiny):
    video = video_tokens(tiny.latents, KEEP)
    whole = tiny.last_logits(tiny.whole_prompt(video))
    video.positions.add_(torch.tensor([0.25, 0.25, 0.0]))
    moved = tiny.last_logits(tiny.whole_prompt(video))
    assert moved.isfinite().all() and largest_difference(moved, whole) > 0


def test_options_are_scored_as_by_a_stock_forward(tiny):
    inputs = tiny.inputs()
    options = [tuple(b"yes"), tuple(b"n"), tuple("vielleicht ü".encode())]
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents))
    ours = engine.score_options(tiny.model, prefix, tiny.prompt.suffix, options)
    for option, score in zip(options, ours, strict=True):
        ids = torch.cat([inputs["input_ids"], torch.tensor([option])], dim=1)
        kinds = (ids == tiny.stock.config.video_token_id).int() * 2
        logits = tiny.stock(**inputs | {"input_ids": ids, "mm_token_type_ids": kinds}).logits[0]
        log_probs = logits[-len(option) - 1 : -1].log_softmax(-1)
        assert abs(log_probs[range(len(option)), option].sum() - score) < 1e-4
    assert prefix.cache.get_seq_length() == prefix.num_tokens
    with pytest.raises(BackboneError, match="at least one token"):
        engine.score_options(tiny.model, prefix, tiny.prompt.suffix, [()])


def test_bfloat16_keeps_rope_frequencies(tiny):
    vision = Qwen2VLVisionEncoder.load(tiny.checkpoint, CPU, "bfloat16")
    model = Qwen2VLLanguageModel.load(tiny.checkpoint, CPU, "bfloat16")
    assert vision.dtype == model.dtype == torch.bfloat16
    pairs = [
        (vision.tower.rotary_pos_emb, tiny.stock.model.visual.rotary_pos_emb),
        (model.decoder.rotary_emb, tiny.stock.model.language_model.rotary_emb),
    ]
    for ours, stock in pairs:
        assert ours.inv_freq.dtype == torch.float32
        assert torch.equal(ours.inv_freq, stock.inv_freq)
    latents = vision.encode(tiny.frames)
    assert latents.dtype == torch.bfloat16
    parts = torch.cat([vision.encode(frame) for frame in tiny.frames.split(1)])
    assert torch.equal(latents, parts)
    prefix = engine.prefill_video(model, tiny.prompt.prefix, video_tokens(latents))
    assert engine.score_options(model, prefix, tiny.prompt.suffix, [(1, 2)]).isfinite().all()


def test_kv_bytes_per_token_is_what_the_cache_holds(tiny):
    prefix = engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)
    assert held == prefix.num_tokens * tiny.model.kv_bytes_per_token


def test_the_prompt_is_the_templates(tiny):
    decode = tiny.model.tokenizer.decode
    assert decode(tiny.prompt.prefix) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    assert decode(tiny.prompt.suffix) == f"<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    template, tiny.model.tokenizer.chat_template = tiny.model.tokenizer.chat_template, None
    try:
        assert tiny.model.prompt(QUESTION, SYSTEM) == tiny.prompt
    finally:
        tiny.model.tokenizer.chat_template = template
    with pytest.raises(BackboneError, match="one place for the video, got 2"):
        tiny.model.prompt("what is <|video_pad|>?")


def test_tokens_of_another_width_are_refused(tiny):
    with pytest.raises(BackboneError, match="expected 48 channels, got 96"):
        tiny.model.splice(tiny.prompt.prefix, video_tokens(torch.zeros(1, 2, 2, 96)))


# Generation


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
    assert {pick_token(logits, Sampling(1.0, 0.5), generator) for _ in range(50)} == {1}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_illegal_sampling_is_refused(bad):
    with pytest.raises(UsageError, match="expected a number"):
        Sampling(**bad)


@pytest.mark.parametrize("data", ["héllo € 𝄞 ab", b"\xe2\x82A\xff\xff\xe2", b"\xf0\x9f\x98", "a\nb  c"])
def test_text_comes_in_whole_characters(tiny, data):
    content = data.encode() if isinstance(data, str) else data
    stream = TextStream(tiny.model.tokenizer)
    pieces = [stream.add(byte) for byte in content]
    assert "".join(pieces) + stream.flush() == content.decode(errors="replace")
    if isinstance(data, str):
        assert "\ufffd" not in "".join(pieces)


def test_the_context_is_a_limit(tmp_path):
    make_qwen2_vl(tmp_path, layers=1, depth=1, context=100)
    model = Qwen2VLLanguageModel.load(open_checkpoint(tmp_path), CPU)
    with pytest.raises(BackboneError, match="expected at most 100, got 1"):
        engine.prefill_video(model, tuple(range(30)), video_tokens(torch.zeros(4, 4, 5, 48)))
    few = video_tokens(torch.zeros(90, 1, 1, 48), torch.tensor([0, 89]))
    prefix = engine.prefill_video(model, tuple(range(30)), few)
    assert prefix.notes == ("positions reach 120, beyond the 100 the model was made for",)
    with pytest.raises(BackboneError, match="more tokens than the model's context"):
        generate(model, prefix, (1, 2), 90)


def test_running_out_of_memory_is_one_line(tiny, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tiny.model.decoder, "forward", fail)
    with pytest.raises(ResourceError, match=rf"\d+ tokens, {(len(tiny.prompt.prefix) + 80) * 576} bytes of KV cache"):
        engine.prefill_video(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents))
    monkeypatch.setattr(tiny.vision.tower, "forward", fail)
    with pytest.raises(ResourceError, match="encoding 4 frames"):
        tiny.vision.encode(tiny.frames)
