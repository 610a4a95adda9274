"""Latents -> what any method keeps of a clip. Both forms of Fre-Res take latents as they arrive, the others all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from freres_cli.baselines.registry import ADAPTIVE, METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.content import Content
from freres_cli.errors import BackboneError, VideoError
from freres_cli.method.adaptive import StretchCompressor
from freres_cli.method.compress import EncodeWhole, StreamingCompressor
from freres_cli.pipeline.beside import BesideTower
from freres_cli.pipeline.method_tokens import check_tokens
from freres_cli.pipeline.planning import FULL_BUDGET, CompressOptions, CompressPlan, method_settings
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks


class LatentBatch(NamedTuple):
    """Consecutive frames: their times in seconds, and latents (n, H, W, C). With two resolutions these are the small ones,
    and ``whole`` gives those of frames that become anchors."""

    seconds: Sequence[float]
    latents: Tensor
    whole: EncodeWhole | None = None

    def narrow(self, width: int) -> LatentBatch:
        """Return the batch without DeepStack rows: only the first ``width`` channels of every latent."""
        whole = self.whole
        own = None if whole is None else lambda rows: whole(rows)[..., :width]
        return LatentBatch(self.seconds, self.latents[..., :width], own)


LatentBatches = Iterable[LatentBatch]
Reducer = StreamingCompressor | StretchCompressor
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Reduction:
    """What is kept of a clip, in ``content``. ``num_frames``: frames that were read. Both forms of Fre-Res count cuts.
    ``num_frames_whole``: with two resolutions, frames that were encoded at that of anchors as well. ``num_encoded``: pictures
    that were encoded, if those between others were not."""

    content: Content
    num_frames: int
    num_cuts_found: int | None = None
    num_cuts_not_honoured: int | None = None
    num_frames_whole: int = 0
    num_encoded: int | None = None


def reduce_latents(
    batches: LatentBatches,
    plan: CompressPlan,
    options: CompressOptions,
    width: int,
    timer: StageTimer,
    on_batch: OnBatch | None = None,
    reducer: Reducer | None = None,
    beside: BesideTower | None = None,
    check: Callable[[], None] = lambda: None,
) -> Reduction:
    """Reduce a clip by the method in ``options``.

    ``batches``: consecutive frames. ``plan``: the plan for the clip. ``width``: D. ``timer``: records the stage
    ``compress``. ``on_batch``: called with the number of frames done. ``reducer``: from ``make_reducer``; it may have taken
    the frames before these. ``beside``: where a method that takes frames as they arrive works, if it is beside the tower.
    ``check``: called once it has them all, and may refuse them. Raises ``VideoError`` if there are no frames,
    ``BackboneError`` if a value overflows its dtype.
    """
    reducer = reducer or make_reducer(plan, options, width)
    if options.settings.deepstack == "drop":
        batches = (batch.narrow(width) for batch in batches)
    if reducer is None:
        reduction = _reduce_by_peer(batches, plan, options, width, timer, on_batch, check)
    else:
        beside = beside or BesideTower(torch.device("cpu"))
        reduction = _reduce_in_stream(batches, plan, timer, reducer, beside, on_batch, check)
    _check_finite(reduction.content, options)
    return reduction


def make_reducer(plan: CompressPlan, options: CompressOptions, width: int) -> Reducer | None:
    """Return what takes frames as they arrive, D = ``width``; ``None`` for a method that needs them all at once."""
    if options.method == ADAPTIVE:
        # A budget of more tokens than the clip has still bounds what is kept; a quality alone has none.
        budget_tokens = None if plan.quality is not None and plan.budget_tokens >= FULL_BUDGET else plan.most_tokens
        grid, keeps_trends = (plan.size.grid_h, plan.size.grid_w), options.settings.trends == "keep"
        return StretchCompressor(grid, width, budget_tokens, plan.quality, keeps_trends)
    if plan.budget is None:
        return None
    return StreamingCompressor(plan.budget, method_settings(options.settings), width)


def _reduce_in_stream(
    batches: LatentBatches,
    plan: CompressPlan,
    timer: StageTimer,
    reducer: Reducer,
    beside: BesideTower,
    on_batch: OnBatch | None,
    check: Callable[[], None],
) -> Reduction:
    for (seconds, latents, whole), end in beside.run_ahead(batches):
        with beside.queue(end), timer.stage("compress"):
            if isinstance(reducer, StreamingCompressor):
                reducer.push(latents, seconds, whole)
            else:
                reducer.push(latents, seconds)
        if on_batch is not None:
            on_batch(reducer.num_frames)
    check()
    _check_any(reducer.num_frames, plan)
    with beside.queue(), timer.stage("compress"):
        content = reducer.finish()
    if isinstance(reducer, StreamingCompressor):
        cuts = reducer.num_cuts_found, reducer.num_cuts_not_honoured
        return Reduction(content, reducer.num_frames, *cuts, num_frames_whole=reducer.num_frames_whole)
    return Reduction(content, reducer.num_frames, reducer.num_cuts_found, 0)


def _reduce_by_peer(
    batches: LatentBatches,
    plan: CompressPlan,
    options: CompressOptions,
    width: int,
    timer: StageTimer,
    on_batch: OnBatch | None,
    check: Callable[[], None],
) -> Reduction:
    method = METHODS[options.method]
    compress = method.compress
    assert compress is not None
    times: list[float] = []
    parts: list[Tensor] = []
    for seconds, latents, _ in batches:
        times += seconds
        parts.append(latents.cpu())
        if on_batch is not None:
            on_batch(len(times))
    check()
    _check_any(len(times), plan)
    with timer.stage("compress"), torch.no_grad():
        latents = parts[0] if len(parts) == 1 else torch.cat(parts)
        frame_seconds = torch.tensor(times, dtype=torch.float64)
        tokens = compress(latents, frame_seconds, plan.budget_tokens, width)
    if method.makes_bundles:  # the blind one keeps nothing
        check_tokens(tokens, method, latents, frame_seconds, plan.budget_tokens, width)
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
