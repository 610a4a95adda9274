"""The generated world: a seed gives one clip; questions have one true answer that cannot be guessed; files are usable."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise, product
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from freres_cli import bench
from freres_cli.bundle.adapter import HEADER, WEIGHT_FACTS, read_header
from freres_cli.errors import ResourceError
from freres_cli.world.bundled_model import bundled_adapter, bundled_model_info, name_weights
from freres_cli.world.draw import draw_scenes, draw_stretches
from freres_cli.world.encode import encode_frames
from freres_cli.world.labels import STILLS, dense_labels, make_stills
from freres_cli.world.make import (
    CODECS,
    FILE_SIDE_PX,
    MARK,
    SPLITS,
    choose_questions,
    clip_seed,
    encode_scene,
    is_world_clip,
    make_demo_clip,
)
from freres_cli.world.questions import CATEGORIES, DOES, NUMBERS, PLACES, SPEEDS, questions_of
from freres_cli.world.scene import COLOUR_RGB, COLOURS, DIRECTIONS, SHAPES, SIDE, STEPS, TEXTURES
from freres_cli.world.script import FPS, KINDS, SPEED_PX, SWAY_PX, make_scene
from tests.runner import check_failure, run_freres

SCENES = 3000
LEVELS = (1, 2, 3)
CHANCE, MARGIN = 0.25, 0.03
NAMES_IN_2821 = ("green triangle", "purple square")


@functools.cache
def asked_at(level, count=1200):
    """Every question of many scenes: (scene, question)."""
    scenes = [(seed, make_scene(seed, level=level)) for seed in range(count)]
    return [(scene, question) for seed, scene in scenes for question in questions_of(seed, scene)]


@pytest.fixture(scope="module")
def asked():
    return asked_at(1)


@functools.cache
def offered_at(level):
    """The questions that each of many clips supports."""
    return [questions_of(seed, make_scene(seed, level=level)) for seed in range(SCENES)]


@functools.cache
def chosen_at(level, per_clip=4):
    """The questions that ``world make`` writes about many clips."""
    counts, found = Counter(), []
    for offered in offered_at(level):
        found += choose_questions(offered, per_clip, counts)
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_is_a_clip(level):
    a, b, c = (make_scene(seed, "motion", level) for seed in (5, 5, 6))
    first, again, other = (torch.cat(list(draw_stretches(scene.stretch(0, 24)))) for scene in (a, b, c))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert a.num_frames == b.num_frames and a.facts == b.facts
    assert questions_of(5, a) == questions_of(5, b) != questions_of(6, c)


def test_splits_share_no_clip():
    firsts = [clip_seed(split, 0, seed) for split in SPLITS for seed in (0, 1, 998)]
    assert all(b - a >= 10**6 for a, b in pairwise(sorted(firsts)))
    # The clips of `world train` come from the training split.
    from freres_cli.world.train_language import FIRST_SEED

    assert clip_seed("train", 0, 10) == FIRST_SEED < clip_seed("validation", 0)


def test_every_category_and_every_kind_comes_up(asked):
    assert {question.category for _, question in asked} == set(CATEGORIES)
    assert {scene.facts["kind"] for scene, _ in asked} == set(KINDS)


def test_four_different_options_one_of_them_true(asked):
    for _, question in asked:
        assert len(set(question.choices)) == 4 and question.answer in question.choices


def blind_key(question, option):
    """What is left of a question and an option for someone without the video: names of objects tell nothing apart."""
    names = "|".join([*COLOURS, *SHAPES])
    wording = re.sub(rf"\b({names})\b", "*", question.question)
    is_name = re.fullmatch(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", option)
    return question.category, wording, "a name" if is_name else option


@pytest.mark.parametrize(("level", "per_clip"), [(1, 4), (2, 4), (3, 4), (1, 1), (1, 2), (1, 3)])
def test_no_category_can_be_guessed_from_the_question(level, per_clip):
    """The best possible guesser: from half the clips it knows how often each option is true for each wording."""
    questions = chosen_at(level, per_clip)
    half = len(questions) // 2
    offered, true = Counter(), Counter()
    for question in questions[:half]:
        for option in question.choices:
            offered[blind_key(question, option)] += 1
        true[blind_key(question, question.answer)] += 1
    right, total = Counter(), Counter()
    for question in questions[half:]:
        # Ties, as between names, are broken by place.
        rates = [true[blind_key(question, o)] / max(1, offered[blind_key(question, o)]) for o in question.choices]
        guess = question.choices[int(np.argmax(rates))]
        right[question.category] += guess == question.answer
        total[question.category] += 1
    for category in CATEGORIES:
        # Three standard errors on top of the margin: rare categories have only a few hundred questions here.
        noise = 3 * (CHANCE * (1 - CHANCE) / total[category]) ** 0.5
        assert right[category] / total[category] < CHANCE + MARGIN + noise, category


@pytest.mark.parametrize("level", LEVELS)
def test_of_the_same_options_each_is_true_equally_often(level):
    true = defaultdict(Counter)
    for question in chosen_at(level):
        true[frozenset(question.choices)][question.answer] += 1
    for options in (DOES, SPEEDS, DIRECTIONS, NUMBERS, PLACES, TEXTURES):
        counts = true[frozenset(options)]
        assert sum(counts.values()) > 400 and max(counts.values()) < 1.25 * min(counts[o] for o in options), counts


@pytest.mark.parametrize("per_clip", [1, 2])
def test_few_questions_a_clip_have_even_answers_as_well(per_clip):
    """Scenes with more objects offer more categories, so each of these is asked about them less often."""
    true = Counter(question.answer for question in chosen_at(1, per_clip) if question.category == "Count")
    assert len(true) == 4 and sum(true.values()) > 100 and max(true.values()) <= min(true.values()) + 2


def test_no_question_is_about_what_another_object_hides_all_the_time():
    seed = clip_seed("test", 2821)
    scene = make_scene(seed)
    hidden, front = (next(thing for thing in scene.things if thing.name == name) for name in NAMES_IN_2821)
    assert np.abs(hidden.centre - front.centre).max() < front.radius / 2 and hidden.radius < front.radius
    asked = [
        question.question for question in questions_of(seed, scene) if question.category in ("Object", "Attribute")
    ]
    assert asked and not any(hidden.colour in text or hidden.shape in text for text in asked)


def test_the_answer_is_in_every_place_equally_often(asked):
    places = Counter(question.choices.index(question.answer) for _, question in asked)
    assert max(places.values()) < 1.1 * min(places.values())


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_what_the_picture_shows(level):
    """Facts against positions: which way, what place, how often, which first."""
    checked = Counter()
    # The camera of level 3 moves everything by a few pixels; that of level 2 sways in no clip with questions about motion.
    unsteady = 2 * SWAY_PX if level == 3 else 0
    for scene, question in asked_at(level):
        finer = scene.fps / FPS
        thing = next((t for t in scene.things if re.search(rf"\b({t.colour}|{t.shape})\b", question.question)), None)
        if question.category == "Action" and question.answer in STEPS:
            assert thing is not None
            moved = thing.centre[-1] - thing.centre[0]
            way = np.asarray(STEPS[question.answer])
            assert moved @ way > 0 and np.abs(moved - (moved @ way) * way).max() <= unsteady
        elif question.category == "Action" and question.answer in SPEED_PX and not unsteady:
            assert thing is not None
            assert np.abs(np.diff(thing.centre, axis=0)).max() * finer == pytest.approx(SPEED_PX[question.answer])
        elif question.answer in ("stays still", "not at all") and not unsteady:
            assert thing is not None and not np.ptp(thing.centre, axis=0).any()
        elif question.category == "Position":
            assert thing is not None
            y, x = question.answer.split()
            assert (thing.centre.mean(0) > SIDE / 2).tolist() == [x == "right", y == "bottom"]
        elif question.category == "Count" and "white" in question.question:
            assert thing is not None
            starts = np.diff(thing.is_white.astype(int), prepend=0) == 1
            assert starts.sum() == int(question.answer)
        elif question.category == "Order":
            first = {t.name: int(t.visible.argmax()) for t in scene.things if "rank" in t.facts}
            wanted = min(first.values()) if "first" in question.question else max(first.values())
            assert first[question.answer] == wanted
        elif question.category == "Transient":
            flash = next(t for t in scene.things if t.facts.get("role") == "transient")
            assert 1 <= flash.visible.sum() <= (3 if level == 1 else 5)
            assert question.answer in (flash.colour, flash.shape)
        elif question.category == "Cognition" and question.answer != "nothing":
            target = next(t for t in scene.things if t.facts.get("role") == "target")
            pusher, start = scene.thing(question.answer), round(int(target.facts["starts"]) * finer)
            gap = np.linalg.norm(pusher.centre[start] - target.centre[start]) - pusher.radius - target.radius
            assert abs(gap) < 4
        else:
            continue
        checked[question.category] += 1
    assert len(checked) == 6 and min(checked.values()) > 50


def test_every_question_about_motion_has_an_answer_of_its_kind(asked):
    kinds = defaultdict(set)
    for _, question in asked:
        if question.category == "Action":
            kinds[question.question.split()[0]].add(question.answer)
    assert set(DOES) <= kinds["What"]


def test_pixels_are_where_the_labels_say():
    checked = 0
    for scene in map(make_stills, range(12)):
        frames, labels = draw_scenes([scene])[0], dense_labels(scene, 6)
        assert frames.shape == (STILLS, SIDE, SIDE, 3) and frames.dtype == torch.uint8
        for frame, thing in product(range(STILLS), scene.things):
            x, y = thing.centre[frame].astype(int)
            # What is short-lived is drawn last.
            drawn = sorted(scene.things, key=lambda t: t.is_outlined)
            later = [t for t in drawn[drawn.index(thing) + 1 :] if t.visible[frame]]
            is_covered = any(np.abs(t.centre[frame] - thing.centre[frame]).max() < 30 for t in later)
            if not thing.visible[frame] or is_covered or thing.shape == "ring":
                continue
            wanted = (245, 245, 245) if thing.is_white[frame] else COLOUR_RGB[thing.colour]
            colour = len(COLOURS) if thing.is_white[frame] else COLOURS.index(thing.colour)
            assert labels["colour"][frame, y // 16, x // 16] == colour
            seen = frames[frame, y, x].double() / scene.fade[frame]
            assert (seen - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 8
            checked += 1
    assert checked >= 20


def test_labels_are_of_the_object_in_front():
    scene = make_stills(0)
    back, front = scene.things[:2]
    back.is_outlined, front.is_outlined = False, True
    for thing in (back, front):
        thing.centre, thing.visible = np.full((STILLS, 2), SIDE / 2), np.ones(STILLS, bool)
        thing.is_white = ~thing.visible
    back.radius = front.radius = 12.0
    for order in ([back, front], [front, back]):
        scene.things = order
        labels, middle = dense_labels(scene, 6), draw_scenes([scene])[0][0, SIDE // 2, SIDE // 2].double()
        assert (labels["rim"][:, 2:4, 2:4] == 1).all()
        assert (labels["colour"][:, 2:4, 2:4] == COLOURS.index(front.colour)).all()
        wanted = torch.tensor(COLOUR_RGB[front.colour]).double() * scene.fade[0]
        assert front.shape != "ring" and (middle - wanted).abs().max() < 2


def test_a_clip_drawn_by_stretches_is_the_clip_drawn_whole():
    drifted = cut_apart = 0
    for seed in range(16):
        scene = make_scene(seed, level=seed % 2 + 1)
        drifts = any(shot.background.drift != (0.0, 0.0) for shot in scene.shots)
        if scene.num_frames > 240 or not (drifts or len(scene.shots) > 1):
            continue
        whole = draw_scenes([scene])[0]
        for length in (7, scene.num_frames // 2, scene.num_frames):
            stretches = list(draw_stretches(scene, num_frames=length))
            assert {len(stretch) for stretch in stretches[:-1]} <= {length} and len(stretches[-1]) <= length
            assert torch.equal(torch.cat(stretches), whole)
        drifted += drifts
        cut_apart += len(scene.shots) > 1
    assert drifted and cut_apart


def test_a_long_clip_is_encoded_by_stretches_to_the_same_file(tmp_path, monkeypatch):
    scene = next(s for s in (make_scene(seed, level=2) for seed in range(100)) if 130 < s.num_frames < 170)
    _, codec, options = CODECS[0]
    whole = draw_scenes([scene], FILE_SIDE_PX)[0].numpy()
    encode_frames(tmp_path / "whole.mp4", whole, FILE_SIDE_PX, scene.fps, codec, options, comment=MARK)
    drawn = []
    monkeypatch.setattr(
        "freres_cli.world.draw.draw_scenes", lambda s, side: drawn.append(s[0].num_frames) or draw_scenes(s, side)
    )
    encode_scene(tmp_path / "stretches.mp4", scene, codec, options)
    assert len(drawn) > 1 and sum(drawn) == scene.num_frames and max(drawn) <= 64
    assert (tmp_path / "stretches.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_higher_resolution_shows_the_same():
    scene = make_scene(11)
    small, large = (draw_scenes([scene], side)[0].float() for side in (SIDE, 2 * SIDE))
    pooled = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (pooled - small).abs().mean() < 4


def test_the_second_level_has_other_rates_and_one_to_five_frames_of_a_flash():
    lengths, rates = set(), set()
    for seed in range(60):
        scene = make_scene(seed, level=2)
        rates.add(scene.fps)
        assert 6 <= scene.num_frames / scene.fps <= 60
        assert scene.shots[-1].end == scene.num_frames == len(scene.fade)
        lengths |= {int(t.visible.sum()) for t in scene.things if t.facts.get("role") == "transient"}
    assert rates == {12, 15, 24, 30} and lengths == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("level", (2, 3))
def test_an_object_of_one_shot_is_in_no_frame_of_the_other(level):
    """At any frame rate; else it would be a second answer to which object is in both."""
    rates = set()
    for seed in range(300):
        scene = make_scene(seed, "cut", level)
        cut = scene.shots[1].start
        before, after = ([t for t in scene.things if t.facts.get("role") == role] for role in ("before", "after"))
        assert len(before) == len(after) == 1
        assert not before[0].visible[cut:].any() and before[0].visible[:cut].all()
        assert not after[0].visible[:cut].any() and after[0].visible[cut:].all()
        rates.add(scene.fps)
    assert len(rates) == {2: 4, 3: 8}[level]


def test_questions_of_a_set_are_of_different_categories_and_balanced(asked):
    counts = Counter()
    for seed in range(400):
        chosen = choose_questions(questions_of(seed, make_scene(seed)), 4, counts)
        assert len({question.category for question in chosen}) == len(chosen) <= 4
    of_category = [counts[category] for category in CATEGORIES]
    assert min(of_category) > 0.25 * max(of_category)


def test_world_make_writes_clips_and_questions(tmp_path):
    made = run_freres("world", "make", "--count", "5", "-o", str(tmp_path / "set"), "--json").json
    rows = [json.loads(line) for line in (tmp_path / "set/questions.jsonl").read_text().splitlines()]
    assert made["num_questions"] == len(rows) and made["num_clips"] == 5
    assert len({row["id"] for row in rows}) == len(rows)
    codecs = set()
    for name in {row["video"] for row in rows}:
        with av.open(str(tmp_path / "set" / name)) as container:
            stream = container.streams.video[0]
            codecs.add(stream.codec_context.name)
            scene = make_scene(next(row["seed"] for row in rows if row["video"] == name))
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == scene.num_frames and stream.average_rate == FPS
        drawn = draw_scenes([scene], 2 * SIDE)[0].numpy().astype(float)
        assert np.abs(np.stack(frames) - drawn).mean() < 8
        assert is_world_clip(tmp_path / "set" / name)
    assert codecs >= {"h264"} and len(codecs) == 2
    again = run_freres("world", "make", "--count", "5", "-o", str(tmp_path / "other"), "--json").json
    assert again["by_category"] == made["by_category"]
    for path in (tmp_path / "set").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_world_make_refuses_bad_arguments(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for arguments, word in (
        (("-o", str(tmp_path / "full")), "empty folder"),
        (("-o", str(tmp_path / "full/file")), "cannot be a folder"),
        (("-o", str(tmp_path / "full/file/below")), "cannot be a folder"),
        (("-o", str(tmp_path / "new"), "--split", "dev"), "train, validation, test"),
    ):
        check_failure(run_freres("world", "make", "--count", "1", *arguments), 2, word)
    assert (tmp_path / "full/file").read_text() == "mine" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("stop", "seen"), [(ValueError, ResourceError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_clip_that_cannot_be_finished_leaves_no_file(tmp_path, stop, seen):
    def frames():
        yield np.zeros((SIDE, SIDE, 3), np.uint8)
        raise stop("no more")

    with pytest.raises(seen, match="no more"):
        encode_frames(tmp_path / "clip.mp4", frames(), SIDE, FPS, *CODECS[0][1:])
    assert not list(tmp_path.iterdir())


def test_the_demo_clip_asks_about_a_flash(tmp_path):
    clip = make_demo_clip(tmp_path / "clip.mp4")
    assert [question.category for question in clip.questions] == ["Action", "Attribute", "Transient"]
    assert is_world_clip(tmp_path / "clip.mp4") and not is_world_clip(tmp_path / "none.mp4")


def test_the_measured_weights_and_adapter_are_those_that_ship():
    """The adapter's header got the digests of the model's weights later; without them the file is the measured one."""
    results = Path(bench.__file__).parent / "results"
    world = json.loads((results / "world.json").read_text())
    ours = world["adapter"]["rows"]
    header = read_header(bundled_adapter())
    header["model"] = {key: value for key, value in header["model"].items() if key not in WEIGHT_FACTS}
    measured = save(load_file(bundled_adapter()), {HEADER: json.dumps(header, sort_keys=True)})
    assert {row["adapter_sha256"] for row in ours} == {hashlib.sha256(measured).hexdigest()}
    names = ("all_methods", "all_methods_level_3", "ablation")
    level_1, level_3, ablation = (json.loads((results / f"{name}.json").read_text()) for name in names)
    parts = [world[part] for part in ("methods", "level_2", "level_2_full", "level_3", "adapter", "no_adapter")]
    for part in (*parts, level_1, level_3, ablation["components"], ablation["sweeps"]):
        assert name_weights(part["model"]["projector_sha256"]) == bundled_model_info()["weights"]
