"""AOT: anchors in every frame, and optimal transport that carries the other tokens to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import Span, cut_evenly
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.groups import locate, place_rows
from freres_cli.baselines.shares import clamp_budget, share_budget
from freres_cli.baselines.visionzip import measure_norms
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

ENTROPY, NUM_ITERATIONS = 0.1, 100  # of Sinkhorn's algorithm, as in the paper
NUM_CLIPS, WINDOWS_A_SIDE = 8, 3  # of the authors' code
BATCH_VALUES = 2**20  # of frames at a time: what the rounds go over stays in the processor's cache
# Of the authors' code: anchors of the 729 tokens of a frame, for these shares of all tokens.
SHARES, ANCHORS, OF_TOKENS = (0.10, 0.15, 0.20, 0.25), (126, 144, 196, 205), 729


@dataclass(frozen=True)
class Layout:
    """How a budget is spent. ``clips``: their frames, [first, stop). ``num_anchors``: A of every frame. ``has_merged``:
    whether a clip also keeps its anchors as they are after they took in its later frames. ``num_distinct``: what is left
    for tokens of later frames."""

    clips: list[Span]
    num_anchors: int
    has_merged: bool
    num_distinct: int


def transport_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): the anchors of the first frame of each clip, the same after
    they took in its later frames, and the tokens of later frames that match them least.

    B is ``budget_tokens``, spent as ``lay_out`` says. Each frame has A anchors, see ``pick_anchors``; its other tokens are
    carried to them, see ``absorb``. Between the anchors of a clip's first frame and those of a later one the transport
    plan is found; a token of the later frame matches as well as the largest share of it that goes to one anchor. Those
    that match least are kept, over all clips, ties in raster order. Each of the rest gives itself to the clip's anchors,
    frame by frame, in those shares; the anchors that took them in lie in the middle of these frames, all others at their own
    places. Decisions are over the first D channels. A video that fits the budget stays as encoded. Time is 100*A*H*W a
    frame besides the distances, memory linear: float32 for a few frames and for what is kept. ``frame_seconds``: (T,)
    float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame, num_tokens = grid_h * grid_w, clamp_budget(latents, budget_tokens)
    if num_tokens == num_frames * per_frame:
        return gather_tokens(latents, frame_seconds, torch.arange(num_tokens), width)
    layout = lay_out(num_frames, per_frame, num_tokens)
    is_kept = _find_distinct(latents, layout, width)
    rows, places, boxes = [], [], []
    for first, stop in layout.clips:
        frames = _anchors_by_frame(latents[first:stop], layout.num_anchors, width)
        anchors, cells = next(frames)
        own: list[tuple[Tensor, int, int, Tensor]] = [(anchors, first, first + 1, cells)]
        merged = anchors
        for frame, (later, later_cells) in enumerate(frames, start=first + 1):
            keep = is_kept[frame]
            if not bool(keep.all()):
                shares = share_out(find_plan(later[:, :width], merged[:, :width]))
                merged = absorb(merged, later[~keep], shares[~keep])
            own.append((later[keep], frame, frame + 1, later_cells[keep]))
        if layout.has_merged and stop - first > 1:
            own.append((merged, first + 1, stop, cells))
        for values, begin, end, where in own:
            rows.append(values.to(latents.dtype))
            place = locate(where, (1, grid_h, grid_w))
            time = torch.tensor([begin, end]).expand(len(where), 2)
            cell = place[:, 1:].long()
            boxes.append(torch.stack([*time.T, cell[:, 0], cell[:, 0] + 1, cell[:, 1], cell[:, 1] + 1], dim=1))
            place[:, 0] = (begin + end - 1) / 2
            places.append(place)
    return place_rows(torch.cat(rows), torch.cat(places), latents, frame_seconds, width, boxes=torch.cat(boxes))


def lay_out(num_frames: int, per_frame: int, num_tokens: int) -> Layout:
    """Return how B = ``num_tokens`` below T*H*W are spent on T = ``num_frames`` of H*W = ``per_frame`` tokens.

    The video is cut into 8 equal clips, or as many as B has room for: a clip of several frames takes 2*A tokens, a single
    frame A. A is on the line through the authors' settings for the share of tokens kept. Where the anchors of all frames
    would not do more than fill B, A is larger, and nothing is left to be taken in, so no merged anchors are kept (ours). A
    single clip with too little room has B/2 anchors (ours).
    """
    share = num_tokens / (num_frames * per_frame)
    wanted = max(1, round(_interpolate(share) / OF_TOKENS * per_frame))
    for count in range(min(NUM_CLIPS, num_frames), 0, -1):
        clips = cut_evenly(0, num_frames, count)
        num_merged = sum(stop - first > 1 for first, stop in clips)
        more = -(-num_tokens // num_frames)
        if wanted * (num_frames + num_merged) <= num_tokens and more * count <= num_tokens:
            return Layout(clips, more, False, num_tokens - more * count)
        left = num_tokens - wanted * (count + num_merged)
        if 0 <= left <= wanted * (num_frames - count):
            return Layout(clips, wanted, True, left)
    has_merged = num_frames > 1 and num_tokens > 1
    anchors = num_tokens // 2 if has_merged else num_tokens
    return Layout([(0, num_frames)], anchors, has_merged, num_tokens - anchors * (1 + has_merged))


def _interpolate(share: float) -> float:
    """The authors' number of anchors for a share of all tokens; between two of their shares on the line."""
    for (low, high), (fewer, more) in zip(pairwise(SHARES), pairwise(ANCHORS), strict=True):
        if share <= high:
            return fewer + (more - fewer) * max(0.0, share - low) / (high - low)
    return ANCHORS[-1]


