"""Windows of time whose cells stand still or move, shared by PruneVid and HoliTom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import Span
from freres_cli.baselines.declaration import lazy_module
from freres_cli.baselines.shares import share_budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def release_cells(is_still: Tensor, likeness: Tensor, windows: list[Span], fewest: int) -> Tensor:
    """Return which cells stay still in each window so that at least ``fewest`` tokens are left: (n, N) bool.

    Each still cell is one token of its window, each other cell one of each frame. Those of lowest ``likeness`` (n, N) are
    released first, ties in order. ``is_still``: (n, N). ``windows``: n spans of frames, [first, stop).
    """
    lengths = torch.tensor([stop - first for first, stop in windows])
    saved = ((lengths - 1)[:, None] * is_still).flatten()
    missing = fewest - (int(lengths.sum()) * is_still.shape[1] - int(saved.sum()))
    if missing <= 0:
        return is_still
    order = likeness.masked_fill(~is_still, torch.inf).flatten().argsort(stable=True)
    gained = saved[order].cumsum(0)
    released = order[: int((gained < missing).sum()) + 1]
    return is_still.flatten().index_fill(0, released, False).reshape(is_still.shape)


def share_sets(
    is_still: Tensor, windows: list[Span], budget_tokens: int, keeps_still: bool
) -> tuple[list[int], list[list[int]]]:
    """Return how many of ``budget_tokens`` the still cells of each window get, and the moving cells of each of its frames.

    They are in proportion to their numbers; if ``keeps_still``, every still cell gets one, and the rest is for the moving.
    ``is_still``: (n, N) bool. ``windows``: n spans of frames.
    """
    num_still = is_still.sum(1)
    num_moving = is_still.shape[1] - num_still
    sizes, is_set_still = [], []
    for (first, stop), still, moving in zip(windows, num_still.tolist(), num_moving.tolist(), strict=True):
        sizes += [still] + [moving] * (stop - first)
        is_set_still += [True] + [False] * (stop - first)
    counts = torch.tensor(sizes)
    fixed = counts * torch.tensor(is_set_still) if keeps_still else torch.zeros_like(counts)
    rest = share_budget(budget_tokens - int(fixed.sum()), counts - fixed, counts - fixed)
    shares = iter((fixed + rest).tolist())
    split = [(next(shares), [next(shares) for _ in range(stop - first)]) for first, stop in windows]
    return [still for still, _ in split], [moving for _, moving in split]


def average_window(latents: Tensor, cells: Tensor, width: int) -> Tensor:
    """Return the mean over time of some cells, (n, D) float32, over the first ``width`` channels.

    ``latents``: (L, H, W, C). ``cells``: (n,) their raster indices.
    """
    total = torch.zeros(cells.shape[0], width)
    for frame in latents:
        total += frame.flatten(0, 1)[cells, :width].to(torch.float32)
    return total / latents.shape[0]
