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
) -> Reduction:
    """Reduce a clip by the method in ``options``.

    ``batches``: times in seconds and latents (n, H, W, C) of consecutive frames. ``plan``: the plan for the clip.
    ``width``: D. ``timer``: records the stage ``compress``. ``on_batch``: called with the number of frames done. Raises
    ``VideoError`` if there are no frames, ``BackboneError`` if a value overflows its dtype.
    """
    if options.method == ADAPTIVE:
        reduce = _reduce_by_merging
    else:
        reduce = _reduce_by_fre_res if plan.budget is not None else _reduce_by_peer
    reduction = reduce(_counted(batches, on_batch), plan, options, width, timer)
    _check_finite(reduction.content, options)
    return reduction


def _counted(batches: LatentBatches, on_batch: Callable[[int], None] | None) -> LatentBatches:
    done = 0
    for seconds, latents in batches:
        yield seconds, latents
        done += len(seconds)
        if on_batch is not None:
            on_batch(done)


def _reduce_by_fre_res(
    batches: LatentBatches, plan: CompressPlan, options: CompressOptions, width: int, timer: StageTimer
) -> Reduction:
    assert plan.budget is not None
    compressor = StreamingCompressor(plan.budget, method_settings(options.settings), width)
    num_frames = _push_all(compressor, batches, plan, timer)
    tracks = _finish(compressor, options, timer)
    return Reduction(tracks, num_frames, compressor.num_cuts_found, compressor.num_cuts_not_honoured)


def _reduce_by_merging(
    batches: LatentBatches, plan: CompressPlan, options: CompressOptions, width: int, timer: StageTimer
) -> Reduction:
    budget_tokens = None if plan.budget_tokens >= FULL_BUDGET else plan.budget_tokens
    grid, keeps_trends = (plan.size.grid_h, plan.size.grid_w), options.settings.trends == "keep"
    compressor = StretchCompressor(grid, width, budget_tokens, plan.quality, keeps_trends)
    num_frames = _push_all(compressor, batches, plan, timer)
    stretches = _finish(compressor, options, timer)
    return Reduction(stretches, num_frames, compressor.num_cuts_found, 0)


def _push_all(
    compressor: StreamingCompressor | StretchCompressor, batches: LatentBatches, plan: CompressPlan, timer: StageTimer
) -> int:
    """Return the number of frames."""
    num_frames = 0
    for seconds, latents in batches:
        with timer.stage("compress"):
            compressor.push(latents, seconds)
        num_frames += len(seconds)
    _check_any(num_frames, plan)
    return num_frames


def _finish(
    compressor: StreamingCompressor | StretchCompressor, options: CompressOptions, timer: StageTimer
) -> Tracks | Stretches:
    with timer.stage("compress"):
        content = compressor.finish()
        # At the end, so the other values are bit for bit those of a bundle that keeps the rows.
        return content.without_deep_rows() if options.settings.deepstack == "drop" else content


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
