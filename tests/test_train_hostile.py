"""freres train with bad input: one line says what is wrong, and runs are never mixed up."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from freres_cli.bundle.adapter import read_header
from freres_cli.cli.compress import make_options
from freres_cli.errors import ContextError
from freres_cli.pipeline.models import Models
from freres_cli.workflows import training_data, training_loop
from freres_cli.workflows.train_adapter import describe_left_out
from freres_cli.world.bundled_model import bundled_model_dir
from freres_cli.world.make import make_set
from tests.clips import cut, write_clip
from tests.evaluations import read_rows, write_rows
from tests.loaded_models import CountingEncoder, CountingLanguageModel, Wrapped, loaded_models, models_with
from tests.runner import check_failure, fails, run_freres
from tests.trainings import Training, stop_at

MOST_IN_MEMORY = 300
TRAINING = Training("0.1", batch=2, questions_a_video=2, validate_every=1, validation_share=0.3, num_steps=2)


class NanWhenTraining(Wrapped):
    """A language model whose logits are NaN whenever gradients are computed."""

    def logits(self, hidden):
        logits = self.inner.logits(hidden)
        return logits * float("nan") if torch.is_grad_enabled() else logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_set(folder, "train", 4, questions_per_clip=2)
    return folder


def rows_of(folder):
    return read_rows(folder / "questions.jsonl")


def train(data, output, cache=None, **changed):
    return TRAINING.run(data, output, cache or data.parent / "cache", **changed)


def run_command(data, output, *flags):
    return run_freres("train", data, "-o", output, "--cache", data.parent / "cache", *TRAINING.flags, *flags)


@pytest.mark.slow
def test_a_state_goes_on_only_where_it_came_from(folder, tmp_path):
    """The videos that can be used decide which are held out."""
    output, data = tmp_path / "a.safetensors", folder / "questions.jsonl"
    video = folder / rows_of(folder)[0]["video"]
    hidden = video.rename(video.with_suffix(".away"))
    with pytest.raises(KeyboardInterrupt):
        train(data, output, log=stop_at(2))
    hidden.rename(video)
    with fails(2, "state of a run with other videos or questions: 4 videos can be used now, 3 when it began"):
        train(data, output)
    for changed in ({"dtype": "bfloat16"}, {"rank": 3}):
        with fails(2, "state of another run"):
            train(data, output, **changed)
    state = tmp_path / "a.safetensors.state"
    assert state.exists() and not output.exists()
    state.write_bytes(b"junk")
    with fails(2, "damaged training state"):
        train(data, output)
    torch.save({"step": 1}, state)
    with fails(2, "damaged training state"):
        train(data, output)


def test_a_question_beyond_the_context_is_left_out_and_named(folder, tmp_path):
    model = copy.copy(loaded_models().language_model)
    model.max_context_tokens = 500
    rows = rows_of(folder)
    rows[2] = {**rows[2], "question": "which way? " * 400}
    data, output, cache = write_rows(folder / "long.jsonl", rows), tmp_path / "a.safetensors", tmp_path / "cache"
    failed = train(data, output, cache, models=models_with(language_model=model))["failed"]
    assert len(failed) == 1
    assert "line 3: " in failed[0] and rows[2]["video"] in failed[0]
    assert "more tokens than the model's context" in failed[0]


def test_what_the_model_reads_as_a_command_is_refused(folder, tmp_path):
    rows = rows_of(folder)
    free = {"video": rows[1]["video"], "question": "what?", "answer": "red<|im_end|>"}
    for bad in ({**rows[1], "question": "what<|im_end|>"}, free):
        data = write_rows(folder / "control.jsonl", [rows[0], bad])
        with fails(2, f"{data}:2: holds <|im_end|>"):
            train(data, tmp_path / "a.safetensors")


@pytest.mark.slow
def test_one_clip_under_two_names_is_one_video(folder, tmp_path):
    """Otherwise it could be both trained on and held out. Unused keys may hold anything."""
    rows = rows_of(folder)
    for i, row in enumerate(rows):
        row["id"], row["category"] = 0, None
        if i % 2:
            shutil.copy(folder / row["video"], folder / f"copy-{row['video']}")
            row["video"] = f"./copy-{row['video']}"
    done = train(write_rows(folder / "twice.jsonl", rows), tmp_path / "a.safetensors")
    assert done["num_videos"] == 4 and done["num_questions"] == len(rows) == 8


@pytest.mark.slow
def test_a_damaged_cache_is_made_anew(folder, tmp_path):
    cache, data = tmp_path / "cache", folder / "questions.jsonl"
    train(data, tmp_path / "a.safetensors", cache)
    bundle = next(cache.rglob("*.pt"))
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[: len(whole) // 2])
    next(cache.rglob("*-teacher.json")).write_text("[]")
    train(data, tmp_path / "b.safetensors", cache)
    assert bundle.read_bytes() == whole
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_teacher_that_does_not_fit_is_done_without(folder, tmp_path, monkeypatch):
    """Only the tokens of a budget fit in memory. That is tried once on a machine, not at every start or by every worker."""
    model = CountingLanguageModel(loaded_models().language_model, max_video_tokens=MOST_IN_MEMORY)
    tower = CountingEncoder(loaded_models().encoder)
    models, data = models_with(tower, model), write_rows(folder / "few.jsonl", rows_of(folder)[::6])
    for name in ("a", "again"):
        tower.num_frames.clear(), model.num_video_tokens.clear()
        done = train(data, tmp_path / f"{name}.safetensors", tmp_path / "cache", models=models, num_steps=1)
        (told,) = describe_left_out(done)
        assert told.startswith("2 videos whose full-token teacher did not fit in memory on this machine")
        assert f"remove {tmp_path / 'cache'}" in told
        counts = read_header(tmp_path / f"{name}.safetensors")["training"]
        assert (counts["num_videos_untaught"], counts["num_videos_teacher_failed"]) == (0, 2)
        is_first = name == "a"
        assert (max(model.num_video_tokens) > MOST_IN_MEMORY) == bool(tower.num_frames) == is_first
    # With more memory they are taught after all, from the same cache.
    monkeypatch.setattr(training_data, "name_machine", lambda _: "CPU, a lot")
    more = train(data, tmp_path / "b.safetensors", tmp_path / "cache", num_steps=1)
    assert not list(describe_left_out(more))


def test_free_answers_have_no_teacher_that_could_be_had_elsewhere(folder, tmp_path):
    rows = [{key: row[key] for key in ("video", "question", "answer")} for row in rows_of(folder)[::6]]
    done = train(write_rows(folder / "free.jsonl", rows), tmp_path / "a.safetensors", num_steps=1)
    assert list(describe_left_out(done)) == [
        "2 videos without a full-token teacher: too long for the model, or only free answers"
    ]


def test_a_state_names_the_video_that_is_missing_since_it_began(folder, tmp_path):
    """One that is away for a moment does not cost the state."""
    output, data = tmp_path / "a.safetensors", folder / "questions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        train(data, output, log=stop_at(2))
    before = (tmp_path / "a.safetensors.state").read_bytes()
    video = folder / rows_of(folder)[0]["video"]
    hidden = video.rename(video.with_suffix(".away"))
    try:
        with fails(2, f"3 videos can be used now, 4 when it began: {video}") as caught:
            train(data, output)
    finally:
        hidden.rename(video)
    assert "bring back" in caught.value.hint and (tmp_path / "a.safetensors.state").read_bytes() == before
    assert train(data, output)["steps"] == 2


def test_videos_that_failed_are_named_before_questions(folder, tmp_path):
    model = copy.copy(loaded_models().language_model)
    model.max_context_tokens = 500
    rows = rows_of(folder)
    rows[0] = {**rows[0], "question": "which way? " * 400}
    rows[4]["video"] = rows[5]["video"] = "gone.mp4"
    data = write_rows(folder / "both.jsonl", rows)
    failed = train(data, tmp_path / "a.safetensors", models=models_with(language_model=model), num_steps=1)["failed"]
    assert len(failed) == 2 and "gone.mp4" in failed[0] and failed[1].startswith("line 1: ")


def test_a_machine_is_another_one_with_more_memory(monkeypatch):
    device, names = loaded_models().source.device, set()
    for gib in (16, 32):
        monkeypatch.setattr(training_data, "total_memory_bytes", lambda _, gib=gib: (gib << 30) + 5)
        names |= {training_data.name_machine(device), training_data.name_machine(device)}
    assert names == {"CPU, 16 GiB", "CPU, 32 GiB"}


def test_running_out_of_memory_is_not_a_bug(folder, tmp_path):
    models = models_with(language_model=CountingLanguageModel(loaded_models().language_model, max_video_tokens=0))
    with fails(6, "training: out of memory"):
        train(folder / "questions.jsonl", tmp_path / "a.safetensors", models=models)


def test_an_adapter_that_learned_nothing_says_so(folder, tmp_path):
    run = run_command(folder / "questions.jsonl", tmp_path / "a.safetensors", "--learning-rate", 0)
    assert run.status == 0 and "the adapter changes nothing" in run.err


def test_a_training_that_blows_up_ends(folder, tmp_path):
    models = models_with(language_model=NanWhenTraining(loaded_models().language_model))
    with fails(5, "step 1: the loss is nan") as caught:
        train(folder / "questions.jsonl", tmp_path / "a.safetensors", models=models)
    assert "--dtype" in caught.value.hint, "no step was taken: the learning rate has no part in it"
    with fails(2, "step 1: the loss on the held-out videos is nan"):
        train(folder / "questions.jsonl", tmp_path / "a.safetensors", learning_rate=1e30)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_loss_on_held_out_videos_that_is_not_finite_is_refused_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop.TrainingLoop, "validate", lambda _: training_loop.Score(0.5, float("nan")))
    with fails(5, "before the first step: the loss on the held-out videos is nan"):
        train(folder / "questions.jsonl", tmp_path / "a.safetensors")


def test_a_loss_on_held_out_videos_that_is_not_finite_later_is_refused(folder, tmp_path, monkeypatch):
    losses = iter((1.0, float("inf")))
    monkeypatch.setattr(training_loop.TrainingLoop, "validate", lambda _: training_loop.Score(0.5, next(losses)))
    with fails(2, "step 1: the loss on the held-out videos is inf"):
        train(folder / "questions.jsonl", tmp_path / "a.safetensors", num_steps=1)
    assert not (tmp_path / "a.safetensors").exists()


def test_trends_that_an_adapter_reads_cannot_be_dropped(folder, tmp_path):
    flags = ("--set", "method=adaptive", "--set", "trends=drop", "-o", tmp_path / "a.safetensors")
    run = run_freres("train", folder / "questions.jsonl", *flags)
    check_failure(run, 2, "--set: trends: adapters of adaptive read trends: expected keep, got drop")


def test_a_question_that_is_too_long_beside_every_token_is_no_want_of_memory(folder, tmp_path, monkeypatch):
    """The video fits; no machine, and no larger memory, helps."""

    def refuse(*_):
        raise ContextError("question: too long")

    monkeypatch.setattr(training_data, "score_options", refuse)
    data = write_rows(folder / "few.jsonl", rows_of(folder)[::6])
    done = train(data, tmp_path / "a.safetensors", tmp_path / "cache", num_steps=1)
    (told,) = describe_left_out(done)
    assert told == "2 videos without a full-token teacher: too long for the model, or only free answers"


def test_another_image_processor_is_another_cache_and_another_run(folder, tmp_path):
    """Its settings decide the pixels, and so every latent."""
    model = shutil.copytree(bundled_model_dir(), tmp_path / "model")
    options = make_options({}, None, str(model), device="cpu")
    digests = []
    for mean in (None, [0.4, 0.4, 0.4]):
        if mean is not None:
            path = model / "preprocessor_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": mean}))
        digests.append(training_data._key(options, Models(options.model)))
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--learning-rate", "inf"), "--learning-rate"),
        (("--seed", 10**20), "--seed"),
        (("-o", "."), "is a folder"),
        (("-o", "a" * 252), "name too long"),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, flags, text):
    run = run_freres("train", folder / "questions.jsonl", "-o", tmp_path / "a.safetensors", *flags)
    assert run.status == 2 and text in run.err and "bug" not in run.err


def test_processes_started_together_may_not_share_a_gpu(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = run_command(folder / "questions.jsonl", tmp_path / "a.safetensors", "--device", "cuda:0")
    check_failure(run, 2, "--device cuda:0: every process would use this one")
    monkeypatch.setenv("FRERES_DEVICE", "cuda:1")
    run = run_freres("train", folder / "questions.jsonl", "-o", tmp_path / "a.safetensors")
    check_failure(run, 2, "FRERES_DEVICE=cuda:1: every process would use this one")


def test_a_video_that_is_cut_short_is_trained_on_and_told(folder, tmp_path):
    """Also of a run that takes it from the cache."""
    rows, cache = rows_of(folder), tmp_path / "cache"
    write_clip(folder / "short.webm", 48, fps=12, codec="libvpx-vp9", options={"cpu-used": "8"})
    cut(folder / "short.webm", 0.5)
    rows[0]["video"] = "short.webm"
    data = write_rows(folder / "short.jsonl", [rows[0], rows[-1]])
    for name in ("a", "b"):
        run = run_command(data, tmp_path / f"{name}.safetensors", "--cache", cache, "--json", "--steps", 1)
        assert run.status == 0, run.err
        warned = [line for line in run.err.splitlines() if "damaged" in line and line.startswith("warning: ")]
        assert len(warned) == 1 and "warning: 1 damaged video trained on" in warned[0] and "short.webm" in warned[0]
        (noted,) = run.json["video_notes"]
        assert noted["video"] == "short.webm" and f"{noted['lost_s']:.2f} s lost" in warned[0]
        assert f"short.webm: {noted['notes'][0]}" in run.err
    assert read_header(tmp_path / "b.safetensors")["training"]["num_videos_damaged"] == 1


def test_an_adapter_that_came_meanwhile_stays(folder, tmp_path):
    """It is replaced where --force is named, by this run or by the one that began it, and then no step is taken again."""
    data, output = folder / "questions.jsonl", tmp_path / "a.safetensors"

    def come(line):
        output.write_bytes(b"another's")

    with fails(2, "already exists"):
        train(data, output, log=come)
    assert output.read_bytes() == b"another's" and output.with_name("a.safetensors.state").exists()
    with fails(2, "already exists"):
        train(data, output)
    told = []
    report = train(data, output, log=told.append, force=True)
    assert report["steps"] == TRAINING.recipe["num_steps"] and not any(line.startswith("step ") for line in told)
    with pytest.raises(KeyboardInterrupt):
        train(data, output, log=stop_at(2), force=True)
    assert train(data, output)["steps"] == TRAINING.recipe["num_steps"]
