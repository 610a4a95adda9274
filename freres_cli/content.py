"""What a bundle holds: the tracks of Fre-Res, the stretches of adaptive Fre-Res, or the tokens of another method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from freres_cli.records import TIME_DIGITS, TOKEN_KINDS, VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import Tracks

if TYPE_CHECKING:
    from torch import Tensor

Content = Tracks | Stretches | VideoTokens
CONTENTS = {"tracks": Tracks, "stretches": Stretches, "tokens": VideoTokens}


def kind_of(content: Content) -> str:
    """Return the name of the kind of content, as bundles have it."""
    return next(name for name, kind in CONTENTS.items() if isinstance(content, kind))


def count_by_kind(content: Content) -> dict[str, int]:
    """Return how many visual tokens of each kind there are."""
    if isinstance(content, Tracks):
        return content.num_tokens_by_kind()
    counts = content.kind.to("cpu").bincount(minlength=len(TOKEN_KINDS)).tolist()
    return dict(zip(TOKEN_KINDS, counts, strict=True))


def latents_of(content: Content) -> Tensor:
    """Return tokens as they are stored, (n, C): those of the anchors, if it is tracks."""
    return content.anchor_latents if isinstance(content, Tracks) else content.latents


def count_from(content: Content, zero_s: float) -> Content:
    """Return content whose times are on a file's own clock with times in seconds after ``zero_s`` on that clock."""
    if not zero_s:
        return content
    names = ("frame_seconds", "seconds") if isinstance(content, VideoTokens) else ("frame_seconds",)
    times = {name: getattr(content, name) - zero_s for name in names}
    return replace(content, **{name: t.round(decimals=TIME_DIGITS).clamp(min=0) for name, t in times.items()})


def without_deep_rows(content: Content) -> Content:
    """Return the same content with the main channels only."""
    if isinstance(content, VideoTokens):
        return replace(content, latents=content.latents[:, : content.width].contiguous())
    return content.without_deep_rows()
