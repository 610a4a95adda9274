"""What the two halves of a model cost, read off its modules, which need no weights: parameters, FLOPs, widths.

A FLOP is one multiplication or one addition. A matrix of n numbers costs 2n per row that passes it, and attention 4*d per
query, key and head of width d. Norms, activations, rotations and softmax are left out: they move memory, and are not what
these times rest on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from freres_cli.backbones.base import LanguageModel, VisionEncoder
from freres_cli.backbones.quantized_weights import ROW_BYTES
from freres_cli.devices import Storage
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize

# Tokens that the reference code of linear attention takes at a time.
DELTA_CHUNK = 64


@dataclass(frozen=True)
class TowerSizes:
    """The cost of one frame in the tower.

    ``num_parameters``: of the vision half. ``flops``: multiplications and additions of one frame. ``rows``: patches of one
    frame. ``width``, ``inner``: of a patch in the layers and inside their MLPs. ``out_channels``: C of a visual token.
    ``is_rotary``: whether queries and keys are turned by their positions, in float32. ``head_width``:
    of one head.
    """

    num_parameters: int
    flops: int
    rows: int
    width: int
    inner: int
    out_channels: int
    is_rotary: bool
    head_width: int


@dataclass(frozen=True)
class DecoderSizes:
    """The cost of a row in the decoder.

    ``num_parameters``: of decoder and head. ``row_flops``: those of one row, without attention and head. ``pair_flops``:
    attention of one query and one key, over all layers. ``head_flops``: one row of logits. ``width``, ``inner``: of a row
    in the layers and of the widest part of them. ``heads_width``: of all queries. ``kv_values``: numbers that a row keeps
    in the cache. ``kv_layer_values``: the same of one layer. ``state_values``: numbers that linear attention keeps for a
    sequence. ``num_deep_layers``: DeepStack rows of a token. ``kv_heads``: heads of keys and of values in all layers.
    ``linear_weights``, ``linear_rows``: numbers, and rows of matrices, in the linear layers; ``largest_linear``: numbers of
    the largest. ``read_weights``: numbers of all weights that one token passes, head included.
    """

    num_parameters: int
    row_flops: int
    pair_flops: int
    head_flops: int
    width: int
    inner: int
    heads_width: int
    kv_values: int
    kv_layer_values: int
    state_values: int
    num_deep_layers: int
    kv_heads: int
    linear_weights: int
    linear_rows: int
    largest_linear: int
    read_weights: int

    def row_bytes(self, itemsize: int, storage: Storage) -> int:
        """Bytes that a row takes in the cache. ``itemsize``: of the model's precision, which scales have too."""
        return self.kv_values * itemsize if storage.kv is None else self.kv_values + self.kv_heads * itemsize

    def weight_bytes(self, itemsize: int, storage: Storage) -> int:
        """Bytes of the weights of decoder and head. ``itemsize``: of the model's precision."""
        if storage.weights is None:
            return self.num_parameters * itemsize
        return (self.num_parameters - self.linear_weights) * itemsize + self.linear_bytes(storage.weights)

    def linear_bytes(self, weights: str) -> int:
        """Bytes of the linear layers in 8 bits, with their scales. ``weights``: int8 or fp8."""
        return self.linear_weights + self.linear_rows * ROW_BYTES[weights]

    def prefill_flops(self, num_rows: int, chunk: int) -> int:
        """FLOPs of a prefill of ``num_rows`` in passes of ``chunk`` rows.

        A pass attends from its rows to all rows so far, with those after each row computed and masked: kernels that skip
        them do up to half of that attention.
        """
        ends = [*range(chunk, num_rows, chunk), num_rows]
        starts = [0, *ends[:-1]]
        pairs = sum((stop - start) * stop for start, stop in zip(starts, ends, strict=True))
        return num_rows * self.row_flops + pairs * self.pair_flops + self.head_flops


def measure_tower(encoder: VisionEncoder, size: FrameSize) -> TowerSizes:
    """The sizes of a vision half, with or without weights, for frames of ``size``."""
    tower = encoder.tower
    config = getattr(tower.config, "vision_config", tower.config)
    side = getattr(encoder, "merge", None)
    patches = size.num_tokens * side**2 if side else (size.height_px // _side(config.patch_size)) ** 2
    count = _rows_of(encoder.family, config, patches, size.num_tokens)
    matrices = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    ]
    flops = sum(2 * module.weight.numel() * count(name) for name, module in matrices)
    width = int(getattr(config, "embed_dim", None) or config.hidden_size)
    flops += 4 * width * _attended_pairs(encoder.family, config, size, patches)
    inner = max(
        module.out_features for name, module in matrices if isinstance(module, nn.Linear) and count(name) >= patches
    )
    channels = encoder.width * (1 + encoder.num_deep_layers)
    is_rotary = encoder.family.startswith("qwen")
    num_parameters = sum(parameter.numel() for parameter in tower.parameters())
    head_width = width // int(getattr(config, "num_heads", None) or config.num_attention_heads)
    return TowerSizes(num_parameters, flops, patches, width, inner, channels, is_rotary, head_width)


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _rows_of(family: str, config: Any, patches: int, tokens: int) -> Any:
    """A function: the rows of one frame that pass the matrix with this name."""

    def count(name: str) -> int:
        if family.startswith("qwen"):
            return tokens if "merger" in name else patches
        if family == "internvl":
            if name.startswith("multi_modal_projector"):
                return tokens
            return patches if "patch_embed" in name else patches + 1  # with the class token
        if family == "smolvlm":
            return tokens if name.startswith("connector") else patches
        if family == "llava_onevision":
            return patches
        if family.startswith("minicpmv"):
            return _minicpm_rows(name, config, patches)
        raise BackboneError(f"{family}: the work of this family's tower is not known: {__name__} lists that of others")

    return count


