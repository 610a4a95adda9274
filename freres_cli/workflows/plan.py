"""What a video will cost before anything heavy runs: tokens, FLOPs, memory and estimated times, from configs alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from freres_cli.backbones.engine import choose_chunk
from freres_cli.backbones.quantized_weights import describe_weights
from freres_cli.backbones.row_parts import PART_ROWS
from freres_cli.backbones.sizes import DecoderSizes, TowerSizes, has_experts, measure_decoder, measure_tower
from freres_cli.baselines.registry import ADAPTIVE, METHODS
from freres_cli.devices import Storage, choose_dtype, memory_errors_as, synchronize
from freres_cli.pipeline.beside import MOST_BEGUN
from freres_cli.pipeline.costs import (
    CUDA_CONTEXT_BYTES,
    Part,
    ask_parts,
    encode_parts,
    method_parts,
    sum_bytes,
)
from freres_cli.pipeline.encoding import BATCHES_AHEAD, VideoSource, count_batch_frames
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.notes import describe_repeats
from freres_cli.pipeline.planning import CompressOptions, CompressPlan, plan_compression
from freres_cli.pipeline.prompt_text import bound_text, describe_context
from freres_cli.video.lines import MOST_APART

# Measured on one thread of a server CPU: decoding 2.1 ms and resizing 10.3 ms for a picture of 1280x720 in H.264.
DECODE_S_PER_PX = 2.1e-3 / (1280 * 720)
RESIZE_S_PER_PX = 10.3e-3 / (1280 * 720)
# A product that takes a CPU 10 ms takes a GPU less time than its start.
CPU_MATMUL_SIDE, CUDA_MATMUL_SIDE = 1024, 8192
MATMUL_SECONDS, COPY_BYTES = 0.3, 2**26


@dataclass(frozen=True)
class Speed:
    """What times are estimated from: ``flops_per_s``; ``bytes_per_s`` of memory, each ``None`` if not known; ``source``:
    where both come from."""

    flops_per_s: float | None
    bytes_per_s: float | None
    source: str

    def time(self, flops: int) -> float | None:
        """Seconds for so much work."""
        return None if self.flops_per_s is None else flops / self.flops_per_s


UNKNOWN_SPEED = Speed(None, None, "nothing: the GPU that is planned for is not here; name its speed with --tflops")


@dataclass(frozen=True)
class Stage:
    """One stage: ``flops``, ``seconds`` (estimated, ``None`` if unknown), and what that estimate assumes."""

    name: str
    flops: int | None
    seconds: float | None
    assumes: str


@dataclass(frozen=True)
class Cost:
    """What compressing and asking cost.

    ``encode``, ``ask``: the parts of the memory of each, in bytes at its peak. ``context_tokens``: rows of the prompt with an
    empty question, at most; without the text of the prompt if the tokenizer cannot be read. ``chunk``: rows of a pass.
    ``residual_tower``: the tower at the size of frames that are no anchors, if that is smaller. ``storage``: of cache and
    weights.
    """

    plan: CompressPlan
    visual_tokens: int
    context_tokens: int
    text_tokens: int | None
    dtype: torch.dtype
    tower: TowerSizes
    residual_tower: TowerSizes | None
    decoder: DecoderSizes
    chunk: int
    encode: list[Part]
    ask: list[Part]
    is_cuda: bool
    storage: Storage

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache of the prompt."""
        return self.context_tokens * self.decoder.row_bytes(self.dtype.itemsize, self.storage)

    @property
    def encode_bytes(self) -> int:
        """Peak memory of ``freres compress`` on the device, without what the process takes anyway."""
        return sum_bytes(self.encode, is_cuda=self.is_cuda)

    @property
    def ask_bytes(self) -> int:
        """Peak memory of ``freres ask`` on the device, without what the process takes anyway."""
        return sum_bytes(self.ask, is_cuda=self.is_cuda)

    @property
    def peak_bytes(self) -> int:
        """The larger of the two: they are separate commands, each with its half of the model."""
        return max(self.encode_bytes, self.ask_bytes)

    @property
    def base_bytes(self) -> int:
        """What the process takes on the device anyway: a CUDA context. On the CPU the interpreter, which is not counted."""
        return CUDA_CONTEXT_BYTES if self.is_cuda else 0


