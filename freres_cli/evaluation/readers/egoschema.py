"""EgoSchema (Mangalam et al., 2023): one JSON file of questions, and the answers to 500 of them."""

from __future__ import annotations

from freres_cli.errors import UsageError, count_of
from freres_cli.evaluation.questions import Protocol, Question
from freres_cli.evaluation.readers.declaration import Benchmark
from freres_cli.evaluation.readers.letters import read_egoschema
from freres_cli.evaluation.readers.local_copy import Entry, LocalCopy, list_options

QUESTIONS, ANSWERS = "questions.json", "subset_answers.json"
VIDEOS = ("videos", "good_clips_git", ".")
NUM_OPTIONS = 5

PROTOCOL = Protocol(
    benchmark="egoschema",
    prompt="lmms-eval 0.7.3, task egoschema_subset",
    extraction="lmms-eval 0.7.3, task egoschema_subset: the first letter",
    max_new_tokens=16,
    extract=read_egoschema,
    stop="\n\n",
    guesses=True,
)


def read(copy: LocalCopy, part: str | None) -> list[Question]:
    """Return the questions whose answers are published. Raises ``UsageError``."""
    hint = "the answers to 500 questions are published; the others are known to the authors' server only"
    answers = copy.read_json(copy.find([ANSWERS], hint))
    if not isinstance(answers, dict):
        raise UsageError(f"{copy.root / ANSWERS}: expected an answer for each q_uid", "download it again")
    entries = copy.json_entries(copy.find([QUESTIONS], "it holds the questions and their options"))
    known = [(entry, own_id) for entry in entries if (own_id := entry.text("q_uid")) in answers]
    missing = len(answers) - len({own_id for _, own_id in known})
    if missing:
        raise UsageError(
            f"{copy.root / ANSWERS}: answers whose questions are missing: {missing}", f"compare {QUESTIONS}"
        )
    if left_out := len(entries) - len(known):
        copy.notes.append(f"EgoSchema: left out: {count_of(left_out, 'question')} without an answer in {ANSWERS}")
    answer_entry = Entry(str(copy.root / ANSWERS), answers)
    return [_read_entry(copy, entry, own_id, answer_entry) for entry, own_id in known]


def _read_entry(copy: LocalCopy, entry: Entry, own_id: str, answers: Entry) -> Question:
    choices = tuple(entry.written(f"option {i}") for i in range(NUM_OPTIONS))
    prompt = (
        f"{entry.written('question')}\n{list_options(choices)}\n"
        "Answer with the option's letter from the given choices directly."
    )
    video = copy.find_video(VIDEOS, own_id)
    return copy.ask(entry, own_id, video, "egoschema", choices, answers.index(own_id, NUM_OPTIONS), prompt)


EGOSCHEMA = Benchmark(
    name="egoschema",
    layout=f"{QUESTIONS}, {ANSWERS}; videos/Q_UID.mp4",
    marks=((QUESTIONS, ANSWERS),),
    protocol=PROTOCOL,
    read=read,
)
