"""Every family's prompt is, token for token, that of the stock processor for the same template and video."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from freres_cli.backbones import stock_processors
from freres_cli.errors import BackboneError
from tests import family_contract
from tests.family_contract import PERIOD_S, QUESTION, T
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import open_checkpoint

tiny, one_thread = family_contract.tiny, family_contract.one_thread


def test_the_prompt_is_the_stock_processors(tiny):
    rows, ids = tiny.whole_prompt(tiny.tokens()), tiny.path.ids[0]
    assert len(rows) == len(ids)
    cells = tiny.case.grid[0] * tiny.case.grid[1]
    assert int(tiny.path.is_visual.sum()) == T * cells
    expected = tiny.stock.get_input_embeddings()(ids)
    # the row that ends a video of LLaVA-OneVision has the video's token, but no text
    is_text = ids != tiny.path.pad
    assert torch.equal(rows.embeds[is_text, : tiny.model.width], expected[is_text])
    assert is_text.sum() >= 40


@pytest.mark.parametrize(
    ("name", "text"),
    [("qwen3_vl", "<7.5 seconds>"), ("internvl", "Frame4: <img>"), ("smolvlm", "series of four frames")],
)
def test_the_stock_prompt_is_written_by_the_stock_processor(name, text, tmp_path):
    case = next(case for case in FAMILY_CASES if case.name == name)
    stock = case.make(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tokenizer = case.language_class.load_without_weights(checkpoint).tokenizer
    arguments = (checkpoint, stock.config, tokenizer, (T, *case.grid), PERIOD_S, QUESTION)
    ids = stock_processors.stock_prompt_ids(*arguments)
    assert text in tokenizer.decode(ids) and QUESTION in tokenizer.decode(ids)
    if name == "internvl":
        tokenizer.chat_template = None
        with pytest.raises(BackboneError, match="the stock processor cannot write this prompt"):
            stock_processors.stock_prompt_ids(*arguments)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_that_puts_spaces_before_texts_puts_none_inside_the_prompt(tmp_path, scheme):
    """Those of InternLM's models are such. ``first``: only at the start of a prompt; ``always``: after control tokens too."""
    case = next(case for case in FAMILY_CASES if case.name == "internvl")
    stock = case.make(tmp_path)
    model = case.language_class.load_without_weights(checkpoint := open_checkpoint(tmp_path))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spaced = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme), to_bytes])
    model.tokenizer.backend_tokenizer.pre_tokenizer = spaced
    arguments = (checkpoint, stock.config, model.tokenizer, (T, *case.grid), PERIOD_S, QUESTION)
    ids = torch.tensor(stock_processors.stock_prompt_ids(*arguments))
    prompt, texts = model.prompt(QUESTION), model.frame_texts(SimpleNamespace(grid=(T, *case.grid)))
    around = [piece for sides in zip(texts.before, texts.after, strict=True) for piece in sides]
    assert ids[ids != stock.config.image_token_id].tolist() == [*prompt.prefix, *chain(*around), *prompt.suffix]


@pytest.mark.parametrize("writes_bos", [True, False])
def test_a_token_that_begins_every_text_begins_a_prompt_once(tmp_path, writes_bos):
    """Of tokenizers like Llama's. The templates of some of their checkpoints write the token, those of others do not."""
    case = next(case for case in FAMILY_CASES if case.name == "internvl")
    stock = case.make(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tokenizer = case.language_class.load_without_weights(checkpoint).tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    if writes_bos:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    model = case.language_class.load_without_weights(open_checkpoint(tmp_path))
    processor = stock_processors._make_processor(checkpoint, stock.config, model.tokenizer, 16, 2)
    processor.chat_template = model.tokenizer.chat_template
    hello = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    expected = processor.apply_chat_template(hello, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert expected["input_ids"][0][:2].count(begin) == 1
    prompt = model.prompt(QUESTION)
    assert prompt.prefix[0] == begin and begin not in (*prompt.prefix[1:], *prompt.suffix)
    ids = stock_processors.stock_prompt_ids(
        checkpoint, stock.config, model.tokenizer, (T, *case.grid), PERIOD_S, QUESTION
    )
    assert ids[0] == begin and ids[-len(prompt.suffix) :] == list(prompt.suffix)