def _minicpm_rows(name: str, config: Any, patches: int) -> int:
    """Rows in MiniCPM-V, whose tower merges 2x2 patches after one of its layers, and again at its end."""
    if name.startswith("merger.mlp."):
        return int(patches // 4 ** (2 + int(name.split(".")[2])))
    if ".vit_merger." in name:
        return patches if "self_attn" in name else patches // 4
    if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) > config.insert_layer_id:
        return patches // 4
    return patches


def _attended_pairs(family: str, config: Any, size: FrameSize, patches: int) -> int:
    """Pairs of query and key of one frame, over all layers of the tower."""
    depth = int(getattr(config, "depth", None) or config.num_hidden_layers)
    if family == "qwen2_5_vl":
        per_side = config.window_size // config.patch_size // config.spatial_merge_size
        windows = [
            min(per_side, size.grid_h - row) * min(per_side, size.grid_w - column) * config.spatial_merge_size**2
            for row in range(0, size.grid_h, per_side)
            for column in range(0, size.grid_w, per_side)
        ]
        num_full = len(config.fullatt_block_indexes)
        return int(num_full * patches**2 + (depth - num_full) * sum(window**2 for window in windows))
    if family == "internvl":
        return depth * (patches + 1) ** 2
    if family.startswith("minicpm"):
        first = config.insert_layer_id + 1
        # The merger itself attends within windows of four patches.
        return int(first * patches**2 + 4 * patches + (depth - first) * (patches // 4) ** 2)
    return depth * patches**2


def find_head_width(config: Any) -> int:
    """Return the width of an attention head of a decoder. ``config``: the text part of a model's configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def find_layer_kinds(config: Any) -> list[str]:
    """Return the kind of attention of each layer of a decoder. ``config``: the text part of a model's configuration."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def has_experts(config: Any) -> bool:
    """Whether a router shares out rows among experts. ``config``: the text part of a model's configuration."""
    return bool(getattr(config, "num_experts", 0))


def find_rope_kind(config: Any) -> str | None:
    """Return how the rotary angles of a decoder are scaled, ``None`` if nothing says so. ``config``: as above."""
    kind: str | None = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return kind


def find_context_tokens(config: Any) -> int:
    """Return the most tokens that a decoder takes: with scaled rotary angles, as many times its own length as they reach.
    ``config``: as above."""
    rope, length = getattr(config, "rope_parameters", None) or {}, config.max_position_embeddings
    if find_rope_kind(config) == "yarn":  # whether or not its config names the greater length as well
        return max(length, int(rope["factor"] * (rope.get("original_max_position_embeddings") or length)))
    return int(length * (rope["factor"] if find_rope_kind(config) in ("dynamic", "linear") else 1))


def find_widest_row(decoder: nn.Module) -> int:
    """Numbers that the widest layer of a decoder holds for a row at once: three outputs, as a gated MLP does; or of the
    experts that a row passes, about four of its width each, as transformers computes them together."""
    linears = (module for module in decoder.modules() if isinstance(module, nn.Linear))
    config: Any = decoder.config
    experts = 4 * (getattr(config, "num_experts_per_tok", 0) or 0) * int(config.hidden_size)
    return max(3 * max(linear.out_features for linear in linears), experts)


def measure_decoder(model: LanguageModel) -> DecoderSizes:
    """The sizes of a language half, with or without weights."""
    decoder = model.decoder
    config = decoder.config
    head_width = find_head_width(config)
    kinds = find_layer_kinds(config)
    num_full = kinds.count("full_attention")
    num_linear = len(kinds) - num_full
    kv_layer = 2 * config.num_key_value_heads * head_width
    delta_flops, state = _linear_attention(config) if num_linear else (0, 0)
    heads_width = config.num_attention_heads * head_width
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    return DecoderSizes(
        num_parameters=model.num_parameters,
        row_flops=_matrix_flops(decoder, config) + num_linear * delta_flops,
        pair_flops=4 * heads_width * num_full,
        head_flops=2 * config.hidden_size * config.vocab_size,
        width=config.hidden_size,
        inner=-(-find_widest_row(decoder) // 3),
        heads_width=heads_width,
        kv_values=kv_layer * num_full,
        kv_layer_values=kv_layer if num_full else 0,
        state_values=num_linear * state,
        num_deep_layers=model.num_deep_layers,
        kv_heads=2 * config.num_key_value_heads * num_full,
        linear_weights=sum(linear.weight.numel() for linear in linears),
        linear_rows=sum(linear.out_features for linear in linears),
        largest_linear=max(linear.weight.numel() for linear in linears),
        read_weights=_matrix_flops(decoder, config) // 2 + config.hidden_size * config.vocab_size,
    )


def _matrix_flops(decoder: nn.Module, config: Any) -> int:
    """FLOPs of one row in all matrices. Of the experts of a layer a row passes as many as the router picks."""
    flops = 0
    for name, parameter in decoder.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name:
            continue
        numbers = parameter.numel()
        if ".experts." in name:
            numbers = numbers * config.num_experts_per_tok // config.num_experts
        flops += 2 * numbers
    return flops


def _linear_attention(config: Any) -> tuple[int, int]:
    """FLOPs of a row in the gated delta rule of one layer, and the numbers that its states keep.

    As in the reference code, which takes 64 rows at a time: two products of keys with keys and queries, one of these with
    values, and three with the state. Its triangular solves are left out.
    """
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    heads = config.linear_num_value_heads
    flops = heads * (4 * DELTA_CHUNK * key + 2 * DELTA_CHUNK * value + 6 * key * value)
    channels = 2 * config.linear_num_key_heads * key + heads * value
    return flops, heads * key * value + channels * config.linear_conv_kernel_dim
