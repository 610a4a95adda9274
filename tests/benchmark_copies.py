"""Small made-up copies of public benchmarks, in their published layouts, with real clips."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tests.clips import write_clip

FRAMES = 8
FPS = 4


def add_clip(root: Path, name: str) -> None:
    """Two seconds of video."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, FRAMES, fps=FPS)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_mvbench(root: Path) -> Path:
    """Every task has a file; action_sequence asks about two parts of one video, two tasks share another video."""
    from freres_cli.evaluation.readers.mvbench import FOLDERS

    for task in FOLDERS:
        rows = [{"video": "p.mp4", "question": "What now?", "candidates": ["up", "down", "up again"], "answer": "down"}]
        if task == "action_sequence":
            both = {"video": "S1.mp4", "question": "What then?", "candidates": ["sat", "ran"], "answer": "sat"}
            rows = [{**both, "start": 0.0, "end": 1.0}, {**both, "start": 0.5, "end": 2.0}]
        if task in ("action_prediction", "object_interaction", "action_localization", "episodic_reasoning"):
            rows = [{**rows[0], "start": 0.0, "end": 1.0}]
        write_json(root / f"json/{task}.json", rows)
    add_clip(root, "video/star/Charades_v1_480/S1.mp4")
    add_clip(root, "video/perception/videos/p.mp4")
    return root


NEXTQA_ROW = {
    "video": "4010069381", "frame_count": 8, "width": 64, "height": 64, "question": "how do they play", "answer": 2,
    "qid": 6, "type": "CH", "a0": "roll", "a1": "tap, softly", "a2": "strum", "a3": "hit", "a4": "tap, softly",
}  # fmt: skip


def make_nextqa(root: Path) -> Path:
    """Three questions on two videos, one in VidOR's folder and one beside it."""
    rows = [NEXTQA_ROW, {**NEXTQA_ROW, "qid": 7, "type": "TP"}, {**NEXTQA_ROW, "video": "77", "type": "TN"}]
    write_csv(root / "test.csv", rows)
    write_csv(root / "val.csv", [NEXTQA_ROW])
    write_json(root / "map_vid_vidorID.json", {"4010069381": "0101/4010069381", "77": "0002/77"})
    add_clip(root, "NExTVideo/0101/4010069381.mp4")
    add_clip(root, "NExTVideo/77.mp4")
    return root


def egoschema_row(uid: str) -> dict[str, str]:
    return {"q_uid": uid, "question": f"What does C do in {uid}?", **{f"option {i}": f"C does {i}." for i in range(5)}}


def make_egoschema(root: Path) -> Path:
    """Three questions, of which two have an answer."""
    write_json(root / "questions.json", [egoschema_row(uid) for uid in ("u-1", "u-2", "u-3")])
    write_json(root / "subset_answers.json", {"u-1": 0, "u-3": 4})
    for uid in ("u-1", "u-3"):
        add_clip(root, f"videos/{uid}.mp4")
    return root


LVB_ROW = {
    "video_id": "86C", "question": "Who enters?", "candidates": ["a man", "a dog", "a cat", "nobody"],
    "correct_choice": 1, "topic_category": "NP", "question_category": "T3E", "level": "L2-Relation", "id": "86C_0",
    "video_path": "86C.mp4", "subtitle_path": "86C_en.json", "duration_group": 15,
    "starting_timestamp_for_subtitles": 0, "duration": 2.0, "view_count": 5,
}  # fmt: skip


def make_longvideobench(root: Path) -> Path:
    rows = [LVB_ROW, {**LVB_ROW, "id": "86C_1", "question": "Who leaves?", "duration_group": 600, "correct_choice": 0}]
    write_json(root / "lvb_val.json", rows)
    write_json(root / "lvb_test_wo_gt.json", [{k: v for k, v in LVB_ROW.items() if k != "correct_choice"}])
    add_clip(root, "videos/86C.mp4")
    return root


VIDEO_MME_ROW = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Astronomy",
    "url": "https://example.org/watch?v=fFj-v93ACGo", "videoID": "fFj-v93ACGo", "question_id": "001-1",
    "task_type": "Counting Problem", "question": "How many?", "options": ["A. One.", "B. Two.", "C. Six.", "D. Ten."],
    "answer": "C",
}  # fmt: skip


def make_video_mme(root: Path) -> Path:
    """A flat list, as the Parquet file has it."""
    rows = [VIDEO_MME_ROW, {**VIDEO_MME_ROW, "question_id": "002-1", "duration": "long", "videoID": "other"}]
    write_json(root / "videomme.json", rows)
    add_clip(root, "data/fFj-v93ACGo.mp4")
    add_clip(root, "data/other.mp4")
    return root


MAKERS = {
    "mvbench": make_mvbench,
    "nextqa": make_nextqa,
    "egoschema": make_egoschema,
    "longvideobench": make_longvideobench,
    "video-mme": make_video_mme,
}
