"""The visual tokens that a method would give for a clip that does not exist: real places, random latents.

For what the language half costs, which depends on where tokens are and how many, and not on what they hold.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.baselines.registry import ADAPTIVE, FRE_RES, METHODS
from freres_cli.baselines.uniform import spread
from freres_cli.bench.latents import MadeLatents
from freres_cli.bench.tables import CostRow, CostTable
from freres_cli.errors import BackboneError
from freres_cli.method.adaptive import StretchCompressor, build_stretch_tokens
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import compress_latents
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.planning import method_settings
from freres_cli.pipeline.prompt_text import TEXT_SHARE, count_frame_text, read_prompt_text, settle_tokens
from freres_cli.presets import load_settings
from freres_cli.records import VideoTokens, nearest_frames

# Wide enough for the methods to tell cells apart. Places do not depend on the width of the model.
MADE_WIDTH = 16
BATCH_FRAMES = 8
DIFFERENT_ROWS = 1024


def place_made_tokens(table: CostTable, row: CostRow) -> VideoTokens:
    """Return what the row's method makes of a made clip, in latents of ``MADE_WIDTH`` channels. ``table``: the clip."""
    latents = MadeLatents(table.num_frames, table.grid, MADE_WIDTH).frames(0, table.num_frames)
    seconds = torch.arange(table.num_frames, dtype=torch.float64) / table.fps
    if row.method == FRE_RES:
        settings = method_settings(load_settings(table.preset, {}))
        plan = plan_budget(table.num_frames, table.grid, settings, row.budget_tokens)
        return build_tokens(compress_latents(latents, seconds.tolist(), plan, settings, MADE_WIDTH))
    if row.method == ADAPTIVE:
        compressor = StretchCompressor(table.grid, MADE_WIDTH, row.budget_tokens)
        for part, times in zip(latents.split(BATCH_FRAMES), seconds.split(BATCH_FRAMES), strict=True):
            compressor.push(part, times.tolist())
        return build_stretch_tokens(compressor.finish())
    compress = METHODS[row.method].compress
    assert compress is not None
    return compress(latents, seconds, row.budget_tokens, MADE_WIDTH)


def fit_prompt(
    tokens: VideoTokens, model: LanguageModel, question: str, context_tokens: int
) -> tuple[VideoTokens, int]:
    """Return the tokens of a prompt of ``context_tokens`` tokens, and how many of these are text.

    ``tokens``: what a method gave. ``model``: the language half, with or without weights. ``question``: what is asked. The
    text that the family writes around frames takes places of the prompt, so tokens are dropped, evenly, but the first of
    each frame. They are at the instants where ``Session`` would have them. Raises ``BackboneError`` if the text alone is
    too long. The prompt is shorter if there are not so many tokens.
    """
    text, ids = read_prompt_text(model, tokens.grid, tokens.frame_seconds), model.prompt(question)
    around = len(ids.prefix) + len(ids.suffix) + text.in_video
    room = context_tokens - around
    # Settled as strictly as the tokens that are left will need: their text is at most TEXT_SHARE of them.
    strictness = len(tokens) * (1 + TEXT_SHARE) / max(1, room)
    settled, _ = settle_tokens(tokens, (text.per_frame * max(1.0, strictness)).ceil().long())
    in_frames = count_frame_text(settled, text.per_frame)
    kept = _thin(settled, min(len(tokens), room - in_frames))
    return kept, around + in_frames


def _thin(tokens: VideoTokens, count: int) -> VideoTokens:
    """Return ``count`` of the tokens: the first of each frame that has any, and the others evenly."""
    frames = nearest_frames(tokens.positions[:, 0], tokens.grid[0])
    by_frame = frames.argsort(stable=True)
    is_first = torch.zeros(len(tokens), dtype=torch.bool)
    is_first[by_frame[torch.cat([torch.ones(1, dtype=torch.int64), frames[by_frame].diff()]) > 0]] = True
    first, rest = is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]
    if count < len(first):
        raise BackboneError(
            f"prompt: the text around {len(first)} frames leaves room for {max(0, count)} visual tokens",
            "this model cannot be measured at this length",
        )
    others = rest[spread(count - len(first), len(rest))] if count > len(first) else rest[:0]
    return tokens.pick(torch.cat([first, others]).sort().values)


def fill_tokens(tokens: VideoTokens, width: int, num_deep: int, dtype: torch.dtype) -> VideoTokens:
    """Return ``tokens`` with random latents for a model of ``width`` D and ``num_deep`` DeepStack rows, in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    some: Tensor = torch.randn(DIFFERENT_ROWS, width * (1 + num_deep), generator=generator).to(dtype)
    return replace(tokens, latents=some[torch.arange(len(tokens)) % DIFFERENT_ROWS], width=width)
