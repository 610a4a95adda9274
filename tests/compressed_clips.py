"""Latents of small clips, and the tracks that the method makes of them, without any model."""

from __future__ import annotations

from typing import Any

import torch

from freres_cli.method.budget import BudgetPlan, MethodSettings, plan_budget
from freres_cli.method.compress import UNIFORM, compress_latents
from freres_cli.method.gop import ClosedGop, OpenGop
from freres_cli.method.residuals import pool_to_cells
from freres_cli.tracks import Tracks


def make_settings(**changes: Any) -> MethodSettings:
    """Settings for clips of a few dozen frames; ``changes``: other values of some fields."""
    values: dict[str, Any] = dict(
        variant="absorber",
        reference_budget_tokens=400,
        anchors=4,
        keep_per_block=8,
        temporal_share=0.3,
        static_per_gop=2,
        pooled_side=4,
        max_coefficients=4,
        tau=None,
        events=False,
    )
    return MethodSettings(**{**values, **changes})


def smooth_clip(num_frames: int, grid: tuple[int, int], width: int = 16, seed: int = 0) -> torch.Tensor:
    """Latents that drift smoothly in the middle of the grid and stay the same elsewhere: (T, H, W, C)."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(*grid, width, generator=generator) + 3.0
    drift = torch.randn(*grid, width, generator=generator)
    mask = torch.zeros(*grid, 1)
    mask[grid[0] // 4 : max(1, 3 * grid[0] // 4), grid[1] // 4 : max(1, 3 * grid[1] // 4)] = 1.0
    t = torch.linspace(0, 1, num_frames)[:, None, None, None]
    noise = 1e-3 * torch.randn(num_frames, *grid, width, generator=generator)
    return still + torch.sin(3 * t) * drift * mask + noise


def compress(latents: torch.Tensor, budget: int, **changes: Any) -> tuple[Tracks, BudgetPlan, MethodSettings]:
    """The tracks of ``latents`` (T, H, W, C) at ten frames per second, with their plan and settings."""
    settings = make_settings(**changes)
    plan = plan_budget(latents.shape[0], tuple(latents.shape[1:3]), settings, budget)
    seconds = [i / 10 for i in range(latents.shape[0])]
    return compress_latents(latents, seconds, plan, settings, latents.shape[-1]), plan, settings


def close_gop(frames: torch.Tensor, pooled: tuple[int, int], num_coefficients: int, width: int) -> ClosedGop:
    """The GoP of ``frames`` (1 + L, H, W, C), the first of which is the anchor, with its first coefficients."""
    cells = pool_to_cells(frames, *pooled)
    gop = OpenGop(0, frames[0].clone(), width, pooled, UNIFORM, 0.0, (frames[0], cells[0]))
    gop.append(frames[1:], cells[1:])
    return gop.close(num_coefficients)
