"""Clips and questions as files: real encoded video and one ``questions.jsonl``, usable by any program."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av

from freres_cli.errors import ResourceError
from freres_cli.world.draw import draw_stretches
from freres_cli.world.encode import encode_frames
from freres_cli.world.questions import Question, questions_of
from freres_cli.world.scene import DIRECTIONS, Scene
from freres_cli.world.script import make_scene

FILE_SIDE_PX = 192
MARK = "made by freres world"  # in a file's metadata: the bundled model knows such clips
QUESTIONS_FILE = "questions.jsonl"
SEEDS_A_SPLIT = 10**9
SEEDS_A_SET = 10**6  # most clips for one --seed of a split
SPLITS = ("train", "validation", "test")
# Every fourth clip is VP9, the others are H.264, both at a quality where coding artefacts are just visible.
CODECS = (
    ("mp4", "libx264", {"crf": "20", "preset": "fast", "threads": "1"}),
    ("webm", "libvpx-vp9", {"crf": "24", "b:v": "0", "deadline": "realtime", "cpu-used": "6", "threads": "1"}),
)
VP9_EVERY = 4
EVEN_COUNT = 3  # questions a clip, from which on every category is asked about often enough to keep its answers even
FOOTAGE_CRF_RANGE = 13


@dataclass(frozen=True)
class MadeClip:
    """A clip written to ``file`` (a name inside the set's folder), and the questions chosen about it."""

    seed: int
    file: str
    questions: tuple[Question, ...]


def clip_seed(split: str, index: int, seed: int = 0) -> int:
    """Return the seed of a clip's scene. No two splits share one."""
    return SPLITS.index(split) * SEEDS_A_SPLIT + seed * SEEDS_A_SET + index


def make_set(
    directory: Path,
    split: str,
    count: int,
    seed: int = 0,
    level: int = 1,
    questions_per_clip: int = 4,
    on_clip: Callable[[int, int], None] | None = None,
) -> list[MadeClip]:
    """Write ``count`` clips and their questions into ``directory``, the questions file last. Return the clips.

    ``split``: one of ``SPLITS``. ``seed``: another one gives other clips. ``level``: difficulty, see ``make_scene``.
    ``questions_per_clip``: at most this many. ``on_clip``: called after each clip with the number of clips done and
    ``count``. Raises ``ResourceError`` if this PyAV lacks an encoder or a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    asked: Counter[object] = Counter()
    made = []
    for index in range(count):
        number = clip_seed(split, index, seed)
        scene = make_scene(number, level=level)
        chosen = choose_questions(questions_of(number, scene), questions_per_clip, asked)
        suffix, codec, options = CODECS[index % VP9_EVERY == VP9_EVERY - 1]
        name = f"{split}-{seed}-{index:05d}.{suffix}"
        if level == 3:
            # As footage from different sources: from barely visible to plainly visible coding artefacts.
            options = {**options, "crf": str(int(options["crf"]) + number % FOOTAGE_CRF_RANGE)}
        encode_scene(directory / name, scene, codec, options)
        made.append(MadeClip(number, name, tuple(chosen)))
        if on_clip is not None:
            on_clip(index + 1, count)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for clip in made for row in question_rows(clip)]
    partial = directory / f"{QUESTIONS_FILE}.part"
    try:
        partial.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResourceError(f"{partial}: cannot be written: {error.strerror}", "free some space") from error
    partial.replace(directory / QUESTIONS_FILE)
    return made


def make_demo_clip(path: Path) -> MadeClip:
    """Write an H.264 clip and choose three questions about it: where something slides, an object's shape or colour, and
    what appears for a moment. It is the first clip of the test split with these questions, whatever a model answers."""
    for index in range(SEEDS_A_SET):
        number = clip_seed("test", index)
        scene = make_scene(number)
        asked = questions_of(number, scene)
        motion = [question for question in asked if question.answer in DIRECTIONS and question.category == "Action"]
        short = [question for question in asked if question.category == "Transient"]
        other = [question for question in asked if question.category == "Attribute"]
        if scene.facts["kind"] == "motion" and motion and short and other:
            break
    _, codec, options = CODECS[0]
    encode_scene(path, scene, codec, options)
    return MadeClip(number, path.name, (motion[0], other[0], short[0]))


def is_world_clip(path: Path) -> bool:
    """Return whether a video file is marked as made by this world."""
    try:
        # Opening a pipe would block forever.
        if not path.is_file():
            return False
        with av.open(str(path)) as container:
            return MARK in {str(value) for value in container.metadata.values()}
    except (av.FFmpegError, OSError, ValueError):
        return False


def choose_questions(questions: list[Question], count: int, asked: Counter[object]) -> list[Question]:
    """Return at most ``count``, one per category, the least asked categories first. Updates ``asked``.

    Of a category's questions, the one is chosen whose options had this answer least often. Otherwise the answers that
    more scenes offer would be true more often, and guessing would pay. Of few questions a clip, scenes that offer many
    categories have a smaller part in each: then a question is left out while its answer was true more often than another.
    """
    by_category: dict[str, list[Question]] = {}
    even = [question for question in questions if count >= EVEN_COUNT or _lead(question, asked) <= 1]
    for question in even or questions:
        by_category.setdefault(question.category, []).append(question)
    chosen = []
    for category in sorted(by_category, key=lambda category: asked[category])[:count]:
        question = min(by_category[category], key=lambda question: asked[_options_and_answer(question)])
        asked[category] += 1
        asked[_options_and_answer(question)] += 1
        chosen.append(question)
    return chosen


def _options_and_answer(question: Question) -> tuple[frozenset[str], str]:
    return frozenset(question.choices), question.answer


def _lead(question: Question, asked: Counter[object]) -> int:
    """How much more often its answer was true than the rarest of its options."""
    options = frozenset(question.choices)
    return asked[options, question.answer] - min(asked[options, option] for option in options)


def question_rows(clip: MadeClip) -> Iterator[dict[str, object]]:
    """Yield the rows of ``questions.jsonl``."""
    for number, question in enumerate(clip.questions):
        yield {
            "id": f"{Path(clip.file).stem}-{number}",
            "video": clip.file,
            "category": question.category,
            "question": question.question,
            "choices": list(question.choices),
            "answer": question.answer,
            "seed": clip.seed,
        }


def encode_scene(path: Path, scene: Scene, codec: str, options: dict[str, str]) -> None:
    """Draw ``scene`` a stretch at a time and write it to the video file ``path``, marked as made by this world.

    ``codec``, ``options``: an encoder and its options, as in ``CODECS``. Raises ``ResourceError``.
    """
    frames = (frame for stretch in draw_stretches(scene, FILE_SIDE_PX) for frame in stretch.numpy())
    encode_frames(path, frames, FILE_SIDE_PX, scene.fps, codec, options, comment=MARK)
