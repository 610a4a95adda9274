"""vLLM's processors with bundles: a payload is read and checked here, before it reaches the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from freres_cli.errors import FreresError
from freres_cli.integrations.vllm_bundles import (
    CONTENT,
    NUM_BYTES,
    BundleReader,
    BundleRows,
    check_lengths,
    is_payload,
    split_payload,
)

# What the engine is given of each bundle: S rows of latents; ids and positions of N rows; (N, S); the position after it.
LATENTS, IDS, POSITIONS, COUNTS, NEXT = (
    "bundle_latents",
    "bundle_ids",
    "bundle_positions",
    "bundle_counts",
    "bundle_next",
)


def bundle_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """How the tensors of several bundles are split into items; empty for data that holds none."""
    if CONTENT in data:
        sizes = torch.as_tensor(data[NUM_BYTES]).flatten()
        return {
            CONTENT: MultiModalFieldConfig.flat_from_sizes("video", sizes),
            NUM_BYTES: MultiModalFieldConfig.batched("video"),
        }
    if COUNTS not in data:
        return {}
    num_rows, num_tokens = data[COUNTS].unbind(1)
    return {
        LATENTS: MultiModalFieldConfig.flat_from_sizes("video", num_tokens),
        IDS: MultiModalFieldConfig.flat_from_sizes("video", num_rows, keep_on_cpu=True),
        POSITIONS: MultiModalFieldConfig.flat_from_sizes("video", num_rows, keep_on_cpu=True),
        COUNTS: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        NEXT: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
    }


class BundleItems(DictEmbeddingItems):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The bundles of one prompt. ``dtype``: the served model's; vLLM puts the items of a batch into that of its first."""

    def __init__(self, bundles: Sequence[BundleRows], dtype: torch.dtype) -> None:
        videos = [bundle.video for bundle in bundles]
        counts = [[len(video.ids), len(video.latents)] for video in videos]
        data = {
            LATENTS: torch.cat([video.latents.to(dtype) for video in videos]),
            IDS: torch.cat([video.ids for video in videos]),
            POSITIONS: torch.cat([video.positions.T for video in videos]),
            COUNTS: torch.tensor(counts),
            NEXT: torch.tensor([video.next_position for video in videos], dtype=torch.float64),
        }
        super().__init__(data, "video", set(data), bundle_fields)
        self.bundles = bundles

    def get_item_for_hash(self, index: int) -> str:
        """The digest of the file, so that all questions about a bundle share its place in the caches."""
        return self.bundles[index].digest


class BundleInfo:
    """Mixed into a family's processing info: its data parser also takes bundles."""

    ctx: Any

    @cached_property
    def bundle_reader(self) -> BundleReader:
        """Reads bundles for the served model."""
        config = self.ctx.model_config
        # Without the hub, vLLM names the folder of the revision, and still the revision.
        revision = None if Path(config.model).is_dir() else config.revision
        return BundleReader(config.model, revision)

    def get_data_parser(self) -> Any:
        """See ``BaseProcessingInfo``."""
        parser: Any = super().get_data_parser()  # type: ignore[misc]
        parse_other = parser._parse_video_data
        parser._parse_video_data = lambda data: self.read_bundles(data) if is_payload(data) else parse_other(data)
        return parser

    def read_bundles(self, data: Mapping[str, Any] | list[Any]) -> BundleItems:
        """Return the bundles of a payload, or of a list of them. Raises ``VLLMValidationError``, which a client sees as a bad
        request."""
        rate = getattr(self.ctx.get_mm_config(), "video_pruning_rate", None)
        if rate:
            raise VLLMValidationError(
                f"bundle: this server prunes videos (--video-pruning-rate {rate}), which would change a bundle's tokens; "
                "start it without"
            )
        try:
            bundles = [self.bundle_reader.read(content) for content in split_payload(data)]
            check_lengths(bundles)
            return BundleItems(bundles, self.ctx.model_config.dtype)
        except FreresError as error:
            raise VLLMValidationError(f"{error.message}" + (f" ({error.hint})" if error.hint else "")) from error


class BundleProcessor:
    """Mixed into a family's processor: a bundle's rows take the place of the video's placeholder."""

    info: Any

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = bundle_fields(hf_inputs)
        return fields or super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        items = mm_items.get("video")
        if not isinstance(items, BundleItems):
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        if len(mm_items) > 1:
            raise VLLMValidationError(
                "bundle: expected no images in the same prompt; ask about them in another request"
            )
        pad = self.info.get_hf_config().video_token_id

        def rows_of(index: int) -> Any:
            return PromptUpdateDetails.select_token_id(items.bundles[index].video.ids.tolist(), pad)

        return [PromptReplacement(modality="video", target=[pad], replacement=rows_of)]
