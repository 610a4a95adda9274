"""Qwen2-VL: one run of visual tokens for all frames, three-axis positions, no DeepStack (C = D)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoTokenizer, DynamicCache, Qwen2VLConfig
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

from freres_cli.backbones.attention import CAUSAL_NO_MASK, PACKED_FRAMES, use_attention
from freres_cli.backbones.base import TEXT_AFTER_RULES, PromptIds, PromptRows
from freres_cli.backbones.checkpoint import Checkpoint, fingerprint, load_submodule
from freres_cli.devices import Device, choose_dtype, memory_errors_as
from freres_cli.errors import BackboneError
from freres_cli.records import FrameSize, VideoTokens

FAMILY = "qwen2_vl"

# The layout of released checkpoints (and of save_pretrained) is visual.* and model.*; in memory it is model.visual.*
# and model.language_model.*, and some tools write that.
_VISION_KEYS = ("model.visual.", "visual.")
_PROJECTOR_KEYS = ("model.visual.merger.", "visual.merger.")
_DECODER_KEYS = ("model.language_model.", "model.")

# Matrix products of few rows take other kernels on the CPU, which round differently (3e-7 to 6e-6 measured below 64).
_LEAST_TOKENS_PER_PASS = 64

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PixelRule:
    """How uint8 pixels become numbers, and how many pixels a frame may have, from ``preprocessor_config.json``.

    Where the file is silent, the values are those of the released models.
    """

    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    rescale_factor: float = 1 / 255
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PixelRule:
        stored = checkpoint.read_json("preprocessor_config.json")
        size = stored.get("size") or {}
        return cls(
            tuple(stored.get("image_mean") or _CLIP_MEAN),
            tuple(stored.get("image_std") or _CLIP_STD),
            stored.get("rescale_factor") or cls.rescale_factor,
            stored.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels,
            stored.get("max_pixels") or size.get("longest_edge") or cls.max_pixels,
        )


def fit_grid(width_px: int, height_px: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(rows, columns) of cells of ``factor`` px that keep the aspect ratio and stay within the pixel limits.

    The rule of ``smart_resize`` of transformers, except that the upper limit also holds for very long frames, where
    one row of cells is the least there can be.
    """
    rows, columns = (max(1, round(side / factor)) for side in (height_px, width_px))
    area, cells = height_px * width_px, max_pixels // factor**2
    if rows * columns > cells:
        shrink = math.sqrt(area / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height_px, width_px))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / area)
        rows, columns = (math.ceil(side * grow / factor) for side in (height_px, width_px))
    if rows * columns > cells:
        rows, columns = (1, min(columns, cells)) if rows < columns else (min(rows, cells), 1)
    return rows, columns


