"""Questions about a generated scene, each with four options, one of them true.

No category can be answered from the question alone: true answers are drawn evenly, or the options are things that the
question says nothing about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from freres_cli.world.scene import COLOURS, DIRECTIONS, SHAPES, TEXTURES, Scene, Thing
from freres_cli.world.script import SPEED_PX

CATEGORIES = (
    "Action",
    "Object",
    "Position",
    "Scene",
    "Count",
    "Attribute",
    "Pose",
    "Character",
    "Cognition",
    "Order",
    "Transient",
)
DOES = ("slides", "circles", "shakes", "stays still")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SPEEDS = (*SPEED_PX, "not at all")
NUMBERS = ("1", "2", "3", "4")
# How often each is drawn for an object. Asking in inverse proportion makes every answer equally likely.
DOES_SHARE = {"slides": 0.46, "circles": 0.18, "shakes": 0.18, "stays still": 0.18}


@dataclass(frozen=True)
class Question:
    """``choices``: four, in the order shown; ``answer`` is one of them."""

    category: str
    question: str
    choices: tuple[str, ...]
    answer: str


def ask_about(scene: Scene, rng: Generator) -> list[Question]:
    """Return every question that the scene supports, in varied wording and random order."""
    found = [question for asker in _ASKERS for question in asker(scene, rng)]
    return [found[i] for i in rng.permutation(len(found))]


def _question(category: str, rng: Generator, wordings: Sequence[str], options: Sequence[str], answer: str) -> Question:
    """A question with four of the options, the answer among them, shuffled."""
    others = [option for option in options if option != answer]
    chosen = [answer, *[others[i] for i in rng.permutation(len(others))[:3]]]
    wording = wordings[int(rng.integers(len(wordings)))]
    return Question(category, wording, tuple(chosen[i] for i in rng.permutation(len(chosen))), answer)


def _named(thing: Thing, scene: Scene, rng: Generator) -> str:
    """The full name of an object, its shape or its colour. Each is unique in the clip. A small object's shape is hard to
    see, so it goes by its colour."""
    which = rng.integers(3)
    return (
        f"{thing.colour} object" if thing.is_small else (thing.name, f"{thing.shape}", f"{thing.colour} object")[which]
    )


def _lasting(scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if thing.facts.get("role") != "transient"]


def _shaped(scene: Scene) -> list[Thing]:
    """Lasting objects whose shape can be seen."""
    lasting = _lasting(scene)
    return [
        thing
        for place, thing in enumerate(lasting)
        if not thing.is_small and not any(_hides(other, thing) for other in lasting[place + 1 :])
    ]


def _hides(front: Thing, thing: Thing) -> bool:
    """Whether an object in front of a smaller one never leaves it, as when two pass by in one lane."""
    if front.radius <= thing.radius:
        return False
    apart_px = np.linalg.norm(front.centre - thing.centre, axis=1)
    return bool(((apart_px < front.radius / 2) & front.visible)[thing.visible].all())


def _action(scene: Scene, rng: Generator) -> Iterator[Question]:
    for thing in _lasting(scene):
        name, facts = _named(thing, scene, rng), thing.facts
        words: tuple[str, ...]
        if "way" in facts and facts.get("role") != "target":
            words = (
                f"Which way does the {name} move?",
                f"In which direction does the {name} go?",
                f"Where is the {name} heading?",
            )
            yield _question("Action", rng, words, DIRECTIONS, str(facts["way"]))
        if scene.facts["kind"] != "motion":
            continue
        does = str(facts["does"])
        if rng.random() < DOES_SHARE["circles"] / DOES_SHARE[does]:
            words = (f"What does the {name} do?", f"How does the {name} behave?", f"What is the {name} doing?")
            yield _question("Action", rng, words, DOES, does)
        share = DOES_SHARE["slides"] / 3
        if "speed" in facts and rng.random() < (share / DOES_SHARE["stays still"] if does == "stays still" else 1):
            words = (f"How fast does the {name} move?", f"How quickly does the {name} go?")
            yield _question("Action", rng, words, SPEEDS, str(facts["speed"]))


def _object(scene: Scene, rng: Generator) -> Iterator[Question]:
    for thing in _shaped(scene):
        words = (
            f"What shape is the {thing.colour} object?",
            f"What is the {thing.colour} thing?",
            f"Which shape does the {thing.colour} object have?",
        )
        yield _question("Object", rng, words, SHAPES, thing.shape)


def _attribute(scene: Scene, rng: Generator) -> Iterator[Question]:
    for thing in _shaped(scene):
        words = (
            f"What colour is the {thing.shape}?",
            f"Which colour does the {thing.shape} have?",
            f"Name the colour of the {thing.shape}.",
        )
        yield _question("Attribute", rng, words, COLOURS, thing.colour)


def _position(scene: Scene, rng: Generator) -> Iterator[Question]:
    for thing in _lasting(scene):
        if "place" in thing.facts:
            name = _named(thing, scene, rng)
            words = (
                f"Where is the {name}?",
                f"In which corner is the {name}?",
                f"Which part of the picture holds the {name}?",
            )
            yield _question("Position", rng, words, PLACES, str(thing.facts["place"]))


def _scene(scene: Scene, rng: Generator) -> Iterator[Question]:
    textures = [shot.background.texture for shot in scene.shots]
    words: tuple[str, ...]
    if len(textures) == 1:
        words = ("What does the background look like?", "What kind of background is there?", "What is the background?")
        yield _question("Scene", rng, words, TEXTURES, textures[0])
        return
    for when, texture in zip(("before", "after"), textures, strict=True):
        words = (f"What does the background look like {when} the cut?", f"What is the background {when} the cut?")
        yield _question("Scene", rng, words, TEXTURES, texture)


def _count(scene: Scene, rng: Generator) -> Iterator[Question]:
    if scene.facts["kind"] == "motion":
        # Short-lived objects are not counted, and the wording says so.
        words = ("How many objects are there all the time?", "How many objects stay in the picture?")
        yield _question("Count", rng, words, NUMBERS, str(scene.facts["num_objects"]))
    for thing in scene.things:
        if "blinks" in thing.facts:
            name = _named(thing, scene, rng)
            words = (f"How many times does the {name} turn white?", f"How often does the {name} flash white?")
            yield _question("Count", rng, words, NUMBERS, str(thing.facts["blinks"]))


def _pose(scene: Scene, rng: Generator) -> Iterator[Question]:
    for thing in _shaped(scene):
        if thing.shape == "arrow":
            words = (
                "Which way does the arrow point?",
                f"Where does the {thing.name} point?",
                "In which direction is the arrow turned?",
            )
            yield _question("Pose", rng, words, DIRECTIONS, DIRECTIONS[thing.turn])


def _character(scene: Scene, rng: Generator) -> Iterator[Question]:
    roles = {str(thing.facts["role"]): thing.name for thing in scene.things if "role" in thing.facts}
    if "again" in roles:
        options = [roles["again"], roles["before"], roles["after"], _unseen(scene)]
        words = (
            "Which object is seen both before and after the cut?",
            "What comes back after the cut?",
            "Which object is in both scenes?",
        )
        yield _question("Character", rng, words, options, roles["again"])


def _unseen(scene: Scene) -> str:
    return str(scene.facts["unseen"]).split("|")[0]


def _cognition(scene: Scene, rng: Generator) -> Iterator[Question]:
    if "cause" in scene.facts:
        target = next(thing for thing in scene.things if thing.facts.get("role") == "target")
        others = [thing.name for thing in _lasting(scene) if thing is not target]
        name = _named(target, scene, rng)
        words = (f"What makes the {name} move?", f"What hits the {name}?", f"What pushes the {name}?")
        yield _question("Cognition", rng, words, [*others, "nothing", _unseen(scene)], str(scene.facts["cause"]))


def _order(scene: Scene, rng: Generator) -> Iterator[Question]:
    ranked = {thing.facts["rank"]: thing for thing in scene.things if "rank" in thing.facts}
    if not ranked:
        return
    options = [*[thing.name for thing in ranked.values()], _unseen(scene)]
    words = {
        0: ("Which object appears first?", "What comes first?"),
        2: ("Which object appears last?", "What comes last?"),
    }
    for rank, wordings in words.items():
        yield _question("Order", rng, wordings, options, ranked[rank].name)


def _transient(scene: Scene, rng: Generator) -> Iterator[Question]:
    for thing in scene.things:
        if thing.facts.get("role") == "transient":
            words = (
                "What colour is the object that appears for a moment?",
                "Which colour flashes up briefly?",
                "What is the colour of the object seen only for an instant?",
            )
            yield _question("Transient", rng, words, COLOURS, thing.colour)
            words = (
                "What shape is the object that appears for a moment?",
                "Which shape flashes up briefly?",
                "What is the shape of the object seen only for an instant?",
            )
            yield _question("Transient", rng, words, SHAPES, thing.shape)


_ASKERS: tuple[Callable[[Scene, Generator], Iterator[Question]], ...] = (
    _action,
    _object,
    _attribute,
    _position,
    _scene,
    _count,
    _pose,
    _character,
    _cognition,
    _order,
    _transient,
)


def questions_of(seed: int, scene: Scene) -> list[Question]:
    """Return the questions about the scene of a seed, the same ones every time."""
    return ask_about(scene, np.random.default_rng([seed, 2]))
