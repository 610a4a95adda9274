"""AOT: anchors in every frame, and optimal transport that carries the other tokens to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import Span
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
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
CLIP_FRAMES = 8  # ours: the paper's number is not known to us
WINDOWS_A_SIDE = 4  # ours, likewise


def transport_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): the anchors of the first frame of each clip, and the tokens of
    later frames that match them least, all at their own places.

    B is ``budget_tokens``. Each frame has A anchors, see ``count_anchors`` and ``pick_anchors``; its other tokens are
    carried to them, see ``absorb``. The video is cut into equal clips of at most 8 frames, longer where B cannot hold the
    anchors of all. Between the anchors of a clip's first frame and those of a later one the transport plan is found; a
    token of the later frame matches as well as the largest share of it that goes to one anchor. The B less A a clip that
    match least are kept, ties in raster order. The rest are carried to the clip's anchors, frame by frame. If B is below
    A, a single clip has B anchors. Decisions are over the first D channels. A video that fits the budget stays as encoded.
    Time is 100*A*H*W a frame besides the distances, memory linear: float32 for one frame and for what is kept.
    ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    num_anchors = min(num_tokens, count_anchors(per_frame, num_tokens / (num_frames * per_frame)))
    num_clips = min(-(-num_frames // CLIP_FRAMES), num_tokens // num_anchors)
    if num_tokens == num_frames * per_frame:
        num_clips = num_frames
    ends = [index * num_frames // num_clips for index in range(num_clips + 1)]
    clips = list(zip(ends, ends[1:], strict=False))
    is_kept = _find_distinct(latents, clips, num_anchors, num_tokens - num_clips * num_anchors, width)
    rows, places = [], []
    for first, stop in clips:
        anchors, cells = _frame_anchors(latents[first], num_anchors, width)
        own: list[tuple[Tensor, int, Tensor]] = []
        for frame in range(first + 1, stop):
            later, later_cells = _frame_anchors(latents[frame], num_anchors, width)
            keep = is_kept[frame]
            if not bool(keep.all()):
                plan = find_plan(later[:, :width], anchors[:, :width])
                anchors = absorb(anchors, later[~keep], plan[~keep])
            own.append((later[keep], frame, later_cells[keep]))
        for values, frame, where in [(anchors, first, cells), *own]:
            rows.append(values.to(latents.dtype))
            places.append(locate(frame * per_frame + where, (num_frames, grid_h, grid_w)))
    return place_rows(torch.cat(rows), torch.cat(places), latents, frame_seconds, width)


def count_anchors(per_frame: int, share: float) -> int:
    """Return A, how many of the H*W tokens of a frame are anchors, if ``share`` of all tokens is kept.

    On the line through the paper's settings for LLaVA-OneVision: 126 of 196 tokens for 10 %, all of them for 20 %.
    """
    return min(per_frame, max(1, -(-int(1000 * per_frame * (0.28 + 3.6 * share)) // 1000)))


def pick_anchors(norms: Tensor, grid_w: int, count: int) -> Tensor:
    """Return ``count`` <= N anchors of a frame, (count,) raster indices, increasing.

    Half, rounded up, are the tokens of largest norm in the frame; the others the largest that are left in each of 4 x 4
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
    """Return the transport plan from ``sources`` (n, D) to ``targets`` (m, D), by Sinkhorn's algorithm: (n, m) float32.

    Each source has 1/n to give, each target takes 1/m; the cost is 1 - cos.
    """
    cosines = torch.nn.functional.normalize(sources, dim=1) @ torch.nn.functional.normalize(targets, dim=1).T
    kernel = ((cosines - 1) / ENTROPY).exp()
    give, take = 1 / sources.shape[0], 1 / targets.shape[0]
    scale = torch.ones(sources.shape[0])
    for _ in range(NUM_ITERATIONS):
        target_scale = take / (scale @ kernel)
        scale = give / (kernel @ target_scale)
    return scale[:, None] * kernel * target_scale


def absorb(anchors: Tensor, others: Tensor, plan: Tensor) -> Tensor:
    """Return ``anchors`` (m, C) after they took in ``others`` (n, C): (x + sum p y) / (1 + sum p), p of ``plan`` (n, m)."""
    return (anchors + plan.T @ others) / (1 + plan.sum(0))[:, None]


def _frame_anchors(frame: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
    """The anchors of a frame (H, W, C) after they took in its other tokens, (A, C) float32, and their cells, (A,)."""
    tokens = frame.flatten(0, 1).to(torch.float32)
    cells = pick_anchors(measure_norms(frame, width), frame.shape[1], count)
    if count == tokens.shape[0]:
        return tokens, cells
    is_other = torch.ones(tokens.shape[0], dtype=torch.bool)
    is_other[cells] = False
    anchors, others = tokens[cells], tokens[is_other]
    return absorb(anchors, others, find_plan(others[:, :width], anchors[:, :width])), cells


def _find_distinct(latents: Tensor, clips: list[Span], num_anchors: int, count: int, width: int) -> Tensor:
    """Whether each anchor of each frame is kept although it is not in a clip's first frame: (T, A) bool, ``count`` in all."""
    match = torch.full((latents.shape[0], num_anchors), torch.inf)
    for first, stop in clips:
        anchors, _ = _frame_anchors(latents[first], num_anchors, width)
        for frame in range(first + 1, stop):
            later, _ = _frame_anchors(latents[frame], num_anchors, width)
            plan = find_plan(later[:, :width], anchors[:, :width])
            match[frame] = (plan / plan.sum(1, keepdim=True)).amax(1)
    is_kept = torch.zeros(match.shape, dtype=torch.bool)
    is_kept.view(-1)[pick_highest(-match, count)] = True
    return is_kept


METHOD = Method(
    name="aot-norm",
    summary="anchors of large norm in every frame, to which optimal transport carries what is like them; the rest stays",
    source="AOT, arXiv 2603.01400, from its abstract and published notes on it",
    deviations="the norm of a token stands in for the attention it gets in the tower, also in the windows; the threshold "
    "of distinct tokens is the one that meets the budget, measured against a clip's anchors before any "
    "change; clips of 8 frames and 4 x 4 windows are ours; a small budget makes clips longer",
    compress=transport_tokens,
)
