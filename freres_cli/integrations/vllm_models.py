"""vLLM's models with bundles: latents in place of the tower's output, and exact positions, fractional ones included.

Everything else is vLLM's own: other requests take the paths that they take without this plug-in, except that rotary
angles are computed where they are used in place of looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding, apply_interleaved_rope
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from freres_cli.integrations.vllm_positions import PlacedItem, decode_positions, place_prompt
from freres_cli.integrations.vllm_processing import COUNTS, LATENTS, NEXT, POSITIONS, BundleInfo, BundleProcessor


class ExactRotary(nn.Module):
    """Turns queries and keys by the angles of any position. ``rotary``: the table that it replaces."""

    frequencies: Tensor

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.section, self.is_interleaved = rotary.mrope_section, rotary.mrope_interleaved
        self.head_size, self.rotary_dim, self.scale = rotary.head_size, rotary.rotary_dim, rotary.mscale
        self.turn = rotary.apply_rotary_emb.forward_native
        # With YaRN the method takes the factor in place of the base.
        frequencies = rotary._compute_inv_freq(rotary.scaling_factor or rotary.base).to(rotary.cos_sin_cache.device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, turned. ``positions``: (3, n) as ``encode_positions`` has them, or (n,) for text alone.
        ``query``, ``key``: (n, heads * head size)."""
        axes = decode_positions(positions if positions.ndim == 2 else positions.expand(3, -1))
        angles = axes[..., None] * self.frequencies
        cos, sin = (self._pick(part * self.scale).to(query.dtype) for part in (angles.cos(), angles.sin()))
        return self._turned(query, cos, sin), self._turned(key, cos, sin)

    def _pick(self, rows: Tensor) -> Tensor:
        """Each frequency belongs to one axis: (3, n, rotary_dim / 2) -> (n, rotary_dim / 2)."""
        if self.is_interleaved:
            return apply_interleaved_rope(rows, self.section)
        return torch.cat([part[axis] for axis, part in enumerate(rows.split(self.section, dim=-1))], dim=-1)

    def _turned(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = rows.view(len(rows), -1, self.head_size)
        turned = self.turn(heads[..., : self.rotary_dim], cos, sin)
        return torch.cat([turned, heads[..., self.rotary_dim :]], dim=-1).reshape(rows.shape)


def use_exact_positions(model: nn.Module) -> None:
    """Replace the tables of angles of every layer. Raises ``ValueError`` if the model has none for three axes."""
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, MRotaryEmbedding) and child.mrope_section
    ]
    if not places:
        raise ValueError("this model has no three-axis positions, which bundles need")
    for module, name in places:
        setattr(module, name, ExactRotary(getattr(module, name)))


def refuse_drafts(speculative: Any) -> None:
    """Refuse a server with a draft model, which would look up the bits of a fraction in its table of angles. ``speculative``:
    vLLM's config of that name, if any. Raises ``ValueError``."""
    if speculative is not None and speculative.uses_draft_kv_cache():
        raise ValueError(
            f"speculative decoding with a model ({speculative.method}) cannot read the positions of bundles: leave it "
            "out, or use ngram"
        )


class TakesBundles:
    """Mixed into a model of vLLM, in front of it."""

    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_drafts(vllm_config.speculative_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        use_exact_positions(self.language_model)
        self.row_dtype = vllm_config.model_config.dtype

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the latents of every bundle of a batch, or what the model makes of other media."""
        if LATENTS not in kwargs:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        sizes = torch.as_tensor(kwargs[COUNTS]).reshape(-1, 2)[:, 1].tolist()
        return kwargs[LATENTS].to(self.row_dtype).split(sizes)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return the encoded positions of a prompt with bundles, (3, L), and the offset of later ones; stock without."""
        if not any(feature.data is not None and POSITIONS in feature.data for feature in mm_features):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        items = [
            PlacedItem(
                feature.mm_position.offset,
                feature.data[POSITIONS].data,
                float(feature.data[NEXT].data),
            )
            for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        ]
        return place_prompt(len(input_tokens), items)


class _Qwen2Info(BundleInfo, qwen2_vl.Qwen2VLProcessingInfo):  # type: ignore[misc]
    pass


class _Qwen2Processor(BundleProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):  # type: ignore[misc]
    pass


class _Qwen25Info(BundleInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    pass


class _Qwen25Processor(BundleProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    pass


class _Qwen3Info(BundleInfo, qwen3_vl.Qwen3VLProcessingInfo):  # type: ignore[misc]
    pass


class _Qwen3Processor(BundleProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2Processor, info=_Qwen2Info, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class BundleQwen2VL(TakesBundles, qwen2_vl.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen25Processor, info=_Qwen25Info, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class BundleQwen25VL(TakesBundles, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3Processor, info=_Qwen3Info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class BundleQwen3VL(TakesBundles, qwen3_vl.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen3-VL, whose DeepStack rows a bundle holds: they are added whether or not the tower is loaded."""

    use_deepstack: bool
    visual_dim: int
    multiscale_dim: int

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        levels = len(self.config.vision_config.deepstack_visual_indexes)
        if self.use_deepstack or not levels:
            return
        # vLLM turns DeepStack off where it leaves out the tower, and then takes embeddings without its rows.
        size = vllm_config.scheduler_config.max_num_batched_tokens, self.config.text_config.hidden_size
        self.use_deepstack, self.deepstack_num_level = True, levels
        self.multiscale_dim = self.visual_dim * levels
        self.deepstack_input_embeds = [torch.zeros(size) for _ in range(levels)]
        self.deepstack_input_embeds_num_tokens = 0

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """See ``TakesBundles``. Embeddings of other media without rows for DeepStack get zeros, which add nothing."""
        found = super().embed_multimodal(**kwargs)
        missing = (0, self.multiscale_dim)
        return found and [
            functional.pad(rows, missing) if rows.shape[-1] == self.visual_dim else rows for rows in found
        ]
