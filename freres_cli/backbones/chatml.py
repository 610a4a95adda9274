"""Tokenizers of bytes with the special tokens of ChatML, in the form that transformers saves and loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def wrap_tokenizer(
    tokenizer: Tokenizer, special_tokens: Iterable[str], chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer for transformers, with the special tokens after its own, or where it has them already.

    ``tokenizer``: with its vocabulary; it is changed. ``chat_template``: how a chat is written, if it is to know that.
    """
    from tokenizers import AddedToken, decoders
    from transformers import PreTrainedTokenizerFast

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = chat_template
    return made
