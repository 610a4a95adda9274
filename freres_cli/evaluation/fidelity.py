"""How much of a clip a reader can rebuild from its visual tokens, without a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.records import VideoTokens

CHUNK_VALUES = 2**24  # latents compared at a time: bounds the memory
# Of the tokens' squared norms. Those of a picture of one colour differ by some 5e-13 of it.
ROUNDING_SHARE = 1e-9


@dataclass(frozen=True)
class Reading:
    """What a reader shows at every place of every frame: a mix of two rows.

    ``rows``: (R, D) float32. ``before``, ``after``: (T, N) int64 rows. ``share``: (T, N) float32 share of ``after``;
    ``None`` if only ``before`` is shown.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    share: Tensor | None

    def frames(self, part: slice | Tensor) -> Tensor:
        """Return some of the rebuilt frames: (n, N, D) float32. ``part``: a slice of them, or their indices (n,)."""
        shown = self.rows[self.before[part]]
        if self.share is None:
            return shown
        return torch.lerp(shown, self.rows[self.after[part]], self.share[part][..., None])


def hold(tokens: VideoTokens) -> Reading:
    """Return the clip in which every place shows one token until another one takes over.

    At a frame, a place shows the token whose box contains both; of several, the one of the smallest area, then the one
    that starts last, then the last in sequence. In a frame where no box contains the place, it shows what it showed in
    the frame before; ahead of the first such box, what it shows there. A place that is in no box at all shows the mean
    of the tokens of the nearest frame that has any, the earlier of two.
    """
    covering = _cover(tokens)
    num_frames, num_places = covering.shape
    frame = torch.arange(num_frames)[:, None]
    last = torch.where(covering >= 0, frame, -1).cummax(0).values
    first = torch.where(covering >= 0, frame, num_frames).min(0).values.clamp(max=num_frames - 1)
    source = torch.where(last >= 0, last, first)
    shown = covering[source, torch.arange(num_places)]
    rows, shown = _show_means(tokens, shown)
    return Reading(rows, shown, shown, None)


def interpolate(tokens: VideoTokens) -> Reading:
    """Return the clip in which every place runs in a straight line from each of its tokens to the next in time.

    A place's tokens are those whose boxes contain it at any frame, each at its own (fractional) position in time. Before
    the first and after the last it stands still. Of several at one instant, and for a place without any, it takes what
    ``hold`` takes.
    """
    num_frames, grid_h, grid_w = tokens.grid
    num_places = grid_h * grid_w
    keys, owners = _instants(tokens)
    places = torch.arange(num_places)[None, :].expand(num_frames, num_places)
    frames = torch.arange(num_frames, dtype=torch.float64)[:, None].expand(num_frames, num_places)
    wanted = (places * _span(tokens) + frames).contiguous()
    after = torch.searchsorted(keys, wanted, right=True)
    before = after - 1
    place_of = torch.div(keys, _span(tokens), rounding_mode="floor").long()
    has_before = (before >= 0) & (place_of[before.clamp(min=0)] == places)
    has_after = (after < keys.shape[0]) & (place_of[after.clamp(max=keys.shape[0] - 1)] == places)
    before, after = torch.where(has_before, before, after), torch.where(has_after, after, before)
    both = has_before & has_after
    none = ~has_before & ~has_after
    before, after = before.masked_fill(none, 0), after.masked_fill(none, 0)
    start, stop = keys[before], keys[after]
    share = torch.where(both, (wanted - start) / (stop - start), 0.0).to(torch.float32)
    rows, before = _show_means(tokens, owners[before].masked_fill(none, -1))
    return Reading(rows, before, torch.where(none, before, owners[after]), share)


READERS: dict[str, Callable[[VideoTokens], Reading]] = {"hold": hold, "linear": interpolate}


