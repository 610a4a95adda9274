"""Video-MME (Fu et al., 2025), without subtitles: a Parquet file, or its rows as JSON."""

from __future__ import annotations

from freres_cli.evaluation.questions import Protocol, Question
from freres_cli.evaluation.readers.declaration import Benchmark
from freres_cli.evaluation.readers.letters import read_video_mme
from freres_cli.evaluation.readers.local_copy import Entry, LocalCopy

PARQUET = ("videomme/test-00000-of-00001.parquet", "test-00000-of-00001.parquet")
JSON = ("videomme.json", "Video-MME.json")
VIDEOS = ("data", "videos", "video", ".")
LENGTHS = ("short", "medium", "long")
OPTIONS = "ABCD"
TASK = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)
NO_SUBTITLES = "Video-MME: subtitles are left out"

PROTOCOL = Protocol(
    benchmark="video-mme",
    prompt="Video-MME's README, without subtitles",
    extraction="Video-MME's eval_your_results.py: the first capital A to D; an answer without one is wrong, while that "
    "script leaves it out of the count",
    max_new_tokens=16,
    extract=read_video_mme,
)


def read(copy: LocalCopy, part: str | None) -> list[Question]:
    """Return all questions, or those about videos of one length. Raises ``UsageError``."""
    name = copy.find([*JSON, *PARQUET], "Video-MME publishes a Parquet file")
    entries = copy.parquet_entries(name) if name in PARQUET else copy.json_entries(name)
    copy.notes.append(NO_SUBTITLES)
    questions = [_read_entry(copy, entry) for entry in entries]
    return [question for question in questions if part in (None, question.category)]


def _read_entry(copy: LocalCopy, entry: Entry) -> Question:
    options = entry.texts("options")
    answer = entry.text("answer")
    if len(options) != len(OPTIONS) or answer not in OPTIONS:
        raise entry.error("answer", f"one of {', '.join(OPTIONS)}, of four options", answer)
    category = entry.text("duration")
    if category not in LENGTHS:
        raise entry.error("duration", f"one of {', '.join(LENGTHS)}", category)
    video = copy.find_video(VIDEOS, entry.text("videoID"))
    listed = "\n".join(options)  # they come with their letters
    prompt = f"{TASK}\n{entry.written('question')}\n{listed}\nThe best answer is:"
    return copy.ask(entry, entry.text("question_id"), video, category, options, OPTIONS.index(answer), prompt)


VIDEO_MME = Benchmark(
    name="video-mme",
    layout=f"{PARQUET[0]}, or {JSON[0]}; data/VIDEO_ID.mp4",
    marks=tuple((name,) for name in (*PARQUET, *JSON)),
    protocol=PROTOCOL,
    read=read,
    parts=LENGTHS,
)
