"""KTV: key frames from clusters of frames, and the key tokens of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.clustering import mean_frames
from freres_cli.baselines.declaration import Method, lazy_module
from freres_cli.baselines.evs import pick_highest
from freres_cli.baselines.full import gather_tokens
from freres_cli.baselines.shares import clamp_budget
from freres_cli.baselines.ts_llava import split_evenly
from freres_cli.records import VideoTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

KEY_FRAMES = 6  # of the paper
NORM_SHARE = 0.2  # of a token's score, where the paper has attention
SEED = 0
ROUNDING = 1e-5  # of the largest value: smaller differences are no more than that
MOST_ROUNDS = 100


def keep_key_tokens(latents: Tensor, frame_seconds: Tensor, budget_tokens: int, width: int) -> VideoTokens:
    """Return the min(B, T*H*W) key tokens of the key frames of ``latents`` (T, H, W, C), in raster order.

    B is ``budget_tokens``. There are six key frames, or more, ceil(2*B / (H*W)), so that about half of each is dropped, as
    in the paper's larger setting (ours); at most T and B. Each is nearest to the centre of a cluster of frames, by the mean
    of their tokens over the first D channels. They keep equal numbers of tokens, except that some have one more: those
    that ``score_tokens`` ranks highest, ties in raster order. Time grows with T times the number of key frames.
    ``frame_seconds``: (T,) float64. ``width``: D. Raises ``ValueError`` if the budget is below one.
    """
    num_tokens = clamp_budget(latents, budget_tokens)
    num_frames, per_frame = latents.shape[0], latents.shape[1] * latents.shape[2]
    num_keys = min(num_frames, num_tokens, max(KEY_FRAMES, -(-2 * num_tokens // per_frame)))
    means = mean_frames(latents, width)
    frames = choose_frames(means, num_keys).sort().values.tolist()
    kept = []
    for frame, count in zip(frames, split_evenly(num_tokens, num_keys), strict=True):
        scores = score_tokens(latents[frame, ..., :width].flatten(0, 1).to(torch.float32))
        kept.append(frame * per_frame + pick_highest(scores, count))
    return gather_tokens(latents, frame_seconds, torch.cat(kept), width)


def choose_frames(features: Tensor, count: int) -> Tensor:
    """Return ``count`` <= T different frames, each the nearest to a centre of k-means that no earlier centre took: (count,)
    int64.

    ``features``: (T, F). Centres start as k-means++ chooses them, with a fixed seed.
    """
    if count == features.shape[0]:
        return torch.arange(count)
    features = features.to(torch.float64)
    centres = _cluster(features, features[_seed_centres(features, count)])
    taken = torch.zeros(features.shape[0], dtype=torch.bool)
    for centre in centres:
        distance = (features - centre).square().sum(1).masked_fill(taken, torch.inf)
        taken[distance.argmin()] = True
    return taken.nonzero()[:, 0]


def score_tokens(tokens: Tensor) -> Tensor:
    """Return how much of a key token each of the ``tokens`` (N, D) of a frame is: (N,).

    0.2 times its norm and 0.8 times (1 - its mean cosine to the other tokens), both scaled to [0, 1] over the frame.
    """
    units = torch.nn.functional.normalize(tokens, dim=-1)
    alike = units @ units.sum(0) - units.square().sum(-1)
    return NORM_SHARE * _scale(tokens.norm(dim=-1)) + (1 - NORM_SHARE) * (1 - _scale(alike))


def _scale(values: Tensor) -> Tensor:
    """Shift and stretch to [0, 1]; 0 if all are equal, but for rounding."""
    low, high = values.aminmax()
    is_varied = high - low > ROUNDING * values.abs().max()
    return (values - low) / (high - low) if bool(is_varied) else torch.zeros_like(values)


def _seed_centres(features: Tensor, count: int) -> Tensor:
    """Return the frames of k-means++: the first at random, each further one with a chance in proportion to its squared
    distance from the nearest of those before; where all distances are 0, the first frame that is left."""
    generator = torch.Generator().manual_seed(SEED)
    chosen = [int(torch.randint(features.shape[0], (1,), generator=generator))]
    nearest = torch.full(features.shape[:1], torch.inf, dtype=torch.float64)
    is_left = torch.ones(features.shape[0], dtype=torch.bool)
    for _ in range(count - 1):
        is_left[chosen[-1]] = False
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1)) * is_left
        chances = nearest.cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * chances[-1]
        index = int(torch.searchsorted(chances, drawn, right=True))
        chosen.append(index if index < len(is_left) and bool(is_left[index]) else int(is_left.nonzero()[0]))
    return torch.tensor(chosen)


def _cluster(features: Tensor, centres: Tensor) -> Tensor:
    """Return the ``centres`` (k, F) that Lloyd's rounds lead to; a centre without frames stays where it is."""
    owner = None
    for _ in range(MOST_ROUNDS):
        nearest = torch.cdist(features, centres).argmin(1)
        if owner is not None and torch.equal(nearest, owner):
            break
        owner = nearest
        counts = torch.bincount(owner, minlength=centres.shape[0])
        sums = torch.zeros_like(centres).index_add_(0, owner, features)
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], centres)
    return centres


METHOD = Method(
    name="ktv",
    summary="key frames from clusters of frames, and of each the tokens of large norm that are least like the others",
    source="KTV, arXiv 2602.03615",
    deviations="frames are clustered by their mean latent, not by DINOv2; a token's norm takes the place of CLIP's "
    "attention; key frames share the budget evenly, not by likeness to the question; above six half frames there are more "
    "key frames",
    compress=keep_key_tokens,
)