def pick_anchors(norms: Tensor, grid_w: int, count: int) -> Tensor:
    """Return ``count`` <= N anchors of a frame, (count,) raster indices, increasing.

    Half, rounded up, are the tokens of largest norm in the frame; the others the largest that are left in each of 3 x 3
    windows, which share them by size. ``norms``: (N,). ``grid_w``: W.
    """
    per_frame = norms.shape[0]
    is_anchor = torch.zeros(per_frame, dtype=torch.bool)
    is_anchor[pick_highest(norms, -(-count // 2))] = True
    cell = torch.arange(per_frame)
    row = cell // grid_w * WINDOWS_A_SIDE // (per_frame // grid_w)
    window = row * WINDOWS_A_SIDE + cell % grid_w * WINDOWS_A_SIDE // grid_w
    num_windows = WINDOWS_A_SIDE**2
    sizes = torch.bincount(window, minlength=num_windows)
    room = torch.bincount(window[~is_anchor], minlength=num_windows)
    for index, share in enumerate(share_budget(count // 2, sizes, room).tolist()):
        outside = is_anchor | (window != index)
        is_anchor[pick_highest(norms.masked_fill(outside, -1.0), share)] = True
    return is_anchor.nonzero().squeeze(1)


def find_plan(sources: Tensor, targets: Tensor) -> Tensor:
    """Return the transport plan from ``sources`` (..., n, D) to ``targets`` (..., m, D), by Sinkhorn's algorithm:
    (..., n, m) float32.

    Each source has 1/n to give, each target takes 1/m; the cost is 1 - cos.
    """
    cosines = torch.nn.functional.normalize(sources, dim=-1) @ torch.nn.functional.normalize(targets, dim=-1).mT
    kernel = ((cosines - 1) / ENTROPY).exp()
    give, take = 1 / sources.shape[-2], 1 / targets.shape[-2]
    scale = torch.ones(kernel.shape[:-1])[..., None]
    for _ in range(NUM_ITERATIONS):
        target_scale = take / (
            scale.mT @ kernel
        )  # a product from the left: transposing the kernel is ten times as slow
        scale = give / (kernel @ target_scale.mT)
    return scale * kernel * target_scale


def share_out(plan: Tensor) -> Tensor:
    """Return the share of each source that goes to each target, rows that add up to 1: (..., n, m), as ``plan``."""
    return plan / plan.sum(-1, keepdim=True)


def absorb(anchors: Tensor, others: Tensor, plan: Tensor) -> Tensor:
    """Return ``anchors`` (..., m, C) after they took in ``others`` (..., n, C): (x + sum p y) / (1 + sum p), p of ``plan``
    (..., n, m)."""
    return (anchors + plan.mT @ others) / (1 + plan.sum(-2))[..., None]


def _anchors_of_frames(frames: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """The anchors of ``frames`` (F, H, W, C) after they took in the other tokens of their frame, (F, A, C) float32, and their
    cells, (F, A)."""
    tokens = frames.flatten(1, 2).to(torch.float32)
    cells = torch.stack([pick_anchors(measure_norms(frame, width), frame.shape[1], count) for frame in frames])
    if count == tokens.shape[1]:
        return tokens, cells
    is_other = torch.ones(tokens.shape[:2], dtype=torch.bool).scatter_(1, cells, False)
    anchors = tokens.gather(1, cells[..., None].expand(-1, -1, tokens.shape[2]))
    others = tokens[is_other].view(len(frames), -1, tokens.shape[2])
    return absorb(anchors, others, find_plan(others[..., :width], anchors[..., :width])), cells


def _in_batches(latents: Tensor, count: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The anchors of a few frames of ``latents`` (T, H, W, C) at a time, as of ``_anchors_of_frames``."""
    step = max(1, BATCH_VALUES // (latents.shape[1] * latents.shape[2] * max(latents.shape[3], count)))
    return (_anchors_of_frames(part, count, width) for part in latents.split(step) if len(part))


def _anchors_by_frame(latents: Tensor, count: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The anchors of each frame of ``latents`` (T, H, W, C), (A, C) float32, and their cells, (A,)."""
    return (pair for batch in _in_batches(latents, count, width) for pair in zip(*batch, strict=True))


def _find_distinct(latents: Tensor, layout: Layout, width: int) -> Tensor:
    """Whether each anchor of each frame is kept although it is not in a clip's first frame: (T, A) bool."""
    match = torch.full((latents.shape[0], layout.num_anchors), torch.inf)
    for first, stop in layout.clips:
        anchors = _anchors_of_frames(latents[first : first + 1], layout.num_anchors, width)[0][0]
        done = first + 1
        for later, _ in _in_batches(latents[first + 1 : stop], layout.num_anchors, width):
            plan = find_plan(later[..., :width], anchors[:, :width])
            match[done : done + len(later)] = share_out(plan).amax(-1)
            done += len(later)
    is_kept = torch.zeros(match.shape, dtype=torch.bool)
    is_kept.view(-1)[pick_highest(-match, layout.num_distinct)] = True
    return is_kept


METHOD = Method(
    name="aot-norm",
    summary="anchors of large norm in 8 frames, the same after optimal transport brought them later frames, and what is new",
    source="AOT, arXiv 2603.01400",
    deviations="the norm of a token stands in for the attention it gets in the tower, also in the windows; the cost of "
    "transport is 1 - cos alone, without terms for space and time, and no part of a hard merge is mixed in; "
    "the anchors with the largest norm in a frame are picked before those of its windows, not after; the "
    "tokens that are new are those of the whole clip that the budget has room for, not a quantile of each "
    "frame, and are measured against a clip's anchors before any change; a small budget has fewer clips, a "
    "large one more anchors",
    mixes=True,
    compress=transport_tokens,
)
