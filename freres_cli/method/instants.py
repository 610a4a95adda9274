"""Instants that tokens share, where a family writes text around every frame that holds tokens. All of this is ours."""

from __future__ import annotations

import torch
from torch import Tensor

from freres_cli.records import nearest_frames

MAX_CANDIDATES = 1024  # bounds time and memory of the search: up to here it is exact
_NEVER = 2**60


def share_instants(
    t: Tensor,
    is_movable: Tensor,
    num_frames: int,
    max_runs: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """Return positions at which the tokens lie at no more than ``max_runs`` distinct nearest frames, (S,).

    Nothing moves if they do already. Otherwise some frames are chosen: all those of tokens that may not move, and others
    up to ``max_runs``. A token whose frame is not chosen moves to the chosen frame that is fewest frames outside its
    stretch, then nearest, then first. The frames make the sum of the frames outside, and then the number of tokens that
    move, as small as can be: optimal 1-D clustering by dynamic programming, exact for up to ``MAX_CANDIDATES`` frames
    that may be chosen; beyond that, every n-th frame that holds movable tokens may be.

    ``t``: (S,) positions on the frame axis, which may be fractional. ``is_movable``: (S,) bool. ``num_frames``: T.
    ``max_runs``: most frames; if the immovable tokens lie at more, those frames are the chosen ones. ``low``, ``high``:
    (S,) the stretch [low, high) of the frame axis that each token stands for; without them, only its nearest frame.
    """
    frames = nearest_frames(t, num_frames)
    if frames.unique().numel() <= max_runs or not bool(is_movable.any()):
        return t
    own = frames[is_movable]
    first, last = own, own
    if low is not None and high is not None:
        # The frame that a token goes to anyway counts as its own, even if its stretch holds no whole frame.
        first = torch.minimum(low[is_movable].ceil().long(), own).clamp(min=0)
        last = torch.maximum(high[is_movable].ceil().long() - 1, own).clamp(max=num_frames - 1)
    fixed = frames[~is_movable].unique()
    chosen = _choose_frames(own, first, last, fixed, max(max_runs, 1))
    moved = t.clone()
    target = _nearest_chosen(own, first, last, chosen)
    moved[is_movable] = torch.where(target == own, t[is_movable], target.to(t.dtype))
    return moved


def _nearest_chosen(own: Tensor, first: Tensor, last: Tensor, chosen: Tensor) -> Tensor:
    """The best of the ``chosen`` frames for each token: one of the two next to its own frame, or that frame itself."""
    after = torch.searchsorted(chosen, own).clamp(max=chosen.shape[0] - 1)
    options = chosen[torch.stack([(after - 1).clamp(min=0), after])]
    outside = (first - options).clamp(min=0) + (options - last).clamp(min=0)
    cost = outside * (int(own.max()) + int(chosen.max()) + 1) + (options - own).abs()
    return torch.where(cost[1] < cost[0], options[1], options[0])


def _choose_frames(own: Tensor, first: Tensor, last: Tensor, fixed: Tensor, max_runs: int) -> Tensor:
    """The frames to keep, increasing: ``fixed`` and the best others, at most ``max_runs`` in all."""
    if fixed.shape[0] >= max_runs:
        return fixed
    candidates = _candidates(own, first, last, fixed)
    costs, before, behind = _gap_costs(own, first, last, fixed, candidates)
    # table[m, g]: least cost of everything up to candidate g, if it is the last of m + 1 chosen frames.
    table = [before]
    for _ in range(1, min(max_runs, candidates.shape[0])):
        table.append((table[-1] + costs).amin(1).clamp(max=_NEVER))
    ends = torch.stack(table) + behind
    layer, place = divmod(int(ends.argmin()), candidates.shape[0])
    chosen = [place]
    for earlier in reversed(table[:layer]):
        place = int((earlier + costs[place]).argmin())
        chosen.append(place)
    return candidates[torch.tensor(chosen[::-1])]


def _candidates(own: Tensor, first: Tensor, last: Tensor, fixed: Tensor) -> Tensor:
    """The frames that may be chosen, increasing. The cost is concave between two of them, so none between is better."""
    candidates = torch.cat([own, first, last, fixed]).unique()
    if candidates.shape[0] <= MAX_CANDIDATES:
        return candidates
    held = own.unique()
    step = -(-held.shape[0] // MAX_CANDIDATES)
    return torch.cat([held[step // 2 :: step], fixed]).unique()


def _gap_costs(
    own: Tensor, first: Tensor, last: Tensor, fixed: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cost of the tokens between two chosen frames f < g with no other chosen between them: [g, f], int64.

    Then that of the tokens before the first chosen frame, [g], and behind the last, [f]. The cost is the frames outside
    stretches, times more than there are tokens, plus the number of tokens that move.
    """
    size = int(max(last.max(), candidates.max())) + 2
    # Tokens with the same stretch cost the same.
    pairs, count = torch.stack([first, last], dim=1).unique(dim=0, return_counts=True)
    first, last = pairs.unbind(1)
    # A token with f < first and last < g costs min(first - f, g - last) = (g - last) - (g + f - first - last)+.
    rows = []
    for f in candidates.tolist():
        right = first > f
        reach = _sum_of_steps(last[right], count[right], size)
        excess = _sum_of_steps((first + last)[right] - f, count[right], size)
        rows.append((reach - excess)[candidates])
    costs = torch.stack(rows, dim=1)
    before = _sum_of_steps(last, count, size)[candidates]
    behind = _sum_of_steps(size - 1 - first, count, size)[size - 1 - candidates]
    held = torch.bincount(own, minlength=size).cumsum(0)[candidates]
    here = torch.bincount(own, minlength=size)[candidates]
    scale = own.shape[0] + 1
    costs = costs * scale + (held - here)[:, None] - held[None, :]
    before = before * scale + held - here
    behind = behind * scale + own.shape[0] - held
    # No fixed frame is skipped, and g comes after f.
    is_fixed = torch.isin(candidates, fixed).long()
    passed = is_fixed.cumsum(0)
    skips = (passed - is_fixed)[:, None] > passed[None, :]
    costs[skips | (candidates[:, None] <= candidates[None, :])] = _NEVER
    before[passed - is_fixed > 0] = _NEVER
    behind[passed < passed[-1]] = _NEVER
    return costs, before, behind


def _sum_of_steps(start: Tensor, count: Tensor, size: int) -> Tensor:
    """The sum of ``count * (x - start)+`` over rows, for x = 0 .. size - 1, int64. ``start``: (n,), 0 or more."""
    rising = torch.zeros(size + 1, dtype=torch.int64)
    rising.index_add_(0, (start + 1).clamp(max=size), count)
    return rising[:size].cumsum(0).cumsum(0)
