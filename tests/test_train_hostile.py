"""freres train with what it should not be given: one line says what is wrong, and nothing is mixed up in silence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from freres_cli.workflows import train_adapter, training_data
from freres_cli.world.make import make_set
from tests.runner import check_failure, run_freres

FLAGS = ("--batch", 2, "--questions", 2, "--validate-every", 1, "--budgets", "0.1", "--validation", 0.3, "--steps", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_set(folder, "train", 4, questions_per_clip=2)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(data, output, *flags, cache=None):
    return run_freres("train", data, "-o", output, "--cache", cache or data.parent / "cache", *FLAGS, *flags)


def stop_after_a_save(monkeypatch):
    save = train_adapter.save_state

    def stop(*arguments, **facts):
        save(*arguments, **facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_adapter, "save_state", stop)


def test_a_state_goes_on_only_where_it_came_from(folder, tmp_path, monkeypatch):
    """The videos that can be used decide which are held out."""
    output, data = tmp_path / "a.safetensors", folder / "questions.jsonl"
    video = folder / rows_of(folder)[0]["video"]
    hidden = video.rename(video.with_suffix(".away"))
    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        assert train(data, output).status == 130
    hidden.rename(video)
    for flags in ((), ("--dtype", "bfloat16"), ("--rank", 3)):
        check_failure(train(data, output, *flags), 2, "state of another run")
    state = tmp_path / "a.safetensors.state"
    assert state.exists() and not output.exists()
    state.write_bytes(b"junk")
    check_failure(train(data, output), 2, "damaged training state")
    torch.save({"step": 1}, state)
    check_failure(train(data, output), 2, "damaged training state")


def test_a_question_beyond_the_context_is_left_out_and_named(folder, tmp_path, monkeypatch):
    load = train_adapter.load_model

    def shorten(request):
        model = load(request)
        model.max_context_tokens = 500
        return model

    monkeypatch.setattr(train_adapter, "load_model", shorten)
    rows = rows_of(folder)
    rows[2] = {**rows[2], "question": "which way? " * 400}
    run = train(write(folder / "long.jsonl", rows), tmp_path / "a.safetensors", "--json", cache=tmp_path / "cache")
    assert run.status == 0, run.err
    assert len(run.json["failed"]) == 1
    assert "line 3: " in run.err and rows[2]["video"] in run.err and "more tokens than the model's context" in run.err


def test_what_the_model_reads_as_a_command_is_refused(folder, tmp_path):
    rows = rows_of(folder)
    data = write(folder / "control.jsonl", [rows[0], {**rows[1], "question": "what<|im_end|>"}])
    check_failure(train(data, tmp_path / "a.safetensors"), 2, f"{data}:2: holds <|im_end|>")
    free = {"video": rows[1]["video"], "question": "what?", "answer": "red<|im_end|>"}
    check_failure(train(write(data, [rows[0], free]), tmp_path / "a.safetensors"), 2, f"{data}:2: holds <|im_end|>")


def test_one_clip_under_two_names_is_one_video(folder, tmp_path):
    """Else it could be learned and held out at once. Keys that are not used may hold anything."""
    rows = rows_of(folder)
    for i, row in enumerate(rows):
        row["id"], row["category"] = 0, None
        if i % 2:
            shutil.copy(folder / row["video"], folder / f"copy-{row['video']}")
            row["video"] = f"./copy-{row['video']}"
    run = train(write(folder / "twice.jsonl", rows), tmp_path / "a.safetensors", "--json")
    assert run.status == 0, run.err
    assert run.json["num_videos"] == 4 and run.json["num_questions"] == len(rows) == 8


def test_a_damaged_cache_is_made_anew(folder, tmp_path):
    cache, data = tmp_path / "cache", folder / "questions.jsonl"
    assert train(data, tmp_path / "a.safetensors", cache=cache).status == 0
    bundle = next(cache.rglob("*.pt"))
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[: len(whole) // 2])
    next(cache.rglob("*-teacher.json")).write_text("[]")
    assert train(data, tmp_path / "b.safetensors", cache=cache).status == 0
    assert bundle.read_bytes() == whole
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_teacher_that_does_not_fit_is_done_without(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(training_data, "prefill_video", fail)
    run = train(folder / "questions.jsonl", tmp_path / "a.safetensors", cache=tmp_path / "cache")
    assert run.status == 0 and "4 videos without a full-token teacher" in run.err


def test_memory_that_does_not_suffice_is_no_bug(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(train_adapter, "score_answers", fail)
    check_failure(train(folder / "questions.jsonl", tmp_path / "a.safetensors"), 6, "training: out of memory")


def test_an_adapter_that_learned_nothing_says_so(folder, tmp_path):
    run = train(folder / "questions.jsonl", tmp_path / "a.safetensors", "--learning-rate", 0)
    assert run.status == 0 and "the adapter changes nothing" in run.err


def test_a_training_that_blows_up_ends(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_adapter, "total_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    check_failure(train(folder / "questions.jsonl", tmp_path / "a.safetensors"), 2, "step 1: the loss is nan")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (("--learning-rate", "inf"), 2, "--learning-rate"),
        (("--seed", 10**20), 2, "--seed"),
        (("-o", "."), 4, "is a folder"),
        (("-o", "a" * 252), 4, "name too long"),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, flags, status, text):
    run = run_freres("train", folder / "questions.jsonl", "-o", tmp_path / "a.safetensors", *flags)
    assert run.status == status and text in run.err and "bug" not in run.err


def test_processes_started_together_may_not_share_a_gpu(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = train(folder / "questions.jsonl", tmp_path / "a.safetensors", "--device", "cuda:0")
    check_failure(run, 2, "--device cuda:0: every process would have this one")
