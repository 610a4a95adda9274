"""The language half of every family: loading it, the prompt, rows for the decoder, running it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModel, DynamicCache
from transformers.initialization import no_init_weights

from freres_cli.backbones.attention import CAUSAL_NO_MASK, attention_for_padding, use_attention
from freres_cli.backbones.base import PromptIds, PromptRows
from freres_cli.backbones.checkpoint import Checkpoint, fingerprint, load_submodule
from freres_cli.backbones.halves import FamilyFiles, loading, read_config, read_tokenizer
from freres_cli.devices import Device, choose_dtype, fit_attention
from freres_cli.errors import BackboneError
from freres_cli.presets import TEXT_AFTER
from freres_cli.records import VideoTokens


class LanguageHalf(nn.Module):
    """A decoder and its head; a tied head has no weights of its own."""

    def __init__(self, decoder: Any, lm_head: nn.Linear | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.lm_head = lm_head


# What ``freres world train`` writes beside the models it trains; no released checkpoint has it.
MODEL_INFO_FILE = "MODEL_INFO.json"


class DecoderLanguageModel(ABC):
    """The decoder, head and tokenizer of one family. See ``base.LanguageModel``.

    A family says where the video stands in the prompt and at which positions its tokens go. ``num_axes``: 3 for
    families with three-axis positions (time, row, column), else 1. ``video_token``: what holds the video's place in
    the prompt, where the config does not name it.
    """

    files: ClassVar[FamilyFiles]
    num_axes: ClassVar[int] = 3
    video_token: ClassVar[str | None] = None

    def __init__(
        self,
        config: Any,
        half: LanguageHalf,
        tokenizer: Any,
        stop_ids: frozenset[int],
        fingerprint: dict[str, str | None],
        notes: tuple[str, ...] = (),
        attention: str = "sdpa",
        choices_as: str = "letters",
    ) -> None:
        use_attention(half.decoder, CAUSAL_NO_MASK, attention)
        self.attention = attention
        self.choices_as = choices_as
        self.config = config
        self.half = half
        self.decoder = half.decoder.eval()
        self.head_weight = half.decoder.embed_tokens.weight if half.lm_head is None else half.lm_head.weight
        self.tokenizer = tokenizer
        self.video_token_id = int(
            tokenizer.convert_tokens_to_ids(self.video_token) if self.video_token else config.video_token_id
        )
        self.stop_ids = stop_ids
        self.fingerprint = fingerprint
        self.notes = notes
        self.width = int(half.decoder.config.hidden_size)
        self.num_deep_layers = self.count_deep_layers(config)
        self.max_context_tokens = int(half.decoder.config.max_position_embeddings)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None) -> Self:
        """Read the language half of a checkpoint and its tokenizer, and nothing else of its weights."""
        config = read_config(checkpoint, cls.files)
        if getattr(config.text_config, "use_sliding_window", False):
            raise BackboneError(f"{checkpoint.model_id}: sliding-window attention is not supported")
        stored = checkpoint.stored_dtype(cls.files.decoder)
        chosen, dtype_note = choose_dtype(dtype, device, stored, checkpoint.weight_bytes)
        attention, attention_note = fit_attention(device, chosen)
        tokenizer = read_tokenizer(checkpoint, cls.video_token or config.video_token_id)
        with loading(checkpoint, "language model"):
            half, prefixes = cls.build_half(config, chosen)
            load_submodule(checkpoint, half, prefixes, chosen, torch.device(device.name), cls.files.transposed)
        stop = checkpoint.read_json("generation_config.json").get("eos_token_id", config.text_config.eos_token_id)
        stop_ids = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
        digests = fingerprint(checkpoint, cls.files.projector)
        notes = tuple(filter(None, (device.note, dtype_note, attention_note, *_rope_notes(config.text_config))))
        choices_as = checkpoint.read_json(MODEL_INFO_FILE).get("choices_as", "letters")
        return cls(config, half, tokenizer, stop_ids, digests, notes, attention, choices_as)

    @classmethod
    def build_half(cls, config: Any, dtype: torch.dtype) -> tuple[LanguageHalf, dict[str, tuple[str, ...]]]:
        """An unfilled decoder with its head, and where each is stored."""
        text = config.text_config
        prefixes: dict[str, tuple[str, ...]] = {"decoder.": cls.files.decoder}
        with no_init_weights():
            decoder = AutoModel.from_config(text, dtype=dtype)
            if config.tie_word_embeddings:
                return LanguageHalf(decoder, None), prefixes
            head = nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype)
        return LanguageHalf(decoder, head), prefixes | {"lm_head.": cls.files.head}

    @classmethod
    def count_deep_layers(cls, config: Any) -> int:
        """How many of the first decoder layers are followed by rows of their own for visual tokens."""
        return 0

    @property
    def family(self) -> str:
        return self.files.family

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.decoder.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.decoder.device
        return device

    @property
    def num_parameters(self) -> int:
        """Of decoder and head; a tied head has none of its own."""
        return sum(parameter.numel() for parameter in self.half.parameters())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, over all layers that keep one."""
        config = self.decoder.config
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        num_layers = sum(kind == "full_attention" for kind in kinds)
        return int(2 * num_layers * config.num_key_value_heads * head_width * self.dtype.itemsize)

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The chat prompt around one video and one question, by the tokenizer's template or else the family's own.

        Raises BackboneError if it does not hold the video's place exactly once, as when the question contains it.
        """
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        place = self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        text = None
        if getattr(self.tokenizer, "chat_template", None):
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except (TypeError, TemplateError):
                # A template for text only cannot take parts, and one that can belongs to the processor.
                text = None
        if text is None or place not in text:
            text = self.plain_prompt(question, system, place)
        return self.split_prompt(text)

    def split_prompt(self, text: str) -> PromptIds:
        """The prompt's ids before and after the video's place. Raises BackboneError unless there is one such place."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (num_places := ids.count(self.video_token_id)) != 1:
            raise BackboneError(
                f"prompt: expected one place for the video, got {num_places}",
                "leave control tokens out of the question",
            )
        place = ids.index(self.video_token_id)
        return PromptIds(tuple(ids[:place]), tuple(ids[place + 1 :]))

    def plain_prompt(self, question: str, system: str | None, video: str) -> str:
        """The chat prompt for a tokenizer without a template: ChatML, as the Qwen families."""
        start, end = "<|im_start|>", "<|im_end|>\n"
        user = f"<|vision_start|>{video}<|vision_end|>{question}"
        return (
            f"{start}system\n{system or 'You are a helpful assistant.'}{end}{start}user\n{user}{end}{start}assistant\n"
        )

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        """The text before the video and the visual tokens at their positions. See ``base.LanguageModel``."""
        if text_after not in TEXT_AFTER:
            raise BackboneError(f"text_after: expected one of {', '.join(TEXT_AFTER)}, got {text_after}")
        channels = self.width * (1 + self.num_deep_layers)
        if video.latents.shape[1] != channels or video.width != self.width:
            got = f"{video.latents.shape[1]} (D = {video.width})"
            hint = "ask with the model that the video was compressed with"
            raise BackboneError(f"visual tokens: expected {channels} channels, got {got}", hint)
        text = self.text_rows(prefix_ids, 0, 0.0)
        return text.then(self.video_rows(video, len(prefix_ids), float(len(prefix_ids)), text_after))

    @abstractmethod
    def video_rows(self, video: VideoTokens, index: int, position: float, text_after: str) -> PromptRows:
        """The video as rows for the decoder, with the family's own text in it. ``index``: how many rows come before
        it. ``position``: where it counts from."""

    def visual_rows(self, latents: Tensor, index: int, axes: Tensor, next_position: float) -> PromptRows:
        """Visual tokens (n, C) at positions ``axes`` (num_axes, n)."""
        embeds = latents.to(device=self.device, dtype=self.dtype)
        axes = axes.to(device=self.device, dtype=torch.float32)
        return PromptRows(embeds, self._positions(axes, index), next_position)

    def text_rows(self, ids: Sequence[int], index: int, position: float) -> PromptRows:
        """Text tokens, all axes counting from ``position``, the plain index from ``index``."""
        embeds = self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        if self.num_deep_layers:
            embeds = nn.functional.pad(embeds, (0, self.width * self.num_deep_layers))
        steps = torch.arange(len(ids), dtype=torch.float32, device=self.device)
        axes = (steps + position).expand(self.num_axes, -1)
        return PromptRows(embeds, self._positions(axes, index), position + len(ids))

    def _positions(self, axes: Tensor, index: int) -> Tensor:
        """(R, 1, n): three-axis families put the plain index before the axes, which only masks are made of."""
        if self.num_axes == 1:
            return axes[:, None]
        plain = torch.arange(index, index + axes.shape[1], dtype=torch.float32, device=self.device)
        return torch.cat([plain[None], axes])[:, None]

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for one sequence."""
        return DynamicCache(config=self.decoder.config)

    def decode(self, rows: PromptRows, cache: Any) -> Tensor:
        """Run rows on top of the cache. Returns last hidden states, (L, D)."""
        out = self.decoder(
            inputs_embeds=rows.embeds[None, :, : self.width],
            position_ids=rows.positions if self.num_axes > 1 else rows.positions[0],
            past_key_values=cache,
            use_cache=True,
            **self.deep_inputs(rows.embeds),
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def decode_batch(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Run text rows of several sequences at once. See ``base.LanguageModel``."""
        with nullcontext() if mask is None else attention_for_padding(self.decoder):
            out = self.decoder(
                inputs_embeds=embeds[..., : self.width],
                position_ids=positions if self.num_axes > 1 else positions[0],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def deep_inputs(self, embeds: Tensor) -> dict[str, Any]:
        """Arguments of the decoder for the DeepStack channels of its rows (L, C)."""
        return {}

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, vocabulary) float32."""
        return linear(hidden, self.head_weight).float()


def _rope_notes(text_config: Any) -> tuple[str, ...]:
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "dynamic":
        return ()
    limit = text_config.max_position_embeddings
    return (f"rotary frequencies change past position {limit} (dynamic scaling): there, answers depend on chunking",)


def join_rows(parts: Sequence[PromptRows], next_position: float) -> PromptRows:
    """Stretches of the prompt one after the other, in one copy."""
    return PromptRows(
        torch.cat([part.embeds for part in parts]),
        torch.cat([part.positions for part in parts], dim=-1),
        next_position,
    )
