"""LongVideoBench (Wu et al., 2024), the validation split: one JSON file, whose subtitles are left out."""

from __future__ import annotations

from freres_cli.evaluation.questions import Protocol, Question
from freres_cli.evaluation.readers.declaration import Benchmark
from freres_cli.evaluation.readers.letters import read_longvideobench
from freres_cli.evaluation.readers.local_copy import Entry, LocalCopy, list_options

QUESTIONS = "lvb_val.json"
NO_SUBTITLES = "LongVideoBench: subtitles are left out, as in lmms-eval's longvideobench_val_v"

PROTOCOL = Protocol(
    benchmark="longvideobench",
    prompt="lmms-eval 0.7.3, task longvideobench_val_v, without subtitles",
    extraction="lmms-eval 0.7.3, task longvideobench_val_v: the first capital A to E",
    max_new_tokens=32,
    extract=read_longvideobench,
    stop="\n\n",
    guesses=True,
)


def read(copy: LocalCopy, part: str | None) -> list[Question]:
    """Return the questions of the validation split. Raises ``UsageError``."""
    name = copy.find([QUESTIONS], "the test split, lvb_test_wo_gt.json, has no answers")
    copy.notes.append(NO_SUBTITLES)
    return [_read_entry(copy, entry) for entry in copy.json_entries(name)]


def _read_entry(copy: LocalCopy, entry: Entry) -> Question:
    choices = entry.texts("candidates")
    prompt = (
        f"{entry.written('question')}\n{list_options(choices)}\n"
        "Answer with the option's letter from the given choices directly.\n"
    )
    # Reported by length in the paper: 15, 60, 600 and 3,600 seconds.
    category = f"{entry.seconds('duration_group'):g} s"
    video = copy.find_video(["videos", "."], entry.text("video_path"))
    right = entry.index("correct_choice", len(choices))
    return copy.ask(entry, entry.text("id"), video, category, choices, right, prompt)


LONGVIDEOBENCH = Benchmark(
    name="longvideobench",
    layout=f"{QUESTIONS}; videos/VIDEO_PATH",
    marks=((QUESTIONS,),),
    protocol=PROTOCOL,
    read=read,
)
