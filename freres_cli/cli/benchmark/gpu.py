"""The parts ``gpu`` and ``gpu_clip`` of the benchmark: what levers bring on a GPU, each on and off in turn, in prefill and
decoding and in the encoding of a clip."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from freres_cli.backbones import attention, engine, fused_layers, long_attention, token_steps
from freres_cli.bench.clock import PeakMemory, StageTimer
from freres_cli.bench.report import describe_environment, summarize_ratios, summarize_runs
from freres_cli.bench.tables import TABLES
from freres_cli.cli.output import print_line
from freres_cli.cli.profile_table import weights_of
from freres_cli.devices import choose_device, synchronize
from freres_cli.pipeline import compressor
from freres_cli.pipeline.beside import BesideTower
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import LatentStream, VideoSource
from freres_cli.pipeline.made_clip import fill_tokens, fit_prompt, place_made_tokens
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.planning import CompressPlan
from freres_cli.pipeline.session import Session
from freres_cli.presets import load_settings
from freres_cli.video.frames import FrameArray

MODEL, TABLE, ROW = "Qwen3-VL-8B", "dense-30fps", "fre-res"
QUESTION, NEW_TOKENS = "What happens in the video?", 128
NUM_QUESTIONS, SHORT_ANSWER = 16, 16
# Rows of a chunk that have 256 MiB of activations in this model, as before there were chunks for cuDNN.
CHUNK_BY_BYTES = 3640
TOWER, CLIP_FRAMES, CLIP_PX, CLIP_BUDGET = "Qwen2-VL-7B", 300, 672, 17280


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


@contextmanager
def in_passes() -> Iterator[None]:
    """Within the block, PyTorch's own passes in place of one kernel for several of them."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(fused_layers, "_takes", lambda *_: False))
        stack.enter_context(patch.object(long_attention, "find_kernels", lambda *_: (None, None)))
        yield


@contextmanager
def in_one_queue() -> Iterator[None]:
    """Within the block, a method waits for the tower, as on a CPU."""
    with patch.object(compressor, "BesideTower", lambda *_: BesideTower(torch.device("cpu"))):
        yield


def measure_gpu_clip(repeat: int = 3) -> dict[str, Any]:
    """Measure the time from frames to what a bundle holds, of a clip in which a picture moves, and of encoding alone.

    ``repeat``: as in ``measure_gpu``.
    """
    device = choose_device("cuda")
    with weights_of(TOWER, "random") as (folder, _):
        models = Models(ModelSource(str(folder), device, is_random=True))
        encoder = models.encoder  # read before its files are removed
    source = _draw_clip()
    runs: dict[int, dict[str, float]] = {}
    for run in range(repeat + 1):
        asked = _encode_each_way(models, source)
        print_line(f"clip, run {run}: {asked}")
        runs[run] = asked
    del runs[0]  # which compiles kernels and loads libraries
    columns = {name: [asked[name] for asked in runs.values()] for name in runs[1]}

    def ratio(name: str, other: str) -> dict[str, float]:
        return summarize_ratios(columns[name], columns[other])

    return {
        "model": f"{TOWER}, random weights",
        "gpu_environment": describe_environment(device, encoder.dtype),
        "clip": f"{CLIP_FRAMES} frames of {CLIP_PX}x{CLIP_PX} px in memory, a picture that moves",
        "budget": CLIP_BUDGET,
        "seconds": {name: summarize_runs(values) for name, values in columns.items()},
        "adaptive_over_encoding_alone": ratio("adaptive", "encoding_alone"),
        "adaptive_in_one_queue_over_encoding_alone": ratio("adaptive_in_one_queue", "encoding_alone"),
        "fre_res_over_encoding_alone": ratio("fre_res", "encoding_alone"),
        "fre_res_in_one_queue_over_encoding_alone": ratio("fre_res_in_one_queue", "encoding_alone"),
        "encoding_alone_over_in_passes": ratio("encoding_alone", "encoding_in_passes"),
    }


