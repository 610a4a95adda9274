"""The bundled model: Qwen2-VL in miniature, so that every command runs without a download.

The same architecture and files as a released checkpoint, written by transformers' own class, at 3.7 million parameters:
frames of 144x144 px become 9x9 tokens of width 192, and text is bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

INFO_FILE = "MODEL_INFO.json"

FRAME_PX = 144
PATCH_PX = 8

# Bytes take ids 0 to 255; these follow.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# As the released models': a default system line, then turns; a video stands where it is listed.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bundled_model_dir() -> Path:
    """The folder of the bundled model."""
    return Path(__file__).parent / "bundled_model"


def bundled_model_info() -> dict[str, Any]:
    """What is known of the bundled model. ``freres_trained`` says whether its answers mean anything."""
    info: dict[str, Any] = json.loads((bundled_model_dir() / INFO_FILE).read_text(encoding="utf-8"))
    return info


def make_checkpoint(directory: Path, seed: int = 0) -> None:
    """Write an untrained bundled model; the same seed gives the same bytes. About 8 MB."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS[:3:2]]
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    _write_json(directory / "preprocessor_config.json", _preprocessor_config())
    info = {"freres_trained": False, "seed": seed, "num_parameters": num_parameters}
    _write_json(directory / INFO_FILE, info)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte b as token b, without merges, then the ChatML and vision tokens. Lossless for any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The character that ByteLevel writes for each byte: itself where it prints, else one from U+0100 on, in order."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(spare)) for byte in range(256)]


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """The miniature's shape.

    The rope base is small because the axes share one falling range of frequencies, width the slowest: at base 100 nine
    columns still span 0.4 rad on its fastest pair, and 16 frames fit in one turn of the slowest temporal pairs.
    """
    from transformers import Qwen2VLConfig

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [6, 5, 5]}
    return Qwen2VLConfig(
        vision_config={
            "depth": 6,
            "embed_dim": 160,
            "hidden_size": 192,
            "num_heads": 5,
            "mlp_ratio": 2,
            "patch_size": PATCH_PX,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 448,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rope_parameters": rope,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": None,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH_PX,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": FRAME_PX**2, "longest_edge": FRAME_PX**2},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_checkpoint(bundled_model_dir())
