"""The part ``quantized`` of the benchmark: what 8-bit cache and weights cost in accuracy and in time, and what they save."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.quantized_cache import make_cache
from freres_cli.backbones.quantized_weights import plain_tensors
from freres_cli.baselines.registry import ADAPTIVE
from freres_cli.cli.benchmark.lean import compare, measure_decoding
from freres_cli.cli.benchmark.variants import Variant, ask_variants
from freres_cli.devices import choose_device, choose_storage
from freres_cli.evaluation.cells import Cell, parse_budget
from freres_cli.pipeline.models import Models, make_source
from freres_cli.presets import BUNDLED

BUDGETS = ("0.25", "0.1")
STORAGES = {
    "float32": (None, None),
    "kv int8": ("int8", None),
    "kv fp8": ("fp8", None),
    "weights int8": (None, "int8"),
    "weights fp8": (None, "fp8"),
}
LENGTHS = (1000, 4000)


def measure_quantized(questions: Sequence[Path], repeat: int = 3) -> dict[str, Any]:
    """Ask the questions of each file with every storage of ``STORAGES``, each clip encoded once, and compare in pairs.

    ``questions``: files of the world, such as ``freres world make`` writes. ``repeat``: pairs of timed runs. Needs torchao. A
    run that was stopped goes on from the answers beside the questions.
    """
    models = {
        name: Models(make_source(BUNDLED, "cpu", storage=choose_storage(kv, weights))).language_model
        for name, (kv, weights) in STORAGES.items()
    }
    variants = {name: Variant(model) for name, model in models.items()}
    cells = [Cell("full", None), *(Cell(ADAPTIVE, parse_budget(budget)) for budget in BUDGETS)]
    asked = {path.parent.name: ask_variants(path, variants, cells, "quantized.jsonl") for path in questions}
    plain = models["float32"]
    rounded: dict[str, Any] = {name: model for name, model in models.items() if name != "float32"}
    return {
        "device": choose_device("cpu").description,
        "torchao": version("torchao"),
        "kv_bytes_per_token": {name: model.kv_bytes_per_token for name, model in models.items()},
        "decoder_weight_bytes": {name: count_weight_bytes(model) for name, model in models.items()},
        "this": "the storage",
        "other": "float32",
        "warmup": 1,
        "runs": repeat,
        "decoding": {
            f"{kv}_after_{length}_rows": measure_decoding(
                plain, length, repeat, {"this": make_cache(plain.decoder.config, kv), "other": plain.new_cache()}
            )
            for kv in ("int8", "fp8")
            for length in LENGTHS
        },
        "prefill": {name: _time_prefill(model, plain, repeat) for name, model in rounded.items()},
        "sets": asked,
    }


def count_weight_bytes(model: LanguageModel) -> int:
    """Bytes of the weights of a decoder, with its scales and without a head."""
    return sum(part.nbytes for weight in model.decoder.parameters() for part in plain_tensors(weight))


def _time_prefill(model: LanguageModel, plain: LanguageModel, repeat: int) -> dict[str, Any]:
    def run(own: LanguageModel) -> None:
        with torch.no_grad():
            own.decode(own.text_rows([5] * LENGTHS[0], 0, 0.0), own.new_cache())

    return compare(lambda: run(model), lambda: run(plain), repeat)
