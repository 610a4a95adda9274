"""The contract of a model family, on a tiny random Qwen2-VL: our results are those of transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from freres_cli.backbones import attention, engine
from freres_cli.backbones.qwen2_vl import Qwen2VLLanguageModel, Qwen2VLVisionEncoder
from freres_cli.backbones.qwen_vision import fit_grid
from freres_cli.errors import BackboneError
from freres_cli.presets import TEXT_AFTER
from tests import tiny_qwen2_vl
from tests.tiny_models import CPU, random_frames, video_tokens
from tests.tiny_qwen2_vl import KEEP, QUESTION, SYSTEM, H, T, W, largest_difference

tiny = tiny_qwen2_vl.tiny


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


def test_attention_is_called_once_per_layer(tiny, monkeypatch):
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
    # 1080p within 576 cells of 28 px, as smart_resize: 504 tokens, never more than the limit.
    assert fit_grid(1920, 1080, 28, 56 * 56, 576 * 784) == (18, 32)
    assert fit_grid(10, 10, 28, 56 * 56, 10**6) == (2, 2)
    assert fit_grid(10_000, 20, 28, 56 * 56, 50 * 784) == (1, 50)


@pytest.mark.parametrize(("width", "height"), [(240, 180), (320, 180), (180, 320), (96, 72), (200, 200)])
@pytest.mark.parametrize("cells", [50, 64, 70, 72, 80, 300])
def test_a_lower_limit_near_the_upper_one_keeps_the_aspect_ratio(width, height, cells):
    """At least 64 cells of 32 px, as Qwen3-VL has them, but no more than are asked for."""
    rows, columns = fit_grid(width, height, 32, min(64, cells) * 32**2, cells * 32**2)
    assert rows * columns <= cells and rows * columns >= 0.7 * min(cells, 64)
    assert max(rows / columns / (height / width), columns / rows / (width / height)) < 1.35


def test_smart_resize_agrees_where_its_limit_holds():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    small = [(width, height) for width in range(28, 56, 5) for height in range(28, 56, 9)]
    for width, height in [(1920, 1080), (1080, 1920), (640, 480), (37, 500), (333, 333), (3000, 20), *small]:
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
    # A single row is another matrix product, which may round differently: the stock model computes one row too.
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
    """Greedy steps of the stock pixel path over the full sequence, without a cache. A mask hides the dropped tokens."""
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
    assert largest_difference(tiny.last_logits(replace(rows, positions=plain)), right) > 1e-2
    long = video_tokens(tiny.latents.repeat(3, 1, 1, 1))
    rules = [tiny.last_logits(tiny.whole_prompt(long, rule)) for rule in TEXT_AFTER]
    assert largest_difference(*rules) > 1e-2


def test_fractional_positions_run(tiny):
    video = video_tokens(tiny.latents, KEEP)
    whole = tiny.last_logits(tiny.whole_prompt(video))
    video.positions.add_(torch.tensor([0.25, 0.25, 0.0]))
    moved = tiny.last_logits(tiny.whole_prompt(video))
    assert moved.isfinite().all() and largest_difference(moved, whole) > 0


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
