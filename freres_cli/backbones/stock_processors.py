"""transformers' own processors of every family, as far as they run without torchvision: their pixels and their prompts.

Their image halves run whole. Of the video halves, which need torchvision, the prompt needs only a few numbers, given here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.video_utils import VideoMetadata

from freres_cli.backbones.checkpoint import Checkpoint
from freres_cli.backbones.smolvlm import in_words
from freres_cli.backbones.templates import OPTIONS, tokenize_chat
from freres_cli.backbones.vision import PixelRule
from freres_cli.errors import BackboneError

_QWEN_PIXELS = "qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil"
_MINICPM_PIXELS = "minicpmv4_6.image_processing_pil_minicpmv4_6:MiniCPMV4_6ImageProcessorPil"
IMAGE_PROCESSORS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"), _QWEN_PIXELS),
    "internvl": "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil",
    "llava_onevision": "siglip.image_processing_pil_siglip:SiglipImageProcessorPil",
    "smolvlm": "smolvlm.image_processing_pil_smolvlm:SmolVLMImageProcessorPil",
    "minicpmv4_6": _MINICPM_PIXELS,
    "minicpmv4_7": _MINICPM_PIXELS,
}
_QWEN3_PROMPT = "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor"
PROCESSORS = {
    "qwen2_vl": "qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor",
    "qwen2_5_vl": "qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5"), _QWEN3_PROMPT),
    "internvl": "internvl.processing_internvl:InternVLProcessor",
    "llava_onevision": "llava_onevision.processing_llava_onevision:LlavaOnevisionProcessor",
    "smolvlm": "smolvlm.processing_smolvlm:SmolVLMProcessor",
    "minicpmv4_6": "minicpmv4_6.processing_minicpmv4_6:MiniCPMV4_6Processor",
    "minicpmv4_7": "minicpmv4_7.processing_minicpmv4_7:MiniCPMV4_7Processor",
}


def read_stock_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the image processor as transformers itself finds them in the checkpoint's folder; none if it has no
    such file."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(checkpoint.directory), local_files_only=True)
    except (OSError, ValueError):
        return {}
    return dict(settings)


def stock_pixels(family: str, frames: Tensor, rule: PixelRule, patch_px: int, merge: int) -> Tensor:
    """What the family's own image processor makes of frames that have their final size.

    ``family``: a ``model_type``. ``frames``: (n, h, w, 3) uint8. ``rule``: the checkpoint's normalization. ``patch_px``,
    ``merge``: side of a patch in pixels, and of a token in patches; only used by families with patches. Returns float32 in
    the shape that the stock model takes, without the axis for several videos. Raises ``BackboneError`` for a family without a
    line here.
    """
    if family not in IMAGE_PROCESSORS:
        raise BackboneError(
            f"{family}: no image processor of transformers is known for this family: {__name__} lists them"
        )
    options: dict[str, Any] = {"do_resize": False, "image_mean": list(rule.mean), "image_std": list(rule.std)}
    options["rescale_factor"] = rule.rescale_factor
    if IMAGE_PROCESSORS[family] == _QWEN_PIXELS:
        options |= {"patch_size": patch_px, "merge_size": merge}
    elif IMAGE_PROCESSORS[family] == _MINICPM_PIXELS:
        options |= {"patch_size": patch_px, "slice_mode": False}
    elif family == "smolvlm":
        longest = {"longest_edge": frames.shape[1]}
        options |= {"do_image_splitting": False, "do_pad": False, "max_image_size": longest}
    processor = _import(IMAGE_PROCESSORS[family])(**options)
    images = [frame.permute(2, 0, 1).cpu().numpy() for frame in frames]
    pixels = processor(images, input_data_format="channels_first")["pixel_values"]
    made = torch.as_tensor(np.asarray(pixels))
    return made.flatten(0, 1) if family == "smolvlm" else made


def stock_prompt_ids(
    checkpoint: Checkpoint, config: Any, tokenizer: Any, grid: tuple[int, int, int], period_s: float, question: str
) -> list[int]:
    """The prompt of one video and a question, as the family's own processor writes and tokenizes it.

    ``checkpoint``, ``config``: the model's. ``tokenizer``: as loaded from the checkpoint. ``grid``: (T, H, W) of the
    frames' tokens. ``period_s``: seconds between two frames. ``question``: the text after the video. Raises BackboneError
    if this checkpoint has no template for a video, or lacks what the processor needs.
    """
    family, (num_frames, rows, columns) = checkpoint.model_type, grid
    merge, twice = 2, 2 if PROCESSORS[family] == _QWEN3_PROMPT else 1
    # Each frame is a temporal step; families whose steps have two frames get it twice.
    indices = [frame for frame in range(num_frames) for _ in range(twice)]
    video = {
        "video_grid_thw": torch.tensor([[num_frames, rows * merge, columns * merge]]),
        "video_metadata": [VideoMetadata(num_frames, fps=1 / period_s, frames_indices=indices)],
        "pixel_values_videos": torch.zeros(1, num_frames),
        "pixel_values": torch.zeros(1, num_frames),
        "target_sizes_videos": torch.tensor([[rows * 4, columns * 4]] * num_frames),
        "num_frames_per_video": [num_frames],
        "grids_videos": torch.zeros(num_frames, 2, dtype=torch.int).numpy(),
    }
    extra = {"video_token_divisor": 16} if family.startswith("minicpm") else {}
    module = importlib.import_module(_module_name(PROCESSORS[family]))
    with _numbers_in_words(module):
        try:
            processor = _make_processor(checkpoint, config, tokenizer, rows * columns, merge)
            text = _write_messages(module, tokenizer, family, question)
            replaced = [processor.replace_video_token(video, 0, **extra)]
            expanded, _ = processor.get_text_with_replacements([text], [], replaced)
        except (AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BackboneError(
                f"{checkpoint.model_id}: the stock processor cannot write this prompt: {reason}"
            ) from error
    return tokenize_chat(tokenizer, expanded[0])


def prompt_note(family: str) -> str | None:
    """What of the stock prompt is freres' own after all, if anything."""
    if family == "smolvlm" and find_spec("num2words") is None:
        return "num2words is not installed: the number of frames in words is freres' own"
    return None


