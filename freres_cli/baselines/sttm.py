"""STTM: a quadtree in every frame, whose nodes are joined over time where they are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.groups import average_groups, locate, place_rows
from freres_cli.baselines.quadtree import Quadtree, build_quadtree, measure_nodes
from freres_cli.baselines.shares import clamp_budget
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

THRESHOLD_STEP = 0.2  # the paper joins over time at a cosine lower by about this than in space: 0.55 and 0.75


def merge_nodes(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return min(B, T*H*W) means of tokens of ``latents`` (T, H, W, C): nodes of quadtrees, joined over time.

    B is ``budget_tokens``. In every frame, from the whole frame down, a node is split into quarters if the cosine of its
    mean to that of a quarter is below a threshold. Nodes of neighbouring frames, one of which contains the other, are
    joined if the cosine of their means is at least that threshold less 0.2; what is joined, directly or through others,
    becomes one token at the place of its first node. The threshold is the one where the clip has about B tokens; the pairs
    joined are then as many of the most alike as leave exactly B. Where there are fewer nodes than B, the next node is
    split into two or three. Boxes are the smallest around what a token holds. Decisions are over the first D channels.
    Time is linear but for sorting, T*H*W*log(H*W)*D; memory is T*H*W*log(H*W) numbers besides the means.
    ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_tokens = clamp_budget(latents, budget_tokens)
    grid = (latents.shape[0], latents.shape[1], latents.shape[2])
    tree = build_quadtree(grid[1], grid[2])
    search = Search.measure(tree, latents, width)
    node, owner = search.find(num_tokens)
    labels, group = owner.unique(return_inverse=True)
    rows, _ = average_groups(latents, group, num_tokens)
    places = locate(torch.arange(group.shape[0]), grid)
    hull = [torch.full((num_tokens, 3), fill) for fill in (torch.inf, -torch.inf)]
    for which, end in enumerate(("amin", "amax")):
        hull[which] = hull[which].scatter_reduce(0, group[:, None].expand(-1, 3), places, end)
    boxes = torch.stack([hull[0], hull[1] + 1], dim=2).flatten(1).long()
    # The middle of the first node, whose cells have the label of the group.
    is_first = node == labels[group]
    sums = torch.zeros(num_tokens, 3, dtype=torch.float64).index_add_(0, group[is_first], places[is_first].double())
    middles = sums / torch.bincount(group[is_first], minlength=num_tokens)[:, None]
    return place_rows(rows, middles, latents, frame_seconds, width, boxes=boxes)


@dataclass(frozen=True)
class Search:
    """The search for the nodes to keep and the pairs to join.

    ``rank``: (T, K), the order in which nodes are split as the threshold rises; those without children never are.
    ``limits``: (J,), the largest 1 - cos at which each split happens. ``steps``: as ``measure_nodes`` returns them.
    """

    tree: Quadtree
    rank: Tensor
    limits: Tensor
    steps: Tensor

    @classmethod
    def measure(cls, tree: Quadtree, latents: Tensor, width: int) -> Search:
        """Return the search over ``latents`` (T, H, W, C). ``tree``: of their grid. ``width``: D."""
        spread, steps = measure_nodes(tree, latents, width)
        # A node is split only if all above it are.
        for node in range(1, spread.shape[1]):
            spread[:, node] = spread[:, node].minimum(spread[:, int(tree.parent[node])])
        inner = tree.is_inner.nonzero().squeeze(1)
        # Of equal ones the larger node first, then the earlier frame.
        limits, order = spread[:, inner].T.flatten().sort(descending=True, stable=True)
        rank = torch.full((inner.shape[0] * spread.shape[0],), 0)
        rank[order] = torch.arange(order.shape[0])
        ranks = torch.full(spread.shape, order.shape[0])
        ranks[:, inner] = rank.reshape(inner.shape[0], spread.shape[0]).T
        return cls(tree, ranks, limits, steps)

    def find(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the node of each token and what it goes into, each as the index of the first token: (T*N,) int64 each.

        ``num_tokens``: how many different ones there are in the second.
        """
        low, high = 0, self.limits.shape[0] + 1
        while high - low > 1:
            middle = (low + high) // 2
            joined, _ = self._join(middle)
            if int(self._count(middle)) - len(joined) <= num_tokens:
                low = middle
            else:
                high = middle
        node, _ = self._nodes(low)
        missing = num_tokens - int(self._count(low))
        if missing > 0:
            node = self._split_in_part(low, missing + 1)
            return node, node
        joined, root = self._join(low, most=-missing)
        return node, root[node]

    def _nodes(self, num_splits: int) -> tuple[Tensor, Tensor]:
        """The first token of the node of each token, (T*N,), and how deep that node is, (T, N)."""
        num_frames, per_frame = self.rank.shape[0], self.tree.path.shape[1]
        is_split = self.rank < num_splits
        depth = sum((is_split[:, nodes].long() for nodes in self.tree.path), torch.zeros(1, dtype=torch.int64))
        node = self.tree.path[depth, torch.arange(per_frame)]
        first = self.tree.first_cell[node] + torch.arange(num_frames)[:, None] * per_frame
        return first.flatten(), depth

    def _count(self, num_splits: int) -> Tensor:
        """The number of nodes after so many splits."""
        node, _ = self._nodes(num_splits)
        return (node == torch.arange(node.shape[0])).sum()

    def _join(self, num_splits: int, most: int | None = None) -> tuple[list[int], Tensor]:
        """Join pairs of nodes from the most alike on: which pairs changed anything, and the root of each node, (T*N,).

        Without ``most``, those alike enough for the threshold; else so many.
        """
        first, depth = self._nodes(num_splits)
        per_frame = depth.shape[1]
        is_finer = depth[:-1] >= depth[1:]
        levels = (depth[:-1] - depth[1:]).abs()
        nodes = self.tree.path[depth, torch.arange(per_frame)]
        finer = torch.where(is_finer, nodes[:-1], nodes[1:])
        frame = torch.arange(depth.shape[0] - 1)[:, None].expand_as(levels)
        change = self.steps[(~is_finer).long(), levels, frame, finer]
        # One pair for each finer node, at its first cell.
        is_pair = self.tree.first_cell[finer] == torch.arange(per_frame)
        if most is None and num_splits:
            is_pair &= change <= self.limits[num_splits - 1] + THRESHOLD_STEP
        pairs = is_pair.flatten().nonzero().squeeze(1)
        pairs = pairs[change.flatten()[pairs].argsort(stable=True)]
        return _grow_forest(first.shape[0], first[pairs].tolist(), first[pairs + per_frame].tolist(), most)

    def _split_in_part(self, num_splits: int, num_parts: int) -> Tensor:
        """Split one more node, into two or three parts in place of four: halves, or the upper quarters and a half."""
        node, _ = self._nodes(num_splits + 1)
        frame, parent = [int(index) for index in (self.rank == num_splits).nonzero()[0]]
        start = frame * self.tree.path.shape[1]
        quarters = (self.tree.first_cell[self.tree.parent == parent] + start).tolist()
        node = node.masked_fill(node == quarters[3], quarters[2])
        return node.masked_fill(node == quarters[1], quarters[0]) if num_parts == 2 else node


def _grow_forest(size: int, ends: list[int], others: list[int], most: int | None) -> tuple[list[int], Tensor]:
    """Join pairs in order until ``most`` have changed anything; return these, and the smallest member of each set."""
    root = list(range(size))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    joined: list[int] = []
    for pair, (end, other) in enumerate(zip(ends, others, strict=True)):
        if len(joined) == most:
            break
        low, high = sorted((find(end), find(other)))
        if low != high:
            root[high] = low
            joined.append(pair)
    return joined, torch.tensor([find(index) for index in range(size)])


METHOD = Method(
    name="sttm",
    summary="parts of a frame as large as their tokens are alike, joined over time with parts that are alike",
    source="STTM, arXiv 2507.07990",
    deviations="merges latents, not states of a decoder layer; one threshold is searched for both steps, 0.2 lower over "
    "time, and the least alike pairs stay apart so that the budget is met exactly; the quadtree starts at the "
    "whole frame; all tokens count alike in a mean",
    mixes=True,
    compress=merge_nodes,
)
