"""ToMe over time: tokens of neighbouring frames merged in rounds, the most similar first, until the budget is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.full import place_tokens, raster_order
from freres_cli.baselines.groups import average_groups
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens, nearest_frames

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

CHUNK_VALUES = 2**24  # values in float32 at a time


def merge_similar_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) means of tokens of ``latents`` (T, H, W, C), at the mean positions of what they hold.

    B is ``budget_tokens``. In a round, groups of frames form pairs, at first single frames: (0, 1), (2, 3) and so on. Each
    token of the later group is linked to the most similar token of the earlier one, by the cosine of their means over the
    first D channels. The most similar links are merged, into means weighted by the tokens that they hold, and each pair is
    one group in the next round. Every round reduces the clip by the same ratio, so that B is met when one group is left, or
    merges all its links if that is not enough. Then every second token of that group is linked to one of the others, until
    B is met. Ties go to the first in sequence.

    Time grows with T times the square of H*W, and in the last rounds with the square of B. Memory beyond the latents grows
    with B. ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    budget_tokens = clamp_budget(latents, budget_tokens)
    num_frames, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    num_tokens = num_frames * per_frame
    owner = torch.arange(num_tokens).reshape(num_frames, per_frame)
    num_rounds = (num_frames - 1).bit_length()
    done = 0
    while (num_left := int(owner.max()) + 1) > budget_tokens:
        links = list(_link(latents, owner, 2**done, width))
        later, earlier = torch.cat([link[0] for link in links]), torch.cat([link[1] for link in links])
        likeness = torch.cat([link[2] for link in links])
        done += 1
        goal = budget_tokens
        if done < num_rounds:
            goal = max(goal, int(num_tokens * (budget_tokens / num_tokens) ** (done / num_rounds)))
        best = likeness.argsort(descending=True, stable=True)[: max(0, num_left - goal)]
        into = torch.arange(num_left)
        into[later[best]] = earlier[best]
        owner = into[owner].unique(return_inverse=True)[1]
    return place_groups(latents, frame_seconds, owner.flatten(), width)


def place_groups(latents: Tensor, frame_seconds: Tensor, owner: Tensor, width: int) -> VideoTokens:
    """Return a token for each group of tokens of ``latents`` (T, H, W, C), in raster order: their mean, over all channels,
    at their mean position and time.

    ``owner``: (T*H*W,) int64, the group of each token, from 0. The box of a group is its
    own if it fills it, else the cell nearest to its mean position, over the time from its first token to its last.
    ``frame_seconds``: (T,) float64. ``width``: D.
    """
    grid = (latents.shape[0], latents.shape[1], latents.shape[2])
    means, counts = average_groups(latents, owner, int(owner.max()) + 1)
    rows = means.to(latents.dtype)
    members = torch.arange(owner.shape[0])
    index = [members // (grid[1] * grid[2]), members // grid[2] % grid[1], members % grid[2]]

    def average(values: Tensor) -> Tensor:
        return torch.zeros(counts.shape[0], dtype=torch.float64).index_add_(0, owner, values.double()) / counts

    positions = torch.stack([average(axis) for axis in index], dim=1).to(torch.float32)
    boxes = _bound(index, owner, positions, counts)
    seconds = average(frame_seconds[index[0]])
    order = raster_order(positions)
    rows, positions = rows[order], positions[order]
    placed = place_tokens(rows, positions, nearest_frames(positions[:, 0], grid[0]), grid, frame_seconds, width)
    return replace(placed, seconds=seconds[order], boxes=boxes[order])


def _bound(index: list[Tensor], owner: Tensor, positions: Tensor, counts: Tensor) -> Tensor:
    """Return the box of each group, (S, 6): see ``place_groups``. ``index``: t, h, w of each token."""
    first = torch.stack(
        [counts.new_full(counts.shape, 2**60).scatter_reduce(0, owner, i, "amin") for i in index], dim=1
    )
    last = torch.stack([torch.zeros_like(counts).scatter_reduce(0, owner, i, "amax") for i in index], dim=1)
    is_filled = (last - first + 1).prod(1) == counts
    nearest = (positions + 0.5).floor().long()
    for axis in (1, 2):
        first[:, axis] = torch.where(is_filled, first[:, axis], nearest[:, axis])
        last[:, axis] = torch.where(is_filled, last[:, axis], nearest[:, axis])
    return torch.stack([first, last + 1], dim=2).flatten(1)


def _link(latents: Tensor, owner: Tensor, span: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Link tokens of groups of ``span`` frames. Yield linked tokens, what each is linked to, and the cosines: (n,) each.

    ``owner``: (T, N), the token that holds each latent; tokens of a group of frames follow each other.
    """
    num_frames = latents.shape[0]
    if span >= num_frames:
        units, first = _average_units(latents, owner, width)
        later, earlier = (torch.arange(start, units.shape[0], 2) for start in (1, 0))
        best, match = _match(units[later], units[earlier])
        yield first + later, first + earlier[match], best
        return
    for start in range(0, num_frames - span, 2 * span):
        middle, stop = start + span, start + 2 * span
        before, first_before = _average_units(latents[start:middle], owner[start:middle], width)
        after, first_after = _average_units(latents[middle:stop], owner[middle:stop], width)
        best, match = _match(after, before)
        yield first_after + torch.arange(after.shape[0]), first_before + match, best


def _average_units(latents: Tensor, owner: Tensor, width: int) -> tuple[Tensor, int]:
    """Return the tokens that hold some frames, means scaled to norm 1, (n, D) float32, and the number of the first."""
    first = int(owner.min())
    sums = torch.zeros(int(owner.max()) + 1 - first, width)
    # The sum points where the mean does.
    for frame, own in zip(latents, owner, strict=True):
        sums.index_add_(0, own - first, frame[..., :width].flatten(0, 1).to(torch.float32))
    return torch.nn.functional.normalize(sums, dim=-1), first


def _match(units: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest cosine of each of ``units`` (n, D) with any of ``others`` (m, D), and which that is: (n,) each."""
    step = max(1, CHUNK_VALUES // others.shape[0])
    found = [(part @ others.T).max(1) for part in units.split(step)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


METHOD = Method(
    name="tome",
    summary="tokens of neighbouring frames merged in rounds, the most similar first, at their mean positions",
    source="ToMe, arXiv 2210.09461, its bipartite matching over time",
    deviations="merges once, after the tower, by the likeness of latents, not in every layer by that of attention keys; "
    "links later frames to earlier ones, not every second token to the others; every round reduces by the same ratio",
    compress=merge_similar_tokens,
)
