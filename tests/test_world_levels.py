"""How far the levels of the world are separate sets of questions: what README.md says of the test split's 500 clips."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from freres_cli.world.make import choose_questions, clip_seed
from freres_cli.world.questions import questions_of
from freres_cli.world.script import make_scene

NUM_CLIPS = 500
README = " ".join(Path("README.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def levels():
    """Of each level the scene and the questions of every clip, without the picture."""
    made = {}
    for level in (1, 2, 3):
        asked, made[level] = Counter(), []
        for index in range(NUM_CLIPS):
            seed = clip_seed("test", index)
            scene = make_scene(seed, level=level)
            made[level].append((scene, choose_questions(questions_of(seed, scene), 4, asked)))
    return made


def num_shared(first, second):
    """Questions about a clip that both levels ask, with the same options and answer."""
    return sum(q in own for (_, asked), (_, own) in zip(first, second, strict=True) for q in asked)


def events(scene):
    """What happens, without the shapes and colours that nothing has."""
    return {key: fact for key, fact in scene.facts.items() if key != "unseen"}


def test_what_the_levels_share_is_what_the_readme_says(levels):
    assert num_shared(levels[1], levels[2]) == sum(len(asked) for _, asked in levels[1]) == 2000
    told = re.search(r"about half of its scenes are those of level 1; (\d+) of its 2,000 questions are", README)
    assert int(told[1]) == num_shared(levels[1], levels[3])
    same = sum(events(a) == events(b) for (a, _), (b, _) in zip(levels[1], levels[3], strict=True))
    assert 0.45 < same / NUM_CLIPS < 0.55


def test_the_camera_sways_in_as_many_clips_as_the_readme_says(levels):
    assert "in about a quarter of the clips the camera sways" in README
    swaying = sum(any(shot.camera is not None for shot in scene.shots) for scene, _ in levels[2])
    assert 0.22 < swaying / NUM_CLIPS < 0.28
