"""Measure vLLM with bundles against the same engine fed with every token.

``python -m freres_cli.integrations.vllm_benchmark -o freres_cli/bench/results/vllm.json``, where vLLM is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from freres_cli.bench.report import describe_environment, summarize_ratios, summarize_runs
from freres_cli.devices import choose_device
from freres_cli.evaluation.cells import parse_budget
from freres_cli.integrations.vllm_bundles import load_payload
from freres_cli.integrations.vllm_plugin import CONNECTOR
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models, make_source
from freres_cli.presets import BUNDLED
from freres_cli.world.bundled_model import bundled_model_dir
from freres_cli.world.make import make_set, question_rows

# For one process on a CPU, so that its time can be read. The first is in GiB.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_MEDIA_CONNECTOR": CONNECTOR,
    "VLLM_NO_USAGE_STATS": "1",
}
ARCHITECTURE = "FreResQwen2VLForConditionalGeneration"
NUM_CLIPS, NUM_CLIENTS, NUM_ANSWER = 4, 8, 16
VARIANTS = {"every token": None, "adaptive, a quarter": "0.25", "adaptive, a tenth": "0.1"}


@contextlib.contextmanager
def open_engine(model: Path, architecture: str, **options: Any) -> Iterator[Any]:
    """An engine in this process, without its tower, in float32; shut down afterwards.

    ``model``: its folder. ``architecture``: one of ``vllm_plugin.ARCHITECTURES``. ``options``: others of vLLM's ``LLM``.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from freres_cli.integrations.vllm_plugin import register

    register()
    wanted: dict[str, Any] = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0, "video": 0}, "seed": 0}
    wanted |= {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": NUM_CLIENTS}
    llm = LLM(str(model), hf_overrides={"architectures": [architecture]}, **wanted | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def make_prompts(models: Models, bundle: Path, questions: Sequence[str]) -> list[dict[str, Any]]:
    """Return the prompts of ``freres ask`` for vLLM. ``models``: the bundle's, not loaded."""
    counter: Any = models.prompt_counter
    payload = load_payload(bundle)
    prompts = [counter.prompt(question) for question in questions]
    return [
        {
            "prompt_token_ids": [*ids.prefix, counter.video_token_id, *ids.suffix],
            "multi_modal_data": {"video": payload},
        }
        for ids in prompts
    ]


def measure(folder: Path, repeat: int) -> dict[str, Any]:
    """Time a first question, a later one, and eight clients at once on four bundles, in turns over the variants."""
    import vllm
    from vllm import SamplingParams

    models = Models(make_source(BUNDLED, "cpu"))
    prompts, tokens = _make_requests(folder, models)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
    one, answer = (SamplingParams(temperature=0, max_tokens=count) for count in (1, NUM_ANSWER))
    with open_engine(bundled_model_dir(), ARCHITECTURE) as llm:

        def run(name: str, key: str, asked: list[dict[str, Any]], params: Any) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            told = llm.generate(asked, params, use_tqdm=False)
            times[name].setdefault(f"{key}_s", []).append(time.perf_counter() - wall)
            times[name].setdefault(f"{key}_cpu_s", []).append(time.process_time() - cpu)
            assert len(told) == len(asked)

        for turn in range(repeat + 1):
            for name, asked in prompts.items():
                llm.reset_prefix_cache()
                run(name, "first_ttft", asked[:1], one)
                run(name, "later_ttft", asked[1:2], one)
                llm.reset_prefix_cache()
                run(name, "all", asked, answer)
            if not turn:  # warm-up
                times = {name: {} for name in VARIANTS}
    return {
        "vllm": vllm.__version__,
        "what": f"{NUM_CLIENTS} questions on each of {NUM_CLIPS} clips of level 1, at most {NUM_CLIENTS} at once; "
        f"answers of up to {NUM_ANSWER} tokens",
        "runs": repeat,
        "rows": [_row(name, tokens[name], times) for name in VARIANTS],
    }


def _make_requests(folder: Path, models: Models) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Return the requests and the mean number of visual tokens of each variant. Two neighbours ask about one clip."""
    clips = make_set(folder, "test", NUM_CLIPS, questions_per_clip=NUM_CLIENTS)
    prompts: dict[str, list[dict[str, Any]]] = {}
    tokens: dict[str, float] = {}
    for name, share in VARIANTS.items():
        prompts[name], counts = [], []
        for place, clip in enumerate(clips):
            video = folder / clip.file
            bundle = Compressor(method="full", device="cpu").compress(video)
            if share is not None:
                most = parse_budget(share, "budget").tokens(bundle.num_visual_tokens)
                bundle = Compressor(method="adaptive", device="cpu", budget_tokens=most).compress(video)
            path = folder / f"{place}-{len(prompts)}.pt"
            bundle.save(path)
            counts.append(bundle.num_visual_tokens)
            prompts[name] += make_prompts(models, path, [str(row["question"]) for row in question_rows(clip)])
        tokens[name] = sum(counts) / len(counts)
    return prompts, tokens


def _row(name: str, num_tokens: float, times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return one variant's figures, with ratios to every token within each turn."""
    mine, every = times[name], times[next(iter(VARIANTS))]
    row: dict[str, Any] = {"name": name, "visual_tokens": num_tokens}
    for key, values in mine.items():
        row[key] = summarize_runs(values)
        row[f"{key.removesuffix('_s')}_over_every_token"] = summarize_ratios(values, every[key])
    row["questions_per_s"] = summarize_runs([NUM_CLIPS * NUM_CLIENTS / value for value in mine["all_s"]])
    return row


def main() -> None:
    """Write the figures to the file that ``-o`` names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.repeat)
    facts = {
        "environment": describe_environment(choose_device("cpu")),
        "command": "python -m freres_cli.integrations.vllm_benchmark -o freres_cli/bench/results/vllm.json",
    }
    arguments.output.write_text(json.dumps({**facts, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
