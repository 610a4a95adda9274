"""The part ``lean`` of the benchmark: the cache with spare rows against the growing one, reading a saved prefix against
prefilling, and later chunks of a prompt in two parts against a mask."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import DynamicCache

from freres_cli.backbones import attention
from freres_cli.backbones.cache import reserve_rows
from freres_cli.backbones.engine import PREFILL_CHUNK_TOKENS, prefill, prefill_video
from freres_cli.backbones.quantized_cache import make_cache
from freres_cli.backbones.saved_prefix import open_prefix
from freres_cli.bench.report import summarize_ratios, summarize_runs
from freres_cli.cli.benchmark.inputs import METHOD
from freres_cli.pipeline.compressor import Compressor
from freres_cli.world.make import make_set

LENGTHS = (1000, 8000)
STEPS = 64
LONG_ROWS = 16384


def measure_lean(folder: Path, repeat: int = 5) -> dict[str, Any]:
    """Measure each with the bundled model, each pair in turn, in CPU and wall seconds; the first pair is not counted."""
    (folder / "lean").mkdir()
    clip = folder / "lean" / make_set(folder / "lean", "test", 1)[0].file
    session = Compressor(method=METHOD, device="cpu").compress(clip).open(device="cpu")
    model, tokens = session.model, session.tokens
    ids, path = model.prompt("?").prefix, folder / "lean.prefix.safetensors"
    open_prefix(model, ids, tokens, session.text_after, path)
    config = model.decoder.config
    rows = {
        f"decoding_after_{length}_rows": measure_decoding(
            model, length, repeat, {"this": make_cache(config), "other": DynamicCache(config=config)}
        )
        for length in LENGTHS
    }
    rows["saved_prefix"] = compare(
        lambda: open_prefix(model, ids, tokens, session.text_after, path),
        lambda: prefill_video(model, ids, tokens, session.text_after),
        repeat,
    )
    rows["late_chunks"] = {
        "rows": LONG_ROWS,
        "chunk_rows": PREFILL_CHUNK_TOKENS,
        "most_mask_bytes": 4 * PREFILL_CHUNK_TOKENS * LONG_ROWS,
        **measure_late_chunks(model, repeat),
    }
    return {
        "steps": STEPS,
        "this": "spare rows; the saved prefix; attention of later chunks in two parts",
        "other": "the cache of transformers; a prefill; attention with a mask",
        "visual_tokens": len(tokens),
        "prefix_bytes": path.stat().st_size,
        "warmup": 1,
        "runs": repeat,
        **rows,
    }


def measure_decoding(model: Any, num_rows: int, repeat: int, caches: dict[str, Any]) -> dict[str, Any]:
    """Time ``STEPS`` decoded tokens after rows that are prefilled once.

    ``model``: the language half. ``num_rows``: how many rows. ``repeat``: pairs of runs. ``caches``: two empty ones, as
    ``this`` and ``other``.
    """
    made = {}
    for name, cache in caches.items():
        reserve_rows(cache, num_rows)
        prefill(model, model.text_rows([5] * num_rows, 0, 0.0), cache)
        made[name] = cache

    def decode(name: str) -> None:
        cache = copy.deepcopy(made[name])
        for step in range(STEPS):
            rows = model.text_rows([7], num_rows + step, float(num_rows + step))
            model.logits(prefill(model, rows, cache)).argmax()

    return compare(lambda: decode("this"), lambda: decode("other"), repeat)


def measure_late_chunks(model: Any, repeat: int) -> dict[str, Any]:
    """Time the prefill of ``LONG_ROWS`` rows in the chunks that a large model takes, as ``compare`` does.

    ``model``: the language half. ``repeat``: pairs of runs.
    """
    prompt = model.text_rows([5] * LONG_ROWS, 0, 0.0)

    def run() -> None:
        prefill(model, prompt, make_cache(model.decoder.config), PREFILL_CHUNK_TOKENS)

    def run_with_mask() -> None:
        with patch.object(attention, "LEAST_ROWS_IN_PARTS", LONG_ROWS):
            run()

    return compare(run, run_with_mask, repeat)


def compare(this: Callable[[], Any], other: Callable[[], Any], repeat: int) -> dict[str, Any]:
    """Run both in turn, and return the seconds of each and the ratios of the pairs."""
    runs: list[dict[str, tuple[float, float]]] = []
    for _ in range(repeat + 1):
        run = {}
        for name, action in (("this", this), ("other", other)):
            cpu, wall = time.process_time(), time.perf_counter()
            action()
            run[name] = (time.process_time() - cpu, time.perf_counter() - wall)
        runs.append(run)
    measured = {}
    for place, kind in enumerate(("cpu_s", "wall_s")):
        own, others = ([run[name][place] for run in runs[1:]] for name in ("this", "other"))
        measured[kind] = {
            "this": summarize_runs(own),
            "other": summarize_runs(others),
            "this_over_other": summarize_ratios(own, others),
        }
    return measured