def _write_messages(module: Any, tokenizer: Any, family: str, question: str) -> str:
    content = [{"type": "video"}, {"type": "text", "text": question}]
    template = module.DEFAULT_CHAT_TEMPLATE if family == "smolvlm" else None
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, chat_template=template, **OPTIONS
        )
    )


def _make_processor(checkpoint: Checkpoint, config: Any, tokenizer: Any, num_cells: int, merge: int) -> Any:
    """The family's processor around a tokenizer. Its image and video halves are the numbers that a prompt needs."""
    loaded = _import(PROCESSORS[checkpoint.model_type])
    unchecked = type(loaded.__name__, (loaded,), {"check_argument_for_proper_class": lambda *_: None})
    half = SimpleNamespace(
        merge_size=merge, temporal_patch_size=2, slice_mode=False, use_image_id=False, downsample_mode="16x"
    )
    stored = checkpoint.read_json("processor_config.json")
    vision = config.vision_config
    lengths: dict[str, dict[str, int]] = {
        "internvl": {"image_seq_length": stored.get("image_seq_length") or num_cells},
        "smolvlm": {"image_seq_len": stored.get("image_seq_len") or num_cells},
    }
    if checkpoint.model_type == "llava_onevision":
        lengths["llava_onevision"] = {"num_image_tokens": (vision.image_size // vision.patch_size) ** 2}
    options = lengths.get(checkpoint.model_type, {})
    return unchecked(image_processor=half, tokenizer=tokenizer, video_processor=half, **options)


@contextmanager
def _numbers_in_words(module: Any) -> Iterator[None]:
    """Let SmolVLM's processor write numbers in words where its package for that, num2words, is not installed."""
    if getattr(module, "num2words", module) is not None:
        yield
        return
    module.num2words = in_words
    try:
        yield
    finally:
        module.num2words = None


def _module_name(place: str) -> str:
    return f"transformers.models.{place.partition(':')[0]}"


def _import(place: str) -> Any:
    return getattr(importlib.import_module(_module_name(place)), place.partition(":")[2])
