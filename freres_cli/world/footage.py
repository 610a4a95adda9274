"""Level 3: what real footage adds to a scene. A moving camera, light, noise, cuts, and posts in front of the objects.

Objects keep their places in the picture, apart from the camera's shake, so questions about motion are about the picture.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.random import Generator

from freres_cli.world.background import random_background
from freres_cli.world.scene import SIDE, Camera, Haze, Post, Scene, Shot, Thing

CUT_SHARE = 0.35  # of the clips that have no cut of their own
PAN_PX_A_S = 18.0
ZOOM = (0.8, 1.3)
STILL_SHARE = 0.2  # of the shots: a camera on a tripod
HAND_SHARE, HAND_PX = 0.4, 0.9  # of the clips: a camera in the hand
HAZE_SHARE, HAZE_WAVES, HAZE_LEVELS = 0.7, 4, (2.0, 6.0)
LIGHT = (0.72, 1.12)
LIGHT_SHARE = 0.6
NOISE_LEVELS = (0.5, 7.0)
POST_SHARE, MOST_POSTS, POST_PX, POST_TRIES = 0.6, 2, (3.0, 8.0), 12
MOST_HIDDEN = 0.25  # of the frames in which an object is visible


def add_footage(scene: Scene, rng: Generator) -> Scene:
    """Return ``scene`` as a camera might have filmed it. ``rng``: decides how."""
    seconds = scene.num_frames / scene.fps
    if len(scene.shots) == 1 and rng.random() < CUT_SHARE:
        _cut_background(scene, rng)
    for shot in scene.shots:
        length = shot.end - shot.start
        shot.background.drift = (0.0, 0.0)
        shot.camera = _camera(length, scene.fps, rng)
        if rng.random() < HAZE_SHARE:
            shot.haze = _haze(rng)
    if rng.random() < HAND_SHARE:
        _shake_by_hand(scene, rng)
    if rng.random() < LIGHT_SHARE:
        scene.fade = scene.fade * _light(scene.num_frames, seconds, rng)
    scene.noise = float(rng.uniform(*NOISE_LEVELS))
    scene.frame_seeds = rng.integers(0, 2**62, scene.num_frames)
    if rng.random() < POST_SHARE:
        _add_posts(scene, int(rng.integers(1, MOST_POSTS + 1)), rng)
    return scene


def _cut_background(scene: Scene, rng: Generator) -> None:
    """Give the second part of the clip another background. The objects stay."""
    n = scene.num_frames
    low = max(1, round(0.3 * n))
    cut = int(rng.integers(low, max(low + 1, round(0.7 * n))))
    first = scene.shots[0]
    scene.shots = [replace(first, end=cut), Shot(cut, n, random_background(rng))]
    scene.facts["cut"] = cut


def _camera(length: int, fps: int, rng: Generator) -> Camera:
    """A pan that may turn round once, and a slow zoom."""
    seconds = np.arange(length) / fps
    if rng.random() < STILL_SHARE:
        return Camera(np.zeros((length, 2)), np.ones(length))
    speed = rng.uniform(-PAN_PX_A_S, PAN_PX_A_S, 2)
    turn = rng.uniform(0.2, 1.2) * max(seconds[-1], 0.1)
    travelled = np.minimum(seconds, turn) - np.maximum(seconds - turn, 0.0)
    offset = rng.uniform(-50, 50, 2) + travelled[:, None] * speed
    zoom = np.ones(length)
    if rng.random() < 0.5:
        zoom = np.interp(seconds, (0.0, max(seconds[-1], 0.1)), rng.uniform(*ZOOM, 2))
    return Camera(offset, zoom)


def _haze(rng: Generator) -> Haze:
    angle, period = rng.uniform(0, 2 * np.pi, HAZE_WAVES), rng.uniform(25, 90, HAZE_WAVES)
    frequency = 2 * np.pi / period
    amplitude = rng.uniform(*HAZE_LEVELS, HAZE_WAVES)
    phase = rng.uniform(0, 2 * np.pi, HAZE_WAVES)
    waves = np.stack([frequency * np.cos(angle), frequency * np.sin(angle), phase, amplitude], -1)
    return Haze(waves, float(rng.uniform(0.3, 1.8)))


def _shake_by_hand(scene: Scene, rng: Generator) -> None:
    """Move everything by a smoothed random walk around 0."""
    jitter = rng.normal(0, 1, (scene.num_frames + 4, 2))
    smooth = np.stack([np.convolve(jitter[:, axis], np.full(5, 0.2), "valid") for axis in (0, 1)], -1)
    shake = HAND_PX * smooth / max(float(smooth.std()), 1e-6)
    for thing in scene.things:
        thing.centre = thing.centre + shake
    for shot in scene.shots:
        assert shot.camera is not None
        shot.camera.offset = shot.camera.offset - shake[shot.start : shot.end]


def _light(num_frames: int, seconds: float, rng: Generator) -> np.ndarray:
    """Brightness of each frame: slow waves, and in half of the clips one sudden change."""
    at = np.linspace(0, seconds, num_frames)
    low, high = np.sort(rng.uniform(*LIGHT, 2))
    wave = low + (high - low) * (0.5 + 0.5 * np.sin(2 * np.pi * at / rng.uniform(3, 12) + rng.uniform(0, 2 * np.pi)))
    if rng.random() < 0.5:
        wave = np.where(at > rng.uniform(0, seconds), wave * rng.uniform(0.85, 1.1), wave)
    return wave


def _add_posts(scene: Scene, count: int, rng: Generator) -> None:
    """Add up to ``count`` posts. None may hide an object for long, or hide what a question is about."""
    seconds = np.arange(scene.num_frames) / scene.fps
    for _ in range(POST_TRIES):
        if len(scene.posts) == count:
            return
        speed = 0.0 if rng.random() < 0.5 else rng.uniform(-14, 14)
        post = Post(
            rng.uniform(0, SIDE) + (seconds - seconds.mean()) * speed,
            float(rng.uniform(*POST_PX)),
            float(rng.uniform(20, 150)),
        )
        if all(_is_clear(post, thing) for thing in scene.things if not thing.is_outlined):
            scene.posts.append(post)


def _is_clear(post: Post, thing: Thing) -> bool:
    """Whether an object can still be seen: most of the time, when it appears, and whenever it is white."""
    gap = np.abs(post.centre - thing.centre[:, 0])
    hidden = thing.visible & (gap < post.width / 2 + 0.4 * thing.radius)
    first = int(thing.visible.argmax())
    around_first = slice(first, first + 4)
    most = MOST_HIDDEN * thing.visible.sum()
    return hidden.sum() <= most and not hidden[around_first].any() and not (hidden & thing.is_white).any()
