"""PruneVid, its first stage: still cells averaged over time, then like tokens merged in space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import Span, find_clusters, mean_frames
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import unit_tokens
from freres_cli.baselines.groups import average_groups, bound_groups, locate, place_rows
from freres_cli.baselines.shares import clamp_budget
from freres_cli.baselines.still import average_window, release_cells, share_sets
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

NUM_NEIGHBOURS = 7
SEGMENTS_PER_FRAME = 0.25
STILL_THRESHOLD = 0.8


def merge_still_cells(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) means of tokens of ``latents`` (T, H, W, C), each at the mean place of what it holds.

    B is ``budget_tokens``. In a segment of ``cut_by_clusters`` of two frames or more, a cell is still if the mean cosine
    of its tokens, all pairs, is above 0.8; the least alike are released until no fewer than B tokens are left when each
    still cell becomes its mean over time. The still cells of a segment, and the moving cells of each frame, are then
    merged in space, each set to its share of B: clusters of DPC-kNN, averaged. Boxes are set. Decisions are over the
    first D channels. Time is quadratic in the frames and in a frame's tokens, memory linear. ``frame_seconds``: (T,)
    float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    segments = cut_by_clusters(mean_frames(latents, width))
    likeness = torch.stack([measure_likeness(latents[first:stop], width) for first, stop in segments])
    alike = likeness > STILL_THRESHOLD
    is_still = release_cells(alike, likeness, segments, num_tokens)
    # What was released to have enough tokens is no reason to drop others.
    shares = share_sets(is_still, segments, num_tokens, keeps_still=not torch.equal(is_still, alike))
    owner = torch.full((num_frames, per_frame), -1)
    done = 0
    for (first, stop), still, num_still, num_moving in zip(segments, is_still, *shares, strict=True):
        if num_still:
            cells = still.nonzero().squeeze(1)
            cluster = find_clusters(average_window(latents[first:stop], cells, width), num_still, NUM_NEIGHBOURS)[1]
            owner[first:stop, cells] = done + cluster
            done += num_still
        cells = (~still).nonzero().squeeze(1)
        for frame, count in zip(range(first, stop), num_moving, strict=True):
            if count:
                tokens = average_window(latents[frame : frame + 1], cells, width)
                owner[frame, cells] = done + find_clusters(tokens, count, NUM_NEIGHBOURS)[1]
                done += count
    owner = owner.flatten()
    rows, sizes = average_groups(latents, owner, num_tokens)
    held = (owner >= 0).nonzero().squeeze(1)
    sums = torch.zeros(num_tokens, 3, dtype=torch.float64)
    sums.index_add_(0, owner[held], locate(held, (num_frames, grid_h, grid_w)).double())
    places = sums / sizes[:, None]
    boxes = bound_groups(owner, places, (num_frames, grid_h, grid_w))
    return place_rows(rows, places, latents, frame_seconds, width, boxes=boxes)


def cut_by_clusters(means: Tensor) -> list[Span]:
    """Return segments of like frames, [first, stop) in order.

    ``means``: (T, D) float32 mean token of each frame. DPC-kNN makes T/4 clusters of frames, rounded down, at least one.
    Each cluster becomes its longest run of frames, the first of several; frames outside these runs join the longer of the
    two beside them, the earlier of equal ones.
    """
    count = max(1, int(SEGMENTS_PER_FRAME * means.shape[0]))
    labels = find_clusters(means, count, NUM_NEIGHBOURS)[1].tolist()
    runs: list[Span] = []
    for frame, label in enumerate(labels):
        if frame and label == labels[frame - 1]:
            runs[-1] = (runs[-1][0], frame + 1)
        else:
            runs.append((frame, frame + 1))
    longest: dict[int, Span] = {}
    for run in runs:
        best = longest.setdefault(labels[run[0]], run)
        if run[1] - run[0] > best[1] - best[0]:
            longest[labels[run[0]]] = run
    kept = sorted(longest.values())
    cuts = [0]
    for (first, stop), (next_first, next_stop) in zip(kept, kept[1:], strict=False):
        cuts.append(next_first if stop - first >= next_stop - next_first else stop)
    return list(zip(cuts, [*cuts[1:], means.shape[0]], strict=True))


def measure_likeness(latents: Tensor, width: int) -> Tensor:
    """Return the mean cosine of all pairs of tokens of each cell of ``latents`` (L, H, W, C), over the first ``width``
    channels: (N,) float32; of a single frame, where there is no pair, -inf."""
    length = latents.shape[0]
    if length == 1:
        return torch.full((latents.shape[1] * latents.shape[2],), -torch.inf)
    total, squares = unit_tokens(latents[0], width), unit_tokens(latents[0], width).square().sum(1)
    for frame in latents[1:]:
        units = unit_tokens(frame, width)
        total += units
        squares += units.square().sum(1)
    return (total.square().sum(1) - squares) / (length * (length - 1))


METHOD = Method(
    name="prunevid",
    summary="segments of like frames: still cells averaged over time, then like tokens of a frame averaged",
    source="PruneVid, stage 1, arXiv 2412.16117",
    deviations="first stage only: the second needs the question; sets of tokens are merged to their share of the budget, "
    "not to half, small sets too; cells are released from being still where too few tokens would be left; a "
    "segment may have one frame, in which nothing is still, and of equally long runs of a cluster only the first is "
    "kept; no random noise in DPC-kNN; sets without a share of a small budget are left out",
    mixes=True,
    compress=merge_still_cells,
)
