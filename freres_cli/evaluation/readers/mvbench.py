"""MVBench (Li et al., 2024): 20 tasks, a JSON file for each, and the videos of their sources."""

from __future__ import annotations

from pathlib import PurePosixPath

from freres_cli.evaluation.questions import Protocol, Question
from freres_cli.evaluation.readers.declaration import Benchmark
from freres_cli.evaluation.readers.letters import read_mvbench
from freres_cli.evaluation.readers.local_copy import Entry, LocalCopy, list_options

# Folders of each task's videos. A second one holds the same videos cut or converted by the benchmark's authors.
STAR = ("star/Charades_v1_480", "star/Charades_segment")
CLEVRER = ("clevrer/video_validation",)
PERCEPTION = ("perception/videos",)
FOLDERS = {
    "action_sequence": STAR,
    "action_prediction": STAR,
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "unexpected_action": ("FunQA_test/test",),
    "object_existence": CLEVRER,
    "object_interaction": STAR,
    "object_shuffle": PERCEPTION,
    "moving_direction": CLEVRER,
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "scene_transition": ("scene_qa/video",),
    "action_count": PERCEPTION,
    "moving_count": CLEVRER,
    "moving_attribute": CLEVRER,
    "state_change": PERCEPTION,
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "character_order": PERCEPTION,
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "counterfactual_inference": CLEVRER,
}
# Their questions are about a part of the video, from ``start`` to ``end``.
CUT_TASKS = ("action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning")
PARENTS = ("video", ".", "video/data0613", "data0613")
FRAMES_PER_SECOND = 3  # of TVQA's folders of frames

PROTOCOL = Protocol(
    benchmark="mvbench",
    prompt="lmms-eval 0.7.3, task mvbench",
    extraction="lmms-eval 0.7.3, task mvbench: the first letter A to E that is a word",
    max_new_tokens=16,
    extract=read_mvbench,
    stop="\n\n",
)


def read(copy: LocalCopy, part: str | None) -> list[Question]:
    """Return the questions of all tasks, or of one. Raises ``UsageError``."""
    hint = "MVBench has a file for each of its 20 tasks; --benchmark mvbench:TASK reads one"
    tasks = [part] if part else list(FOLDERS)
    names = {task: copy.find([f"json/{task}.json", f"{task}.json"], hint) for task in tasks}
    return [
        _read_entry(copy, entry, task, number)
        for task, name in names.items()
        for number, entry in enumerate(copy.json_entries(name), start=1)
    ]


def _read_entry(copy: LocalCopy, entry: Entry, task: str, number: int) -> Question:
    choices = entry.texts("candidates")
    answer = entry.text("answer")
    known = [choice.strip() for choice in choices]
    if answer not in known:
        raise entry.error("answer", "one of the candidates", answer)
    folders = [(PurePosixPath(parent) / folder).as_posix() for folder in FOLDERS[task] for parent in PARENTS]
    name = entry.text("video")
    video = copy.find_video(folders, name)
    problem = ""
    if (copy.root / video).is_dir():
        frames = copy.root / video
        problem = (
            f"{frames}: is a folder of frames: expected a video; make one with: ffmpeg -framerate {FRAMES_PER_SECOND} "
            f"-i {frames}/%05d.jpg -pix_fmt yuv420p {frames}.mp4"
        )
    is_part = task in CUT_TASKS and "_segment/" not in video
    bounds = {"start_s": entry.seconds("start"), "end_s": entry.seconds("end")} if is_part else {}
    options = list_options(choices, "({letter}) {option}")
    prompt = f"Question:{entry.written('question')}\nOption:\n{options}\nOnly give the best option.\n"
    own_id = f"{task}/{number}"
    return copy.ask(entry, own_id, video, task, choices, known.index(answer), prompt, problem=problem, **bounds)


MVBENCH = Benchmark(
    name="mvbench",
    layout="json/action_sequence.json and 19 more; video/star/Charades_v1_480/... and the other sources",
    marks=(("json/action_sequence.json",), ("json/moving_count.json",), ("json/state_change.json",)),
    protocol=PROTOCOL,
    read=read,
    parts=tuple(FOLDERS),
)
