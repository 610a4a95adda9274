"""What a method returned, held to what ``baselines.declaration.Method`` promises: methods may come from other packages."""

from __future__ import annotations

import torch
from torch import Tensor

from freres_cli.baselines.declaration import Method
from freres_cli.bundle.checks import CLOCK_S
from freres_cli.errors import FreresError
from freres_cli.records import VideoTokens, are_in_order
from freres_cli.tracks import TOKEN_COLUMNS


def check_tokens(
    tokens: VideoTokens, method: Method, latents: Tensor, seconds: Tensor, budget_tokens: int, width: int
) -> None:
    """Refuse tokens that a bundle cannot hold, or that are more than there may be.

    ``tokens``: what ``compress`` of the ``method`` returned. ``latents``: (T, H, W, C), what it was given. ``seconds``:
    (T,), ``budget_tokens``, ``width``: likewise. Raises ``FreresError``.
    """

    def expect(holds: bool, what: str) -> None:
        if not holds:
            hint = "freres methods names the package that it is from; baselines/declaration.py has what it must return"
            raise FreresError(f"method {method.name}: a fault in it: {what}", hint)

    expect(isinstance(tokens, VideoTokens), f"expected VideoTokens, got {type(tokens).__name__}")
    most = budget_tokens if method.has_budget else latents.shape[:3].numel()
    expect(1 <= len(tokens) <= most, f"expected 1 to {most} tokens, got {len(tokens)}")
    for name, column in TOKEN_COLUMNS.items():
        own = getattr(tokens, name)
        dtype = str(latents.dtype) if column.is_latent else f"torch.{column.dtype}"
        expect(str(own.dtype) == dtype, f"{name}: expected {dtype}, got {own.dtype}")
        expect(own.device.type == "cpu", f"{name}: expected a tensor on the CPU, got {own.device}")
        if column.limit is not None:
            most = int(column.limit) - 1
            expect(0 <= int(own.min()) <= int(own.max()) <= most, f"{name}: expected 0 to {most}")
    shape = tokens.latents.shape[1], tokens.width
    expect(
        shape == (latents.shape[3], width), f"expected latents (S, {latents.shape[3]}) of width {width}, got {shape}"
    )
    grid = tuple(latents.shape[:3])
    expect(tokens.grid == grid, f"grid: expected {grid}, got {tokens.grid}")
    outermost = torch.tensor(grid) - 1
    is_inside = ((tokens.positions >= 0) & (tokens.positions <= outermost)).all()
    expect(bool(is_inside), "positions: expected frames, rows and columns of the grid")
    is_sorted = are_in_order(tokens.positions, method.mixes)
    expect(is_sorted, "positions: expected by time, then row, then column" + ("" if method.mixes else ", each once"))
    expect(torch.equal(tokens.frame_seconds, seconds), "frame_seconds: expected the times that it was given")
    first, last = seconds[0] - CLOCK_S, seconds[-1] + CLOCK_S
    expect(bool(((tokens.seconds >= first) & (tokens.seconds <= last)).all()), "seconds: expected times of the frames")
    expect(bool((tokens.energy.isfinite() & (tokens.energy >= 0)).all()), "energy: expected finite numbers, 0 or more")
