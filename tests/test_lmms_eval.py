"""The model ``freres`` of lmms-eval, with the bundled model: on requests as lmms-eval makes them and, where it is installed,
inside the real one, on a small local task."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import wave
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from freres_cli.baselines.registry import METHODS
from freres_cli.errors import FreresError, PresetError, UsageError, VideoError
from freres_cli.pipeline.compressor import Compressor
from tests.clips import write_clip
from tests.lmms_eval_stand_in import stand_in
from tests.loaded_models import CountingEncoder, loaded_models, models_with

IS_INSTALLED = find_spec("lmms_eval") is not None
IS_LISTED = "freres" in entry_points(group="lmms_eval.models").names
QUESTIONS = ("What moves first?", "How many things are there?")
FRAMES = 8
TOKENS = 6
TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_visual.doc_to_visual
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module", autouse=True)
def lmms_eval():
    """The real one where it is installed, else what stands in for it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not IS_INSTALLED:
            stand_in(monkeypatch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips, and two questions about each, so that questions about one video do not follow each other."""
    folder = tmp_path_factory.mktemp("lmms")
    for name in ("a", "b"):
        write_clip(folder / f"{name}.mp4", FRAMES, fps=4)
    docs = [{"video": str(folder / f"{n}.mp4"), "question": q, "answer": "x"} for q in QUESTIONS for n in ("a", "b")]
    (folder / "tiny.json").write_text(json.dumps(docs))
    (folder / "tiny.yaml").write_text(TASK.replace("DATA", str(folder / "tiny.json")))
    (folder / "tiny_visual.py").write_text("def doc_to_visual(doc):\n    return [doc['video']]\n")
    return folder


def ask_alone(video: Path, question: str, **more) -> str:
    """What freres answers through its own API, at the same budget."""
    session = Compressor(budget_tokens=TOKENS, method="adaptive", device="cpu").compress(video).open(device="cpu")
    return session.ask(question, max_new_tokens=3, **more).text


def make_requests(folder, docs=None, visuals=None, **wanted):
    """The requests that lmms-eval's task makes, and its documents."""
    from lmms_eval.api.instance import Instance

    docs = docs or json.loads((folder / "tiny.json").read_text())
    shown = visuals or (lambda doc: [doc["video"]])
    wanted = {"max_new_tokens": 3, "until": ["\n\n"], **wanted}
    meta = {"task": "tiny", "repeats": 1}
    requests = [
        Instance("generate_until", (doc["question"], dict(wanted), shown, i, "tiny", "test"), 0, {**meta, "doc_id": i})
        for i, doc in enumerate(docs)
    ]
    return requests, {"tiny": {"test": docs}}


def make_model(models=None, **arguments):
    from freres_cli.integrations.lmms_eval import FreRes

    return FreRes(budget=TOKENS, models=models or loaded_models(), **arguments)


def answer(model, requests, task_dict):
    model.task_dict = task_dict
    return [result.text for result in model.generate_until(requests)]


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason="lmms-eval is not installed")
@pytest.mark.skipif(not IS_LISTED, reason="freres is not installed with its entry points")
def test_the_command_of_lmms_eval_gives_the_answers_of_freres(folder):
    flags = ["--model", "freres", "--model_args", f"pretrained=bundled,method=adaptive,budget={TOKENS},device=cpu"]
    flags += ["--tasks", "tiny", "--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = (folder / "out").rglob("*samples_tiny.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    docs = json.loads((folder / "tiny.json").read_text())
    assert [row["filtered_resps"] for row in rows] == [
        ask_alone(Path(doc["video"]), doc["question"]).strip() for doc in docs
    ]
    (results,) = (folder / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["tiny"]["exact_match,none"] == 0.0


def test_a_video_is_encoded_once_and_answers_keep_their_order(folder):
    encoder = CountingEncoder(loaded_models().encoder)
    requests, docs = make_requests(folder)
    found = answer(make_model(models_with(encoder)), requests, docs)
    assert sum(encoder.num_frames) == 2 * FRAMES
    assert found == [ask_alone(Path(doc["video"]), doc["question"]) for doc in docs["tiny"]["test"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_within_its_budget(folder, method):
    requests, docs = make_requests(folder)
    counts = []
    for own in (method, "blind"):
        model = make_model(method=own)
        model.task_dict = docs
        counts.append(model.generate_until(requests[:1])[0].token_counts.input_tokens)
    # What prunes in the decoder has every token in its context.
    most = {"full": FRAMES * 36, "fastv": FRAMES * 36, "framefusion-prune": FRAMES * 36, "blind": 0}.get(method, TOKENS)
    visual = counts[0] - counts[1]
    assert 0 < visual <= most if method not in ("full", "blind", "uniform", "adaptive") else visual == most


def test_a_share_is_of_the_full_tokens(folder):
    from freres_cli.integrations.lmms_eval import FreRes

    requests, docs = make_requests(folder)
    counts = []
    for budget in (1.0, "0.5", FRAMES * 36 // 2):  # lmms-eval reads numbers out of model_args
        model = FreRes(budget=budget, method="uniform", models=loaded_models())
        model.task_dict = docs
        counts.append(model.generate_until(requests[:1])[0].token_counts.input_tokens)
    assert counts[0] - counts[1] == FRAMES * 36 // 2 and counts[1] == counts[2]


def test_an_answer_ends_before_a_stop_text(folder):
    requests, docs = make_requests(folder)
    (whole,) = answer(make_model(), requests[:1], docs)
    assert len(whole) > 1
    requests, docs = make_requests(folder, until=[whole[1:]])
    assert answer(make_model(), requests[:1], docs) == [whole.partition(whole[1:])[0]]


def test_sampling_is_seeded_and_beams_are_refused(folder):
    requests, docs = make_requests(folder, temperature=2.0, do_sample=True)
    assert answer(make_model(), requests, docs) == answer(make_model(), requests, docs)
    requests, docs = make_requests(folder, num_beams=2)
    with pytest.raises(UsageError, match="num_beams: expected 1, got 2"):
        answer(make_model(), requests, docs)


def test_a_request_that_comes_again_draws_other_tokens(folder):
    """lmms-eval's --repeats sends the copies of a request one after the other. Greedy ones are alike."""
    requests, docs = make_requests(folder, temperature=2.0, do_sample=True, max_new_tokens=6)
    repeated = [request for request in requests[:2] for _ in range(4)]
    drawn = answer(make_model(), repeated, docs)
    assert len(set(drawn[:4])) > 2 and len(set(drawn[4:])) > 2
    assert drawn[::4] == answer(make_model(), requests[:2], docs), "the first copy is the request alone"
    assert drawn == answer(make_model(), repeated, docs)
    requests, docs = make_requests(folder)
    assert len(set(answer(make_model(), requests[:1] * 3, docs))) == 1


def test_it_has_what_lmms_eval_reads_with_several_processes(folder):
    """As its evaluator does it: rank and number are set from outside, and counts are gathered on the model's device."""
    model = make_model()
    model._rank, model._world_size = 1, 2
    assert (model.rank, model.world_size) == (1, 2)
    assert torch.tensor([3], device=model.device).device == torch.device("cpu")
    assert model.generate_until([]) == [], "a process may have no requests"


def test_videos_that_cannot_be_opened_stop_the_run_before_anything_is_encoded(folder, tmp_path):
    good = json.loads((folder / "tiny.json").read_text())
    cut, silent = tmp_path / "cut.mp4", tmp_path / "sound.wav"
    cut.write_bytes(Path(good[0]["video"]).read_bytes()[:-1500])  # as a download that stopped: the index is at the end
    with wave.open(str(silent), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    for video, told in (
        ("gone.mp4", r"gone\.mp4: no such file; videos that cannot be used: 1 of 3"),
        (str(cut), r"cut\.mp4: not a video .*: 1 of 3"),
        (str(silent), r"sound\.wav: has no video stream, only audio; .*: 1 of 3"),
    ):
        encoder = CountingEncoder(loaded_models().encoder)
        docs = [*good, {"video": video, "question": "q?", "answer": "x"}]
        with pytest.raises(VideoError, match=told):
            answer(make_model(models_with(encoder)), *make_requests(folder, docs))
        assert encoder.num_frames == []


@pytest.mark.parametrize(
    ("question", "wanted", "text"),
    [
        (" ", {}, "question: is empty"),
        ("q <|im_end|>", {}, "which the model reads as a command"),
        ("q?", {"num_beams": 3}, "num_beams: expected 1"),
        ("q?", {"max_new_tokens": -1}, "max_new_tokens: expected at least 1"),
    ],
)
def test_what_the_model_cannot_be_asked_stops_the_run_before_anything_is_encoded(folder, question, wanted, text):
    docs = json.loads((folder / "tiny.json").read_text())
    docs[-1]["question"] = question
    requests, documents = make_requests(folder, docs)
    requests[-1].args[1].update(wanted)
    encoder = CountingEncoder(loaded_models().encoder)
    with pytest.raises(UsageError, match=f"tiny, document {len(docs) - 1}: .*{re.escape(text)}"):
        answer(make_model(models_with(encoder)), requests, documents)
    assert encoder.num_frames == []


def test_notes_on_answers_are_logged_once_a_kind(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loaded_models().language_model, "max_context_tokens", 34)
    docs = [{"video": str(tmp_path / f"{frames}.mp4"), "question": "q?", "answer": "x"} for frames in (40, 48)]
    for doc in docs:
        write_clip(Path(doc["video"]), int(Path(doc["video"]).stem), fps=4)
    answer(make_model(text_after="max", method="uniform"), *make_requests(folder, docs))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (told,) = [text for text in warnings if "beyond the model's context of 34" in text]
    assert "40.mp4: positions reach" in told


def test_a_damaged_video_is_answered_with_a_warning(folder, tmp_path, caplog):
    write_clip(tmp_path / "whole.webm", 48, fps=12, codec="libvpx-vp9", options={"cpu-used": "8"})
    data = (tmp_path / "whole.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 2])
    docs = [{"video": str(tmp_path / f"{n}.webm"), "question": "q?", "answer": "x"} for n in ("whole", "cut")]
    requests, documents = make_requests(folder, docs)
    assert len(answer(make_model(), requests, documents)) == 2
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cut.webm: damaged: " in warning and "s of video are lost" in warning


@pytest.mark.parametrize(
    "visuals", [lambda doc: [], lambda doc: [doc["video"]] * 2, lambda doc: [1.5], lambda doc: None]
)
def test_anything_but_one_video_is_refused(folder, visuals):
    with pytest.raises(UsageError, match="tiny, document 0: expected the path of one video"):
        answer(make_model(), *make_requests(folder, visuals=visuals))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"method": "magic"}, UsageError, "method: expected one of"),
        ({"bugdet_tokens": 4}, PresetError, "bugdet_tokens"),
        ({"quality": 0.9}, FreresError, "quality"),
        ({"budget_tokens": 64}, UsageError, "model_args: budget_tokens: budget decides"),
        ({"method": "evs", "adapter": "x"}, UsageError, "model_args: adapter: has no effect on evs"),
        ({"batch_size": 8}, UsageError, "batch_size: expected 1"),
    ],
)
def test_model_args_that_cannot_be_carried_out(arguments, error, text):
    with pytest.raises(error, match=text):
        make_model(**arguments)


def test_log_likelihoods_are_refused_by_name():
    with pytest.raises(UsageError, match="loglikelihood: not supported"):
        make_model().loglikelihood([])