def measure_energy(latents: Tensor, width: int) -> float:
    """Return the energy of a clip, ``latents`` (T, H, W, C): the squared distances of its tokens to their mean, over the
    first ``width`` channels, summed in float64; 0 if it is but the rounding of equal tokens."""
    tokens = latents[..., :width].flatten(0, 2)
    mean = torch.stack([part.sum(0, dtype=torch.float64) for part in _parts(tokens)]).sum(0) / tokens.shape[0]
    energy = float(sum((part.to(torch.float64) - mean).square().sum() for part in _parts(tokens)))
    whole = energy + tokens.shape[0] * float(mean.square().sum())  # their squared norms
    return energy if energy > ROUNDING_SHARE * whole else 0.0


def measure_loss(latents: Tensor, rebuild: Callable[[slice], Tensor], width: int) -> Tensor:
    """Return the energy lost in each frame of ``latents`` (T, H, W, C): (T,) float64, the squared distances between its
    tokens and the rebuilt ones, over the first ``width`` channels.

    ``rebuild``: returns some frames of the rebuilt clip, (n, H*W, D).
    """
    lost = []
    step = max(1, CHUNK_VALUES // (latents.shape[1] * latents.shape[2] * width))
    for start in range(0, latents.shape[0], step):
        part = slice(start, start + step)
        difference = latents[part, ..., :width].flatten(1, 2).to(torch.float32) - rebuild(part)
        lost.append(difference.square().sum((1, 2), dtype=torch.float64))
    return torch.cat(lost)


def share_kept(lost: float, energy: float) -> float:
    """Return the share of a clip's energy that is kept: 1 - lost / energy; 1 for a clip without energy.

    It is negative if the mean token in every place would have been closer.
    """
    return 1.0 - lost / energy if energy > 0 else 1.0


def lost_by_second(lost: Tensor, energy: float, seconds: Sequence[float]) -> list[float]:
    """Return the share of the clip's energy that is lost in each second after the first frame. It sums to 1 - kept.

    ``lost``: (T,) energy lost by frame. ``energy``: of the clip. ``seconds``: time of each frame.
    """
    times = torch.tensor(seconds, dtype=torch.float64)
    # To the microsecond, so a frame at 1 s on a clock that starts at 0.3 s does not round down to second 0.
    second = ((times - times[0]) * 1e6).round().div(1e6).floor().long().clamp(min=0)
    sums = torch.zeros(int(second.max()) + 1, dtype=torch.float64).index_add_(0, second, lost)
    return (sums / energy if energy > 0 else torch.zeros_like(sums)).tolist()


def find_nearest(values: Tensor, wanted: Tensor) -> Tensor:
    """Return the index of the value nearest to each wanted one, the earlier of two: (n,) int64. ``values`` increase."""
    later = torch.searchsorted(values, wanted).clamp(max=values.shape[0] - 1)
    earlier = (later - 1).clamp(min=0)
    return torch.where((values[later] - wanted).abs() < (wanted - values[earlier]).abs(), later, earlier)


def find_places(values: Tensor, wanted: Tensor) -> Tensor:
    """Return the indices of the values nearest to the wanted ones, as ``find_nearest`` does, where both may repeat: what is
    wanted at one value is spread evenly over the places that have it: (n,) int64. Both increase or stay."""
    value = values[find_nearest(values, wanted)]
    start, stop = torch.searchsorted(values, value), torch.searchsorted(values, value, right=True)
    first, count = torch.searchsorted(start, start), torch.bincount(start, minlength=values.shape[0])[start]
    rank = torch.arange(wanted.shape[0]) - first
    return start + torch.div((2 * rank + 1) * (stop - start), 2 * count, rounding_mode="floor")


def _parts(tokens: Tensor) -> Sequence[Tensor]:
    return tokens.split(max(1, CHUNK_VALUES // tokens.shape[1]))


def _boxes(tokens: VideoTokens) -> Tensor:
    """The boxes; without them, each token's own cell at its own frame, the nearest to its position."""
    if tokens.boxes is not None:
        return tokens.boxes
    limits = torch.tensor(tokens.grid) - 1
    first = (tokens.positions.to(torch.float64) + 0.5).floor().long().clamp(min=0).minimum(limits)
    return torch.stack([first, first + 1], dim=2).flatten(1)


def _by_preference(boxes: Tensor) -> Tensor:
    """Return the tokens from the least to the most preferred, (S,): by area, start and place in the sequence."""
    area = (boxes[:, 3] - boxes[:, 2]) * (boxes[:, 5] - boxes[:, 4])
    order = boxes[:, 0].argsort(stable=True)
    return order[area[order].argsort(descending=True, stable=True)]


def _spread(boxes: Tensor, axes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """List the points of every box on some axes (0 t, 1 h, 2 w): the row of each point's box, and its coordinates."""
    first, stop = boxes[:, 0::2][:, list(axes)], boxes[:, 1::2][:, list(axes)]
    sizes = stop - first
    counts = sizes.prod(1)
    row = torch.arange(boxes.shape[0]).repeat_interleave(counts)
    index = torch.arange(row.shape[0]) - (counts.cumsum(0) - counts)[row]
    coordinates = []
    for axis in reversed(range(len(axes))):
        coordinates.append(first[row, axis] + index % sizes[row, axis])
        index = index // sizes[row, axis]
    return row, coordinates[::-1]


def _cover(tokens: VideoTokens) -> Tensor:
    """Return the preferred token whose box contains each place of each frame, -1 where there is none: (T, N) int64."""
    num_frames, grid_h, grid_w = tokens.grid
    boxes = _boxes(tokens)
    order = _by_preference(boxes)
    rank, (t, h, w) = _spread(boxes[order], (0, 1, 2))
    best = torch.full((num_frames * grid_h * grid_w,), -1)
    best = best.scatter_reduce(0, (t * grid_h + h) * grid_w + w, rank, "amax")
    covering = torch.where(best >= 0, order[best.clamp(min=0)], -1)
    return covering.reshape(num_frames, grid_h * grid_w)


def _span(tokens: VideoTokens) -> int:
    """The distance between the keys of neighbouring places, more than any instant."""
    return tokens.grid[0] + 1


def _instants(tokens: VideoTokens) -> tuple[Tensor, Tensor]:
    """Return the instants of all places' tokens as increasing keys, place * span + t, float64, and the token of each."""
    boxes = _boxes(tokens)
    order = _by_preference(boxes)
    rank, (h, w) = _spread(boxes[order], (1, 2))
    token = order[rank]
    keys = (h * tokens.grid[2] + w) * _span(tokens) + tokens.positions[token, 0].to(torch.float64)
    # Stable: among equal keys the preferred token comes last.
    by_key = keys.argsort(stable=True)
    keys, token = keys[by_key], token[by_key]
    is_last = torch.cat([keys[1:] != keys[:-1], torch.ones(1, dtype=torch.bool)])
    return keys[is_last], token[is_last]


def _show_means(tokens: VideoTokens, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and which of them each place shows; one that shows nothing, -1, gets the mean of its nearest frame."""
    rows = tokens.latents[:, : tokens.width].to(torch.float32)
    is_bare = shown < 0
    if not bool(is_bare.any()):
        return rows, shown
    num_frames = tokens.grid[0]
    row, (frame,) = _spread(_boxes(tokens), (0,))
    sums = torch.zeros(num_frames, tokens.width, dtype=torch.float64).index_add_(0, frame, rows[row].to(torch.float64))
    counts = torch.bincount(frame, minlength=num_frames)
    held = counts.nonzero().squeeze(1)
    nearest = find_nearest(held, torch.arange(num_frames))
    means = (sums[held] / counts[held, None]).to(torch.float32)
    return torch.cat([rows, means]), torch.where(is_bare, rows.shape[0] + nearest[:, None], shown)
