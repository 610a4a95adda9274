"""Level 3 of the generated world: what real footage adds, and that it hides nothing that a question is about."""

from __future__ import annotations

import functools
import re
from collections import Counter

import av
import numpy as np
import pytest
import torch

from freres_cli.world.draw import draw_scenes, draw_stretches
from freres_cli.world.footage import LIGHT, MOST_HIDDEN, MOST_POSTS, NOISE_LEVELS, POST_PX
from freres_cli.world.make import choose_questions, clip_seed, make_set
from freres_cli.world.questions import questions_of
from freres_cli.world.scene import COLOUR_RGB, SIDE, Background, Camera, Post, Scene, Shot, Thing
from freres_cli.world.script import FOOTAGE_FPS, FOOTAGE_SECONDS, make_scene

SCENES = 800
PLAIN = Background("plain", (60.0, 60.0, 60.0), 20.0, 12.0, True, (0.0, 0.0), (0.0, 0.0), np.zeros((48, 48)))


@functools.cache
def scenes():
    return [make_scene(seed, level=3) for seed in range(SCENES)]


def small_scenes(wanted, most_frames=120):
    return [scene for scene in scenes() if scene.num_frames <= most_frames and wanted(scene)]


def share(values):
    return float(np.mean(list(values)))


def lasting(scene):
    return [thing for thing in scene.things if not thing.is_outlined]


def test_lengths_rates_and_sizes_cover_their_ranges():
    seconds = [scene.num_frames / scene.fps for scene in scenes()]
    assert min(seconds) == FOOTAGE_SECONDS[0] == 4 and max(seconds) == FOOTAGE_SECONDS[1] == 20
    rates = Counter(scene.fps for scene in scenes())
    assert set(rates) == set(FOOTAGE_FPS) and min(FOOTAGE_FPS) == 8 and max(FOOTAGE_FPS) == 30
    assert min(rates.values()) > 0.05 * SCENES
    heights = [2 * thing.radius / SIDE for scene in scenes() for thing in scene.things]
    assert 0.03 <= min(heights) < 0.035 and 0.29 < max(heights) <= 0.3
    assert 0.03 < share(thing.is_small for scene in scenes() for thing in scene.things) < 0.3


def test_everything_has_one_value_for_each_frame():
    for scene in scenes():
        n = scene.num_frames
        assert len(scene.fade) == len(scene.frame_seeds) == n and len(set(scene.frame_seeds.tolist())) == n
        assert all(len(part.centre) == n for part in (*scene.things, *scene.posts))
        assert [shot.start for shot in scene.shots] == [0, *[shot.end for shot in scene.shots[:-1]]]
        assert scene.shots[-1].end == n
        for shot in scene.shots:
            assert len(shot.camera.offset) == len(shot.camera.zoom) == shot.end - shot.start > 0
            assert shot.background.drift == (0.0, 0.0) and shot.camera.zoom.min() > 0.5


def test_everything_that_footage_adds_comes_up_and_is_left_out():
    """Shares of clips or shots. Each is at least a tenth and at most nine tenths."""
    shots = [shot for scene in scenes() for shot in scene.shots]
    staged = [scene for scene in scenes() if scene.facts["kind"] != "cut"]
    unfaded = [scene for scene in scenes() if "has_fade" not in scene.facts]
    # The camera's shake is that of what stands still.
    still = [thing.centre for scene in staged for thing in scene.things if thing.facts.get("does") == "stays still"]
    found = {
        "cut": share(len(scene.shots) == 2 for scene in staged),
        "post": share(bool(scene.posts) for scene in scenes()),
        "second post": share(len(scene.posts) == MOST_POSTS for scene in scenes()),
        "haze": share(shot.haze is not None for shot in shots),
        "light": share(np.ptp(scene.fade) > 0.01 for scene in unfaded),
        "shake": share(np.ptp(centre) > 0 and np.ptp(centre, axis=0).max() > 0.01 for centre in still),
        "pan": share(np.ptp(shot.camera.offset, axis=0).max() > 4 for shot in shots),
        "zoom": share(np.ptp(shot.camera.zoom) > 0.01 for shot in shots),
    }
    assert all(0.1 <= value <= 0.9 for value in found.values()), found
    moving = [post for scene in scenes() for post in scene.posts if np.ptp(post.centre) > 0]
    assert moving and len(moving) < sum(len(scene.posts) for scene in scenes())
    assert all(POST_PX[0] <= post.width <= POST_PX[1] for post in moving)
    levels = [scene.noise for scene in scenes()]
    assert NOISE_LEVELS[0] <= min(levels) < 1 and 6 < max(levels) <= NOISE_LEVELS[1]
    assert all(LIGHT[0] * 0.85 <= scene.fade.min() <= scene.fade.max() <= LIGHT[1] * 1.1 for scene in unfaded)


def test_no_question_is_about_the_shape_of_a_small_object():
    asked = Counter()
    for seed, scene in enumerate(scenes()):
        small = [thing for thing in scene.things if thing.is_small]
        for question in questions_of(seed, scene) if small else ():
            for thing in small:
                words = set(re.findall(r"\w+", question.question))
                assert thing.shape not in words, question
                if thing.colour in words:
                    assert question.category not in ("Object", "Attribute", "Pose"), question
                    asked[question.category] += 1
                if question.category == "Attribute":
                    assert question.answer != thing.colour, question
                if question.category in ("Object", "Transient"):
                    assert question.answer != thing.shape, question
    assert {"Action", "Position"} <= set(asked)


def hidden(post, thing):
    """In which frames a post covers an object's middle, or comes near it."""
    near = np.abs(post.centre - thing.centre[:, 0]) < post.width / 2 + 0.4 * thing.radius
    return near & thing.visible


