"""What happens in a generated clip, as plain numbers: objects with a place in every frame, backgrounds, cuts.

Lengths are in design pixels: the frame is ``SIDE`` wide and high, whatever size it is rendered at.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

SIDE = 96
SMALL_RADIUS = 4.8

SHAPES = ("circle", "square", "triangle", "cross", "ring", "arrow")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
TEXTURES = ("plain", "striped", "checked", "speckled")
DIRECTIONS = ("up", "right", "down", "left")  # an arrow's quarter turns, clockwise
STEPS = {"up": (0.0, -1.0), "right": (1.0, 0.0), "down": (0.0, 1.0), "left": (-1.0, 0.0)}

COLOUR_RGB = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (55, 95, 240),
    "yellow": (240, 220, 50),
    "purple": (175, 60, 215),
    "cyan": (60, 215, 220),
}


@dataclass
class Thing:
    """An object, and where it is in each of T frames.

    ``centre``: (T, 2) x, y. ``visible``, ``is_white``: (T,) bool. ``turn``: quarter turns clockwise (arrows only).
    ``is_outlined``: it has a white rim, as short-lived objects do.
    """

    shape: str
    colour: str
    radius: float
    centre: NDArray[np.float64]
    visible: NDArray[np.bool_]
    is_white: NDArray[np.bool_]
    turn: int = 0
    is_outlined: bool = False
    facts: dict[str, str | int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def is_small(self) -> bool:
        """Whether its shape is hard to see: it is less than a tenth of the frame high."""
        return self.radius < SMALL_RADIUS


@dataclass
class Camera:
    """How the camera moves over the background of a shot of n frames. ``offset``: (n, 2) px x, y; ``zoom``: (n,)."""

    offset: NDArray[np.float64]
    zoom: NDArray[np.float64]


@dataclass
class Haze:
    """Soft waves over a background, on a layer of its own, which moves ``parallax`` times as far as the background.

    ``waves``: (k, 4) x and y frequency in radians per px, phase, and amplitude in grey levels.
    """

    waves: NDArray[np.float64]
    parallax: float


@dataclass
class Post:
    """A grey post from top to bottom, in front of the objects. ``centre``: (T,) x; ``width``: px; ``grey``: level."""

    centre: NDArray[np.float64]
    width: float
    grey: float


@dataclass
class Background:
    """A textured background. ``drift``: px (x, y) that the texture moves per frame, as under a moving camera."""

    texture: str
    rgb: tuple[float, float, float]
    contrast: float
    period: float
    is_upright: bool
    gradient: tuple[float, float]
    drift: tuple[float, float]
    speckles: NDArray[np.float64]


@dataclass
class Shot:
    """Frames ``start`` to ``end`` (excluded) with one background.

    ``elapsed``: frames cut off at the start of the shot; a drifting background has moved on by as many. ``camera``:
    levels 2 and 3 only; covers the whole shot, with the frames cut off, and takes the place of the background's drift.
    ``haze``: level 3 only.
    """

    start: int
    end: int
    background: Background
    elapsed: int = 0
    camera: Camera | None = None
    haze: Haze | None = None

    def stretch(self, start: int, end: int) -> Shot:
        """Return the part that is in frames ``start`` to ``end`` of the clip, counted from ``start``."""
        low, high = max(self.start, start), min(self.end, end)
        return replace(self, start=low - start, end=high - start, elapsed=self.elapsed + low - self.start)


@dataclass
class Scene:
    """The content of a clip. ``fade``: (T,) brightness, 1 as drawn. ``facts``: what questions may ask about the whole.

    ``posts``: drawn over all objects but the short-lived ones. ``noise``: the sensor's, in grey levels. ``frame_seeds``:
    (T,) seed of the noise of each frame; empty without noise.
    """

    num_frames: int
    fps: int
    shots: list[Shot]
    things: list[Thing]
    fade: NDArray[np.float64]
    facts: dict[str, str | int] = field(default_factory=dict)
    posts: list[Post] = field(default_factory=list)
    noise: float = 0.0
    frame_seeds: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def stretch(self, start: int, end: int) -> Scene:
        """Return frames ``start`` to ``end`` (excluded, cut at the clip's end) as a clip, with the facts of the whole."""
        rows = slice(start, end)
        shots = [shot.stretch(start, end) for shot in self.shots if shot.start < end and start < shot.end]
        things = [
            replace(thing, centre=thing.centre[rows], visible=thing.visible[rows], is_white=thing.is_white[rows])
            for thing in self.things
        ]
        fade = self.fade[rows]
        posts = [replace(post, centre=post.centre[rows]) for post in self.posts]
        seeds = self.frame_seeds[rows]
        return replace(
            self, num_frames=len(fade), shots=shots, things=things, fade=fade, posts=posts, frame_seeds=seeds
        )

    def thing(self, name: str) -> Thing:
        """Return the object with a full name, such as ``red circle``."""
        return next(thing for thing in self.things if thing.name == name)
