"""The bundled model's tokenizer: bytes, so that any text survives, with merges for the words of its world."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from freres_cli.backbones.chatml import wrap_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Bytes and merges have the ids below these.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# As in the released models: a default system line, then turns; a video goes where it is listed.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# One token each: the text around every question and every option.
FRAME_PIECES = (
    "\nOptions:\nA. ",
    *(f"\n{letter}. " for letter in "BCDEFGH"),
    "\nAnswer with the option's letter from the given choices directly.",
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
)
# Merges stay within these pieces: a frame piece, a word with the space before it, a digit, a run of spaces or symbols.
PIECES = "|".join([*map(re.escape, FRAME_PIECES), r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+"])
MAX_VOCABULARY = 1024


def make_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with merges learned from ``corpus``. The same corpus gives the same tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap_tokenizer(tokenizer, SPECIAL_TOKENS, CHAT_TEMPLATE)
