"""Every family's prompt is, token for token, that of the stock processor for the same template and video.

The processors' own text code runs here; their image and video halves, which need torchvision, are stubs.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import VideoMetadata

from tests.stock_paths import PERIOD_S
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, MERGE, open_checkpoint, video_tokens

T, QUESTION = 4, "What is it? Ünïcödé"
PROCESSORS = {
    "qwen2_vl": "qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor",
    "qwen2_5_vl": "qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
    "qwen3_vl": "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
    "qwen3_vl_moe": "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
    "qwen3_5": "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
    "internvl": "internvl.processing_internvl:InternVLProcessor",
    "llava_onevision": "llava_onevision.processing_llava_onevision:LlavaOnevisionProcessor",
    "smolvlm": "smolvlm.processing_smolvlm:SmolVLMProcessor",
    "minicpmv4_6": "minicpmv4_6.processing_minicpmv4_6:MiniCPMV4_6Processor",
    "minicpmv4_7": "minicpmv4_7.processing_minicpmv4_7:MiniCPMV4_7Processor",
}
# Attributes that the released tokenizers have, and the byte tokenizer of the tests does not.
TOKENIZER_NAMES = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "minicpmv4_6": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
}
for _name in ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end"):
    kind, _, end = _name.rpartition("_")
    TOKENIZER_NAMES["minicpmv4_6"][f"{_name}_token"] = f"<{'/' * (end == 'end')}{kind}>"
TOKENIZER_NAMES["minicpmv4_7"] = TOKENIZER_NAMES["minicpmv4_6"]


def stock_processor(case, tokenizer, monkeypatch):
    module_name, _, class_name = PROCESSORS[case.name].partition(":")
    module = importlib.import_module(f"transformers.models.{module_name}")
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    if case.name == "smolvlm":
        monkeypatch.setattr(module, "num2words", {T: "four"}.get)
    for name, token in TOKENIZER_NAMES.get(case.name, {}).items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, name + "_id", tokenizer.convert_tokens_to_ids(token))
    half = SimpleNamespace(
        merge_size=MERGE, temporal_patch_size=2, slice_mode=False, use_image_id=False, downsample_mode="16x"
    )
    cells = case.grid[0] * case.grid[1]
    sizes = {"internvl": {"image_seq_length": cells}, "smolvlm": {"image_seq_len": cells}}
    sizes["llava_onevision"] = {"num_image_tokens": (case.frame_px[0] // 4) ** 2}
    return getattr(module, class_name)(
        image_processor=half, tokenizer=tokenizer, video_processor=half, **sizes.get(case.name, {})
    )


def stock_ids(case, tokenizer, monkeypatch):
    """The prompt of one video of T frames, as the stock processor writes and tokenizes it."""
    processor = stock_processor(case, tokenizer, monkeypatch)
    module = importlib.import_module(type(processor).__module__)
    rows, columns = case.grid
    # Each frame is a temporal step; families whose steps have two frames get it twice.
    twice = 2 if case.name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5") else 1
    indices = [frame for frame in range(T) for _ in range(twice)]
    video = {
        "video_grid_thw": torch.tensor([[T, rows * MERGE, columns * MERGE]]),
        "video_metadata": [VideoMetadata(T, fps=1 / PERIOD_S, frames_indices=indices)],
        "pixel_values_videos": torch.zeros(1, T),
        "pixel_values": torch.zeros(1, T),
        "target_sizes_videos": torch.tensor([[rows * 4, columns * 4]] * T),
        "num_frames_per_video": [T],
        "grids_videos": torch.zeros(T, 2, dtype=torch.int).numpy(),
    }
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True,
        chat_template=module.DEFAULT_CHAT_TEMPLATE if case.name == "smolvlm" else None,
    )
    extra = {"video_token_divisor": 16} if case.module == "minicpm_v" else {}
    expanded, _ = processor.get_text_with_replacements([text], [], [processor.replace_video_token(video, 0, **extra)])
    return tokenizer(expanded[0], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_the_prompt_is_the_stock_processors(case, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    stock = case.make(tmp_path)
    model = case.language_class.load(open_checkpoint(tmp_path), CPU)
    vision = case.vision_class.load(open_checkpoint(tmp_path), CPU)
    frames = case.frames(T)
    video = video_tokens(vision.encode(frames), width=vision.width, period_s=PERIOD_S)
    prompt = model.prompt(QUESTION)
    rows = model.splice(prompt.prefix, video)
    rows = rows.then(model.text_rows(prompt.suffix, len(rows), rows.next_position))

    ids = stock_ids(case, model.tokenizer, monkeypatch)
    assert len(rows) == len(ids)
    path = case.stock_path(case, stock, prompt, frames, vision)
    assert path.ids[0].tolist() == ids
    is_text = ~path.is_visual
    expected = stock.get_input_embeddings()(torch.tensor(ids))
    newline = torch.tensor(ids) == getattr(stock.config, "video_token_index", -1)
    is_text &= ~newline  # the row that ends a video of LLaVA-OneVision has the video's token, but no text
    assert torch.equal(rows.embeds[is_text, : model.width], expected[is_text])
    assert is_text.sum() >= 40
