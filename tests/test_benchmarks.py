"""Public benchmarks, read from small copies in their own layouts, and run through ``freres eval``."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pytest

from freres_cli.errors import UsageError
from freres_cli.evaluation.questions import Question
from freres_cli.evaluation.readers.registry import BENCHMARKS, read_any_questions
from freres_cli.pipeline.query import Query
from freres_cli.pipeline.refining import refine_tokens
from freres_cli.pipeline.session import Session
from freres_cli.records import Answer
from freres_cli.workflows.evaluate import evaluate
from tests.benchmark_copies import (
    FPS,
    LVB_ROW,
    MAKERS,
    NEXTQA_ROW,
    VIDEO_MME_ROW,
    add_clip,
    egoschema_row,
    make_mvbench,
    write_csv,
    write_json,
)
from tests.evaluations import make_request
from tests.loaded_models import CountingEncoder, loaded_models, models_with
from tests.runner import check_failure, fails, run_freres


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """One copy of each benchmark, by name. Tests that change one copy it first."""
    folder = tmp_path_factory.mktemp("copies")
    made = {}
    for name, make in MAKERS.items():
        (folder / name).mkdir()
        made[name] = make(folder / name)
    return made


def request_for(root, named=None, methods="uniform"):
    """The request of ``freres eval`` for a copy, at 8 tokens."""
    row = root.parent / "none.jsonl"
    row.write_text(json.dumps({"id": "1", "video": "v", "category": "c", "question": "q", "answer": "a"}) + "\n")
    return replace(make_request(row, methods, "8"), questions=read_any_questions(root, named))


def say(monkeypatch, text_of):
    """Make the model say ``text_of(prompt)``, and return the list of prompts that it is asked."""
    prompts = []

    def ask(self, question, *, choices=(), max_new_tokens=64, **more):
        assert not choices, "a benchmark is answered in words"
        self._prompt(Query(question))
        prompts.append(question)
        return Answer(text_of(question), len(self.tokens), 0, 1, 0.1, None, "stop")

    monkeypatch.setattr(Session, "ask", ask)
    return prompts


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_is_recognized_and_run_with_the_benchmarks_own_protocol(copies, name):
    run = run_freres("eval", copies[name], "--methods", "uniform", "--budgets", "8", "--limit", 2, "--json", "--quiet")
    assert run.status == 0, run.err
    protocol = BENCHMARKS[name].protocol
    assert run.json["scoring"] == {
        "benchmark": name,
        "answers": f"greedily, at most {protocol.max_new_tokens} tokens",
        "prompt": protocol.prompt,
        "extraction": protocol.extraction,
    }
    assert run.json["num_questions"] == 2 and run.json["failed"] == []
    assert any(name in note and "own prompt" in note for note in run.json["notes"])


def test_a_plain_file_is_scored_by_probability_and_says_so(tmp_path):
    add_clip(tmp_path, "v.mp4")
    row = {"id": "1", "video": "v.mp4", "category": "c", "question": "q?", "choices": ["a", "b"], "answer": "a"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    run = run_freres("eval", tmp_path / "q.jsonl", "--methods", "blind", "--budgets", "8", "--json", "--quiet")
    assert run.json["scoring"]["benchmark"] is None and "probabilities" in run.json["scoring"]["answers"]


PROMPTS = {
    "mvbench": "Question:What then?\nOption:\n(A) sat\n(B) ran\nOnly give the best option.\n",
    "nextqa": "how do they play\nA. roll\nB. tap, softly\nC. strum\nD. hit\nE. tap, softly",
    "egoschema": "What does C do in u-1?\nA. C does 0.\nB. C does 1.\nC. C does 2.\nD. C does 3.\nE. C does 4.\n"
    "Answer with the option's letter from the given choices directly.",
    "longvideobench": "Who enters?\nA. a man\nB. a dog\nC. a cat\nD. nobody\n"
    "Answer with the option's letter from the given choices directly.\n",
    "video-mme": "Select the best answer to the following multiple-choice question based on the video. Respond with only "
    "the letter (A, B, C, or D) of the correct option.\nHow many?\nA. One.\nB. Two.\nC. Six.\nD. Ten.\n"
    "The best answer is:",
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_prompt_is_the_published_one_and_the_right_letter_is_right(copies, name, monkeypatch):
    request = request_for(copies[name])
    letters = {q.prompt: q.answer for q in request.questions.questions}
    prompts = say(monkeypatch, lambda prompt: letters[prompt])
    assert evaluate(request, models=loaded_models()).summary["rows"][0]["accuracy"] == 1.0
    assert prompts[0] == PROMPTS[name]
    say(monkeypatch, lambda prompt: "B" if letters[prompt] == "A" else "A")
    assert evaluate(request, models=loaded_models()).summary["rows"][0]["accuracy"] == 0.0


def test_spaces_are_in_the_prompt_as_they_are_published(tmp_path):
    """The published scripts take none away, and a model reads them."""
    MAKERS["mvbench"](tmp_path)
    path = next(tmp_path.rglob("action_sequence.json"))
    entries = json.loads(path.read_text())
    entries[0] |= {"question": "What then? ", "candidates": ["sat ", " ran"], "answer": "sat"}
    path.write_text(json.dumps(entries))
    question = read_any_questions(tmp_path).questions[0]
    assert question.prompt == "Question:What then? \nOption:\n(A) sat \n(B)  ran\nOnly give the best option.\n"
    assert question.choices == ("sat", "ran") and question.answer == "A"


def test_what_is_relevant_is_the_question_without_options_and_template(copies, monkeypatch):
    """The text that ``cdpruner`` picks tokens by."""
    request = request_for(copies["video-mme"], methods="cdpruner")
    texts = []

    def refine(tokens, model, text, *options):
        texts.append(text)
        return refine_tokens(tokens, model, text, *options)

    monkeypatch.setattr("freres_cli.pipeline.session.refine_tokens", refine)
    evaluate(request, models=loaded_models())
    assert texts == [question.question for question in request.questions.questions]
    assert not any(question.prompt in texts for question in request.questions.questions)


def test_answers_are_the_letters_of_the_published_ones(copies):
    found = {name: "".join(q.answer for q in read_any_questions(copies[name]).questions) for name in MAKERS}
    mvbench = "AA" + "B" * 19
    assert found == {"mvbench": mvbench, "nextqa": "CCC", "egoschema": "AE", "longvideobench": "BA", "video-mme": "CC"}


def test_categories_and_chance_are_those_of_the_benchmark(copies):
    found = {name: [q.category for q in read_any_questions(copies[name]).questions] for name in MAKERS}
    assert found["nextqa"] == ["CH", "TN", "TN"]
    assert found["longvideobench"] == ["15 s", "600 s"] and found["video-mme"] == ["short", "long"]
    assert len(set(found["mvbench"])) == 20 and found["egoschema"] == ["egoschema"] * 2
    sizes = {name: {len(q.choices) for q in read_any_questions(copies[name]).questions} for name in MAKERS}
    assert sizes == {"mvbench": {2, 3}, "nextqa": {5}, "egoschema": {5}, "longvideobench": {4}, "video-mme": {4}}


def test_a_part_of_a_video_is_a_clip_of_its_own_and_a_shared_video_is_encoded_once(copies, monkeypatch):
    request = request_for(copies["mvbench"], "mvbench:action_sequence")
    say(monkeypatch, lambda _: "A")
    encoder = CountingEncoder(loaded_models().encoder)
    evaluate(request, models=models_with(encoder))
    # Parts from 0 to 1 s and from 0.5 to 2 s of the same file, every frame of them.
    assert sum(encoder.num_frames) == FPS * 1 + FPS * 1.5
    request = request_for(copies["mvbench"])
    shared = request.questions.by_video()["video/perception/videos/p.mp4"]
    assert {q.category for q in shared} == {"object_shuffle", "action_count", "state_change", "character_order"}
    encoder = CountingEncoder(loaded_models().encoder)
    result = evaluate(request, models=models_with(encoder))
    assert sum(encoder.num_frames) == FPS * (1 + 1.5 + 2)
    assert result.summary["num_questions"] == 2 + 4


def test_missing_videos_are_failed_rows(copies):
    run = run_freres("eval", copies["mvbench"], "--methods", "blind", "--json")
    failed = {item["video"]: item for item in run.json["failed"]}
    assert sum(item["num_questions"] for item in failed.values()) == 21 - 6
    assert "video/clevrer/video_validation/p.mp4" in failed and "p.mp4" in failed["video/nturgbd/p.mp4"]["message"]
    assert "questions that count for no method: 15" in run.err


def test_a_folder_of_frames_is_named_and_a_video_made_of_it_is_read(tmp_path):
    root = make_mvbench(tmp_path)
    row = {"video": "ep_01", "start": 0.5, "end": 1.5, "question": "q?", "candidates": ["a", "b"], "answer": "b"}
    write_json(root / "json/episodic_reasoning.json", [row])
    (root / "video/tvqa/frames_fps3_hq/ep_01").mkdir(parents=True)
    run = run_freres("eval", root, "--benchmark", "mvbench:episodic_reasoning", "--methods", "blind")
    check_failure(run, 3, "is a folder of frames: expected a video; make one with: ffmpeg -framerate 3")
    add_clip(root, "video/tvqa/frames_fps3_hq/ep_01.mp4")
    question = read_any_questions(root, "mvbench:episodic_reasoning").questions[0]
    assert not question.problem and question.video.is_file() and (question.start_s, question.end_s) == (0.5, 1.5)


def test_clips_that_the_authors_cut_are_read_whole(tmp_path):
    root = make_mvbench(tmp_path)
    (root / "video/star/Charades_v1_480").rename(root / "video/star/Charades_segment")
    (root / "video").rename(root / "data0613")
    for question in read_any_questions(root, "mvbench:action_sequence").questions:
        assert question.video == root / "data0613/star/Charades_segment/S1.mp4" and question.start_s is None


def test_splits_and_lengths_are_parts(copies):
    assert len(read_any_questions(copies["nextqa"], "nextqa:val").questions) == 1
    assert [q.id for q in read_any_questions(copies["video-mme"], "video-mme:long").questions] == ["002-1"]
    assert [q.id for q in read_any_questions(copies["nextqa"]).questions][:2] == ["4010069381_6", "4010069381_7"]


def test_parquet_gives_the_same_questions_as_json(copies, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    rows = json.loads((copies["video-mme"] / "videomme.json").read_text())
    (tmp_path / "videomme").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "videomme/test-00000-of-00001.parquet")
    made, expected = (read_any_questions(root).questions for root in (tmp_path, copies["video-mme"]))
    assert [(q.id, q.prompt, q.answer) for q in made] == [(q.id, q.prompt, q.answer) for q in expected]


def test_damage_to_parquet_is_told_with_the_name_of_the_file(copies, tmp_path):
    """pyarrow raises errors of several kinds for it."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    path = tmp_path / "videomme/test-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(
        pyarrow.Table.from_pylist(json.loads((copies["video-mme"] / "videomme.json").read_text())), path
    )
    whole, kinds = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(kinds.randint(1, 10)):
            damaged[kinds.randrange(len(whole))] = kinds.randrange(256)
        path.write_bytes(damaged)
        try:
            read_any_questions(tmp_path)
        except UsageError as error:
            refused += "not a whole Parquet file" in error.message and str(path) in error.message
    assert refused > 75


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("freres_cli.evaluation.readers.local_copy.find_spec", lambda name: None)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with fails(2, "needs pyarrow") as caught:
        read_any_questions(tmp_path)
    assert "freres[benchmarks]" in caught.value.hint


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


