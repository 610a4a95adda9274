"""A tiny random Qwen2-VL checkpoint with a byte tokenizer, and helpers that all tests of backbones use."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from freres_cli.backbones.chatml import wrap_tokenizer
from freres_cli.backbones.checkpoint import Checkpoint
from freres_cli.devices import Device
from freres_cli.records import VideoTokens
from freres_cli.world.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS

CPU = Device("cpu", "CPU", "sdpa", "device cpu: for a test")
PATCH_PX, MERGE = 4, 2
FACTOR = PATCH_PX * MERGE


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte b as token b, without merges, then the ChatML and vision tokens: tests can read and write its ids."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return wrap_tokenizer(tokenizer, SPECIAL_TOKENS, CHAT_TEMPLATE)


def _byte_characters() -> list[str]:
    """The character that ByteLevel writes for each byte: itself if printable, else the next one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(spare)) for byte in range(256)]


def make_qwen2_vl(
    directory: Path,
    *,
    tied: bool = False,
    layers: int = 3,
    hidden: int = 48,
    depth: int = 3,
    tower: int = 32,
    context: int = 4096,
    intermediate: int | None = None,
) -> Qwen2VLForConditionalGeneration:
    """Write a tiny Qwen2-VL checkpoint with a byte tokenizer, and return it. Weights are large, to make logits large."""
    tokenizer = make_byte_tokenizer()

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    config = Qwen2VLConfig(
        vision_config={
            "depth": depth,
            "embed_dim": tower,
            "hidden_size": hidden,
            "num_heads": 2,
            "patch_size": PATCH_PX,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": intermediate or 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [hidden // 8 - 2 * (hidden // 24), hidden // 24, hidden // 24],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        video_token_id=token("<|video_pad|>"),
        image_token_id=token("<|image_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 1.2 * parameter[0].numel() ** -0.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    # Without a stop token, so that comparisons always run for 24 tokens.
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    preprocessor = {"patch_size": PATCH_PX, "merge_size": MERGE, "size": {"shortest_edge": 64, "longest_edge": 65536}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def open_checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint(directory.name, None, directory, json.loads((directory / "config.json").read_text()))


@dataclass(frozen=True)
class RecordingCheckpoint(Checkpoint):
    """Records the key and the number of values of every tensor that is read."""

    read: list[tuple[str, int]] = field(default_factory=list)

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in super().tensors(keys):
            self.read.append((key, tensor.numel()))
            yield key, tensor


def open_recording_checkpoint(directory: Path) -> RecordingCheckpoint:
    opened = open_checkpoint(directory)
    return RecordingCheckpoint(opened.model_id, opened.revision, opened.directory, opened.config)


def rewrite_weights(directory: Path, rename=lambda key: key, drop=(), shards: int = 1) -> None:
    """Store a checkpoint's tensors under other names, without some, or over several files with an index."""
    path = directory / "model.safetensors"
    tensors = {rename(k): v.clone() for k, v in load_file(path).items() if k not in drop}
    path.unlink()
    if shards == 1:
        save_file(tensors, path, metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in itertools.islice(sorted(tensors), number, None, shards)}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def to_new_layout(key: str) -> str:
    """``visual.*`` and ``model.*`` as ``model.visual.*`` and ``model.language_model.*``."""
    if key.startswith("visual."):
        return "model." + key
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


def random_frames(num_frames: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """(n, h, w, 3) uint8 noise of a token grid's size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_frames, grid[0] * FACTOR, grid[1] * FACTOR, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def video_tokens(
    latents: Tensor, keep: Tensor | None = None, width: int | None = None, period_s: float = 1.0
) -> VideoTokens:
    """All tokens of (T, H, W, C) latents at their places, or those of a sorted index into the T*H*W."""
    grid = latents.shape[:3]
    positions = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float32) for size in grid])
    keep = torch.arange(len(positions)) if keep is None else keep
    zeros = torch.zeros(len(keep))
    flat = latents.reshape(len(positions), -1)[keep]
    frame_seconds = torch.arange(grid[0], dtype=torch.float64) * period_s
    seconds = frame_seconds[positions[keep, 0].long()]
    return VideoTokens(
        flat,
        positions[keep],
        seconds,
        zeros.byte(),
        zeros.long(),
        zeros,
        tuple(grid),
        width or latents.shape[-1],
        frame_seconds,
    )


def stock_inputs(model: Qwen2VLForConditionalGeneration, prompt, grid: tuple[int, int, int], patches: Tensor) -> dict:
    """The arguments of the stock pixel path for one video and one prompt."""
    count = grid[0] * grid[1] * grid[2]
    ids = torch.tensor([[*prompt.prefix, *[model.config.video_token_id] * count, *prompt.suffix]])
    return {
        "input_ids": ids,
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([[grid[0], grid[1] * MERGE, grid[2] * MERGE]]),
        "mm_token_type_ids": (ids == model.config.video_token_id).int() * 2,
    }
