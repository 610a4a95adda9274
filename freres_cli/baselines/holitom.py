"""HoliTom's merging ahead of the decoder, with the norm of tokens in place of the tower's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import Span, find_clusters
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import measure_changes, pick_highest
from freres_cli.baselines.fastvid import keep_own_share
from freres_cli.baselines.groups import average_around, place_rows
from freres_cli.baselines.shares import clamp_budget
from freres_cli.baselines.still import average_window, release_cells, share_sets
from freres_cli.baselines.visionzip import measure_norms
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

NUM_NEIGHBOURS = 7
# The paper's thresholds: 0.65 for 10 % of the tokens, 0.80 for 15 and 20 %.
LOW_THRESHOLD, HIGH_THRESHOLD, LARGEST_LOW_SHARE = 0.65, 0.80, 0.10


def merge_windows(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): still cells averaged over time, moving cells as encoded.

    B is ``budget_tokens``. A cell is still from one frame to the next if the cosine of its tokens is above 0.65 for up to
    10 % of the tokens, else 0.8. The clip is cut into the windows of ``find_windows``. A cell that is still throughout
    its window becomes one token, its mean over time; those with the lowest cosine in their window are released where
    fewer than B tokens would be left. The still cells of a window and the moving cells of each of its frames get their
    share of B. Of still cells, centres of DPC-kNN are kept (k is 7, at most the number of centres), and the others join
    the nearest as in ``fastvid-norm``; of moving ones those of largest norm are kept. Still tokens stand in the middle of
    their window; boxes are set, without what joined. Decisions are over the first D channels. Time is quadratic in the
    frames and in a frame's tokens, memory linear. ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if
    the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    change = measure_changes(latents, width)
    is_low = num_tokens <= LARGEST_LOW_SHARE * num_frames * per_frame
    still_pairs = change[1:] < 1 - (LOW_THRESHOLD if is_low else HIGH_THRESHOLD)
    windows = find_windows(still_pairs)
    alike = torch.stack([still_pairs[first : stop - 1].all(0) & (stop - first > 1) for first, stop in windows])
    worst = torch.stack(
        [change[first + 1 : stop].amax(0) if stop - first > 1 else change[0] for first, stop in windows]
    )
    is_still = release_cells(alike, -worst, windows, num_tokens)
    # What was released to have enough tokens is no reason to drop others.
    shares = share_sets(is_still, windows, num_tokens, keeps_still=not torch.equal(is_still, alike))
    holder, joined = torch.full((2, num_frames, per_frame), -1)
    boxes, numbers = [], []
    done = 0
    for (first, stop), still, num_still, num_moving in zip(windows, is_still, *shares, strict=True):
        if num_still:
            cells = still.nonzero().squeeze(1)
            means = average_window(latents[first:stop], cells, width)
            centres, cluster = find_clusters(means, num_still, min(NUM_NEIGHBOURS, num_still))
            joined[first:stop, cells] = done + cluster
            joined[first:stop, cells[centres]] = -1
            holder[first:stop, cells[centres]] = done + torch.arange(num_still)
            boxes.append(_boxes((first, stop), cells[centres], grid_w))
            numbers.append(torch.bincount(cluster, minlength=num_still) - 1)
            done += num_still
        for frame, count in zip(range(first, stop), num_moving, strict=True):
            if count:
                kept = pick_highest(measure_norms(latents[frame], width).masked_fill(still, -1.0), count)
                holder[frame, kept] = done + torch.arange(count)
                boxes.append(_boxes((frame, frame + 1), kept, grid_w))
                numbers.append(torch.zeros(count, dtype=torch.int64))
                done += count
    rows = average_around(latents, holder.flatten(), joined.flatten(), keep_own_share(torch.cat(numbers)))
    box = torch.cat(boxes)
    places = (box[:, 0::2] + box[:, 1::2] - 1).to(torch.float32) / 2
    return place_rows(rows, places, latents, frame_seconds, width, boxes=box)


def find_windows(still_pairs: Tensor) -> list[Span]:
    """Return the cut of the clip into windows, [first, stop) in order, that saves most tokens; of equal ones the window
    that ends last is the longest.

    ``still_pairs``: (T-1, N) bool, whether a cell stays the same from frame t to t + 1. A window of L frames saves L - 1
    tokens for each cell that is still throughout. Dynamic programming over all windows: for each last frame, the cells
    still since each first frame are counted from where each cell's run began, so memory is T + N and time T * (T + N).
    """
    num_frames, per_frame = still_pairs.shape[0] + 1, still_pairs.shape[1]
    run_start = torch.zeros(per_frame, dtype=torch.int64)
    best = torch.zeros(num_frames + 1, dtype=torch.int64)
    first_of = []
    for last in range(num_frames):
        if last:
            run_start = torch.where(still_pairs[last - 1], run_start, last)
        num_still = torch.bincount(run_start, minlength=last + 1).cumsum(0)
        saved = best[: last + 1] + num_still * (last - torch.arange(last + 1))
        first_of.append(int(saved.argmax()))
        best[last + 1] = saved[first_of[-1]]
    windows, stop = [], num_frames
    while stop:
        windows.append((first_of[stop - 1], stop))
        stop = first_of[stop - 1]
    return windows[::-1]


def _boxes(span: Span, cells: Tensor, grid_w: int) -> Tensor:
    h, w = cells // grid_w, cells % grid_w
    first, stop = torch.full_like(h, span[0]), torch.full_like(h, span[1])
    return torch.stack([first, stop, h, h + 1, w, w + 1], dim=1)


METHOD = Method(
    name="holitom-norm",
    summary="windows that save most: cells that stand still averaged over time, of the others the tokens of largest norm",
    source="HoliTom, arXiv 2505.21334",
    deviations="ahead of the decoder only; the norm of a token stands in for the attention it gets in the tower; still "
    "tokens stand in the middle of their window, not at its start; cells are released from being still where "
    "too few tokens would be left; no random noise in DPC-kNN; sets without a share of a small budget are "
    "left out",
    mixes=True,
    compress=merge_windows,
)
