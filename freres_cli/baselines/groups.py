"""Groups of tokens: their means over all channels, and the merged tokens at their places."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import CHUNK_VALUES
from freres_cli.baselines.declaration import lazy_module
from freres_cli.baselines.full import place_tokens, raster_order
from freres_cli.records import VideoTokens, nearest_frames

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def average_groups(latents: Tensor, owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each group of tokens, (count, C) float32, and how many it has, (count,) int64.

    ``latents``: (T, H, W, C). ``owner``: (T*H*W,) group of each token, -1 for none. ``count``: number of groups. A group
    without tokens has mean 0; one with a single token has that token, bit for bit.
    """
    tokens = latents.flatten(0, 2)
    sums = torch.zeros(count, latents.shape[-1])
    chosen = (owner >= 0).nonzero().squeeze(1)
    for part in chosen.split(max(1, CHUNK_VALUES // latents.shape[-1])):
        sums.index_add_(0, owner[part], tokens[part].to(torch.float32))
    sizes = torch.bincount(owner[chosen], minlength=count)
    return sums.div_(sizes.clamp(min=1)[:, None]), sizes


def average_around(latents: Tensor, holder: Tensor, joined: Tensor, own_share: Tensor) -> Tensor:
    """Return tokens that others have joined: s * own + (1 - s) * mean of the joined, (S, C) float32.

    ``latents``: (T, H, W, C). ``holder``: (T*H*W,) the output token that each token is, or is averaged to, -1 for none.
    ``joined``: (T*H*W,) the output token that each other token joins, -1 for none. ``own_share``: (S,) s of each. A token
    that nothing joins is its own, bit for bit.
    """
    rows, _ = average_groups(latents, holder, own_share.shape[0])
    means, sizes = average_groups(latents, joined, own_share.shape[0])
    some = (sizes > 0).nonzero().squeeze(1)
    rows[some] = torch.lerp(means[some], rows[some], own_share[some, None])
    return rows


def place_rows(
    rows: Tensor,
    positions: Tensor,
    latents: Tensor,
    frame_seconds: Tensor,
    width: int,
    boxes: Tensor | None = None,
) -> VideoTokens:
    """Return merged tokens in raster order of their positions, in the dtype of the clip. Between two frames, the time of a
    token lies between theirs.

    ``rows``: (S, C). ``positions``: (S, 3), t, h, w. ``latents``: (T, H, W, C), for its grid and dtype. ``frame_seconds``:
    (T,) float64. ``width``: D. ``boxes``: (S, 6), see ``VideoTokens``.
    """
    order = raster_order(positions)
    positions = positions[order].to(torch.float32)
    grid = (latents.shape[0], latents.shape[1], latents.shape[2])
    frame = nearest_frames(positions[:, 0], grid[0])
    tokens = place_tokens(rows[order].to(latents.dtype), positions, frame, grid, frame_seconds, width)
    before = positions[:, 0].floor().long()
    after = (before + 1).clamp(max=grid[0] - 1)
    seconds = torch.lerp(frame_seconds[before], frame_seconds[after], positions[:, 0].double() - before)
    return replace(tokens, seconds=seconds, boxes=None if boxes is None else boxes[order])


def locate(index: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return the places of tokens by their raster ``index`` (S,) on ``grid`` (T, H, W): (S, 3) float32, t, h, w."""
    _, grid_h, grid_w = grid
    places = [index // (grid_h * grid_w), index // grid_w % grid_h, index % grid_w]
    return torch.stack(places, dim=1).to(torch.float32)


def bound_groups(owner: Tensor, positions: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return the box of each group of tokens, (S, 6) int64, see ``VideoTokens``.

    It is that around the group if the group fills it, else the cell nearest to the position of its token, over the time
    from the group's first token to its last. ``owner``: (T*H*W,) group of each token, -1 for none; no group is empty.
    ``positions``: (S, 3) t, h, w of the token of each group. ``grid``: T, H, W.
    """
    _, grid_h, grid_w = grid
    members = (owner >= 0).nonzero().squeeze(1)
    group = owner[members]
    counts = torch.bincount(group, minlength=positions.shape[0])
    index = [members // (grid_h * grid_w), members // grid_w % grid_h, members % grid_w]
    first = torch.stack([counts.new_full(counts.shape, 2**60).scatter_reduce(0, group, i, "amin") for i in index], 1)
    last = torch.stack([torch.zeros_like(counts).scatter_reduce(0, group, i, "amax") for i in index], 1)
    is_filled = (last - first + 1).prod(1) == counts
    nearest = (positions + 0.5).floor().long()
    for axis in (1, 2):
        first[:, axis] = torch.where(is_filled, first[:, axis], nearest[:, axis])
        last[:, axis] = torch.where(is_filled, last[:, axis], nearest[:, axis])
    return torch.stack([first, last + 1], dim=2).flatten(1)
