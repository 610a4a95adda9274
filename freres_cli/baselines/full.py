"""The full-token run: every latent of every frame, each at its own position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


def keep_every_token(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return all T*H*W tokens of ``latents`` (T, H, W, C).

    ``frame_seconds``: (T,) float64. ``width``: D, the channels that go into the prompt. Raises ``ValueError`` if there
    are more tokens than ``budget_tokens``.
    """
    num_tokens = latents.shape[:3].numel()
    if budget_tokens < num_tokens:
        raise ValueError(f"budget: expected at least all {num_tokens} tokens, got {budget_tokens}")
    return gather_tokens(latents, frame_seconds, torch.arange(num_tokens), width)


def gather_tokens(latents: Tensor, frame_seconds: Tensor, keep: Tensor, width: int) -> VideoTokens:
    """Return some tokens of ``latents`` (T, H, W, C), bit for bit, as anchor tokens.

    ``keep``: (S,) their raster indices among the T*H*W, increasing. ``frame_seconds``: (T,) float64. ``width``: D.
    """
    num_frames, grid_h, grid_w = latents.shape[:3]
    t, h, w = keep // (grid_h * grid_w), keep // grid_w % grid_h, keep % grid_w
    positions = torch.stack([t, h, w], dim=1).to(torch.float32)
    return place_tokens(latents[t, h, w], positions, t, (num_frames, grid_h, grid_w), frame_seconds, width)


def place_tokens(
    rows: Tensor, positions: Tensor, frame: Tensor, grid: tuple[int, int, int], frame_seconds: Tensor, width: int
) -> VideoTokens:
    """Return the tokens ``rows`` (S, C) at ``positions`` (S, 3), as anchor tokens.

    ``frame``: (S,) sampled frame of each. ``grid``: (T, H, W) of the whole clip. ``frame_seconds``: (T,) float64.
    ``width``: D.
    """
    return VideoTokens(
        latents=rows,
        positions=positions,
        seconds=frame_seconds[frame],
        kind=torch.zeros(frame.shape[0], dtype=torch.uint8),
        gop=frame,
        energy=rows[:, :width].to(torch.float32).square().sum(-1),
        grid=grid,
        width=width,
        frame_seconds=frame_seconds,
    )


def raster_order(positions: Tensor) -> Tensor:
    """Return the order of ``positions`` (S, 3) by time, then row, then column: (S,) int64. Ties keep their order."""
    order = torch.arange(positions.shape[0])
    for axis in (2, 1, 0):
        order = order[positions[order, axis].argsort(stable=True)]
    return order


METHOD = Method(
    name="full",
    summary="every token of every frame",
    source="the unmodified model",
    has_budget=False,
    compress=keep_every_token,
)
