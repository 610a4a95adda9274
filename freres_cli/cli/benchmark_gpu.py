"""The part ``gpu`` of the benchmark: what the levers of prefill and decoding bring on a GPU, each on and off in turn."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from freres_cli.backbones import attention, engine, token_steps
from freres_cli.backbones.long_attention import LONG_CHUNK_TOKENS
from freres_cli.bench.clock import PeakMemory
from freres_cli.bench.report import describe_environment, summarize_ratios, summarize_runs
from freres_cli.bench.tables import TABLES
from freres_cli.cli.output import print_line
from freres_cli.cli.profile_table import weights_of
from freres_cli.devices import choose_device
from freres_cli.pipeline.made_clip import fill_tokens, fit_prompt, place_made_tokens
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.session import Session
from freres_cli.presets import load_settings

MODEL, TABLE, ROW = "Qwen3-VL-8B", "dense-30fps", "fre-res"
QUESTION, NEW_TOKENS = "What happens in the video?", 128
# Rows of a chunk that have 256 MiB of activations in this model, as before there were chunks for cuDNN.
CHUNK_BY_BYTES = 3640


def measure_gpu(repeat: int = 3) -> dict[str, Any]:
    """Measure a prompt of the paper's Table 3 and answers to it, with random weights.

    ``repeat``: runs of each setting, in turn. Raises ``ResourceError`` without a CUDA device.
    """
    device, table = choose_device("cuda"), TABLES[TABLE]
    wanted = next(row for row in table.rows if row.name == ROW)
    with weights_of(MODEL, "random") as (folder, notes):
        model = Models(ModelSource(str(folder), device, is_random=True)).language_model
    tokens, _ = fit_prompt(place_made_tokens(table, wanted), model, QUESTION, wanted.context_tokens)
    filled = fill_tokens(tokens, model.width, model.num_deep_layers, model.dtype)
    session = Session(model, filled, table.full_tokens, load_settings(table.preset, {}).text_after, 0.0)
    return {
        "model": f"{MODEL}, {', '.join(notes)}",
        "context_tokens": wanted.context_tokens,
        "gpu_environment": describe_environment(device, model.dtype),
        **measure_session(session, repeat),
    }


def measure_session(session: Session, repeat: int, num_new: int = NEW_TOKENS) -> dict[str, Any]:
    """Measure TTFT and peak memory with and without cuDNN, and ``num_new`` tokens with and without a recorded step.

    ``session``: of one video. ``repeat``: as in ``measure_gpu``.
    """
    memory, runs = PeakMemory(session.model.device), {}
    first = _ask_anew(session, memory)
    print_line(f"first prompt of the process: {first['ttft_s']:.2f} s")
    for run in range(repeat):
        asked = {"cudnn": _ask_anew(session, memory)}
        with patch.object(attention, "can_attend_long", lambda *_: False):
            asked["flash"] = _ask_anew(session, memory)
            with patch.object(engine, "LONG_CHUNK_TOKENS", CHUNK_BY_BYTES):
                asked["flash_in_small_chunks"] = _ask_anew(session, memory)
        asked |= _answers(session, num_new)
        print_line(f"run {run + 1}: {', '.join(f'{name} {row}' for name, row in asked.items())}")
        runs[run] = asked
    names = list(runs[0])
    figures = {
        name: {key: summarize_runs([asked[name][key] for asked in runs.values()]) for key in runs[0][name]}
        for name in names
    }

    def ratio(name: str, other: str, key: str) -> dict[str, float]:
        return summarize_ratios(*([asked[each][key] for asked in runs.values()] for each in (name, other)))

    return {
        "chunks": {"cudnn": LONG_CHUNK_TOKENS, "flash": LONG_CHUNK_TOKENS, "flash_in_small_chunks": CHUNK_BY_BYTES},
        "new_tokens": num_new,
        "first_prompt_of_the_process": first,
        "runs": repeat,
        **figures,
        "cudnn_over_flash": ratio("cudnn", "flash", "ttft_s"),
        "cudnn_over_flash_in_small_chunks": ratio("cudnn", "flash_in_small_chunks", "ttft_s"),
        "recorded_over_eager": ratio("recorded", "eager", "tpot_s"),
        "recorded_later_over_eager": ratio("recorded_later", "eager", "tpot_s"),
    }


def _ask_anew(session: Session, memory: PeakMemory) -> dict[str, float]:
    session.forget_prefix()
    memory.reset()
    answer = session.ask(QUESTION, max_new_tokens=1)
    assert answer.ttft_s is not None
    return {"ttft_s": answer.ttft_s, "peak_memory_bytes": memory.read_bytes()}


def _answers(session: Session, num_new: int) -> dict[str, dict[str, float]]:
    """Seconds a token of the first answer about a video, of a later one, and of one without recorded steps."""
    session.forget_prefix()
    asked = {name: session.ask(QUESTION, max_new_tokens=num_new) for name in ("recorded", "recorded_later")}
    with patch.object(token_steps, "can_record", lambda *_: False):
        asked["eager"] = session.ask(QUESTION, max_new_tokens=num_new)
    assert all(answer.num_new_tokens == num_new for answer in asked.values()), "an answer ended early"
    return {name: {"tpot_s": answer.tpot_s or 0.0} for name, answer in asked.items()}
