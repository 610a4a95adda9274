"""The text that a family writes in the prompt of a clip: its cost, and the instants that tokens share to keep it small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.baselines.registry import ADAPTIVE
from freres_cli.content import Content
from freres_cli.errors import BackboneError
from freres_cli.method.instants import share_instants
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import CompressPlan
from freres_cli.pipeline.tokens import make_tokens
from freres_cli.records import TOKEN_KINDS, VideoTokens, nearest_frames

# Most text tokens around frames for each visual token, where tokens can move so that fewer frames hold any. Ours.
TEXT_SHARE = 0.1
ANCHOR = TOKEN_KINDS.index("anchor")
COUNTS = ("text_overhead_tokens", "context_tokens", "moved_tokens", "moved_outside", "mean_shift_s", "max_shift_s")


@dataclass(frozen=True)
class PromptText:
    """The text tokens of a prompt about one clip, with an empty question.

    ``per_frame``: (T,) int64, those around each sampled frame if it holds tokens. ``in_video``: those written once for the
    whole video, with any other row that is no visual token. ``around_video``: those before and after the video.
    """

    per_frame: Tensor
    in_video: int
    around_video: int

    def count_overhead(self, tokens: VideoTokens) -> int:
        """Return how many tokens of the video part of the prompt are not visual."""
        return self.in_video + count_frame_text(tokens, self.per_frame)


@dataclass(frozen=True)
class Moves:
    """What sharing instants did to a clip.

    ``moved``: tokens that are now told at another frame. ``outside``: those of them that left the stretch of time they
    stand for, ``None`` if it is not known. ``mean_s``, ``max_s``: their shift in seconds. ``text_before``,
    ``text_after``: text tokens around frames.
    """

    moved: int
    outside: int | None
    mean_s: float
    max_s: float
    text_before: int
    text_after: int

    def describe(self, num_tokens: int) -> str:
        """Return a note. ``num_tokens``: S."""
        outside = f"; {self.outside} of them left the stretch that they stand for" if self.outside else ""
        return (
            f"{self.moved} of {num_tokens} tokens are told at a frame near their own, {self.mean_s:.2f} s away on average "
            f"and {self.max_s:.2f} s at most{outside}: the model writes text around every frame, now "
            f"{self.text_after} tokens in place of {self.text_before}"
        )


def count_frame_text(tokens: VideoTokens, per_frame: Tensor) -> int:
    """Return the text tokens around the frames that hold tokens. ``per_frame``: (T,), those of each frame."""
    return int(per_frame[nearest_frames(tokens.positions[:, 0], tokens.grid[0]).unique()].sum())


def settle_tokens(tokens: VideoTokens, per_frame: Tensor) -> tuple[VideoTokens, Moves | None]:
    """Return the tokens at instants that keep the text around frames within ``TEXT_SHARE`` of them, and what moved.

    Anchor tokens never move, nor does anything if all T*H*W tokens are there: those belong to one frame each. Where their
    frames alone exceed the share, the other tokens move to these frames. Rows and columns stay. ``per_frame``: (T,) text
    tokens around each frame.
    """
    most, size = TEXT_SHARE * len(tokens), tokens.grid[0] * tokens.grid[1] * tokens.grid[2]
    before = count_frame_text(tokens, per_frame)
    is_movable = tokens.kind != ANCHOR
    if before <= most or len(tokens) == size or not bool(is_movable.any()):
        return tokens, None
    t, num_frames = tokens.positions[:, 0], tokens.grid[0]
    low, high = (None, None) if tokens.spans is None else tokens.spans.unbind(1)
    settled = share_instants(t, is_movable, num_frames, int(most / int(per_frame.max())), low, high)
    places = torch.cat([settled[:, None], tokens.positions[:, 1:]], dim=1)
    frames = nearest_frames(settled, num_frames)
    is_moved = frames != nearest_frames(t, num_frames)
    if not bool(is_moved.any()):
        return tokens, None
    shift = (tokens.frame_seconds[frames] - tokens.seconds).abs()[is_moved]
    outside = None
    if low is not None and high is not None:
        outside = int(((frames < low) | (frames >= high))[is_moved].sum())
    moved = replace(
        tokens, positions=places, seconds=torch.where(is_moved, tokens.frame_seconds[frames], tokens.seconds)
    )
    after = count_frame_text(moved, per_frame)
    return moved, Moves(int(is_moved.sum()), outside, float(shift.mean()), float(shift.max()), before, after)


def read_prompt_text(model: LanguageModel, grid: tuple[int, int, int], frame_seconds: Tensor) -> PromptText:
    """Count the text of a prompt about a clip.

    ``model``: the language half, with or without weights. ``grid``: (T, H, W). ``frame_seconds``: (T,) float64.
    """
    empty = VideoTokens(
        latents=torch.empty(0, model.width * (1 + model.num_deep_layers)),
        positions=torch.empty(0, 3),
        seconds=torch.empty(0, dtype=torch.float64),
        kind=torch.empty(0, dtype=torch.uint8),
        gop=torch.empty(0, dtype=torch.int64),
        energy=torch.empty(0),
        grid=grid,
        width=model.width,
        frame_seconds=frame_seconds,
    )
    ids = model.prompt("")
    return PromptText(model.text_per_frame(empty), model.text_in_video(empty), len(ids.prefix) + len(ids.suffix))


def describe_text(content: Content, variant: str, text: PromptText | None) -> dict[str, Any]:
    """Return the counts that a manifest has under ``COUNTS``; each is ``None`` if ``text`` is.

    ``content``: of the bundle. ``variant``: one of ``presets.VARIANTS``. ``text``: that of the model's prompt.
    """
    if text is None:
        return dict.fromkeys(COUNTS)
    tokens = make_tokens(content, variant)
    tokens, moves = settle_tokens(tokens, text.per_frame)
    overhead = text.count_overhead(tokens)
    return {
        "text_overhead_tokens": overhead,
        "context_tokens": text.around_video + overhead + len(tokens),
        **describe_moves(moves),
    }


def describe_moves(moves: Moves | None) -> dict[str, Any]:
    """Return what sharing instants did, as the JSON documents have it."""
    if moves is None:
        return {"moved_tokens": 0, "moved_outside": 0, "mean_shift_s": 0.0, "max_shift_s": 0.0}
    return {
        "moved_tokens": moves.moved,
        "moved_outside": moves.outside,
        "mean_shift_s": moves.mean_s,
        "max_shift_s": moves.max_s,
    }


def bound_text(plan: CompressPlan, models: Models, method: str) -> dict[str, int | None]:
    """Return the most text that the prompt of a planned bundle can have, under the first two names of ``COUNTS``; ``None``
    for both if the tokenizer of ``models`` cannot be read.

    Which frames will hold tokens is not known yet. All tokens of ``method`` adaptive can share frames, if it merges any;
    Fre-Res may have an anchor for each event; another method may have tokens at every frame.
    """
    info, num_frames = plan.info, plan.num_frames
    visual = plan.bound_tokens
    last_s = info.count_s(info.start_s) + info.duration_s
    # Backwards, so that one frame has the time that takes the most text.
    seconds = torch.linspace(last_s, last_s - info.duration_s, num_frames, dtype=torch.float64).flip(0)
    try:
        text = read_prompt_text(models.prompt_counter, (num_frames, plan.size.grid_h, plan.size.grid_w), seconds)
    except BackboneError:
        return dict.fromkeys(COUNTS[:2])
    longest, runs = int(text.per_frame.max()), min(num_frames, visual)
    most = runs * longest
    num_fixed = None
    if method == ADAPTIVE and plan.budget_tokens < num_frames * plan.size.num_tokens:
        num_fixed = 1
    elif plan.budget is not None and not plan.budget.is_lossless:
        num_fixed = max(1, plan.budget.num_anchors + plan.budget.max_events)
    if num_fixed is not None:
        most = min(most, max(int(TEXT_SHARE * visual), num_fixed * longest))
    overhead = text.in_video + most
    return {"text_overhead_tokens": overhead, "context_tokens": text.around_video + overhead + visual}


def describe_context(context_tokens: int, model: LanguageModel, *, is_bound: bool = False) -> tuple[str, ...]:
    """Return a note if a prompt without a question leaves no room for one in the context of ``model``; else nothing.

    ``context_tokens``: of the prompt. ``is_bound``: it is known to have no more than these.
    """
    if context_tokens < model.max_context_tokens:
        return ()
    has, refuses = ("has up to", "may refuse") if is_bound else ("has", "refuses")
    return (
        f"the prompt {has} {context_tokens} tokens without a question, and the model's context {model.max_context_tokens}: "
        f"freres ask {refuses} it; use fewer tokens, or ask with --refine",
    )


def record_text(text: PromptText | None) -> dict[str, Any]:
    """Return the text of a prompt as a manifest records it, so that a cut of the bundle can be counted without a model.

    ``text_per_frame`` is in runs: a number of frames, then the tokens around each of them.
    """
    if text is None:
        return dict.fromkeys(("text_per_frame", "text_in_video", "text_around_video"))
    values, counts = text.per_frame.unique_consecutive(return_counts=True)
    runs = torch.stack([counts, values], dim=1).flatten().tolist()
    return {"text_per_frame": runs, "text_in_video": text.in_video, "text_around_video": text.around_video}


def recall_text(geometry: Mapping[str, Any]) -> PromptText | None:
    """Return the text that a manifest's ``geometry`` records; ``None`` if it was not counted."""
    runs, in_video, around = (geometry[name] for name in ("text_per_frame", "text_in_video", "text_around_video"))
    if runs is None or in_video is None or around is None:
        return None
    counts, values = torch.tensor(runs, dtype=torch.int64).view(-1, 2).unbind(1)
    return PromptText(values.repeat_interleave(counts), in_video, around)
