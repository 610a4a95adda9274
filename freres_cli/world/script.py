"""Making up scenes from seeds. Each is of one of five kinds, so that every category of question has its clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from freres_cli.world.background import random_background
from freres_cli.world.footage import add_footage
from freres_cli.world.scene import COLOURS, DIRECTIONS, SHAPES, SIDE, STEPS, Camera, Scene, Shot, Thing

FPS = 8
SECONDS = (4, 5)
LONG_SECONDS, LONG_FPS = (6, 60), (12, 15, 24, 30)
FOOTAGE_SECONDS, FOOTAGE_FPS = (4, 20), (8, 10, 12, 15, 20, 24, 25, 30)
SWAY_SHARE, SWAY_PX = 0.5, 5.0
SMALL_SHARE, SMALL_RADII, LARGE_RADII = 0.2, (1.44, 4.5), (5.5, 14.4)
KINDS = ("motion", "cut", "hit", "order", "repeat")
MOVING_KINDS = ("motion", "hit")
CORNERS = ((24.0, 24.0), (72.0, 24.0), (24.0, 72.0), (72.0, 72.0))

SPEED_PX = {"slowly": 1.0, "steadily": 2.5, "quickly": 6.0}  # per frame
TRAVEL_FRAMES = {"slowly": (14, 18), "steadily": (11, 13), "quickly": (7, 9)}
TRANSIENT_FRAMES = (1, 1, 1, 2, 2, 3)
TRANSIENT_SHARE = 0.6
CIRCLE_RADIUS, CIRCLE_FRAMES = 12.0, 10
SHAKE_PX, SHAKE_FRAMES = 6.0, 4
BLINK_FRAMES = 2


@dataclass
class Cast:
    """Objects that differ in shape and in colour, so that either names one. Those not taken serve as wrong options."""

    names: list[tuple[str, str]]
    level: int = 1

    def radius(self, rng: Generator, may_be_small: bool) -> float:
        """Return the radius of a new object. At level 3 objects are 3 to 30 % of the frame's height."""
        if self.level < 3:
            return float(rng.uniform(9, 12.5))
        is_small = may_be_small and rng.random() < SMALL_SHARE
        return float(rng.uniform(*SMALL_RADII) if is_small else rng.uniform(*LARGE_RADII))

    def take(self) -> tuple[str, str]:
        """Return the shape and colour of an object that has not been taken yet."""
        return self.names.pop()


def make_scene(seed: int, kind: str | None = None, level: int = 1) -> Scene:
    """Return the scene of a seed, the same one on every machine. ``kind``: one of ``KINDS``, by default a random one.

    Level 1 lasts 4 or 5 s at 8 frames per second. Level 2 has the same events in clips of 6 to 60 s at 12 to 30 frames
    per second, with a camera that may sway. Level 3 looks like footage: 4 to 20 s at 8 to 30 frames per second, see
    ``world/footage.py``.
    """
    rng = np.random.default_rng(seed)
    kind = kind or KINDS[rng.choice(len(KINDS), p=(0.28, 0.2, 0.22, 0.15, 0.15))]
    num_frames = FPS * int(rng.choice(SECONDS))
    finer = np.random.default_rng([seed, 4])
    if level > 1:
        low, high = LONG_SECONDS if level == 2 else FOOTAGE_SECONDS
        num_frames = FPS * int(finer.integers(low, high + 1))
    cast = Cast(list(zip(rng.permutation(SHAPES).tolist(), rng.permutation(COLOURS).tolist(), strict=True)), level)
    scene = Scene(num_frames, FPS, [], [], np.ones(num_frames), {"kind": kind})
    _MAKERS[kind](scene, cast, rng)
    if rng.random() < TRANSIENT_SHARE:
        _add_transient(scene, cast, rng)
    scene.facts["unseen"] = "|".join(f"{colour} {shape}" for shape, colour in cast.names)
    if level == 1:
        return scene
    rates = LONG_FPS if level == 2 else FOOTAGE_FPS
    scene = _refine(scene, finer, int(rates[finer.integers(len(rates))]), SWAY_SHARE if level == 2 else 0.0)
    return scene if level == 2 else add_footage(scene, finer)


