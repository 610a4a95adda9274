"""What the vision tower learns for every token (which object is there, and where), and the frames it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freres_cli.world.background import random_background
from freres_cli.world.footage import add_footage
from freres_cli.world.scene import COLOURS, SHAPES, SIDE, TEXTURES, Scene, Shot, Thing
from freres_cli.world.script import LARGE_RADII, SMALL_RADII

STILLS = 2
MAX_THINGS = 5
STILLS_SMALL = 0.3  # of the objects of level 3

# Number of classes of each label that is known where an object is. Presence and texture are known everywhere.
CLASSES = {"shape": len(SHAPES), "colour": len(COLOURS) + 1, "turn": 4, "rim": 2}
REACH = 0.62  # how far outside a cell the centre of an object in that cell may be, in radii


def make_stills(seed: int, level: int = 1) -> Scene:
    """Return frames that share only their background: each object is at a new place in every frame. At ``level`` 3 they
    look like footage, and objects are of any size."""
    rng = np.random.default_rng([seed, 1])
    scene = Scene(STILLS, 1, [Shot(0, STILLS, random_background(rng))], [], np.ones(STILLS))
    scene.fade = np.where(rng.random(STILLS) < 0.06, rng.uniform(0.2, 1.0, STILLS), 1.0)
    for _ in range(int(rng.integers(2, MAX_THINGS + 1))):
        shape, colour = SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))]
        centre = rng.uniform(10, SIDE - 10, (STILLS, 2))
        visible, white = rng.random(STILLS) < 0.75, rng.random(STILLS) < 0.12
        radius = float(rng.uniform(9, 12.5))
        if level == 3:
            radius = float(rng.uniform(*(SMALL_RADII if rng.random() < STILLS_SMALL else LARGE_RADII)))
        thing = Thing(shape, colour, radius, centre, visible, white)
        thing.turn = int(rng.integers(4)) if shape == "arrow" else 0
        thing.is_outlined = bool(rng.random() < 0.25)
        scene.things.append(thing)
    return add_footage(scene, rng) if level == 3 else scene


def dense_labels(scene: Scene, grid: int) -> dict[str, Tensor]:
    """Return labels of every token of every frame, each (T, grid, grid).

    ``present`` bool; ``shape``, ``colour``, ``turn``, ``rim``, ``texture`` int64; ``place`` (T, grid, grid, 2): offset of
    the object's centre from the cell's, in cells. The topmost object counts. (The position of a cell in the frame is not
    a label: a tower with relative positions cannot know it.)
    """
    cell = SIDE / grid
    shape = (scene.num_frames, grid, grid)
    labels = {name: torch.zeros(shape, dtype=torch.long) for name in CLASSES}
    present, place = torch.zeros(shape, dtype=torch.bool), torch.zeros(*shape, 2)
    # In the order in which they are drawn.
    for thing in sorted(scene.things, key=lambda thing: thing.is_outlined):
        dx, dy, near = _reach(thing, shape, cell)
        present |= near
        white = torch.from_numpy(thing.is_white)[:, None, None]
        labels["shape"][near] = SHAPES.index(thing.shape)
        colour = torch.where(white, len(COLOURS), COLOURS.index(thing.colour)).expand(shape)
        labels["colour"] = torch.where(near, colour, labels["colour"])
        labels["turn"][near] = thing.turn if thing.shape == "arrow" else -100
        labels["rim"][near] = int(thing.is_outlined)
        found = torch.stack([dx, dy], -1) / cell
        place = torch.where(near[..., None], found, place)
    texture = torch.empty(shape, dtype=torch.long)
    for shot in scene.shots:
        texture[shot.start : shot.end] = TEXTURES.index(shot.background.texture)
    return {"present": present, "place": place, "texture": texture, **labels}


# What the language half learns about every visual token, besides the questions. For every token: where and when it is.
# Where there is an object: its centre; how far it has moved since it was first seen, and over what width and height;
# when that was; how often it has turned white, whether it has touched another object, and how many objects there are.
TRACES = (
    *("row", "column", "frame"),
    *("x", "y", "x_moved", "y_moved", "x_span", "y_span", "first", "blinks", "touched", "count"),
)
ALWAYS_KNOWN = 3  # the first ones; the others are known only where there is an object
MOVE_UNIT_PX, TIME_UNIT, COUNT_UNIT = 24.0, 20.0, 2.0
TOUCH_PX = 5.0  # between edges, in design px


def trace_labels(scene: Scene, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors: the values of ``TRACES``, (T, grid, grid, 13), each within a few units of 0; where there is
    an object, (T, grid, grid) bool; and where there is one that is visible or white only for a moment."""
    t = scene.num_frames
    labels = torch.zeros(t, grid, grid, len(TRACES))
    present, brief = torch.zeros(2, t, grid, grid, dtype=torch.bool)
    frame, row, column = torch.meshgrid(torch.arange(t), torch.arange(grid), torch.arange(grid), indexing="ij")
    labels[..., 0], labels[..., 1] = row * (2 / grid) - 1, column * (2 / grid) - 1
    labels[..., 2] = frame / TIME_UNIT - 1
    lasting = [thing for thing in scene.things if thing.facts.get("role") != "transient"]
    count = np.sum([thing.visible for thing in lasting], axis=0)
    for thing in scene.things:
        near = _reach(thing, (t, grid, grid), SIDE / grid)[2]
        present |= near
        short = thing.is_white if thing in lasting else thing.visible
        brief |= near & torch.from_numpy(short)[:, None, None]
        known = np.column_stack([_history(thing, [other for other in lasting if other is not thing]), count])
        known[:, -1] = known[:, -1] / COUNT_UNIT - 1
        rows = torch.from_numpy(known).float()[:, None, None].expand(t, grid, grid, -1)
        labels[..., ALWAYS_KNOWN:] = torch.where(near[..., None], rows, labels[..., ALWAYS_KNOWN:])
    return labels, present, brief


