"""Backgrounds made up from random numbers."""

from __future__ import annotations

from numpy.random import Generator

from freres_cli.world.scene import TEXTURES, Background


def random_background(rng: Generator) -> Background:
    """Return a dull background with one of the textures, sometimes with a gradient, sometimes drifting."""
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    base = rng.uniform(45, 85)
    red, green, blue = (float(v) for v in base + rng.uniform(-15, 15, 3))
    gradient = (0.0, 0.0) if rng.random() < 0.5 else _pair(rng, 25)
    drift = _pair(rng, 0.8) if rng.random() < 0.25 else (0.0, 0.0)
    return Background(
        texture,
        (red, green, blue),
        float(rng.uniform(16, 26)),
        float(rng.uniform(11, 15)),
        bool(rng.random() < 0.5),
        gradient,
        drift,
        rng.choice([-1.0, 0.0, 1.0], (48, 48)),
    )


def _pair(rng: Generator, most: float) -> tuple[float, float]:
    """Two numbers between ``-most`` and ``most``."""
    x, y = rng.uniform(-most, most, 2)
    return float(x), float(y)