LVB, NEXT, MME = "lvb_val.json", "test.csv", "videomme.json"
BROKEN = {
    "lvb not json": ("longvideobench", LVB, '[{"id": "x"},\n oops]', f"{LVB}:2: not valid JSON"),
    "lvb no list": ("longvideobench", LVB, {"a": 1}, f"{LVB}: expected a list of questions, got an object"),
    "lvb empty": ("longvideobench", LVB, [], "got an empty list"),
    "lvb entry": ("longvideobench", LVB, [LVB_ROW, 3], f"{LVB}: entry 2: expected an object"),
    "lvb no answer": ("longvideobench", LVB, [without(LVB_ROW, "correct_choice")], "entry 1: 'correct_choice' is missing"),
    "lvb far answer": ("longvideobench", LVB, [{**LVB_ROW, "correct_choice": 4}], "from 0 to 3, got 4"),
    "lvb bool": ("longvideobench", LVB, [{**LVB_ROW, "correct_choice": True}], "from 0 to 3, got true"),
    "lvb same id": ("longvideobench", LVB, [LVB_ROW, LVB_ROW], "id 86C_0 is already used in"),
    "lvb path": ("longvideobench", LVB, [{**LVB_ROW, "video_path": "../x.mp4"}], "expected a name inside the copy"),
    "lvb options": ("longvideobench", LVB, [{**LVB_ROW, "candidates": ["one"]}], "candidates: expected 2 to 26 options"),
    "next column": ("nextqa", NEXT, [without(NEXTQA_ROW, "a4")], f"{NEXT}:1: no column a4"),
    "next answer": ("nextqa", NEXT, [{**NEXTQA_ROW, "answer": "C"}], f'{NEXT}:2: answer: expected a whole number from 0'),
    "next question": ("nextqa", NEXT, [NEXTQA_ROW, {**NEXTQA_ROW, "question": ""}], f"{NEXT}:3: question: expected text"),
    "next map": ("nextqa", "map_vid_vidorID.json", [1], "expected a path for each video"),
    "next bytes": ("nextqa", NEXT, b"video\n\xff", "expected UTF-8"),
    "ego answer": ("egoschema", "subset_answers.json", {"u-1": 5}, "subset_answers.json: u-1: expected a whole number"),
    "ego lost": ("egoschema", "subset_answers.json", {"u-9": 1}, "answers whose questions are missing: 1"),
    "ego option": ("egoschema", "questions.json", [without(egoschema_row("u-1"), "option 3"), egoschema_row("u-3")],
                   "entry 1: 'option 3' is missing"),
    "mme answer": ("video-mme", MME, [{**VIDEO_MME_ROW, "answer": "E"}], "entry 1: answer: expected one of A, B, C, D"),
    "mme length": ("video-mme", MME, [{**VIDEO_MME_ROW, "duration": "brief"}], "duration: expected one of short"),
    "mme no id": ("video-mme", MME, [without(VIDEO_MME_ROW, "videoID")], "entry 1: 'videoID' is missing"),
    "mv answer": ("mvbench", "json/state_change.json",
                  [{"video": "p.mp4", "question": "q", "candidates": ["a", "b"], "answer": "c"}],
                  "state_change.json: entry 1: answer: expected one of the candidates"),
    "mv start": ("mvbench", "json/action_sequence.json",
                 [{"video": "S1.mp4", "question": "q", "candidates": ["a", "b"], "answer": "a"}], "'start' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_copy_is_one_line_that_names_the_place(copies, tmp_path, case):
    name, file, content, expected = BROKEN[case]
    root = tmp_path / "copy"
    shutil.copytree(copies[name], root, symlinks=True)
    if isinstance(content, bytes):
        (root / file).write_bytes(content)
    elif isinstance(content, str):
        (root / file).write_text(content)
    elif file.endswith(".csv"):
        write_csv(root / file, content)
    else:
        write_json(root / file, content)
    run = run_freres("eval", root)
    check_failure(run, 2, expected)
    assert str(root) in run.errors[0]


def test_missing_annotations_and_wrong_names_are_usage(copies, tmp_path):
    check_failure(run_freres("eval", tmp_path), 2, "got none that is known")
    (tmp_path / "questions.jsonl").touch()  # as freres world make leaves it
    run = run_freres("eval", tmp_path)
    check_failure(run, 2, "got none that is known")
    assert f"hint: for questions of your own, name {tmp_path / 'questions.jsonl'}" in run.err
    check_failure(run_freres("eval", tmp_path, "--benchmark", "mvbench"), 2, "action_sequence.json: is missing")
    check_failure(run_freres("eval", tmp_path, "--benchmark", "mvbenhc"), 2, "expected one of mvbench, nextqa")
    check_failure(run_freres("eval", copies["nextqa"], "--benchmark", "nextqa:train"), 2, "expected one of test, val")
    check_failure(run_freres("eval", tmp_path / "no", "--benchmark", "nextqa"), 2, "is not a folder")
    shutil.copy(copies["longvideobench"] / "lvb_val.json", tmp_path)
    shutil.copy(copies["video-mme"] / "videomme.json", tmp_path)
    check_failure(run_freres("eval", tmp_path), 2, "more than one: longvideobench, video-mme")
    assert len(read_any_questions(tmp_path, "longvideobench").questions) == 2


def test_a_guess_is_drawn_from_the_id_and_is_fair():
    protocol = BENCHMARKS["nextqa"].protocol
    base = Question("", "v", None, "c", "q", ("a", "b", "c", "d", "e"), "B", 0, "p")
    asked = [replace(base, id=f"{i}_{i % 9}") for i in range(2000)]
    right = [protocol.is_right("I do not know.", question) for question in asked]
    assert right == [protocol.is_right("no idea", question) for question in asked]
    # Five standard deviations of a fair draw among five.
    assert abs(sum(right) / len(right) - 0.2) < 5 * (0.2 * 0.8 / len(right)) ** 0.5
    assert not any(BENCHMARKS["video-mme"].protocol.is_right("no idea", question) for question in asked)


def test_answers_without_a_letter_are_counted_in_a_note(copies, monkeypatch):
    say(monkeypatch, lambda _: "hm")
    result = evaluate(request_for(copies["egoschema"], methods="uniform,blind"), models=loaded_models())
    assert "answers that name no option: 4 of 4; each counts as a guess" in result.notes
    assert any("left out: 1 question without" in note for note in result.notes)


def test_an_answer_to_video_mme_without_a_letter_is_wrong_and_scoring_says_that_its_script_differs(copies, monkeypatch):
    request = request_for(copies["video-mme"])
    replies = iter(["hm", "C"])
    say(monkeypatch, lambda _: next(replies))
    assert evaluate(request, models=loaded_models()).summary["rows"][0]["accuracy"] == 0.5
    assert "leaves it out of the count" in request.questions.describe_scoring()["extraction"]


def test_resuming_needs_the_same_annotations_and_the_same_benchmark(copies, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(copies["longvideobench"], root)
    flags = ("--methods", "blind", "-o", tmp_path / "out.jsonl", "--json", "--quiet")
    assert run_freres("eval", root, *flags).json["num_videos_resumed"] == 0
    assert run_freres("eval", root, *flags).json["num_videos_resumed"] == 1
    write_json(root / "lvb_val.json", [LVB_ROW])
    check_failure(run_freres("eval", root, *flags), 2, "questions_sha256 differs")
