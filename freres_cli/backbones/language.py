"""The language half of every family: loading it, building the prompt and its decoder rows, and running it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModel, DynamicCache
from transformers.initialization import no_init_weights

from freres_cli.backbones.angles import rope_notes, settle_angles
from freres_cli.backbones.attention import CAUSAL_NO_MASK, attention_for_padding, use_attention
from freres_cli.backbones.base import Piece, PromptIds, PromptRows
from freres_cli.backbones.cache import CACHE_ARGUMENT
from freres_cli.backbones.checkpoint import Checkpoint, fingerprint, load_submodule
from freres_cli.backbones.fused import start_compiling_kernels
from freres_cli.backbones.fused_layers import use_kernels
from freres_cli.backbones.halves import (
    FamilyFiles,
    LanguageHalf,
    MatricesOnMeta,
    check_decoder,
    loading,
    read_config,
    read_stop_ids,
    read_tokenizer,
)
from freres_cli.backbones.locks import ThreadLock
from freres_cli.backbones.long_attention import HeadKind, start_compiling
from freres_cli.backbones.pruning import only_layers
from freres_cli.backbones.quantized_cache import make_cache, row_format
from freres_cli.backbones.quantized_weights import quantize_linears
from freres_cli.backbones.row_parts import use_row_parts
from freres_cli.backbones.shared_prefix import Shared, SharedCache
from freres_cli.backbones.sizes import (
    find_context_tokens,
    find_head_width,
    find_layer_kinds,
    find_widest_row,
    has_experts,
)
from freres_cli.backbones.templates import render_chat, tokenize_chat
from freres_cli.devices import AS_COMPUTED, Device, Storage, choose_dtype, fit_attention
from freres_cli.errors import BackboneError
from freres_cli.presets import MODEL_INFO_FILE, TEXT_AFTER
from freres_cli.records import VideoTokens


class DecoderLanguageModel(ABC):
    """The decoder, head and tokenizer of one family. See ``base.LanguageModel``.

    A subclass defines where the video goes in the prompt and at which positions its tokens are. ``num_axes``: 3 for
    families with three-axis positions (time, row, column), else 1. ``video_token``: the placeholder for the video in
    the prompt, if the config does not name it.

    ``config`` is the model's config from transformers, ``half`` its decoder and head, ``tokenizer`` its tokenizer.
    ``stop_ids``: the tokens that end an answer. ``fingerprint``: what identifies the checkpoint. ``notes``: what the
    user should know. ``attention``: the kernel, one of sdpa, flash and eager. ``choices_as``: letters or words.
    ``storage``: how cache and weights are kept; the weights are already.
    """

    files: ClassVar[FamilyFiles]
    num_axes: ClassVar[int] = 3
    video_token: ClassVar[str | None] = None
    storage: Storage = AS_COMPUTED

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
        storage: Storage = AS_COMPUTED,
    ) -> None:
        use_attention(half.decoder, CAUSAL_NO_MASK, attention)
        self.attention = attention
        self.choices_as = choices_as
        self.config = config
        self.half = half
        self.lock = ThreadLock()
        self.decoder = half.decoder.eval()
        kernels_note = use_kernels(self.decoder, self.device, self.dtype)
        use_row_parts(self.decoder)
        settle_angles(self.decoder)
        self.head_weight = half.decoder.embed_tokens.weight if half.lm_head is None else half.lm_head.weight
        self.tokenizer = tokenizer
        named = tokenizer.convert_tokens_to_ids(self.video_token) if self.video_token else config.video_token_id
        self.video_token_id = int(named)
        self.stop_ids = stop_ids
        self.fingerprint = fingerprint
        self.storage = storage
        self.notes = (*notes, *filter(None, [kernels_note]), *self.describe_kv())
        self.width = int(half.decoder.config.hidden_size)
        self.num_layers = len(half.decoder.layers)
        self.num_deep_layers = self.count_deep_layers(config)
        self.max_context_tokens = find_context_tokens(half.decoder.config)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: Device, dtype: str | None = None, storage: Storage = AS_COMPUTED
    ) -> Self:
        """Read the language half of a checkpoint and its tokenizer, without reading other weights.

        ``checkpoint``: where it is. ``device``, ``dtype``: where and in which precision it runs. ``storage``: how its cache
        and weights are kept.
        """
        config = read_config(checkpoint, cls.files)
        check_decoder(checkpoint, config.text_config)
        stored = checkpoint.stored_dtype(cls.files.decoder)
        chosen, dtype_note = choose_dtype(dtype, device, stored, checkpoint.weight_bytes)
        attention, attention_note = fit_attention(device, chosen)
        start_compiling_kernels(torch.device(device.name), chosen)
        long_note = None
        if attention == "sdpa" and not has_experts(config.text_config):
            long_note = start_compiling(HeadKind.of(torch.device(device.name), chosen, config.text_config))
        tokenizer = read_tokenizer(checkpoint, cls.video_token or config.video_token_id)
        with loading(checkpoint, "language model"):
            is_tied = config.tie_word_embeddings and not checkpoint.keys_under(cls.files.head)[1]
            half, prefixes = cls.build_half(config, chosen, is_tied)
            place = torch.device(device.name)
            # Weights to be quantized reach the device one by one, so that it need not hold all of them as they are stored.
            first = place if storage.weights is None else torch.device("cpu")
            load_submodule(checkpoint, half, prefixes, chosen, first, cls.files.transposed)
            weights_note = quantize_linears(half.decoder, storage.weights, place)
            half.to(place)
            half.tie_equal_head()
        stop_ids = read_stop_ids(checkpoint, config.text_config, tokenizer)
        digests = fingerprint(checkpoint, cls.files.projector)
        found = (device.note, dtype_note, attention_note, long_note, weights_note, *rope_notes(config.text_config))
        notes = tuple(filter(None, found))
        choices_as = checkpoint.read_json(MODEL_INFO_FILE).get("choices_as", "letters")
        return cls(config, half, tokenizer, stop_ids, digests, notes, attention, choices_as, storage)

    @classmethod
    def load_without_weights(cls, checkpoint: Checkpoint, storage: Storage = AS_COMPUTED) -> Self:
        """The language half on torch's meta device, which holds no values: it can count the rows of prompts, not run. Only
        configs and the tokenizer are read. ``storage``: how a cache would be kept."""
        config = read_config(checkpoint, cls.files)
        tokenizer = read_tokenizer(checkpoint, cls.video_token or config.video_token_id)
        with MatricesOnMeta():
            half, _ = cls.build_half(config, torch.float32)
        stops = read_stop_ids(checkpoint, config.text_config, tokenizer)
        return cls(config, half.to("meta"), tokenizer, stops, {}, storage=storage)

    @classmethod
    def build_half(
        cls, config: Any, dtype: torch.dtype, is_tied: bool | None = None
    ) -> tuple[LanguageHalf, dict[str, tuple[str, ...]]]:
        """A decoder and head without weights, and the prefixes under which each is stored. ``is_tied``: whether the head is
        the embeddings, if not as the config says."""
        text = config.text_config
        prefixes: dict[str, tuple[str, ...]] = {"decoder.": cls.files.decoder}
        with no_init_weights():
            decoder = AutoModel.from_config(text, dtype=dtype)
            if config.tie_word_embeddings if is_tied is None else is_tied:
                return LanguageHalf(decoder, None), prefixes
            head = nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype)
        return LanguageHalf(decoder, head), prefixes | {"lm_head.": cls.files.head}

    @classmethod
    def count_deep_layers(cls, config: Any) -> int:
        """Number of first decoder layers after which visual tokens get a further row (DeepStack)."""
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
        """Number of parameters of decoder and head, not counting a tied head twice."""
        return sum(parameter.numel() for parameter in self.half.parameters())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, with its scales, over all layers that have one."""
        return self._kv_bytes(self.storage.kv)

    def _kv_bytes(self, kv: str | None) -> int:
        config = self.decoder.config
        numbers, dtype = row_format(find_head_width(config), self.dtype, kv)
        num_heads = 2 * find_layer_kinds(config).count("full_attention") * config.num_key_value_heads
        return int(num_heads * numbers * dtype.itemsize)

    def describe_kv(self) -> tuple[str, ...]:
        """A note on what the cache loses and saves, if it is kept in other numbers than the model's."""
        if self.storage.kv is None:
            return ()
        held, plain = self.kv_bytes_per_token, self._kv_bytes(None)
        saved = f"{held} bytes a token in place of {plain}"
        return (f"KV cache in {self.storage.kv}, {saved}: keys and values are rounded, so answers may change",)

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes that the widest layer holds for one token of a forward pass."""
        return find_widest_row(self.decoder) * self.dtype.itemsize

    def prompt(self, question: str, system: str | None = None) -> PromptIds:
        """The chat prompt around one video and one question, from the tokenizer's template or else the family's own.

        Raises BackboneError unless the prompt contains the video's placeholder exactly once (a question that contains
        it adds another), and for a template that fails or does not end.
        """
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        place = self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        text = render_chat(self.tokenizer, messages)
        if text is None or place not in text:
            text = self.plain_prompt(question, system, place)
        return self.split_prompt(text)

    def split_prompt(self, text: str) -> PromptIds:
        """The prompt's ids before and after the video's placeholder. Raises BackboneError unless there is exactly one."""
        ids = tokenize_chat(self.tokenizer, text)
        if (num_places := ids.count(self.video_token_id)) != 1:
            raise BackboneError(
                f"prompt: expected one place for the video, got {num_places}",
                "remove control tokens from the question",
            )
        place = ids.index(self.video_token_id)
        return PromptIds(tuple(ids[:place]), tuple(ids[place + 1 :]))

    def plain_prompt(self, question: str, system: str | None, video: str) -> str:
        """The chat prompt for a tokenizer without a template: ChatML, as in the Qwen families."""
        start, end = "<|im_start|>", "<|im_end|>\n"
        user = f"<|vision_start|>{video}<|vision_end|>{question}"
        return (
            f"{start}system\n{system or 'You are a helpful assistant.'}{end}{start}user\n{user}{end}{start}assistant\n"
        )

    def splice(self, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str = "max") -> PromptRows:
        """See ``base.LanguageModel``. Raises BackboneError for an unknown ``text_after`` or tokens of another width."""
        if text_after not in TEXT_AFTER:
            raise BackboneError(f"text_after: expected one of {', '.join(TEXT_AFTER)}, got {text_after}")
        channels = self.width * (1 + self.num_deep_layers)
        if video.latents.shape[1] != channels or video.width != self.width:
            got = f"{video.latents.shape[1]} (D = {video.width})"
            hint = "use the model that the video was compressed with"
            raise BackboneError(f"visual tokens: expected {channels} channels, got {got}", hint)
        # On a GPU, rows stay in host memory if the latents do, and the decoder gets those of one pass at a time.
        place = video.latents.device if self.device.type == "cuda" else self.device
        video = replace(video, latents=video.latents.to(device=place, dtype=self.dtype))
        (piece,) = self.text_pieces([prefix_ids], place)
        text = self.rows_of_text(piece, 0, 0.0)
        return text.then(self.video_rows(video, len(prefix_ids), float(len(prefix_ids)), text_after))

    @abstractmethod
    def video_rows(self, video: VideoTokens, index: int, position: float, text_after: str) -> PromptRows:
        """The tokens of ``video`` as rows for the decoder, together with the family's own text in it.

        Rows are where ``video.latents`` are, which have the decoder's dtype. ``index``: number of rows before the video.
        ``position``: position of its first row. ``text_after``: the rule for the position of the text after it, as in
        ``splice``.
        """

    def text_per_frame(self, video: VideoTokens) -> Tensor:
        """See ``base.LanguageModel``. None, in a family whose visual tokens form one run."""
        return torch.zeros(video.grid[0], dtype=torch.int64)

    def text_in_video(self, video: VideoTokens) -> int:
        """See ``base.LanguageModel``. None, in a family that writes nothing around its visual tokens."""
        return 0

    def visual_rows(self, piece: Piece, index: int, axes: Tensor, next_position: float) -> PromptRows:
        """Visual tokens as rows for the decoder.

        ``piece``: of the video's latents, n rows. ``axes``: their positions, (num_axes, n). ``index``: number of rows before
        them. ``next_position``: position of the text after them.
        """
        axes = axes.to(device=piece.table.device, dtype=torch.float32)
        is_visual = torch.ones(len(piece), dtype=torch.bool, device=piece.table.device)
        return PromptRows((piece,), self._positions(axes, index), next_position, is_visual)

    def text_rows(self, ids: Sequence[int], index: int, position: float) -> PromptRows:
        """Text tokens as rows, all axes counting up from ``position``, and the plain index from ``index``."""
        embeds = self._embed(torch.tensor(ids, dtype=torch.long, device=self.device))
        return self.rows_of_text(Piece(embeds), index, position)

    def step_rows(self, token: Tensor, place: Tensor, position: Tensor) -> PromptRows:
        """See ``base.LanguageModel``."""
        plain = [] if self.num_axes == 1 else [place.float()[None]]
        positions = torch.cat([*plain, position.expand(self.num_axes, 1)])
        return PromptRows((Piece(self._embed(token)),), positions[:, None], 0.0)

    def text_pieces(self, texts: Sequence[Sequence[int]], place: torch.device) -> list[Piece]:
        """The rows of several texts, for ``rows_of_text``. ``place`` gets each token of them once, in one copy."""
        ids = torch.tensor([token for text in texts for token in text], dtype=torch.long)
        tokens, index = ids.unique(return_inverse=True)
        table = self._embed(tokens.to(self.device)).to(place)
        return [Piece(table, part) for part in index.split([len(text) for text in texts])]

    def rows_of_text(self, piece: Piece, index: int, position: float) -> PromptRows:
        """``text_rows`` of embedded tokens, where they are."""
        steps = torch.arange(len(piece), dtype=torch.float32, device=piece.table.device)
        axes = (steps + position).expand(self.num_axes, -1)
        return PromptRows((piece,), self._positions(axes, index), position + len(piece))

    def _embed(self, ids: Tensor) -> Tensor:
        """Token ids (n,) on the device -> their rows, (n, C)."""
        embeds: Tensor = self.decoder.embed_tokens(ids)
        return nn.functional.pad(embeds, (0, self.width * self.num_deep_layers)) if self.num_deep_layers else embeds

    def _positions(self, axes: Tensor, index: int) -> Tensor:
        """(R, 1, n): three-axis families put the plain index, which is only used for masks, before the axes."""
        if self.num_axes == 1:
            return axes[:, None]
        plain = torch.arange(index, index + axes.shape[1], dtype=torch.float32, device=axes.device)
        return torch.cat([plain[None], axes])[:, None]

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for one sequence."""
        return make_cache(self.decoder.config, self.storage.kv)

    def decode(self, rows: PromptRows, cache: Any, **of_attention: Any) -> Tensor:
        """See ``base.LanguageModel``."""
        return self._run(rows, cache, **of_attention)

    def decode_layers(
        self, rows: PromptRows, cache: Any, layers: range, attended: list[Tensor] | None = None
    ) -> Tensor:
        """See ``base.LanguageModel``."""
        with only_layers(self.decoder, layers):
            return self._run(rows, cache, **({} if attended is None else {"attended": attended}))

    def _run(self, rows: PromptRows, cache: Any, **of_attention: Any) -> Tensor:
        rows = self.leave_out_zeros(rows).to(self.device)
        embeds = rows.embeds
        hidden: Tensor = self.decoder(
            inputs_embeds=embeds[None, :, : self.width],
            position_ids=rows.positions if self.num_axes > 1 else rows.positions[0],
            use_cache=True,
            **{CACHE_ARGUMENT: cache},
            **self.deep_inputs(embeds),
            **of_attention,
        ).last_hidden_state[0]
        return hidden

    def leave_out_zeros(self, rows: PromptRows) -> PromptRows:
        """These rows without their DeepStack channels, if all of those are zero, as they are for text."""
        deep = rows.channels(slice(self.width, None)).pieces
        if not self.num_deep_layers or (rows.is_visual is not None and any(piece.has_values() for piece in deep)):
            return rows
        return rows.channels(slice(self.width))

    def decode_batch(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Run the text rows of several sequences at once. See ``base.LanguageModel``."""
        shared = {"shared": Shared.of(cache, mask, len(embeds))} if isinstance(cache, SharedCache) else {}
        with nullcontext() if shared or mask is None else attention_for_padding(self.decoder):
            hidden: Tensor = self.decoder(
                inputs_embeds=embeds[..., : self.width],
                position_ids=positions if self.num_axes > 1 else positions[0],
                attention_mask=None if shared else mask,
                use_cache=True,
                **{CACHE_ARGUMENT: cache},
                **shared,
            ).last_hidden_state
        return hidden

    @property
    def keeps_state(self) -> bool:
        """See ``base.LanguageModel``."""
        return any(kind != "full_attention" for kind in find_layer_kinds(self.decoder.config))

    def attend_from_last(self, rows: PromptRows, cache: Any) -> Tensor:
        """See ``base.LanguageModel``."""
        kept: list[Tensor] = []
        self._run(rows, cache, attended=kept)
        return torch.stack(kept).mean(1)

    def deep_inputs(self, embeds: Tensor) -> dict[str, Any]:
        """Further arguments of the decoder for the DeepStack channels of its rows (L, C)."""
        return {}

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) hidden states -> (n, vocabulary) float32 logits."""
        return linear(hidden, self.head_weight).float()
