"""Rotary frequencies that depend on the length of the prompt (dynamic and longrope scaling), settled once for a video.

transformers keeps in the model what the longest prompt so far needed, and changes it as an answer grows. So an answer would
depend on the questions and videos before it, and on how a prompt is cut into chunks. Ours: the length of a video, with the
text before it, settles the frequencies for it, and for every question and answer that continues it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from freres_cli.backbones.cache import CACHE_ARGUMENT
from freres_cli.backbones.sizes import find_rope_kind

# Kinds of scaling whose frequencies depend on the length of the prompt.
CHANGING_ROPE = ("dynamic", "longrope")
# As transformers looks for these words in it, this ends its own changes.
_SETTLED = "settled"


def settle_angles(decoder: nn.Module) -> None:
    """Let the cache of each pass decide the rotary frequencies of ``decoder``, if they depend on the prompt's length."""
    if find_rope_kind(decoder.config) in CHANGING_ROPE:
        decoder.rotary_emb.rope_type = _SETTLED  # type: ignore[union-attr]
        decoder.register_forward_pre_hook(_settle, with_kwargs=True)


def rope_notes(text_config: Any) -> tuple[str, ...]:
    """What the user should know about the rotary angles of a decoder with this config."""
    if (kind := find_rope_kind(text_config)) not in CHANGING_ROPE:
        return ()
    limit = text_config.max_position_embeddings
    if kind == "longrope":
        limit = text_config.rope_parameters["original_max_position_embeddings"]
    return (
        f"rotary frequencies change past position {limit} ({kind} scaling): the length of the video settles them, and they "
        "do not change again with each word of an answer, as in transformers",
    )


def _settle(decoder: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    cache, rotary = options.get(CACHE_ARGUMENT), decoder.rotary_emb
    num_positions = getattr(cache, "num_settled", None)
    if num_positions is None:  # one pass is the whole prompt
        num_positions = math.ceil(float(options["position_ids"].max())) + 1
        if cache is not None:
            cache.num_settled = num_positions
    if num_positions != getattr(rotary, "num_settled", None):
        # As a tensor, as transformers gives it: the sums round otherwise.
        length = torch.tensor(num_positions)
        change = ROPE_INIT_FUNCTIONS[str(find_rope_kind(decoder.config))]
        frequencies, _ = change(decoder.config, torch.device("cpu"), seq_len=length)
        rotary.inv_freq.data.copy_(frequencies)
        rotary.num_settled = num_positions
