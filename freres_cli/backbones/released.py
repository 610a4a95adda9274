"""The configs of released checkpoints, and a folder that holds one without its weights, for measuring cost offline.

Source: the config files that these checkpoints were released with, as public repositories quote them. The models that
transformers builds from them have exactly the published numbers of parameters (``registry.KNOWN_CHECKPOINTS``);
``tests/test_random_weights.py`` counts them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from freres_cli.backbones.chatml import wrap_tokenizer
from freres_cli.errors import BackboneError

_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
# One token in the released vocabularies, too, so that the times that Qwen3-VL writes around frames are as long as theirs.
_SECONDS = " seconds"
TOKENIZER_NOTE = "a tokenizer of bytes stands in for the released one: questions are a few tokens longer"

# Of the language half: layers, width, heads, key-value heads, width inside the MLP, vocabulary, head tied to embeddings.
Text = tuple[int, int, int, int, int, int, bool]


def _text(sizes: Text, **more: Any) -> dict[str, Any]:
    layers, width, heads, kv_heads, inner, vocabulary, _ = sizes
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "bos_token_id": _TOKENS["<|endoftext|>"],
        "eos_token_id": _TOKENS["<|im_end|>"],
        **more,
    }


def _config(family: str, sizes: Text, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": family,
        "dtype": "bfloat16",
        "tie_word_embeddings": sizes[-1],
        "image_token_id": _TOKENS["<|image_pad|>"],
        "video_token_id": _TOKENS["<|video_pad|>"],
        "vision_start_token_id": _TOKENS["<|vision_start|>"],
        "vision_end_token_id": _TOKENS["<|vision_end|>"],
        "text_config": {**text, "tie_word_embeddings": sizes[-1]},
        "vision_config": vision,
    }


def _rope(theta: float, section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": section, **more}}


def _qwen2_vl(sizes: Text) -> dict[str, Any]:
    text = _text(sizes, max_position_embeddings=32768, **_rope(1e6, [16, 24, 24]))
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return _config("qwen2_vl", sizes, text, {**vision, "hidden_size": sizes[1]})


def _qwen2_5_vl(sizes: Text) -> dict[str, Any]:
    text = _text(sizes, max_position_embeddings=128000, **_rope(1e6, [16, 24, 24]))
    vision: dict[str, Any] = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "patch_size": 14,
    }
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "tokens_per_second": 2}
    return _config("qwen2_5_vl", sizes, text, {**vision, "out_hidden_size": sizes[1]})


def _qwen3_vl(sizes: Text, depth: int, width: int, inner: int, deep: list[int]) -> dict[str, Any]:
    rope = _rope(5e6, [24, 20, 20], mrope_interleaved=True)
    text = _text(sizes, max_position_embeddings=262144, head_dim=128, **rope)
    vision: dict[str, Any] = {
        "depth": depth,
        "hidden_size": width,
        "num_heads": 16,
        "intermediate_size": inner,
        "patch_size": 16,
    }
    vision |= {"deepstack_visual_indexes": deep, "num_position_embeddings": 2304, "out_hidden_size": sizes[1]}
    return _config("qwen3_vl", sizes, text, vision)


_QWEN2_7B: Text = (28, 3584, 28, 4, 18944, 152064, False)

RELEASED_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl((28, 1536, 12, 2, 8960, 151936, True)),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(_QWEN2_7B),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl((36, 2048, 16, 2, 11008, 151936, True)),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(_QWEN2_7B),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl((36, 2560, 32, 8, 9728, 151936, True), 24, 1024, 4096, [5, 11, 17]),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl((36, 4096, 32, 8, 12288, 151936, False), 27, 1152, 4304, [8, 16, 24]),
}


def find_released(name: str) -> str | None:
    """Return the id of the released checkpoint that ``name`` means, in full or short as in Qwen3-VL-8B; else ``None``."""
    return next((known for known in RELEASED_CONFIGS if name in (known, *_short_names(known))), None)


def _short_names(known: str) -> tuple[str, str]:
    last = known.rpartition("/")[2]
    return last, last.removesuffix("-Instruct")


def write_weightless(name: str, folder: Path) -> Path:
    """Write the config of a released checkpoint and a tokenizer that stands in for its own. No weights, no network.

    ``name``: as ``find_released`` takes it. ``folder``: where a folder named after the checkpoint is made, and returned.
    The tokenizer has the released ids of the special tokens, and bytes for text. Raises ``BackboneError`` for a name whose
    config is not known.
    """
    known = find_released(name)
    if known is None:
        shorts = ", ".join(_short_names(known)[1] for known in RELEASED_CONFIGS)
        raise BackboneError(
            f"{name}: its config is not known here: expected one of {shorts}",
            "or name a folder that holds a config.json and a tokenizer",
        )
    made = folder / known.rpartition("/")[2]
    made.mkdir()
    (made / "config.json").write_text(json.dumps(RELEASED_CONFIGS[known]))
    _make_tokenizer().save_pretrained(made)
    return made


def _make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {_SECONDS: len(letters)} | _TOKENS
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_tokens([AddedToken(_SECONDS, normalized=False)])
    return wrap_tokenizer(tokenizer, _TOKENS)
