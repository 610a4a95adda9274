"""ToMe over time: tokens of neighbouring frames merged in rounds, the most similar first, until the budget is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.full import place_tokens, raster_order
from freres_cli.baselines.groups import average_groups, bound_groups
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens, nearest_frames

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

CHUNK_VALUES = 2**24  # values in float32 at a time
NUM_PARTS = 8  # of the tokens that are compared with those before them: what comes after a part is left out


def merge_similar_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) means of tokens of ``latents`` (T, H, W, C), at the mean positions of what they hold.

    B is ``budget_tokens``. In a round, groups of frames form pairs, at first single frames: (0, 1), (2, 3) and so on. In
    the first round each token of the later frame is linked to the most similar token of the earlier one, by the cosine
    over the first D channels; in later rounds each token to the most similar one before it in its pair of groups, by that
    of their means. So like tokens that a round leaves are still linked in the next. The most similar links are merged,
    those that form a chain into one token, into means weighted by the tokens that they hold, and each pair is one group
    in the next round. Every round reduces the clip by the same ratio, so that B is met when one group is left, but by no
    more than half of its tokens, and where that is not enough that group has more rounds. Ties go to the first in
    sequence.

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
        goal = max(budget_tokens, num_left - num_left // 2)
        if done < num_rounds:
            goal = max(goal, int(num_tokens * (budget_tokens / num_tokens) ** (done / num_rounds)))
        best = likeness.argsort(descending=True, stable=True)[: max(0, num_left - goal)]
        into = torch.arange(num_left)
        into[later[best]] = earlier[best]
        # Links lead back, so a chain ends at its first token.
        while not torch.equal(into[into], into):
            into = into[into]
        owner = into[owner].unique(return_inverse=True)[1]
    return place_groups(latents, frame_seconds, owner.flatten(), width)


def place_groups(latents: Tensor, frame_seconds: Tensor, owner: Tensor, width: int) -> VideoTokens:
    """Return a token for each group of tokens of ``latents`` (T, H, W, C), in raster order: their mean, over all channels,
    at their mean position and time.

    ``owner``: (T*H*W,) int64, the group of each token, from 0. Boxes are those of ``bound_groups``. ``frame_seconds``:
    (T,) float64. ``width``: D.
    """
    grid = (latents.shape[0], latents.shape[1], latents.shape[2])
    means, counts = average_groups(latents, owner, int(owner.max()) + 1)
    rows = means.to(latents.dtype)
    members = torch.arange(owner.shape[0])
    index = [members // (grid[1] * grid[2]), members // grid[2] % grid[1], members % grid[2]]

    def average(values: Tensor) -> Tensor:
        return torch.zeros(counts.shape[0], dtype=torch.float64).index_add_(0, owner, values.double()) / counts

    positions = torch.stack([average(axis) for axis in index], dim=1).to(torch.float32)
    boxes = bound_groups(owner, positions, grid)
    seconds = average(frame_seconds[index[0]])
    order = raster_order(positions)
    rows, positions = rows[order], positions[order]
    placed = place_tokens(rows, positions, nearest_frames(positions[:, 0], grid[0]), grid, frame_seconds, width)
    return replace(placed, seconds=seconds[order], boxes=boxes[order])


def _link(latents: Tensor, owner: Tensor, span: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Link tokens of pairs of groups of ``span`` frames. Yield linked tokens, what each is linked to, which is before it, and
    the cosines: (n,) each.

    ``owner``: (T, N), the token that holds each latent; tokens of a group of frames follow each other.
    """
    num_frames, per_frame = owner.shape
    for start in range(0, num_frames, 2 * span):
        pair = slice(start, start + 2 * span)
        units, first = _average_units(latents[pair], owner[pair], width)
        # In single frames of a clip, only links between the two.
        skip = per_frame if span == 1 < num_frames else 1
        if units.shape[0] > skip:
            best, match = _match(units[skip:], units[:skip]) if skip > 1 else _match_before(units)
            yield first + skip + torch.arange(best.shape[0]), first + match, best


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


def _match_before(units: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest cosine of each of ``units`` (n, D) but the first with any one before it, and which that is:
    (n - 1,) each."""
    size = units.shape[0]
    step = max(1, min(CHUNK_VALUES // size, -(-size // NUM_PARTS)))
    best, match = torch.empty(size), torch.empty(size, dtype=torch.int64)
    for start in range(0, size, step):
        cosine = units[start : start + step] @ units[: start + step].T
        own = cosine[:, start:]
        own.masked_fill_(torch.ones_like(own, dtype=torch.bool).triu(), -torch.inf)
        best[start : start + step], match[start : start + step] = cosine.max(1)
    return best[1:], match[1:]


METHOD = Method(
    name="tome",
    summary="tokens of neighbouring frames merged in rounds, the most similar first, at their mean positions",
    source="ToMe, arXiv 2210.09461, its matching over time",
    deviations="merges once, after the tower, by the likeness of latents, not in every layer by that of attention keys; "
    "links each token of a pair of groups of frames to the most similar one before it, not every second token to the "
    "others, so that equal tokens always find each other; links may form chains; every round reduces by the same ratio, by "
    "half at most",
    mixes=True,
    compress=merge_similar_tokens,
)
