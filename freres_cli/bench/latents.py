"""Made latents that change as those of a video do, for the cost of methods that depends on what they are given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_SCENES = 6
SCENE_SHARE = 0.6  # how much of a latent is its scene's own; the rest is common to all, as in real towers
OBJECT_SHARE = 0.25  # side of the object that crosses the frame, in sides of the frame
PERIOD_FRAMES = 240.0  # of the slow change of the whole frame: 8 s at 30 fps
DRIFT, NOISE = 0.2, 0.05
NOISE_FRAMES = 8


class MadeLatents:
    """Latents of ``num_frames`` frames on ``grid`` (H, W), D = ``width``. The same arguments give the same latents.

    Six scenes of different lengths, with hard cuts between them. In each, the whole frame changes slowly (a sine of a
    fixed direction), an object crosses it once, a cell at a time, and every value has independent noise. On a 24x24 grid
    the flattened cosine distance from frame to frame is below 0.1 within a scene (median 0.0025) and about 0.45 at a cut;
    real clips have at most 0.09, and 0.28 to 0.60 at cuts (ours).
    """

    def __init__(self, num_frames: int, grid: tuple[int, int], width: int) -> None:
        self.num_frames, self.grid, self.width = num_frames, grid, width
        generator = torch.Generator().manual_seed(0)
        shape = (*grid, width)
        self._common = torch.randn(shape, generator=generator)
        self._noise = torch.randn(NOISE_FRAMES, *shape, generator=generator) * NOISE
        ends = torch.rand(min(NUM_SCENES, num_frames), generator=generator).add(0.5).cumsum(0)
        self.cuts = (ends / ends[-1] * num_frames).round().long().tolist()
        self._scene: tuple[int, Tensor, Tensor, Tensor] | None = None

    def frames(self, start: int, stop: int) -> Tensor:
        """Return some frames: (stop - start, H, W, D) bfloat16. No more than a few frames of float32 exist at a time."""
        made = torch.empty(stop - start, *self.grid, self.width, dtype=torch.bfloat16)
        for place, frame in enumerate(range(start, stop)):
            made[place] = self._draw(frame)
        return made

    def _draw(self, frame: int) -> Tensor:
        number = next(i for i, end in enumerate(self.cuts) if frame < end)
        first = self.cuts[number - 1] if number else 0
        base, direction, thing = self._open_scene(number)
        drawn = base + direction * (DRIFT * math.sin(2 * math.pi * frame / PERIOD_FRAMES))
        way = (frame - first) / max(1, self.cuts[number] - 1 - first)
        top, left = (round((side - size) * way) for side, size in zip(self.grid, thing.shape[:2], strict=True))
        drawn[top : top + thing.shape[0], left : left + thing.shape[1]] = thing
        # Shifted, so that no two frames of a scene have the same noise at the same place.
        noise = self._noise[frame % NOISE_FRAMES].roll(frame // NOISE_FRAMES, dims=-1)
        return drawn.add_(noise)

    def _open_scene(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._scene is None or self._scene[0] != number:
            generator = torch.Generator().manual_seed(1 + number)
            own, direction = torch.randn(2, *self.grid, self.width, generator=generator)
            size = [max(1, round(side * OBJECT_SHARE)) for side in self.grid]
            thing = torch.randn(*size, self.width, generator=generator)
            base = math.sqrt(1 - SCENE_SHARE**2) * self._common + SCENE_SHARE * own
            self._scene = number, base, direction, thing
        return self._scene[1:]
