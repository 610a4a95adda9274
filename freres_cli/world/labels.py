"""What the vision tower is taught: for every token, which object is there, and where. And the frames it learns from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from freres_cli.world.scene import COLOURS, SHAPES, SIDE, TEXTURES, Scene, Shot, Thing
from freres_cli.world.script import random_background

STILLS = 2
MAX_THINGS = 5

# The columns of the labels: presence, then what is known where something is present, then the texture everywhere.
CLASSES = {"shape": len(SHAPES), "colour": len(COLOURS) + 1, "turn": 4, "rim": 2}
REACH = 0.62  # how far beyond a cell's edge an object's centre may lie to be its own, in radii


def make_stills(seed: int) -> Scene:
    """Frames with nothing in common but their background: each object is at a new place in every frame."""
    rng = np.random.default_rng([seed, 1])
    scene = Scene(STILLS, 1, [Shot(0, STILLS, random_background(rng))], [], np.ones(STILLS))
    scene.fade = np.where(rng.random(STILLS) < 0.06, rng.uniform(0.2, 1.0, STILLS), 1.0)
    for _ in range(int(rng.integers(2, MAX_THINGS + 1))):
        shape, colour = SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))]
        centre = rng.uniform(10, SIDE - 10, (STILLS, 2))
        visible, white = rng.random(STILLS) < 0.75, rng.random(STILLS) < 0.12
        thing = Thing(shape, colour, float(rng.uniform(9, 12.5)), centre, visible, white)
        thing.turn = int(rng.integers(4)) if shape == "arrow" else 0
        thing.is_outlined = bool(rng.random() < 0.25)
        scene.things.append(thing)
    return scene


def dense_labels(scene: Scene, grid: int) -> dict[str, Tensor]:
    """Labels of every token of every frame, each (T, grid, grid).

    ``present`` bool; ``shape``, ``colour``, ``turn``, ``rim``, ``texture`` int64; ``place`` (T, grid, grid, 2): centre of
    the object from the cell's, in cells. The topmost object counts. (Where a cell lies in the frame is nothing that a
    tower with relative positions could know.)
    """
    cell = SIDE / grid
    middle = (torch.arange(grid) + 0.5) * cell
    shape = (scene.num_frames, grid, grid)
    labels = {name: torch.zeros(shape, dtype=torch.long) for name in CLASSES}
    present, place = torch.zeros(shape, dtype=torch.bool), torch.zeros(*shape, 2)
    for thing in scene.things:
        centre = torch.from_numpy(thing.centre).float()
        dx = centre[:, None, None, 0] - middle[None, None, :].expand(shape)
        dy = centre[:, None, None, 1] - middle[None, :, None].expand(shape)
        near = torch.maximum(dx.abs(), dy.abs()) < cell / 2 + REACH * thing.radius
        near &= torch.from_numpy(thing.visible)[:, None, None]
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
