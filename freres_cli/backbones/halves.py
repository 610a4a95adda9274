"""What the two halves of every family share: where a family keeps its weights, and reading config and tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer, PretrainedConfig

from freres_cli.backbones.checkpoint import Checkpoint
from freres_cli.backbones.hub import TOKENIZER_FILES
from freres_cli.backbones.sizes import find_layer_kinds
from freres_cli.devices import memory_errors_as
from freres_cli.errors import BackboneError, is_out_of_memory


@dataclass(frozen=True)
class FamilyFiles:
    """How a family's checkpoints are laid out.

    ``vision``: prefix of the vision half's own names -> the prefixes they may have in a checkpoint, longer ones first.
    ``projector``, ``decoder`` and ``head``: the possible prefixes of that part. Released checkpoints,
    ``save_pretrained`` and the modules in memory may all differ. ``transposed``: endings of the names that may be
    stored with their last two axes swapped. ``family`` is the ``model_type``; ``title`` is the name for users.
    """

    family: str
    title: str
    config_class: type[PretrainedConfig]
    vision: dict[str, tuple[str, ...]]
    projector: tuple[str, ...]
    decoder: tuple[str, ...]
    head: tuple[str, ...] = ("lm_head.",)
    transposed: tuple[str, ...] = ()

    @property
    def language(self) -> dict[str, tuple[str, ...]]:
        """Prefix of the language half's own names -> the prefixes they may have in a checkpoint."""
        return {"decoder.": self.decoder, "lm_head.": self.head}

    @property
    def first_vision_prefixes(self) -> tuple[str, ...]:
        return next(iter(self.vision.values()))


class LanguageHalf(nn.Module):
    """A decoder and its head. ``lm_head`` is None if the head is tied to the embeddings."""

    def __init__(self, decoder: Any, lm_head: nn.Linear | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.lm_head = lm_head

    def tie_equal_head(self) -> None:
        """Drop a head that holds the same numbers as the embeddings."""
        if self.lm_head is None:
            return
        # In parts: a comparison takes memory, and most heads differ at once.
        parts = zip(self.lm_head.weight.split(1024), self.decoder.embed_tokens.weight.split(1024), strict=False)
        if all(torch.equal(own, row) for own, row in parts):
            self.lm_head = None


class MatricesOnMeta(TorchFunctionMode):
    """Inside the block, matrices made without values, as weights are until they are read, are on torch's meta device.

    Vectors and tensors with values, such as rotary frequencies, stay where they are, because some families compute with
    them: arithmetic on the meta device imports torch's symbolic shapes and sympy, which takes longer than all the rest.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and (made := func(*args, **{"device": "meta", **kwargs})).dim() > 1:
            return made
        return func(*args, **kwargs)


def qwen_files(
    family: str, title: str, config_class: type[PretrainedConfig], transposed: tuple[str, ...] = ()
) -> FamilyFiles:
    """The layouts of a Qwen family: ``visual.*`` and ``model.*``, or ``model.visual.*`` and ``model.language_model.*``.

    ``family``, ``title``, ``config_class`` and ``transposed`` are the fields of ``FamilyFiles``.
    """
    return FamilyFiles(
        family,
        title,
        config_class,
        vision={"": ("model.visual.", "visual.")},
        projector=("model.visual.merger.", "visual.merger."),
        decoder=("model.language_model.", "model."),
        transposed=transposed,
    )


def read_config(checkpoint: Checkpoint, files: FamilyFiles) -> Any:
    """The checkpoint's config as the class from transformers. Raises BackboneError with a one-line message."""
    try:
        # transformers writes into what it is given, and the config's hash identifies the model.
        return files.config_class.from_dict(copy.deepcopy(checkpoint.config))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"{checkpoint.model_id}: config.json is not a {files.title} config: {reason}") from error


def check_decoder(checkpoint: Checkpoint, text_config: Any) -> None:
    """Refuse decoders whose attention or storage is not that of the families here. ``text_config``: the decoder's. Raises
    BackboneError."""
    kinds = set(find_layer_kinds(text_config)) - {"full_attention", "linear_attention"}
    if kinds or getattr(text_config, "use_sliding_window", False):
        named = ", ".join(sorted(kinds)) or "sliding_attention"
        raise BackboneError(f"{checkpoint.model_id}: layers of kind {named} are not supported", "see: freres models")
    if any(".experts.0." in key for key in checkpoint.files_by_key):
        hint = "load it with transformers 5 and save it with save_pretrained(FOLDER, save_original_format=False)"
        raise BackboneError(f"{checkpoint.model_id}: experts that are stored one by one are not supported", hint)


def read_tokenizer(checkpoint: Checkpoint, known_token: int | str) -> Any:
    """The checkpoint's tokenizer, with the chat template of the processor if that has its own file.

    Raises BackboneError if the tokenizer cannot be read or does not know ``known_token``.
    """
    hint = "the model needs tokenizer.json and tokenizer_config.json"
    checkpoint.fetch_files(TOKENIZER_FILES, are_needed=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as error:  # the native part of tokenizers raises no other for a file of a newer release
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        newer = f"{hint}; one that a newer release of tokenizers wrote may need that release"
        raise BackboneError(f"{checkpoint.model_id}: tokenizer cannot be read: {reason}", newer) from error
    # Without tokenizer files, transformers silently makes an empty tokenizer.
    if isinstance(known_token, int):
        is_known = tokenizer.convert_ids_to_tokens(known_token) is not None
    else:
        is_known = known_token in tokenizer.get_vocab()
    if not is_known:
        raise BackboneError(f"{checkpoint.model_id}: tokenizer cannot be read: no token {known_token}", hint)
    for name in ("processor_config.json", "chat_template.json"):  # as transformers' processors choose
        if template := checkpoint.read_json(name).get("chat_template"):
            tokenizer.chat_template = template
            break
    return tokenizer


def loading(checkpoint: Checkpoint, what: str) -> Any:
    """A context that turns running out of memory into a ResourceError naming the model and its size."""
    gib = checkpoint.weight_bytes / 2**30
    message = f"{checkpoint.model_id}: loading the {what} (whole model: {gib:.1f} GiB as stored)"
    return memory_errors_as(message, "use a smaller model or dtype, or a device with more memory")


def read_stop_ids(checkpoint: Checkpoint, text_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation config, or else of the decoder's config, and the one that
    ends a turn in the ``tokenizer``: checkpoints without a generation config may name another, and run on past it."""
    named = checkpoint.read_json("generation_config.json").get("eos_token_id", text_config.eos_token_id)
    every = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(token for token in every if token is not None)