class Planner:
    """Plans for one video at any budget. Reads the video's packets, and of the model only config, tokenizer and the dtype of
    its weights, if those are in a folder.

    ``video``: the file. ``options``: how to compress it. ``is_cuda``: whether to plan for a CUDA device. Raises
    ``VideoError``, ``BackboneError`` or ``UsageError``.
    """

    def __init__(self, video: Path, options: CompressOptions, is_cuda: bool) -> None:
        self.options, self.is_cuda = options, is_cuda
        self.info = VideoSource(video).info
        self.models = Models(options.model)
        self.encoder = cast(Any, self.models.weightless_encoder)
        self.language = cast(Any, self.models.prompt_counter)
        parameters = self.language.num_parameters + sum(p.numel() for p in self.encoder.tower.parameters())
        stored = self.models.checkpoint.planned_dtype(self.language.files.decoder)
        device = replace(options.model.device, name="cuda:0") if is_cuda else options.model.device
        self.dtype, self.dtype_note = choose_dtype(options.model.dtype, device, stored, parameters * stored.itemsize)
        # On the meta device: no values are converted, only the sizes of numbers.
        self.language.half.to(self.dtype)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the figures."""
        levels = self.options.settings.still_levels
        still = f"in which nothing moved by more than {levels} levels" if levels else "that repeat the last one"
        cost = self.cost()
        lines = cost.plan.line_levels
        still += f", or that lie within {lines} levels of the line between two others," if lines else ""
        skipped = f"frames {still} are not encoded; they are found while decoding, so resize and tower may take less"
        told = [self.dtype_note, skipped, *describe_repeats(cost.plan), *self.language.describe_kv()]
        told += describe_context(cost.context_tokens, self.language, is_bound=True)
        if (weights := self.options.model.storage.weights) is not None:
            sizes = cost.decoder
            before = sizes.linear_weights * self.dtype.itemsize
            told.append(describe_weights(weights, sizes.linear_bytes(weights), before))
        return tuple(told)

    def cost(self, budget_tokens: int | None = None) -> Cost:
        """The cost at the options' budget, or another one."""
        options = self.options
        if budget_tokens is not None:
            settings = options.settings.with_values("flag", budget_tokens=budget_tokens)
            options = replace(options, settings=settings)
        plan = plan_compression(options, self.encoder, self.info)
        text = bound_text(plan, self.models, options.method)
        visual = plan.bound_tokens
        context = text["context_tokens"]
        tower, decoder = measure_tower(self.encoder, plan.size), measure_decoder(self.language)
        rows = visual if context is None else context
        chunk = choose_chunk(self.language, rows, is_cuda=self.is_cuda)
        # As row_parts.use_row_parts: experts share out rows themselves.
        mlp_rows = PART_ROWS if self.is_cuda and not has_experts(self.language.decoder.config) else None
        b, cells = self.dtype.itemsize, plan.size.num_tokens
        storage = options.model.storage
        batch = min(count_batch_frames(plan), plan.num_frames)
        frame_px = plan.size.height_px * plan.size.width_px
        kept = method_parts(plan.budget, options.method, plan.num_frames, cells, visual, self._kept_channels(tower), b)
        return Cost(
            plan,
            visual,
            rows,
            text["text_overhead_tokens"],
            self.dtype,
            tower,
            None if plan.residual_size is None else measure_tower(self.encoder, plan.residual_size),
            decoder,
            chunk,
            [*encode_parts(tower, batch, frame_px, cells, b, *self._count_batches(plan, batch)), *kept],
            ask_parts(decoder, visual, rows, chunk, b, storage, is_cuda=self.is_cuda, mlp_rows=mlp_rows),
            self.is_cuda,
            storage,
        )

    def _kept_channels(self, tower: TowerSizes) -> int:
        """Numbers that a method keeps of each token: latents, with their DeepStack rows and trends where those are kept."""
        settings, width = self.options.settings, int(self.encoder.width)
        trends = width if self.options.method == ADAPTIVE and settings.trends == "keep" else 0
        return (width if settings.deepstack == "drop" else tower.out_channels) + trends

    def _count_batches(self, plan: CompressPlan, batch: int) -> tuple[int, int]:
        """How many batches of frames, and frames with latents, are there at once. ``batch``: frames of one."""
        is_beside = self.is_cuda and plan.residual_size is None and (plan.budget or self.options.method == ADAPTIVE)
        has_lines, begun = bool(plan.line_levels), MOST_BEGUN if is_beside else 0
        # One is decoded, some wait, one is encoded; and where lines are drawn, one must be known not to be the last.
        num_batches = min(BATCHES_AHEAD + 2 + has_lines, -(-plan.num_frames // batch))
        # There a batch begins with frames that waited for it, and is there as lines and joined.
        whole = batch + MOST_APART if has_lines else batch
        return num_batches, (2 + has_lines + begun) * whole

    def largest_budget(self, device_bytes: int) -> int | None:
        """The largest budget whose peak memory fits, and whose prompt the model's context holds; ``None`` if not even one
        token does. At most every token."""

        def fits(budget_tokens: int | None) -> bool:
            cost = self.cost(budget_tokens)
            is_read = not describe_context(cost.context_tokens, self.language)
            return is_read and cost.peak_bytes + cost.base_bytes <= device_bytes

        low, high = 0, self.cost().plan.full_tokens
        if not METHODS[self.options.method].has_budget:
            return high if fits(None) else None
        if fits(high):
            return high
        while high - low > max(1, low // 1000):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low or None


def estimate_stages(cost: Cost, speed: Speed) -> list[Stage]:
    """The time of every stage, one after the other, at ``speed``."""
    plan = cost.plan
    source_px = plan.info.width_px * plan.info.height_px
    tower_flops, encoded = plan.num_frames * cost.tower.flops, "every sampled frame"
    if cost.residual_tower is not None and plan.residual_size is not None and plan.budget is not None:
        num_anchors, num_events, small = plan.budget.num_anchors, plan.budget.max_events, plan.residual_size
        num_whole = min(plan.num_frames, num_anchors + num_events)
        tower_flops = plan.num_frames * cost.residual_tower.flops + num_whole * cost.tower.flops
        events = f" and {num_events} more for cuts" if num_events else ""
        encoded = f"every sampled frame at {small.grid_h}x{small.grid_w} tokens, at least {num_anchors} whole{events},"
    prefill_flops = cost.decoder.prefill_flops(cost.context_tokens, cost.chunk)
    rate = "a speed that is not known" if speed.flops_per_s is None else f"{speed.flops_per_s / 1e12:.3g} TFLOP/s"
    per_token = None
    if speed.bytes_per_s is not None:
        weights = cost.decoder.weight_bytes(cost.dtype.itemsize, cost.storage)
        # A token reads no experts but its own, and one row of the embedding; neither is kept in 8 bits.
        weights -= (cost.decoder.num_parameters - cost.decoder.read_weights) * cost.dtype.itemsize
        per_token = (weights + cost.kv_bytes) / speed.bytes_per_s
    return [
        Stage(
            "decode",
            None,
            plan.info.num_packets * source_px * DECODE_S_PER_PX,
            "every frame of the file, H.264, one thread",
        ),
        Stage("resize", None, plan.num_frames * source_px * RESIZE_S_PER_PX, "every sampled frame, one thread"),
        Stage("tower", tower_flops, speed.time(tower_flops), f"{encoded} at {rate}"),
        Stage("prefill", prefill_flops, speed.time(prefill_flops), f"the whole prompt at {rate}"),
        Stage("per token", None, per_token, "cache and weights that it passes are read once for each token"),
    ]


def state_speed(tflops: float) -> Speed:
    """The speed that a user named."""
    return Speed(tflops * 1e12, None, "--tflops")


def measure_speed(device_name: str, dtype: torch.dtype) -> Speed:
    """The speed of a square matrix product and of a copy on this device, in less than a second."""
    device = torch.device(device_name)
    side = CPU_MATMUL_SIDE if device.type == "cpu" else CUDA_MATMUL_SIDE
    with memory_errors_as("measuring the speed", "name it with --tflops"):
        # Not of ones, of which a GPU makes products a tenth faster: they take less power, and its clock stays higher.
        a = torch.randn(side, side, dtype=dtype, device=device)
        block = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
        product_s = _time(lambda: a @ a, device)
        copy_s = _time(block.clone, device)
    # A copy reads and writes.
    name = str(dtype).removeprefix("torch.")
    source = f"a product of two random {side}x{side} matrices in {name} and a copy of 64 MiB on this device"
    return Speed(2 * side**3 / product_s, 2 * COPY_BYTES / copy_s, source)


def _time(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after a first one that is not counted."""
    work()
    best, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
