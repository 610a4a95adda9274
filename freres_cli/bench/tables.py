"""The paper's cost table as something to run: which rows it has, how long their prompts are, and what the paper measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PAPER_SOURCE = "arXiv 2605.16366, Table 3: Qwen3-VL-8B on one H100 with FlashAttention-2"


@dataclass(frozen=True)
class CostRow:
    """One row. ``name``: what it is called. ``method``: a name in ``baselines.registry``.

    ``budget_tokens``: visual tokens of the method. ``context_tokens``: of the whole prompt. ``paper``: ``ttft_s`` and
    ``peak_memory_gb`` as the paper prints them, ``None`` where it ran out of memory; empty for a row that it does not have.
    """

    name: str
    method: str
    budget_tokens: int
    context_tokens: int
    paper: dict[str, float | None] = field(default_factory=dict)

    @property
    def paper_figures(self) -> dict[str, Any] | None:
        """What the paper measured, marked as the paper's; ``None`` if it has no such row."""
        if not self.paper:
            return None
        status = "ok" if self.paper["ttft_s"] is not None else "out_of_memory"
        return {"source": PAPER_SOURCE, "status": status, "context_tokens": self.context_tokens, **self.paper}


@dataclass(frozen=True)
class CostTable:
    """Rows about one clip of ``num_frames`` frames at ``fps``, on a ``grid`` of (H, W) tokens.

    ``preset``: whose settings Fre-Res has.
    """

    name: str
    preset: str
    num_frames: int
    fps: float
    grid: tuple[int, int]
    rows: tuple[CostRow, ...]

    @property
    def full_tokens(self) -> int:
        """Visual tokens of the whole clip."""
        return self.num_frames * self.grid[0] * self.grid[1]


# The adaptive row is ours, at the budget of Fre-Res. The paper's prompts have 22 tokens of text.
DENSE_30FPS = CostTable(
    "dense-30fps",
    "dense-30fps",
    num_frames=1800,
    fps=30.0,
    grid=(24, 24),
    rows=(
        CostRow("full", "full", 1_036_800, 1_036_822, {"ttft_s": None, "peak_memory_gb": None}),
        CostRow("uniform 1 fps", "uniform", 34_560, 34_582, {"ttft_s": 1.15, "peak_memory_gb": 19.42}),
        CostRow("fourier 8x", "fourier", 129_600, 129_622, {"ttft_s": 7.84, "peak_memory_gb": 41.68}),
        CostRow("fre-res", "fre-res", 46_080, 46_102, {"ttft_s": 1.68, "peak_memory_gb": 22.35}),
        CostRow("adaptive", "adaptive", 46_080, 46_102),
    ),
)
TABLES = {table.name: table for table in (DENSE_30FPS,)}
