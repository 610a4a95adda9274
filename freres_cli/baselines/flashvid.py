"""FlashVID in its attention-free form: tokens far from each other, and trees of like tokens through time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import ROUNDING, cut_by_similarity, find_clusters
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import unit_tokens
from freres_cli.baselines.groups import average_groups, bound_groups, locate, place_rows
from freres_cli.baselines.shares import clamp_budget, share_budget, share_evenly
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

THRESHOLD = 0.9  # of segments
FEWEST_SEGMENTS = 8
SELECTED_SHARE = 0.7
LINK_THRESHOLD = 0.8
NUM_NEIGHBOURS = 7


def merge_trees(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) tokens of ``latents`` (T, H, W, C): 70 % as encoded, the rest means of trees of like tokens.

    B is ``budget_tokens``. The 70 %, rounded, are shared evenly among the frames, see ``pick_far_apart``. In each segment
    of ``cut_by_similarity``, every other token is linked to the one of the frame before, of those not picked, with which
    its cosine is highest, if that is above 0.8; of all links the weakest are undone if fewer trees than tokens would be
    left. Trees are averaged; where there are too many, frames share the budget in proportion to the trees that begin in
    them, and DPC-kNN merges those of a frame (k is 7, at most the number of clusters). A merged token stands where the
    first token of its (central) tree was; boxes are set. Decisions are over the first D channels. Time is quadratic in
    the tokens of a frame, memory linear: the trees of one segment are held in float32. ``frame_seconds``: (T,) float64.
    ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_frames, grid_h, grid_w, _ = latents.shape
    per_frame = grid_h * grid_w
    num_tokens = clamp_budget(latents, budget_tokens)
    num_picked = round(SELECTED_SHARE * num_tokens) if num_tokens < num_frames * per_frame else num_tokens
    is_picked = torch.zeros(num_frames, per_frame, dtype=torch.bool)
    for frame, count in enumerate(share_evenly(num_picked, num_frames, per_frame).tolist()):
        if count:
            is_picked[frame, pick_far_apart(unit_tokens(latents[frame], width), count)] = True
    segments = cut_by_similarity(latents, width, THRESHOLD, FEWEST_SEGMENTS)
    root = find_trees(latents, is_picked, [first for first, _ in segments], num_tokens - num_picked, width)
    owner = torch.full((num_frames * per_frame,), -1)
    heads = is_picked.flatten().nonzero().squeeze(1)
    owner[heads] = torch.arange(num_picked)
    is_root = root == torch.arange(root.shape[0])
    counts = is_root.reshape(num_frames, per_frame).sum(1)
    shares = share_budget(num_tokens - num_picked, counts, counts)
    for first, stop in segments:
        part, share = slice(first * per_frame, stop * per_frame), shares[first:stop].tolist()
        if any(share):
            centres, cluster = _merge_segment(latents[first:stop], root[part] - first * per_frame, share, width)
            owner[part] = torch.where(cluster >= 0, cluster + heads.shape[0], owner[part])
            heads = torch.cat([heads, centres + first * per_frame])
    rows, _ = average_groups(latents, owner, num_tokens)
    places = locate(heads, (num_frames, grid_h, grid_w))
    boxes = bound_groups(owner, places, (num_frames, grid_h, grid_w))
    return place_rows(rows, places, latents, frame_seconds, width, boxes=boxes)


def pick_far_apart(units: Tensor, count: int) -> Tensor:
    """Return ``count`` <= n tokens of ``units`` (n, D), of norm 1, far apart by 1 - cos: (count,) int64, in order of picking.

    The first is the one whose nearest other is farthest; then each is the one whose nearest picked is farthest; ties in
    order. A distance is 0 where rounding leaves nothing of it, as for equal tokens.
    """
    distance = 1 - units @ units.T
    distance.masked_fill_(distance <= ROUNDING, 0.0)
    nearest = distance.clone().fill_diagonal_(torch.inf).min(1).values
    picked = torch.empty(count, dtype=torch.int64)
    is_free = torch.ones(units.shape[0], dtype=torch.bool)
    for index in range(count):
        pick = int(nearest.masked_fill(~is_free, -torch.inf).argmax())
        picked[index], is_free[pick] = pick, False
        nearest = distance[pick] if index == 0 else nearest.minimum(distance[pick])
    return picked


def find_trees(latents: Tensor, is_picked: Tensor, starts: list[int], fewest: int, width: int) -> Tensor:
    """Return the root of each token that is not picked, itself if nothing is before it: (T*N,) int64, -1 for the picked.

    ``latents``: (T, H, W, C). ``is_picked``: (T, N) bool. ``starts``: first frame of each segment, where no link leads
    back. ``fewest``: trees to leave, by undoing the weakest links. ``width``: D.
    """
    num_frames, per_frame = is_picked.shape
    parent = torch.where(is_picked.flatten(), -1, torch.arange(num_frames * per_frame))
    strength = torch.full(parent.shape, torch.inf)
    before = unit_tokens(latents[0], width)
    for frame in range(1, num_frames):
        now = unit_tokens(latents[frame], width)
        free, earlier = (~is_picked[frame]).nonzero().squeeze(1), (~is_picked[frame - 1]).nonzero().squeeze(1)
        if frame not in starts and free.shape[0] and earlier.shape[0]:
            best = (now[free] @ before[earlier].T).max(1)
            is_linked = best.values > LINK_THRESHOLD
            token = frame * per_frame + free[is_linked]
            parent[token] = (frame - 1) * per_frame + earlier[best.indices[is_linked]]
            strength[token] = best.values[is_linked]
        before = now
    num_linked = int(strength.isfinite().sum())
    num_undone = fewest - (int((~is_picked).sum()) - num_linked)
    if num_undone > 0:
        undone = strength.argsort(stable=True)[:num_undone]
        parent[undone] = undone
    root = parent.reshape(num_frames, per_frame)
    for frame in range(1, num_frames):
        # The frame before has its roots already.
        root[frame] = torch.where(root[frame] >= 0, parent[root[frame].clamp(min=0)], -1)
    return root.flatten()


def _merge_segment(latents: Tensor, root: Tensor, shares: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Return where the tokens of a segment stand, (n,) raster indices, and the token that each of its own goes into,
    (L*N,) int64, -1 for the picked and for trees of frames without a share. ``root``: (L*N,), negative for the picked.
    ``shares``: tokens of the trees that begin in each frame."""
    heads, tree = root.clamp(min=-1).unique(return_inverse=True)
    if int(heads[0]) < 0:
        heads, tree = heads[1:], tree - 1
    means, _ = average_groups(latents[..., :width], tree, heads.shape[0])
    token = torch.full_like(heads, -1)
    centres: list[Tensor] = []
    done = 0
    frame_of = heads // (latents.shape[1] * latents.shape[2])
    for frame, share in enumerate(shares):
        if share:
            own = (frame_of == frame).nonzero().squeeze(1)
            peaks, cluster = find_clusters(means[own], share, min(NUM_NEIGHBOURS, share))
            centres.append(heads[own[peaks]])
            token[own] = done + cluster
            done += share
    return torch.cat(centres), torch.where(tree >= 0, token[tree.clamp(min=0)], -1)


METHOD = Method(
    name="flashvid-div",
    summary="in each frame tokens far from each other; the others linked to their like in the frame before, and averaged",
    source="FlashVID, arXiv 2602.08024",
    deviations="its attention-free mode, without the pruning in the decoder, which 1.25 times as many tokens would "
    "enter; no random noise in DPC-kNN; all tokens of a tree count alike in its mean; the share of trees is "
    "for the whole clip, and not each segment's own; the weakest links are undone where too few trees would "
    "be left; segments longer than 32 frames are cut; trees that begin in a frame without a share are left "
    "out",
    mixes=True,
    compress=merge_trees,
)