def _history(thing: Thing, others: Sequence[Thing]) -> NDArray[np.float64]:
    """The traces of one object: (T, 9) x, y, x_moved, y_moved, x_span, y_span, first, blinks, touched."""
    first = int(thing.visible.argmax())
    since = thing.centre.copy()
    since[:first] = since[first]
    span = np.maximum.accumulate(since) - np.minimum.accumulate(since)
    onset = thing.is_white & ~np.roll(thing.is_white, 1)
    touched = np.zeros(len(since), bool)
    for other in others:
        gap = np.linalg.norm(thing.centre - other.centre, axis=1) - thing.radius - other.radius
        touched |= (gap < TOUCH_PX) & thing.visible & other.visible
    return np.column_stack(
        [
            thing.centre / (SIDE / 2) - 1,
            (since - since[first]) / MOVE_UNIT_PX,
            span / MOVE_UNIT_PX,
            np.full(len(since), first / TIME_UNIT - 1),
            np.cumsum(onset) / COUNT_UNIT,
            2.0 * np.maximum.accumulate(touched) - 1,
        ]
    )


def _reach(thing: Thing, shape: tuple[int, int, int], cell: float) -> tuple[Tensor, Tensor, Tensor]:
    """Offset in x and y of an object from each cell's centre, and the cells it reaches while visible: (T, grid, grid)."""
    middle = (torch.arange(shape[1]) + 0.5) * cell
    centre = torch.from_numpy(thing.centre).float()
    dx = centre[:, None, None, 0] - middle[None, None, :].expand(shape)
    dy = centre[:, None, None, 1] - middle[None, :, None].expand(shape)
    near = torch.maximum(dx.abs(), dy.abs()) < cell / 2 + REACH * thing.radius
    return dx, dy, near & torch.from_numpy(thing.visible)[:, None, None]
