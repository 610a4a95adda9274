"""NExT-QA, multiple choice (Xiao et al., 2021): a CSV file for each split, and VidOR's folders of videos."""

from __future__ import annotations

from freres_cli.errors import UsageError
from freres_cli.evaluation.questions import Protocol, Question
from freres_cli.evaluation.readers.declaration import Benchmark
from freres_cli.evaluation.readers.letters import read_nextqa
from freres_cli.evaluation.readers.local_copy import Entry, LocalCopy, list_options

COLUMNS = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")
ANNOTATIONS = ("", "dataset/nextqa/", "nextqa/", "annotations/")
VIDEOS = ("NExTVideo", "videos", ".")
MAP = "map_vid_vidorID.json"
SPLITS = ("test", "val")

PROTOCOL = Protocol(
    benchmark="nextqa",
    prompt="lmms-eval 0.7.3, task nextqa_mc_test",
    extraction="lmms-eval 0.7.3, task nextqa_mc_test: the last letter",
    # The task sets no limit; this is the one that lmms-eval's Qwen2-VL has then.
    max_new_tokens=128,
    extract=read_nextqa,
    stop="\n\n",
    guesses=True,
)


def read(copy: LocalCopy, part: str | None) -> list[Question]:
    """Return the questions of a split, by default those of the test split. Raises ``UsageError``."""
    split = part or SPLITS[0]
    name = copy.find([f"{folder}{split}.csv" for folder in ANNOTATIONS], "--benchmark nextqa:val reads val.csv")
    paths = _read_map(copy, name.removesuffix(f"{split}.csv") + MAP)
    entries = copy.csv_entries(name, COLUMNS)
    return [_read_entry(copy, entry, paths) for entry in entries]


def _read_map(copy: LocalCopy, name: str) -> dict[str, str]:
    """Return the path of each video below VidOR's folders; nothing if the copy has no map, as its videos may lie flat."""
    if not copy.has(name):
        return {}
    paths = copy.read_json(name)
    if not isinstance(paths, dict) or not all(isinstance(path, str) for path in paths.values()):
        raise UsageError(f"{copy.root / name}: expected a path for each video", "download it again")
    return paths


def _read_entry(copy: LocalCopy, entry: Entry, paths: dict[str, str]) -> Question:
    name = entry.text("video")
    choices = tuple(str(entry.values[f"a{i}"]).strip() for i in range(5))
    flat = copy.find_video(VIDEOS, name)
    mapped = copy.find_video(VIDEOS, paths[name]) if name in paths else flat
    video = flat if (copy.root / flat).exists() else mapped
    # The official script counts questions about what came before among those about what came next.
    category = entry.text("type").replace("TP", "TN")
    prompt = f"{entry.text('question')}\n{list_options(choices)}"
    right = entry.index("answer", len(choices))
    return copy.ask(entry, f"{name}_{entry.text('qid')}", video, category, choices, right, prompt)


NEXTQA = Benchmark(
    name="nextqa",
    layout=f"test.csv, val.csv, {MAP}; NExTVideo/0101/2909445186.mp4 and so on",
    marks=(
        *((f"{folder}{split}.csv", folder + MAP) for folder in ANNOTATIONS for split in SPLITS),
        ("NExTVideo", "*.csv"),
    ),
    protocol=PROTOCOL,
    read=read,
    parts=SPLITS,
)