def _refine(scene: Scene, rng: Generator, fps: int, sway_share: float) -> Scene:
    """The same events at a higher frame rate, with the transient object in 1 to 5 of its frames, under a camera that
    sways in ``sway_share`` of the clips without questions about motion: those are about the picture."""
    ticks = np.arange(scene.num_frames * fps // FPS) * (FPS / fps)
    nearest = np.minimum(ticks.astype(int), scene.num_frames - 1)
    sway = np.zeros((len(ticks), 2))
    if rng.random() < sway_share and scene.facts["kind"] not in MOVING_KINDS:
        periods = rng.uniform(40, 90, 2)
        sway = SWAY_PX * np.sin(ticks[:, None] * (2 * np.pi / periods) + rng.uniform(0, 2 * np.pi, 2))
    for thing in scene.things:
        known = np.arange(scene.num_frames)
        x, y = (np.interp(ticks, known, thing.centre[:, axis]) for axis in (0, 1))
        # Between two shots an object jumps; it must not glide. Where both shots have it in one corner, it does, by less than
        # 12 px: to change that would change the published sets.
        jumps = np.abs(np.diff(thing.centre, axis=0)).max(1) > 2 * max(SPEED_PX.values())
        hold = np.append(jumps, False)[nearest]
        moved = np.where(hold[:, None], thing.centre[nearest], np.stack([x, y], -1))
        thing.centre = moved + sway
        thing.visible, thing.is_white = thing.visible[nearest], thing.is_white[nearest]
        if thing.facts.get("role") == "transient":
            length = int(rng.integers(1, 6))
            first = int(thing.visible.argmax())
            thing.visible[:] = False
            thing.visible[first : first + length] = True
            thing.facts |= {"frames": length, "starts": first}
    for shot in scene.shots:
        # Up, as ``nearest`` rounds ticks down: an object of the shot before is gone at the first frame of the next.
        shot.start, shot.end = (min(-(-at * fps // FPS), len(ticks)) for at in (shot.start, shot.end))
        drift = shot.background.drift
        shot.background.drift = (drift[0] * FPS / fps, drift[1] * FPS / fps)
        if sway.any():
            drifted = np.arange(shot.end - shot.start)[:, None] * shot.background.drift
            shot.camera = Camera(drifted - sway[shot.start : shot.end], np.ones(len(drifted)))
    scene.fade = np.interp(ticks, np.arange(scene.num_frames), scene.fade)
    scene.num_frames, scene.fps = len(ticks), fps
    return scene


def _one_shot(scene: Scene, rng: Generator) -> None:
    scene.shots = [Shot(0, scene.num_frames, random_background(rng))]


def _thing(
    scene: Scene,
    cast: Cast,
    rng: Generator,
    at: tuple[float, float],
    start: int = 0,
    end: int | None = None,
    may_be_small: bool = False,
) -> Thing:
    """Add a still object at ``at`` that is visible from frame ``start`` to ``end``."""
    shape, colour = cast.take()
    n = scene.num_frames
    visible = np.zeros(n, bool)
    visible[start : n if end is None else end] = True
    radius = cast.radius(rng, may_be_small)
    thing = Thing(shape, colour, radius, np.tile(np.asarray(at, float), (n, 1)), visible, np.zeros(n, bool))
    thing.turn = int(rng.integers(4)) if shape == "arrow" else 0
    scene.things.append(thing)
    return thing


def _corners(rng: Generator, count: int) -> list[tuple[float, float]]:
    """Places in different quarters of the frame, clear of its middle lines."""
    chosen = rng.permutation(len(CORNERS))[:count]
    return [(CORNERS[i][0] + rng.uniform(-8, 8), CORNERS[i][1] + rng.uniform(-8, 8)) for i in chosen]


def _place_fact(thing: Thing) -> None:
    x, y = thing.centre[0]
    thing.facts["place"] = f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


def _stay(thing: Thing) -> None:
    thing.facts |= {"does": "stays still", "speed": "not at all"}
    _place_fact(thing)


def _slide(thing: Thing, rng: Generator, start: int) -> None:
    """Move straight along an axis, inside the frame."""
    direction = DIRECTIONS[rng.integers(4)]
    speed = list(SPEED_PX)[rng.integers(3)]
    n = len(thing.centre)
    low, high = TRAVEL_FRAMES[speed]
    frames = min(int(rng.integers(low, high + 1)), n - 1 - start)
    length = frames * SPEED_PX[speed]
    step = np.asarray(STEPS[direction])
    along = rng.uniform(14, SIDE - 14 - length)
    across = rng.uniform(16, SIDE - 16)
    first = np.where(step > 0, along, np.where(step < 0, SIDE - along, across))
    moved = np.clip(np.arange(n) - start, 0, frames) * SPEED_PX[speed]
    thing.centre = first + moved[:, None] * step
    thing.facts |= {"does": "slides", "way": direction, "speed": speed, "starts": start}


def _circle(thing: Thing, rng: Generator, start: int) -> None:
    n = len(thing.centre)
    turn = np.clip(np.arange(n) - start, 0, None) * (2 * np.pi / CIRCLE_FRAMES) * rng.choice([-1, 1])
    angle = turn + rng.uniform(0, 2 * np.pi)
    first = np.clip(thing.centre[0], 14 + CIRCLE_RADIUS, SIDE - 14 - CIRCLE_RADIUS)
    thing.centre = first + CIRCLE_RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1)
    thing.facts["does"] = "circles"


def _shake(thing: Thing, start: int) -> None:
    since = np.arange(len(thing.centre)) - start
    side = np.where(since % SHAKE_FRAMES < SHAKE_FRAMES // 2, SHAKE_PX, -SHAKE_PX)
    thing.centre = thing.centre.copy()
    thing.centre[:, 0] += np.where(since >= 0, side, 0.0)
    thing.facts["does"] = "shakes"


def _move(thing: Thing, rng: Generator, start: int) -> None:
    does = rng.choice(4, p=(0.46, 0.18, 0.18, 0.18))
    if does == 0:
        _slide(thing, rng, start)
    elif does == 1:
        _circle(thing, rng, start)
    elif does == 2:
        _shake(thing, start)
    else:
        _stay(thing)


def _make_motion(scene: Scene, cast: Cast, rng: Generator) -> None:
    """One to four objects, each with its own motion."""
    _one_shot(scene, rng)
    count = int(rng.integers(1, 5))
    for at in _corners(rng, count):
        thing = _thing(scene, cast, rng, at, may_be_small=True)
        _move(thing, rng, int(rng.integers(1, scene.num_frames // 3)))
    scene.facts["num_objects"] = count


def _make_cut(scene: Scene, cast: Cast, rng: Generator) -> None:
    """Two shots of two objects each; one object is in both."""
    n = scene.num_frames
    cut = int(rng.integers(round(0.35 * n), round(0.65 * n)))
    scene.shots = [Shot(0, cut, random_background(rng)), Shot(cut, n, random_background(rng))]
    before, after = _corners(rng, 2), _corners(rng, 2)
    again = _thing(scene, cast, rng, before[0])
    again.centre[cut:] = after[0]
    again.facts["role"] = "again"
    for role, at, start, end in (("before", before[1], 0, cut), ("after", after[1], cut, n)):
        _thing(scene, cast, rng, at, start, end).facts["role"] = role
    scene.facts["cut"] = cut
    if rng.random() < 0.4:
        distance = np.abs(np.arange(n) + 0.5 - cut)
        scene.fade = np.clip(distance / 3, 0.0, 1.0)
        scene.facts["has_fade"] = 1


def _make_hit(scene: Scene, cast: Cast, rng: Generator) -> None:
    """The first object starts to move: pushed by the second, by the third, or by itself."""
    _one_shot(scene, rng)
    n = scene.num_frames
    direction = DIRECTIONS[rng.integers(4)]
    step = np.asarray(STEPS[direction])
    across = np.abs(step[::-1])
    lane = rng.uniform(22, 74)
    other = lane + 34 if lane < SIDE / 2 else lane - 34
    cause = ("nothing", "second", "third")[rng.choice(3, p=(0.25, 0.375, 0.375))]
    speed, frames = 2.5, np.arange(n)

    def at(along: float, place: float) -> tuple[float, float]:
        """A place on the lane ``place``; ``along`` is measured in the direction of motion."""
        signed = along if step.sum() > 0 else SIDE - along
        return tuple(np.abs(step) * signed + across * place)

    target = _thing(scene, cast, rng, at(rng.uniform(44, 50), lane))
    pair = [_thing(scene, cast, rng, (0.0, 0.0)) for _ in range(2)]
    contact = int(rng.integers(12, 18))
    target.facts |= {"does": "slides", "way": direction, "role": "target", "starts": contact}
    pusher = {"second": pair[0], "third": pair[1]}.get(cause)
    for thing in pair:
        if thing is pusher:
            travel = speed * (contact - 2)
            touching = float((target.centre[0] * np.abs(step)).sum())
            touching = touching if step.sum() > 0 else SIDE - touching
            first = at(touching - thing.radius - target.radius - travel + 2, lane)
            way = step
        else:
            way = step if rng.random() < 0.5 else -step
            travel = speed * int(rng.integers(8, 13))
            along = rng.uniform(16, SIDE - 16 - travel)
            # Both may be in the far lane, and pass each other.
            first = at(along if way is step else SIDE - along, other)
        moved = np.clip((frames - 2) * speed, 0, travel)
        thing.centre = np.asarray(first) + moved[:, None] * way
    target.centre = target.centre + np.clip((frames - contact) * speed, 0, rng.uniform(22, 34))[:, None] * step
    scene.facts["cause"] = pusher.name if pusher else "nothing"


def _make_order(scene: Scene, cast: Cast, rng: Generator) -> None:
    """Three objects appear one after the other."""
    _one_shot(scene, rng)
    n = scene.num_frames
    times = np.sort(rng.choice(np.arange((n - 2) // 6), 3, replace=False)) * 6 + rng.integers(1, 3, 3)
    places = _corners(rng, 3)
    for rank, index in enumerate(rng.permutation(3)):
        thing = _thing(scene, cast, rng, places[index], start=int(times[rank]), may_be_small=True)
        thing.facts["rank"] = rank
        _place_fact(thing)
    rng.shuffle(scene.things)
    scene.facts["num_objects"] = 3


def _make_repeat(scene: Scene, cast: Cast, rng: Generator) -> None:
    """One object turns white for a moment, one to four times."""
    _one_shot(scene, rng)
    n, count = scene.num_frames, int(rng.integers(1, 4 + 1))
    for rank, at in enumerate(_corners(rng, int(rng.integers(1, 4)))):
        thing = _thing(scene, cast, rng, at, may_be_small=rank > 0)
        _place_fact(thing)
        if rank == 0:
            slots = np.sort(rng.choice(np.arange((n - 3) // 5), count, replace=False)) * 5 + rng.integers(1, 4)
            for start in slots:
                thing.is_white[start : start + BLINK_FRAMES] = True
            thing.facts["blinks"] = count
    scene.facts["num_objects"] = len(scene.things)


def _add_transient(scene: Scene, cast: Cast, rng: Generator) -> None:
    """An outlined object, in front of everything else, for one to three frames."""
    n = scene.num_frames
    length = int(TRANSIENT_FRAMES[rng.integers(len(TRANSIENT_FRAMES))])
    start = int(rng.integers(2, n - length - 1))
    while (scene.fade[start : start + length] < 1).any():
        start = int(rng.integers(2, n - length - 1))
    at = (float(rng.uniform(16, SIDE - 16)), float(rng.uniform(16, SIDE - 16)))
    thing = _thing(scene, cast, rng, at, start, start + length)
    thing.is_outlined = True
    thing.facts |= {"role": "transient", "frames": length, "starts": start}


_MAKERS = {
    "motion": _make_motion,
    "cut": _make_cut,
    "hit": _make_hit,
    "order": _make_order,
    "repeat": _make_repeat,
}
