"""Several texts that continue one prefilled video: its keys and values are kept once, and read once for all of them.

What a text adds has rows of its own. Attention is then two parts, to the video and to a text's own rows, put together by what
their scores add up to. Ours, because a copy of the video's cache for each text takes as many times the memory and, for each
token, the time. Relatives: cascade inference of FlashInfer, Hydragen (arXiv 2402.05099).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from freres_cli.backbones.cache import ReservedLayer
from freres_cli.backbones.flash import attend_flash, takes_flash
from freres_cli.backbones.fused import Written
from freres_cli.backbones.quantized_cache import QuantizedLayer, unpack_rows

# Scores that are held at a time where no kernel of PyTorch is used (ours), and rows of a text from which on one is: of fewer,
# all texts are faster in one product.
SCORE_BYTES = 256 << 20
LEAST_ROWS_OF_KERNEL = 256
FLOAT32 = 4


class _OwnRows(CacheLayerMixin):
    """One layer: the rows of the video, (1, heads, P, w), and those of each text, kept as the video's are. An update returns
    only the latter."""

    is_croppable = True

    def __init__(self, video: ReservedLayer, own: ReservedLayer) -> None:
        super().__init__()
        self.video, self._own = video, own
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: each part does it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append rows (B, heads, L, d) of the texts, and return all of theirs."""
        return self._own.update(key_states, value_states)

    def read_video(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of the video, (1, heads, P, d)."""
        keys, values = self.video.keys, self.video.values
        assert keys is not None and values is not None
        if isinstance(self.video, QuantizedLayer):
            return unpack_rows(keys, dtype, self.video.kv), unpack_rows(values, dtype, self.video.kv)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask, which the attention here does not take."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Rows of the video and of one text."""
        return self.video.get_seq_length() + self._own.get_seq_length()

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1

    def pick(self, index: Tensor) -> _OwnRows:
        """A layer with a copy of these texts, which may repeat."""
        own = _empty_like(self.video)
        if self._own.is_initialized:
            assert self._own.keys is not None and self._own.values is not None
            own.append(self._own.keys[index], self._own.values[index])
        return _OwnRows(self.video, own)


class SharedCache(Cache):
    """The cache of several texts that continue one video. ``num_settled``: the length that settles rotary angles."""

    def __init__(self, layers: Sequence[_OwnRows], num_settled: int | None) -> None:
        super().__init__(layers=list(layers))
        self.parts = list(layers)
        self.num_video_rows = layers[0].video.get_seq_length()
        self.num_settled = num_settled

    def pick(self, index: Tensor) -> SharedCache:
        """A cache with a copy of these texts, which may repeat. Before any was run, there is nothing to copy."""
        return SharedCache([layer.pick(index) for layer in self.parts], self.num_settled)


def can_share(cache: Any) -> bool:
    """Whether texts can share this cache of a video: whether every layer keeps a key and a value of every row."""
    return all(isinstance(layer, ReservedLayer) for layer in cache.layers)


def share(cache: Any) -> SharedCache:
    """Return a cache for texts that continue the video in ``cache``, for which ``can_share`` holds. It is not changed."""
    own = [_OwnRows(layer, _empty_like(layer)) for layer in cache.layers]
    return SharedCache(own, getattr(cache, "num_settled", None))


def _empty_like(layer: ReservedLayer) -> ReservedLayer:
    return QuantizedLayer(layer.kv) if isinstance(layer, QuantizedLayer) else ReservedLayer()


@dataclass(frozen=True)
class Shared:
    """What attention needs to know. ``cache``: of the video and the texts. ``is_token``: (B, s) bool, False where a text's
    own rows are padding, ``None`` if none are. ``num_pads``: how many of them each text begins with, in its first pass, where
    there is no other padding; else ``None``."""

    cache: SharedCache
    is_token: Tensor | None
    num_pads: tuple[int, ...] | None

    @staticmethod
    def of(cache: SharedCache, is_token: Tensor | None, num_texts: int) -> Shared:
        """For a pass of texts. ``is_token``: (B, P + s) bool, with the rows of the video, or ``None``."""
        own = None if is_token is None else is_token[:, cache.num_video_rows :]
        if cache.get_seq_length() > cache.num_video_rows:
            return Shared(cache, own, None)
        # Read once for all layers: a GPU is waited for.
        return Shared(cache, own, (0,) * num_texts if own is None else tuple((~own).sum(1).tolist()))


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layer: int, shared: Shared, kernel: str
) -> Tensor:
    """Attention of texts to the video and, causally, to their own rows.

    ``query``: (B, heads, q, d), the last q of a text's s own rows. ``key``, ``value``: (B, kv_heads, s, d), those rows.
    ``scaling``: factor of the scores, by default 1/sqrt(d). ``layer``: its number. ``shared``: the video, and where padding
    is. ``kernel``: sdpa, flash or eager, of which the last writes all scores out. Returns (B, heads, q, d).
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_texts, num_heads, num_queries, width = query.shape
    # All texts are queries of one sequence, so that keys and values of the video are read once.
    rows = query.transpose(0, 1).reshape(1, num_heads, num_texts * num_queries, width)
    seen, sums = _attend_all(rows, *shared.cache.parts[layer].read_video(query.dtype), factor, kernel)
    seen = seen.float().reshape(num_heads, num_texts, num_queries, width).transpose(0, 1).contiguous()
    sums = sums.float().reshape(num_heads, num_texts, num_queries).transpose(0, 1).contiguous()
    is_long = num_queries >= LEAST_ROWS_OF_KERNEL and kernel != "eager"
    if shared.num_pads is not None and is_long and takes_flash(query, key, value):
        for text, start in enumerate(shared.num_pads):
            part = slice(text, text + 1), slice(None), slice(start, None)
            Written.blend(seen[part], sums[part], *attend_flash(query[part], key[part], value[part], factor, True))
        return seen.to(query.dtype)
    size = max(1, SCORE_BYTES // (FLOAT32 * num_texts * num_heads * key.shape[2]))
    for start in range(0, num_queries, size):
        part = slice(None), slice(None), slice(start, start + size)
        num_later = num_queries - min(start + size, num_queries)
        _add_own(seen[part], sums[part], query[part], key, value, factor, num_later, shared.is_token)
    return seen.to(query.dtype)


def _add_own(
    seen: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    num_later: int,
    is_token: Tensor | None,
) -> None:
    """Add what queries read of their own rows to what they have ``seen``, with every score written out.

    ``seen``: (B, heads, q, d) float32. ``sums``: (B, heads, q), what the scores of it add up to. ``query``, ``key``,
    ``value``: as in ``attend_shared``, of ``query`` some. ``factor``: of the scores. ``num_later``: rows after the last
    query. ``is_token``: as in ``Shared``.
    """
    num_texts, num_heads, num_queries, width = query.shape
    num_keys = key.shape[2]
    groups = query.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, kv_heads, heads of each * q, d)
    scores = (groups @ key.float().mT * factor).view(num_texts, num_heads, num_queries, num_keys)
    places = torch.arange(num_keys, device=query.device)
    last = places[num_keys - num_later - num_queries : num_keys - num_later, None]
    hidden = places > last if is_token is None else (places > last) | ~is_token[:, None, None]
    scores.masked_fill_(hidden, -torch.inf)
    total = torch.logaddexp(sums, scores.logsumexp(-1))
    # A row of padding sees no row of its own: its scores are minus infinity, and the video is all it reads.
    shares = scores.sub_(total[..., None]).exp_().view(num_texts, key.shape[1], -1, num_keys)
    own = (shares @ value.float()).view(num_texts, num_heads, num_queries, width)
    seen.mul_((sums - total).exp()[..., None]).add_(own)


def _attend_all(query: Tensor, key: Tensor, value: Tensor, factor: float, kernel: str) -> tuple[Tensor, Tensor]:
    """What (1, heads, n, d) queries read from (1, kv_heads, P, d) rows, and the logarithm of what the exponentials of their
    scores add up to, (1, heads, n)."""
    if kernel != "eager" and takes_flash(query, key, value):
        return attend_flash(query, key, value, factor, False)
    groups = query[0].float().unflatten(0, (key.shape[1], -1))  # (kv_heads, heads of each, n, d)
    keys, values, parts = key[0].float().mT, value[0].float(), []
    for part in groups.split(max(1, SCORE_BYTES // (FLOAT32 * query.shape[1] * key.shape[2])), dim=2):
        scores = part.flatten(1, 2) @ keys * factor  # the heads of a group are rows of one product
        sums = scores.logsumexp(-1).unflatten(1, part.shape[1:3])
        parts.append(((scores.softmax(-1) @ values).unflatten(1, part.shape[1:3]), sums))
    out, sums = (torch.cat(found, dim=2).flatten(0, 1)[None] for found in zip(*parts, strict=True))
    return out, sums