def _draw_clip() -> VideoSource:
    """A picture that moves."""
    picture = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    base = (torch.nn.functional.interpolate(picture, CLIP_PX, mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)
    base = base.permute(1, 2, 0)
    frames = torch.stack([base.roll((3 * index, 2 * index), (0, 1)) for index in range(CLIP_FRAMES)])
    return VideoSource(FrameArray(frames, [index / 30 for index in range(CLIP_FRAMES)]))


def _encode_each_way(models: Models, source: VideoSource) -> dict[str, float]:
    """Seconds from frames to what a bundle holds, with the levers on and off, and to latents alone."""
    asked = {}
    for name, method in (("adaptive", "adaptive"), ("fre_res", "fre-res")):
        settings: dict[str, Any] = {"preset": "long-video", "sample": "native", "track_density": 1}
        own = Compressor(models=models, budget_tokens=CLIP_BUDGET, method=method, **settings)
        plan, timer = own.plan(source.video), StageTimer(models.encoder.device)
        compress = partial(own.run_stages, source, own.options, plan, timer)
        asked[name] = _time(compress)
        with in_one_queue():
            asked[f"{name}_in_one_queue"] = _time(compress)
    encode = partial(_encode_alone, source, own, plan)
    asked["encoding_alone"] = _time(encode)
    with in_passes():
        asked["encoding_in_passes"] = _time(encode)
    return asked


def _encode_alone(source: VideoSource, own: Compressor, plan: CompressPlan) -> None:
    encoder = own.models.encoder
    for _ in LatentStream(encoder, StageTimer(encoder.device), TOWER).encode(source.open(plan, own.options)):
        pass


def _time(work: Callable[[], Any]) -> float:
    device = torch.device("cuda")
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def measure_session(session: Session, repeat: int, num_new: int = NEW_TOKENS) -> dict[str, Any]:
    """Measure TTFT and peak memory with and without cuDNN, and ``num_new`` tokens with and without a recorded step.

    ``session``: of one video. ``repeat``: as in ``measure_gpu``.
    """
    memory, runs = PeakMemory(session.model.device), {}
    first = _ask_anew(session, memory)
    print_line(f"first prompt of the process: {first['ttft_s']:.2f} s")
    for run in range(repeat):
        asked = {"cudnn": _ask_anew(session, memory)}
        with in_passes():
            asked["in_passes"] = _ask_anew(session, memory)
        with patch.object(attention, "can_attend_long", lambda *_: False):
            asked["flash"] = _ask_anew(session, memory)
            with patch.object(engine, "fit_long_chunk", lambda _: CHUNK_BY_BYTES):
                asked["flash_in_small_chunks"] = _ask_anew(session, memory)
        asked |= _answers(session, num_new) | _ask_together(session)
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
        "small_chunk_tokens": CHUNK_BY_BYTES,
        "new_tokens": num_new,
        "first_prompt_of_the_process": first,
        "runs": repeat,
        **figures,
        "fused_over_in_passes": ratio("cudnn", "in_passes", "ttft_s"),
        "cudnn_over_flash": ratio("cudnn", "flash", "ttft_s"),
        "cudnn_over_flash_in_small_chunks": ratio("cudnn", "flash_in_small_chunks", "ttft_s"),
        "recorded_fused_over_in_passes": ratio("recorded_later", "recorded_in_passes", "tpot_s"),
        "recorded_over_eager": ratio("recorded", "eager", "tpot_s"),
        "recorded_later_over_eager": ratio("recorded_later", "eager", "tpot_s"),
        "num_questions": NUM_QUESTIONS,
        "short_answer_tokens": SHORT_ANSWER,
        "together_over_one_at_a_time": ratio("together", "one_at_a_time", "all_s"),
    }


def _ask_anew(session: Session, memory: PeakMemory) -> dict[str, float]:
    session.forget_prefix()
    memory.reset()
    answer = session.ask(QUESTION, max_new_tokens=1)
    assert answer.ttft_s is not None
    return {"ttft_s": answer.ttft_s, "peak_memory_bytes": memory.read_bytes()}


def _ask_together(session: Session) -> dict[str, dict[str, float]]:
    """Seconds for several questions about a prefilled video, together and one at a time."""
    questions = [f"{QUESTION} ({number})" for number in range(NUM_QUESTIONS)]
    ways: dict[str, Callable[[], Any]] = {
        "together": lambda: session.ask_many(questions, max_new_tokens=SHORT_ANSWER),
        "one_at_a_time": lambda: [session.ask(question, max_new_tokens=SHORT_ANSWER) for question in questions],
    }
    seconds = {}
    for name, run in ways.items():
        start = time.perf_counter()
        run()  # it ends with words, so the device is done
        seconds[name] = {"all_s": time.perf_counter() - start}
    return seconds


def _answers(session: Session, num_new: int) -> dict[str, dict[str, float]]:
    """Seconds a token of the first answer about a video, of a later one, and of one without recorded steps."""
    session.forget_prefix()
    asked = {name: session.ask(QUESTION, max_new_tokens=num_new) for name in ("recorded", "recorded_later")}
    with patch.object(token_steps, "can_record", lambda *_: False):
        asked["eager"] = session.ask(QUESTION, max_new_tokens=num_new)
    session.forget_prefix()
    with in_passes():
        session.ask(QUESTION, max_new_tokens=token_steps.STEPS_BEFORE_RECORDING + 2)  # records the step
        asked["recorded_in_passes"] = session.ask(QUESTION, max_new_tokens=num_new)
    assert all(answer.num_new_tokens == num_new for answer in asked.values()), "an answer ended early"
    return {name: {"tpot_s": answer.tpot_s or 0.0} for name, answer in asked.items()}
