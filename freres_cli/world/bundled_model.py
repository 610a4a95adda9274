"""The bundled model: Qwen2-VL in miniature, so that every command runs without a download.

It has the architecture and files of a released checkpoint, written by transformers' own class, with 3.8 million
parameters. Frames of 96x96 px become 6x6 tokens of width 192; text is bytes, with merges for the words of its world.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freres_cli.presets import MODEL_INFO_FILE
from freres_cli.world.questions import questions_of
from freres_cli.world.script import make_scene
from freres_cli.world.tokenizer import FRAME_PIECES, SPECIAL_TOKENS, make_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

# All weights that freres has ever embedded, by the SHA-256 of their projector, so that what was made with them can be
# named. New weights add a row, with the name in their MODEL_INFO.json.
EMBEDDED_WEIGHTS = {
    "398066178e877a6fc584fb77c48ad90d2b3b7de4c2fadbd5041e64ed49fa65c4": "drawn-1",
    "0177830147c05d4292199421a86957c063bab0635615facc40714fd016fbfd3f": "drawn-2",
}
RANDOM_WEIGHTS = "random"  # the name of untrained ones

FRAME_PX = 96
PATCH_PX = 8
MERGE = 2
GRID = FRAME_PX // (PATCH_PX * MERGE)  # tokens per side
WIDTH = 192
CORPUS_SCENES = 400


def bundled_model_dir() -> Path:
    """Return the folder of the bundled model."""
    return Path(__file__).parent / "bundled_model"


def bundled_adapter() -> Path:
    """Return the path of the adapter that ships with the bundled model."""
    return Path(__file__).parent / "bundled_adapter.safetensors"


def bundled_model_info() -> dict[str, Any]:
    """Return facts about the bundled model. ``freres_trained`` says whether its answers mean anything."""
    info: dict[str, Any] = json.loads((bundled_model_dir() / MODEL_INFO_FILE).read_text(encoding="utf-8"))
    return info


def name_weights(projector_sha256: str | None) -> str | None:
    """Return the name of embedded weights, of any release, that have this projector; ``None`` if no such are known."""
    return EMBEDDED_WEIGHTS.get(projector_sha256 or "")


def make_checkpoint(
    directory: Path, tower: Mapping[str, Tensor] | None = None, decoder: Mapping[str, Tensor] | None = None, **info: Any
) -> None:
    """Write the bundled model and its tokenizer to ``directory``, in bfloat16, as transformers' own class saves it.

    ``tower``, ``decoder``: trained weights of the two halves; without them the weights are random, but always the same.
    ``info``: more facts about the weights, for ``MODEL_INFO.json``. Trained weights are named after their folder.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(tokenizer_corpus())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(make_config(tokenizer))
    if tower is not None and decoder is not None:
        model.model.visual.load_state_dict(tower)
        model.model.language_model.load_state_dict(decoder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS[:3:2]]
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    model.bfloat16().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    _write_json(directory / "preprocessor_config.json", _preprocessor_config())
    weights = RANDOM_WEIGHTS if tower is None else directory.resolve().name
    facts = {"freres_trained": tower is not None, "num_parameters": num_parameters, "weights": weights, **info}
    _write_json(directory / MODEL_INFO_FILE, facts)


def tokenizer_corpus() -> list[str]:
    """Return the texts that the tokenizer's merges are learned from: the world's questions and options."""
    corpus = list(FRAME_PIECES) * 2
    for seed in range(CORPUS_SCENES):
        for question in questions_of(seed, make_scene(seed)):
            corpus += [question.question, *question.choices]
    return corpus


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Return the miniature's configuration.

    The rope base is small because the axes share one falling range of frequencies, and width gets the slowest. At base
    10, six columns still span a radian, and the slowest temporal pair turns once in 12 frames.
    """
    from transformers import Qwen2VLConfig

    def token(name: str) -> int:
        found = tokenizer.convert_tokens_to_ids(name)
        assert isinstance(found, int)
        return found

    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [8, 8, 8]}
    return Qwen2VLConfig(
        vision_config={
            "depth": 6,
            "embed_dim": 128,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
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
