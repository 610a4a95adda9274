"""The quadtree of a grid, the same for every frame, and how far from each other its nodes are: for STTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import lazy_module
from freres_cli.baselines.evs import measure_change

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


@dataclass(frozen=True)
class Quadtree:
    """The K nodes of a grid of N cells, parents before children.

    ``boxes``: (K, 4) int64, [h0, h1, w0, w1). ``parent``: (K,), -1 for the root. ``depth``: (K,). ``first_cell``: (K,)
    first cell of each in raster order. ``path``: (L, N), the nodes from the root down to each cell, the last one repeated.
    """

    boxes: Tensor
    parent: Tensor
    depth: Tensor
    first_cell: Tensor
    path: Tensor

    @property
    def areas(self) -> Tensor:
        """(K,) number of cells of each node."""
        return (self.boxes[:, 1] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 2])

    @property
    def is_inner(self) -> Tensor:
        """(K,) whether a node has children."""
        return self.areas > 1


def build_quadtree(grid_h: int, grid_w: int) -> Quadtree:
    """Return the quadtree of a grid: each node of more than one cell is halved along each side longer than 1, the first
    half the larger one."""
    boxes, parent, depth = [(0, grid_h, 0, grid_w)], [-1], [0]
    for node, (h0, h1, w0, w1) in enumerate(boxes):  # grows as it is read
        if (h1 - h0) * (w1 - w0) > 1:
            children = [(*rows, *columns) for rows in _halve(h0, h1) for columns in _halve(w0, w1)]
            boxes += children
            parent += [node] * len(children)
            depth += [depth[node] + 1] * len(children)
    box, up, level = torch.tensor(boxes), torch.tensor(parent), torch.tensor(depth)
    leaf = torch.empty(grid_h * grid_w, dtype=torch.int64)
    first_cell = box[:, 0] * grid_w + box[:, 2]
    is_leaf = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) == 1
    leaf[first_cell[is_leaf]] = is_leaf.nonzero().squeeze(1)
    path = [leaf]
    for distance in range(max(depth), 0, -1):
        path.append(torch.where(level[path[-1]] == distance, up[path[-1]], path[-1]))
    return Quadtree(box, up, level, first_cell, torch.stack(path[::-1]))


def _halve(first: int, stop: int) -> list[tuple[int, int]]:
    middle = (first + stop + 1) // 2
    return [(first, middle), (middle, stop)] if stop - first > 1 else [(first, stop)]


def average_nodes(tree: Quadtree, tokens: Tensor) -> Tensor:
    """Return the direction of the mean token of each node, (K, D) of norm 1. ``tokens``: (N, D) float32."""
    sums = torch.zeros(tree.parent.shape[0], tokens.shape[1])
    sums[tree.path[-1]] = tokens
    for depth in range(int(tree.depth.max()), 0, -1):
        nodes = (tree.depth == depth).nonzero().squeeze(1)
        sums.index_add_(0, tree.parent[nodes], sums[nodes])
    return torch.nn.functional.normalize(sums, dim=1)


def measure_nodes(tree: Quadtree, latents: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return how far apart nodes are, as 1 - cos of their mean tokens over the first ``width`` channels.

    ``spread``: (T, K), the largest between a node and its children, 0 where it has none. ``steps``: (2, L, T-1, K), between
    a node and its ancestor k levels up in the next frame (0) or the one before (1), where the node is in the later frame
    of the two. ``latents``: (T, H, W, C). Time is T*L*K*D, memory T*L*K.
    """
    num_frames, num_nodes, num_levels = latents.shape[0], tree.parent.shape[0], tree.path.shape[0]
    spread = torch.zeros(num_frames, num_nodes)
    steps = torch.full((2, num_levels, num_frames - 1, num_nodes), torch.inf)
    ancestors = [torch.arange(num_nodes)]
    for _ in range(num_levels - 1):
        above = ancestors[-1]
        ancestors.append(torch.where(above >= 0, tree.parent[above.clamp(min=0)], -1))
    before = None
    for frame in range(num_frames):
        units = average_nodes(tree, latents[frame, ..., :width].flatten(0, 1).to(torch.float32))
        if num_nodes > 1:
            change = measure_change(units[1:], units[tree.parent[1:]])
            spread[frame] = spread[frame].scatter_reduce(0, tree.parent[1:], change, "amax")
        for levels, ancestor in enumerate(ancestors):
            nodes = (ancestor >= 0).nonzero().squeeze(1)
            if before is not None:
                steps[0, levels, frame - 1, nodes] = measure_change(before[nodes], units[ancestor[nodes]])
                steps[1, levels, frame - 1, nodes] = measure_change(units[nodes], before[ancestor[nodes]])
        before = units
    return spread, steps