def test_a_post_hides_nothing_that_a_question_is_about():
    passed = 0
    for scene in scenes():
        for post in scene.posts:
            for thing in lasting(scene):
                behind = hidden(post, thing)
                first = int(thing.visible.argmax())
                assert not behind[first : first + 4].any() and not behind[thing.is_white].any()
                assert behind.sum() <= MOST_HIDDEN * thing.visible.sum()
                passed += bool(behind.any())
    assert passed > 20


def test_what_is_short_lived_is_drawn_over_posts():
    n = 2
    at, seen = np.full((n, 2), SIDE / 2), np.ones(n, bool)
    things = [Thing("square", "red", 10.0, at, seen, ~seen), Thing("square", "green", 5.0, at, seen, ~seen)]
    things[1].is_outlined = True
    scene = Scene(n, 8, [Shot(0, n, PLAIN)], things, np.ones(n), posts=[Post(at[:, 0], 30.0, 100.0)])
    for order in (things, things[::-1]):
        scene.things = order
        frame = draw_scenes([scene])[0][0].int()
        assert frame[SIDE // 2, SIDE // 2].tolist() == list(COLOUR_RGB["green"])
        row, column = SIDE // 2, SIDE // 2 + 9  # beside the short-lived object, inside the other one
        assert np.ptp(frame[row, column].numpy()) == 0 and abs(int(frame[row, column, 0]) - 100) <= 5
        beside = frame[row, SIDE // 2 + 20].tolist()
        assert beside == [60, 60, 60]


def test_an_object_that_appears_can_be_seen():
    """In the picture: at its middle an object has its own colour, as bright as the light allows."""
    checked = 0
    for scene in small_scenes(lambda scene: scene.facts["kind"] == "order" and scene.posts)[:12]:
        for thing in lasting(scene):
            first = int(thing.visible.argmax())
            x, y = thing.centre[first].astype(int)
            others = [t for t in scene.things if t is not thing and t.visible[first]]
            if thing.shape == "ring" or any(np.abs(t.centre[first] - thing.centre[first]).max() < 34 for t in others):
                continue
            frame = draw_scenes([scene.stretch(first, first + 1)])[0][0].double()
            seen = frame[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            wanted = torch.tensor(COLOUR_RGB[thing.colour]).double() * scene.fade[first]
            # A small object also shows its smooth edges.
            most = 12 + 3 * scene.noise if thing.radius > 9 else 90
            assert (seen - wanted.clamp(max=255)).abs().max() < most, (thing.name, seen, wanted)
            checked += 1
    assert checked > 12


def test_the_camera_moves_the_background_and_its_zoom_scales_it():
    n = 3
    striped = Background("striped", (60.0, 60.0, 60.0), 20.0, 12.0, False, (0.0, 0.0), (0.0, 0.0), PLAIN.speckles)
    offset = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    camera = Camera(offset, np.array([1.0, 1.0, 2.0]))
    scene = Scene(n, 8, [Shot(0, n, striped, camera=camera)], [], np.ones(n))
    first, moved, zoomed = (frame[0, :, 0].int() for frame in draw_scenes([scene])[0])
    assert torch.equal(moved[:-3], first[3:])
    changes = [int((torch.diff((row > 60).int()) != 0).sum()) for row in (first, zoomed)]
    assert changes[0] == pytest.approx(2 * changes[1], abs=2)


def test_a_clip_drawn_by_stretches_is_the_clip_drawn_whole():
    """With posts, noise, a moving camera, haze, light and a cut."""

    def has_everything(scene):
        moves = any(np.ptp(shot.camera.offset) > 4 and np.ptp(shot.camera.zoom) > 0 for shot in scene.shots)
        hazy = any(shot.haze is not None for shot in scene.shots)
        return scene.posts and len(scene.shots) == 2 and moves and hazy and np.ptp(scene.fade) > 0

    found = small_scenes(has_everything)[:2]
    assert len(found) == 2
    for scene in found:
        whole = draw_scenes([scene])[0]
        for length in (7, 64):
            stretches = list(draw_stretches(scene, num_frames=length))
            assert torch.equal(torch.cat(stretches), whole)
        # Frames of different noise, whatever they are drawn with.
        assert torch.equal(draw_scenes([scene.stretch(0, 9), scene.stretch(9, 20)])[1], whole[9:20])
        assert not torch.equal(whole[0], whole[1])


def test_noise_is_as_strong_as_the_scene_says():
    flat = Scene(40, 8, [Shot(0, 40, PLAIN)], [], np.ones(40), noise=5.0, frame_seeds=np.arange(40))
    frames = draw_scenes([flat])[0].double()
    assert frames.std() == pytest.approx(5.0, rel=0.02) and frames.mean() == pytest.approx(60, abs=0.1)
    # Grey, and another pattern in every frame.
    assert torch.equal(frames[..., 0], frames[..., 1])
    assert abs(float(torch.corrcoef(frames[:2, :, :, 0].flatten(1))[0, 1])) < 0.05


def test_world_make_writes_footage(tmp_path):
    seed = min(range(200), key=lambda seed: make_scene(clip_seed("test", 0, seed), level=3).num_frames)
    made = make_set(tmp_path / "set", "test", 1, seed, level=3)[0]
    scene = make_scene(made.seed, level=3)
    assert list(made.questions) == choose_questions(questions_of(made.seed, scene), 4, Counter())
    with av.open(str(tmp_path / "set" / made.file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == scene.fps
    drawn = draw_scenes([scene], 2 * SIDE)[0].numpy().astype(float)
    # Video encoders take some of the noise out.
    assert len(frames) == scene.num_frames and np.abs(np.stack(frames) - drawn).mean() < 8 + scene.noise
