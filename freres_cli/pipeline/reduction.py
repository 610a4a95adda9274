"""Latents -> what any method keeps of a clip. Both forms of Fre-Res take latents as they arrive, the others all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.baselines.registry import ADAPTIVE, METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.content import Content
from freres_cli.errors import BackboneError, VideoError
from freres_cli.method.adaptive import StretchCompressor
from freres_cli.method.compress import StreamingCompressor
from freres_cli.pipeline.planning import FULL_BUDGET, CompressOptions, CompressPlan, method_settings
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks

LatentBatches = Iterable[tuple[Sequence[float], Tensor]]
Reducer = StreamingCompressor | StretchCompressor


@dataclass(frozen=True)
class Reduction:
    """What is kept of a clip, in ``content``. ``num_frames``: frames that were read. Both forms of Fre-Res count cuts."""

    content: Content
    num_frames: int
    num_cuts_found: int | None = None
    num_cuts_not_honoured: int | None = None


def reduce_latents(
    batches: LatentBatches,
    plan: CompressPlan,
    options: CompressOptions,
    width: int,
    timer: StageTimer,
    on_batch: Callable[[int], None] | None = None,
    reducer: Reducer | None = None,
) -> Reduction:
    """Reduce a clip by the method in ``options``.

    ``batches``: times in seconds and latents (n, H, W, C) of consecutive frames. ``plan``: the plan for the clip.
    ``width``: D. ``timer``: records the stage ``compress``. ``on_batch``: called with the number of frames done.
    ``reducer``: from ``make_reducer``; it may have taken the frames before these. Raises ``VideoError`` if there are no
    frames, ``BackboneError`` if a value overflows its dtype.
    """
    reducer = reducer or make_reducer(plan, options, width)
    counted = _counted(batches, on_batch, 0 if reducer is None else reducer.num_frames)
    if reducer is None:
        reduction = _reduce_by_peer(counted, plan, options, width, timer)
    else:
        reduction = _reduce_in_stream(counted, plan, options, timer, reducer)
    _check_finite(reduction.content, options)
    return reduction


def make_reducer(plan: CompressPlan, options: CompressOptions, width: int) -> Reducer | None:
    """Return what takes frames as they arrive, D = ``width``; ``None`` for a method that needs them all at once."""
    if options.method == ADAPTIVE:
        budget_tokens = None if plan.budget_tokens >= FULL_BUDGET else plan.budget_tokens
        grid, keeps_trends = (plan.size.grid_h, plan.size.grid_w), options.settings.trends == "keep"
        return StretchCompressor(grid, width, budget_tokens, plan.quality, keeps_trends)
    if plan.budget is None:
        return None
    return StreamingCompressor(plan.budget, method_settings(options.settings), width)


def _counted(batches: LatentBatches, on_batch: Callable[[int], None] | None, done: int) -> LatentBatches:
    for seconds, latents in batches:
        yield seconds, latents
        done += len(seconds)
        if on_batch is not None:
            on_batch(done)


def _reduce_in_stream(
    batches: LatentBatches, plan: CompressPlan, options: CompressOptions, timer: StageTimer, reducer: Reducer
) -> Reduction:
    for seconds, latents in batches:
        with timer.stage("compress"):
            reducer.push(latents, seconds)
    _check_any(reducer.num_frames, plan)
    with timer.stage("compress"):
        content: Tracks | Stretches = reducer.finish()
        # At the end, so the other values are bit for bit those of a bundle that keeps the rows.
        content = content.without_deep_rows() if options.settings.deepstack == "drop" else content
    lost = reducer.num_cuts_not_honoured if isinstance(reducer, StreamingCompressor) else 0
    return Reduction(content, reducer.num_frames, reducer.num_cuts_found, lost)


def _reduce_by_peer(
    batches: LatentBatches, plan: CompressPlan, options: CompressOptions, width: int, timer: StageTimer
) -> Reduction:
    compress = METHODS[options.method].compress
    assert compress is not None
    channels = slice(width if options.settings.deepstack == "drop" else None)
    times: list[float] = []
    parts: list[Tensor] = []
    for seconds, latents in batches:
        times += seconds
        parts.append(latents[..., channels].cpu())
    _check_any(len(times), plan)
    with timer.stage("compress"), torch.no_grad():
        latents = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens = compress(latents, torch.tensor(times, dtype=torch.float64), plan.budget_tokens, width)
    return Reduction(tokens, len(times))


def _check_finite(content: Content, options: CompressOptions) -> None:
    """Refuse values that overflowed. A coefficient sums many frames, so in float16 it may overflow when no latent does."""
    tensors = content.tensors() if isinstance(content, Tracks) else {"latents": content.latents}
    if isinstance(content, Stretches):
        tensors = {**tensors, "trends": content.trends}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(
                f"{options.model.name}: {name} overflows in {str(tensor.dtype).removeprefix('torch.')}",
                "use --dtype float32 or bfloat16",
            )


def _check_any(num_frames: int, plan: CompressPlan) -> None:
    if not num_frames:
        raise VideoError(f"{plan.info.path}: no frame could be decoded in the requested part")