class Qwen2VLVisionEncoder:
    """The vision tower and merger of a Qwen2-VL checkpoint. See ``base.VisionEncoder``."""

    family = FAMILY
    num_deep_layers = 0

    def __init__(
        self,
        tower: Qwen2VisionTransformerPretrainedModel,
        pixel_rule: PixelRule,
        fingerprint: dict[str, str | None],
        notes: tuple[str, ...] = (),
    ) -> None:
        use_attention(tower, PACKED_FRAMES)
        self.tower = tower.eval()
        self.pixel_rule = pixel_rule
        self.fingerprint = fingerprint
        self.notes = notes
        self.width = int(tower.config.hidden_size)
        self.patch_px = int(tower.config.patch_size)
        self.merge = int(tower.config.spatial_merge_size)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> Qwen2VLVisionEncoder:
        """Read the vision half of a checkpoint, and nothing else of its weights."""
        config = _read_config(checkpoint)
        chosen, dtype_note = choose_dtype(dtype, device, checkpoint.stored_dtype(_VISION_KEYS), checkpoint.weight_bytes)
        with _loading(checkpoint, "vision tower"):
            with no_init_weights():
                tower = Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config, dtype=chosen)
            load_submodule(checkpoint, tower, {"": _VISION_KEYS}, chosen, torch.device(device.name))
        notes = (device.note, dtype_note)
        return cls(tower, PixelRule.of(checkpoint), fingerprint(checkpoint, _PROJECTOR_KEYS), notes)

    @property
    def dtype(self) -> torch.dtype:
        return self.tower.dtype

    @property
    def device(self) -> torch.device:
        return self.tower.device

    def frame_size(
        self,
        width_px: int,
        height_px: int,
        grid: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ) -> FrameSize:
        """Pixels to resize a frame to, and its token grid; every side a multiple of patch*merge px.

        ``grid`` (rows, columns) is taken exactly. Otherwise the aspect ratio is kept, within the checkpoint's pixel
        limits and at most ``max_tokens`` tokens. Raises BackboneError for a grid or limit below one token.
        """
        factor = self.patch_px * self.merge
        if max_tokens is not None and max_tokens < 1:
            raise BackboneError(f"tokens per frame: expected at least 1, got {max_tokens}")
        if grid is None:
            most = self.pixel_rule.max_pixels
            most = most if max_tokens is None else min(most, max_tokens * factor**2)
            grid = fit_grid(width_px, height_px, factor, min(self.pixel_rule.min_pixels, most), most)
        if min(grid) < 1:
            raise BackboneError(f"token grid: expected at least 1x1, got {grid[0]}x{grid[1]}")
        return FrameSize(grid[0] * factor, grid[1] * factor, grid[0], grid[1])

    def patches(self, pixels: Tensor) -> Tensor:
        """Frames as the tower's input: (n, h, w, 3) uint8 -> (n*gh*gw, 3*2*p*p) float32, gh = h/p, gw = w/p.

        Patches come in blocks of merge x merge, and a frame fills both steps of the temporal patch. Equals
        ``Qwen2VLImageProcessorPil`` without resizing to the bit. Raises BackboneError if h or w does not divide.
        """
        n, height, width, channels = pixels.shape
        p, m, factor = self.patch_px, self.merge, self.patch_px * self.merge
        if height % factor or width % factor or channels != 3 or pixels.dtype != torch.uint8:
            raise BackboneError(
                f"frames: expected (n, h, w, 3) uint8 with h and w multiples of {factor}, "
                f"got {tuple(pixels.shape)} {pixels.dtype}"
            )
        cells = pixels.to(self.device).view(n, height // factor, m, p, width // factor, m, p, 3)
        # (n, rows, columns, m, m, 3, p, p), moved as bytes
        cells = cells.permute(0, 1, 4, 2, 5, 7, 3, 6).contiguous()
        # As the reference: scaled in float64, rounded to float32, normalised in float32.
        rule = self.pixel_rule
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (rule.mean, rule.std))
        values = cells.to(torch.float64).mul_(rule.rescale_factor).to(torch.float32).sub_(mean).div_(std)
        steps = int(self.tower.config.temporal_patch_size)
        doubled = values.unsqueeze(6).expand(*cells.shape[:6], steps, p, p)
        return doubled.reshape(n * (height // p) * (width // p), 3 * steps * p * p)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of frames, each on its own: (n, h, w, 3) uint8 -> (n, H, W, D), in the tower's dtype and place.

        A pass of very few tokens is filled up with black frames, so that latents do not depend on how many frames are
        encoded at a time.
        Raises BackboneError for a size that is not a multiple of patch*merge px, ResourceError if memory runs out.
        """
        n, height, width, _ = pixels.shape
        factor = self.patch_px * self.merge
        rows, columns = height // factor, width // factor
        what, hint = f"encoding {n} frames of {width}x{height} px", "encode fewer frames at a time, or smaller ones"
        with memory_errors_as(what, hint):
            patches = self.patches(pixels)
            num_black = max(0, math.ceil(_LEAST_TOKENS_PER_PASS / (rows * columns)) - n)
            if num_black:
                patches = torch.cat([patches, self.patches(pixels.new_zeros(num_black, height, width, 3))])
            grid = torch.tensor([[n + num_black, rows * self.merge, columns * self.merge]], device=self.device)
            latents = self.tower(patches.to(self.dtype), grid_thw=grid, return_dict=True).pooler_output
        return latents.view(n + num_black, rows, columns, self.width)[:n]


class _LanguageHalf(nn.Module):
    def __init__(self, decoder: Qwen2VLTextModel, lm_head: nn.Linear | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.lm_head = lm_head


class Qwen2VLLanguageModel:
    """The decoder, head and tokenizer of a Qwen2-VL checkpoint. See ``base.LanguageModel``."""

    family = FAMILY
    num_deep_layers = 0

    def __init__(
        self,
        half: _LanguageHalf,
        tokenizer: Any,
        video_token_id: int,
        stop_ids: frozenset[int],
        fingerprint: dict[str, str | None],
        notes: tuple[str, ...] = (),
    ) -> None:
        use_attention(half.decoder, CAUSAL_NO_MASK)
        self.decoder = half.decoder.eval()
        self.head_weight = half.decoder.embed_tokens.weight if half.lm_head is None else half.lm_head.weight
        self.tokenizer = tokenizer
        self.video_token_id = video_token_id
        self.stop_ids = stop_ids
        self.fingerprint = fingerprint
        self.notes = notes
        self.width = int(half.decoder.config.hidden_size)
        self.max_context_tokens = int(half.decoder.config.max_position_embeddings)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> Qwen2VLLanguageModel:
        """Read the language half of a checkpoint and its tokenizer, and nothing else of its weights."""
        config = _read_config(checkpoint)
        if config.text_config.use_sliding_window:
            raise BackboneError(f"{checkpoint.model_id}: sliding-window attention is not supported")
        chosen, dtype_note = choose_dtype(
            dtype, device, checkpoint.stored_dtype(_DECODER_KEYS), checkpoint.weight_bytes
        )
        tokenizer = _read_tokenizer(checkpoint, config.video_token_id)
        with _loading(checkpoint, "language model"):
            half, prefixes = _build_language_half(config, chosen)
            load_submodule(checkpoint, half, prefixes, chosen, torch.device(device.name))
        stop = checkpoint.read_json("generation_config.json").get("eos_token_id", config.text_config.eos_token_id)
        stop_ids = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
        digests = fingerprint(checkpoint, _PROJECTOR_KEYS)
        return cls(half, tokenizer, config.video_token_id, stop_ids, digests, (device.note, dtype_note))

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, over all layers."""
        config = self.decoder.config
        head_width = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_width * self.dtype.itemsize

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The chat prompt around one video and one question, by the tokenizer's template or else plain ChatML.

        Raises BackboneError if it does not hold the video's place exactly once, as when the question contains it.
        """
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = _chatml(question, system, self.tokenizer.convert_ids_to_tokens(self.video_token_id))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (num_places := ids.count(self.video_token_id)) != 1:
            raise BackboneError(
                f"prompt: expected one place for the video, got {num_places}",
                "leave control tokens out of the question",
            )
        place = ids.index(self.video_token_id)
        return PromptIds(tuple(ids[:place]), tuple(ids[place + 1 :]))

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        """The text before the video, then its tokens at (base + t, base + h, base + w), base = tokens before it.

        Positions equal ``get_rope_index`` of transformers for a full grid, and may be fractional. Later text starts at
        base + max(T, H, W) of the full grid under ``max`` (how the released models were trained, and transformers 4),
        at base + max(H, W) under ``hf`` (transformers 5.23).
        """
        if text_after not in TEXT_AFTER_RULES:
            raise BackboneError(f"text_after: expected one of {', '.join(TEXT_AFTER_RULES)}, got {text_after}")
        if video.latents.shape[1] != self.width or video.width != self.width:
            got = f"{video.latents.shape[1]} (D = {video.width})"
            hint = "ask with the model that the video was compressed with"
            raise BackboneError(f"visual tokens: expected {self.width} channels, got {got}", hint)
        text = self.text_rows(prefix_ids, 0, 0.0)
        base, count = len(prefix_ids), len(video)
        index = torch.arange(base, base + count, dtype=torch.float32, device=self.device)
        place = video.positions.to(device=self.device, dtype=torch.float32).T + base
        positions = torch.cat([index[None], place])[:, None]
        latents = video.latents.to(device=self.device, dtype=self.dtype)
        span = max(video.grid) if text_after == "max" else max(video.grid[1:])
        return text.then(PromptRows(latents, positions, float(base + span)))

    @torch.no_grad()
    def text_rows(self, ids: list[int] | tuple[int, ...], index: int, position: float) -> PromptRows:
        """Text tokens, all three axes counting from ``position``, the plain index from ``index``."""
        embeds = self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        steps = torch.arange(len(ids), dtype=torch.float32, device=self.device)
        positions = torch.stack([steps + index, *[steps + position] * 3])[:, None]
        return PromptRows(embeds, positions, position + len(ids))

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for one sequence."""
        return DynamicCache(config=self.decoder.config)

    @torch.no_grad()
    def decode(self, rows: PromptRows, cache: Any) -> Tensor:
        """Run rows on top of the cache. Returns last hidden states, (L, D)."""
        out = self.decoder(
            inputs_embeds=rows.embeds[None], position_ids=rows.positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, vocabulary) float32."""
        return linear(hidden, self.head_weight).float()


def _build_language_half(config: Qwen2VLConfig, dtype: torch.dtype) -> tuple[_LanguageHalf, dict[str, tuple[str, ...]]]:
    """An unfilled decoder with its head, and where each is stored. A tied head has no weights of its own."""
    text = config.text_config
    prefixes: dict[str, tuple[str, ...]] = {"decoder.": _DECODER_KEYS}
    with no_init_weights():
        decoder = Qwen2VLTextModel._from_config(text, dtype=dtype)
        if config.tie_word_embeddings:
            return _LanguageHalf(decoder, None), prefixes
        head = nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype)
    return _LanguageHalf(decoder, head), prefixes | {"lm_head.": ("lm_head.",)}


def _read_config(checkpoint: Checkpoint) -> Qwen2VLConfig:
    try:
        return Qwen2VLConfig.from_dict(checkpoint.config)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"{checkpoint.model_id}: config.json is not a Qwen2-VL config: {reason}") from error


def _read_tokenizer(checkpoint: Checkpoint, video_token_id: int) -> Any:
    hint = "the folder needs tokenizer.json and tokenizer_config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"{checkpoint.model_id}: tokenizer cannot be read: {reason}", hint) from error
    # Without tokenizer files transformers quietly makes an empty one.
    if tokenizer.convert_ids_to_tokens(video_token_id) is None:
        raise BackboneError(f"{checkpoint.model_id}: tokenizer cannot be read: no token {video_token_id}", hint)
    return tokenizer


def _loading(checkpoint: Checkpoint, what: str) -> Any:
    gib = checkpoint.weight_bytes / 2**30
    message = f"{checkpoint.model_id}: loading the {what} (whole model: {gib:.1f} GiB as stored)"
    return memory_errors_as(message, "use a smaller model or dtype, or a device with more memory")


def _chatml(question: str, system: str | None, video_token: str) -> str:
    start, end = "<|im_start|>", "<|im_end|>\n"
    user = f"<|vision_start|>{video_token}<|vision_end|>{question}"
    return f"{start}system\n{system or 'You are a helpful assistant.'}{end}{start}user\n{user}{end}{start}assistant\n"
