"""Letters of options are the tokens that a released model begins its answer with, whatever its tokenizer does with spaces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from freres_cli.backbones.base import PromptIds
from freres_cli.pipeline.query import Query, encode_choices


class Model(SimpleNamespace):
    """A model whose prompt is a text, with the control token ``<end>`` before its own turn."""

    __hash__ = object.__hash__

    def prompt(self, question):
        ids = self.tokenizer.encode(f"<end>{question}<end>{self.opening}", add_special_tokens=False)
        return PromptIds((), tuple(ids))


def bytes_with_spaced_letters():
    """As SmolLM2: a word's token has the space before it."""
    words = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {token: len(words) + place for place, token in enumerate(("ĠA", "ĠB"))}
    made = Tokenizer(models.BPE(words, [("Ġ", "A"), ("Ġ", "B")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def pieces_with_spaced_starts():
    """As Llama: the start of a text gets a space."""
    known = [*(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581ABasitn", "\u2581A", "\u2581B", "<unk>"]
    merges = [("\u2581", "A"), ("\u2581", "B")]
    words = {token: place for place, token in enumerate(known)}
    made = Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made


@pytest.mark.parametrize(
    ("make", "opening", "answer"),
    [
        (bytes_with_spaced_letters, "\nAssistant:", "\nAssistant: A"),  # SmolVLM's template writes its turn so
        (bytes_with_spaced_letters, "assistant\n", "assistant\nA"),
        (pieces_with_spaced_starts, "assistant\n", "assistant\nA"),
        (bytes_with_spaced_letters, "", "A"),
    ],
)
def test_a_letter_is_what_a_turn_begins_with(make, opening, answer):
    made = make()
    made.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    model = Model(tokenizer=tokenizer, opening=opening, choices_as="letters")
    text, options = encode_choices(model, Query("which?", ("x", "y")))
    turn = tokenizer.encode(f"<end>{answer}", add_special_tokens=False)
    assert [*model.prompt(text).suffix, *options[0]][-len(turn) :] == turn
    assert len(options[0]) == len(options[1]) == 1 and options[0] != options[1]
