"""freres train: frozen stays frozen, a stopped run resumes to the same bits, the cache holds what compress writes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from freres_cli.backbones.gradients import score_answers
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.adapter import read_adapter
from freres_cli.bundle.store import read_bundle
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.errors import BackboneError
from freres_cli.evaluation.questions import format_choices, read_questions
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.losses import DISTILLATION_WEIGHT, distillation_loss, total_loss
from freres_cli.method.select import VARIANTS_WITH_OWN_ROWS
from freres_cli.method.stretch_modules import StretchModules
from freres_cli.pipeline.adapters import TRAINED_METHODS
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.session import Session
from freres_cli.pipeline.tokens import make_tokens
from freres_cli.presets import VARIANTS
from freres_cli.stretches import STRETCH_COLUMNS
from freres_cli.video.opening import hash_file
from freres_cli.workflows import train_adapter, training_data, training_loop
from freres_cli.world.make import make_set
from tests.evaluations import read_rows, run_eval, write_rows
from tests.loaded_models import loaded_models
from tests.runner import check_failure, fails, run_freres
from tests.trainings import Training, stop_at

STEPS = 6
TRAINING = Training("0.25,0.1", num_steps=STEPS, batch=2, questions_a_video=2, validate_every=3, validation_share=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_set(folder, "train", 4)
    rows = read_rows(folder / "questions.jsonl")
    kept = [{key: row[key] for key in ("video", "question", "choices", "answer")} for row in rows]
    kept.append({"video": kept[0]["video"], "question": "What colour?", "answer": "red"})
    write_rows(folder / "data.jsonl", kept)
    return folder


def train(folder, output, **changed):
    return TRAINING.run(folder / "data.jsonl", output, changed.pop("cache", folder / "cache"), **changed)


def run_command(folder, output, *flags):
    known = ("train", folder / "data.jsonl", "-o", output, "--cache", folder / "cache")
    return run_freres(*known, *TRAINING.flags, *flags)


@pytest.fixture(scope="module")
def adapter(folder):
    path = folder / "whole.safetensors"
    run = run_command(folder, path, "--json")
    assert run.status == 0, run.err
    return path, run.json


def test_an_adapter_says_how_it_was_trained(adapter):
    path, done = adapter
    weights, header = read_adapter(path, json.loads(json.dumps(model_facts(path))))
    training = header["training"]
    assert training["recipe"]["budgets"] == ["0.25", "0.1"] and training["steps"] == STEPS
    assert training["num_questions"] == done["num_questions"] and training["num_videos"] == 4
    assert sum(tensor.numel() for tensor in weights.values()) == training["num_parameters"]
    assert training["share_of_model"] <= 0.01
    names = {row["video"] for row in read_rows(path.parent / "data.jsonl")}
    assert training["videos"] == sorted(hash_file(path.parent / name)[:16] for name in names) and "videos" not in done
    assert [row[0] for row in training["history"]] == [0, 3, 6]
    best = min(training["history"], key=lambda row: row[2])
    assert training["best_step"] == best[0] and training["validation"]["loss"] == best[2]


def model_facts(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["freres.adapter/1"])["model"]


def test_the_adapter_is_for_its_model_only(adapter):
    facts = model_facts(adapter[0])
    with pytest.raises(BackboneError, match="adapter for another model"):
        read_adapter(adapter[0], {**facts, "config_sha256": "0"})


def test_a_stopped_run_resumes_to_the_same_bits(folder, adapter):
    path = folder / "stopped.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(folder, path, log=stop_at(STEPS))
    assert not path.exists() and path.with_name(path.name + ".state").exists()
    train(folder, path)
    whole, resumed = load_file(adapter[0]), load_file(path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert path.read_bytes() == adapter[0].read_bytes()
    assert not path.with_name(path.name + ".state").exists()


def test_a_state_of_another_run_is_refused(folder, tmp_path, monkeypatch):
    """By the command, which is killed after a save."""
    path = tmp_path / "a.safetensors"
    save = training_loop.save_state
    monkeypatch.setattr(
        training_loop, "save_state", lambda *a, **f: (save(*a, **f), (_ for _ in ()).throw(KeyboardInterrupt))
    )
    assert run_command(folder, path).status == 130
    # Before anything is made for it.
    check_failure(run_command(folder, path, "--seed", 5, "--cache", tmp_path / "more"), 2, "state of another run")
    assert not (tmp_path / "more").exists()


def test_tower_and_language_model_do_not_change_by_a_bit(folder, tmp_path):
    models = Models(loaded_models().source)
    halves = (models.encoder.tower, models.language_model.half)
    seen = [(module, {name: tensor.clone() for name, tensor in module.state_dict().items()}) for module in halves]
    flags = {"models": models, "cache": tmp_path / "fresh", "learning_rate": 0.1, "num_steps": 3}
    train(folder, tmp_path / "a.safetensors", **flags)
    for module, before in seen:
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_cache_holds_the_bundles_that_compress_writes(folder, adapter, tmp_path):
    video = folder / read_rows(folder / "data.jsonl")[0]["video"]
    for cached in sorted((folder / "cache").rglob("*-0.1.pt")):
        manifest = read_bundle(cached).manifest
        if manifest["source"]["file"] == video.name:
            break
    path, budget = tmp_path / "b.pt", manifest["tokens"]["budget_tokens"]
    assert (
        run_freres("compress", video, "--method", "fre-res", "--budget", budget, "-o", path, "--device", "cpu").status
        == 0
    )
    assert path.read_bytes() == cached.read_bytes()


def test_videos_are_encoded_once(folder, adapter, tmp_path):
    models, lines = Models(loaded_models().source, language_model=loaded_models().language_model), []
    train(folder, tmp_path / "a.safetensors", models=models, log=lines.append, num_steps=1)
    assert not models.has_encoder, "the tower was loaded again"
    assert any("device cpu" in line for line in lines)


def test_the_teacher_is_the_model_with_every_token(folder, adapter, tmp_path):
    taught = {}
    for path in (folder / "cache").rglob("*-teacher.json"):
        taught |= json.loads(path.read_text())
    run_eval(folder / "questions.jsonl", "full", output=tmp_path / "a.jsonl")
    answers = {}
    for row in read_rows(tmp_path / "a.jsonl")[1:]:
        answers |= row["cells"][0]["answers"]
    for row in read_rows(folder / "questions.jsonl"):
        scores = taught[json.dumps([row["question"], *row["choices"]])]
        assert row["choices"][max(range(4), key=scores.__getitem__)] == answers[row["id"]][0]


def test_training_moves_what_it_trains(folder, tmp_path):
    """With a split whose held-out video leaves something to learn, or the best weights are those before training."""
    path = tmp_path / "a.safetensors"
    assert train(folder, path, seed=3)["best_step"]
    weights, header = read_adapter(path, model_facts(path))
    start = FreResModules(ModuleShape.from_dict(header["shape"]))
    assert not torch.equal(weights["type_embedding"], start.type_embedding)
    assert float(weights["absorber.gamma"]) != 0


def test_an_adapter_of_method_adaptive_is_trained_on_bundles_with_trends(folder, tmp_path):
    path = tmp_path / "a.safetensors"
    flags = ("--set", "method=adaptive", "--budgets", 0.1, "--steps", 2, "--validate-every", 2, "--json")
    run = run_command(folder, path, *flags)
    assert run.status == 0 and "compress uses" not in run.err, run.err
    header = read_adapter(path, model_facts(path))[1]
    assert header["method"] == run.json["method"] == "adaptive"
    before, after = (row[2] for row in run.json["history"])
    assert before != after, "two steps moved what the validation asks"
    videos = {row["video"] for row in read_rows(folder / "data.jsonl")}
    cached = [read_bundle(path) for path in (folder / "cache").rglob("*-0.1.pt")]
    cached = [bundle for bundle in cached if bundle.manifest["content"] == "stretches"]
    assert {bundle.manifest["source"]["file"] for bundle in cached} == videos
    one, manifest = cached[0].content, cached[0].manifest
    made = tmp_path / "b.pt"
    named = ("--method", "adaptive", "--set", "trends=keep", "--budget", manifest["tokens"]["budget_tokens"])
    assert (
        run_freres("compress", folder / manifest["source"]["file"], *named, "-o", made, "--device", "cpu").status == 0
    )
    same = read_bundle(made).content
    for name in set(STRETCH_COLUMNS) - {"curve_tokens", "curve_loss"}:
        assert torch.equal(getattr(one, name), getattr(same, name)), name


def test_distillation_is_least_where_student_and_teacher_agree():
    teacher = torch.tensor([-1.0, -2.0, -4.0])
    assert distillation_loss(teacher + 3.0, teacher).item() == pytest.approx(0, abs=1e-6)
    scores = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        distillation_loss(scores, teacher).backward()
        optimizer.step()
    assert torch.allclose(scores.softmax(-1), teacher.softmax(-1), atol=1e-3)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    modules = FreResModules(ModuleShape(4, 2, 2))
    parts = [torch.tensor(1.0), torch.tensor(3.0)]
    assert total_loss(parts, [], modules).item() == pytest.approx(2.0)
    assert total_loss(parts, [torch.tensor(5.0)], modules).item() == pytest.approx(2.0 + 5.0 * DISTILLATION_WEIGHT)
    with torch.no_grad():
        modules.gates.add_(1.0)
    assert total_loss(parts, [], modules).item() > 2.0


def test_the_learning_rate_warms_up_and_falls():
    rates = [training_loop.learning_rate(step, 200) for step in range(200)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0 and rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:])[::-1]
    assert 0 < rates[-1] < 0.05


def test_a_broken_video_is_left_out_and_named(folder, tmp_path):
    (folder / "broken.mp4").write_bytes(b"no video")
    broken = {"video": "broken.mp4", "question": "Which way?", "choices": ["up", "down"], "answer": "up"}
    some = write_rows(folder / "some.jsonl", [broken, *read_rows(folder / "data.jsonl")])
    flags = ("--cache", folder / "cache", *TRAINING.flags, "--steps", 1)
    run = run_freres("train", some, "-o", tmp_path / "a.safetensors", *flags)
    assert "this adapter is for --method fre-res; compress uses adaptive unless a method is named: to train" in run.err
    assert run.status == 0 and "left out: " in run.err and "broken.mp4" in run.err
    with fails(3, "none of 1 videos"):
        TRAINING.run(write_rows(folder / "broken.jsonl", [broken]), tmp_path / "b.safetensors", folder / "cache")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--budgets", "2.5"), "--budgets"),
        (("--validation", "1.5"), "--validation"),
        (("--set", "budget_tokens=3"), "use --budgets"),
        (("--set", "method=evs"), "method: train trains adapters of fre-res or adaptive, got evs"),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, flags, text):
    run = run_command(folder, tmp_path / "a.safetensors", *flags)
    assert run.status == 2 and text in run.err and not (tmp_path / "a.safetensors").exists()


def test_an_existing_adapter_is_kept(folder, adapter):
    before = adapter[0].read_bytes()
    check_failure(run_command(folder, adapter[0]), 2, "already exists")
    assert adapter[0].read_bytes() == before


def test_the_share_that_is_trained_is_at_most_one_percent(folder):
    class Model:
        width, num_parameters = 1536, 1_500_000_000

    bands = make_options({}, None, None, device="cpu").settings.max_coefficients
    for kind in (FreResModules, StretchModules):
        Model.width, Model.num_parameters = 1536, 1_500_000_000
        assert train_adapter.choose_shape(kind, Model(), bands, None).rank == 64
        Model.width, Model.num_parameters = 192, 2_500_000
        small = train_adapter.choose_shape(kind, Model(), bands, None)
        larger = ModuleShape(192, small.rank * 2, small.num_bands)
        assert train_adapter._size(kind, small) <= 25_000 < train_adapter._size(kind, larger)
        assert train_adapter.choose_shape(kind, Model(), bands, 5).rank == 5


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(folder, adapter, tmp_path):
    path = tmp_path / "two.safetensors"
    arguments = ["train", folder / "data.jsonl", "-o", path, "--cache", folder / "cache", *TRAINING.flags]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, sys.executable, "-c", "from freres_cli.cli.app import main; main()", *arguments, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(list(map(str, command)), env=environment, capture_output=True, timeout=300)
    assert made.returncode == 0, made.stderr.decode()
    # One document: the second process is silent.
    assert json.loads(made.stdout)["steps"] == STEPS
    one, two = load_file(adapter[0]), load_file(path)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_training_data_that_cannot_be_split_is_refused(folder, tmp_path):
    one = write_rows(folder / "one.jsonl", read_rows(folder / "data.jsonl")[:1])
    with fails(2, "at least 2 videos that can be used, got 1"):
        TRAINING.run(one, tmp_path / "a.safetensors", folder / "cache")
    recipe = training_loop.Recipe((), 1, validation_share=0.99)
    for count in (2, 3, 5):
        learned, held_out = train_adapter._split(SimpleNamespace(examples=list(range(count))), recipe)
        assert len(learned) == 1 and sorted((*learned, *held_out)) == list(range(count))


def test_what_is_asked_is_what_asking_asks(folder):
    """The prompt and the answers of training are those that ``freres ask --choices`` scores."""
    model = loaded_models().language_model
    question = read_questions(folder / "data.jsonl", 1, is_named=False).questions[0]
    prefix, suffix, answers, truth = training_data.answer_ids(model, question)
    ids = model.prompt(question.question)
    assert (prefix, suffix) == (ids.prefix, ids.suffix) and question.choices[truth] == question.answer
    words = [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert words == list(question.choices)


@pytest.mark.parametrize("choices_as", ["words", "letters"])
def test_options_are_scored_as_asking_scores_them(folder, adapter, choices_as):
    model = copy.copy(loaded_models().language_model)
    model.choices_as = choices_as
    question = read_questions(folder / "data.jsonl", 1, is_named=False).questions[0]
    content = read_bundle(next((folder / "cache").rglob("*-0.1.pt"))).content
    tokens = make_tokens(content)
    prefix, suffix, answers, truth = training_data.answer_ids(model, question)
    [scores] = score_answers(model, prefix, tokens, "hf", [(suffix, answers)])
    asked = Session(model, tokens, 1000, "hf", 0.0).ask(question.question, choices=question.choices).choices
    assert scores.softmax(0).tolist() == pytest.approx(list(asked.values()), abs=1e-5)
    assert question.choices[truth] == question.answer
    if choices_as == "letters":
        ids = model.prompt(format_choices(question.question, question.choices))
        assert (prefix, suffix) == (ids.prefix, ids.suffix), "the options are listed"
        assert [model.tokenizer.decode(answer) for answer in answers] == list("ABCD")


def test_variants_that_share_their_bundles_keep_the_same_rows(folder):
    """What the cache of training relies on, and only what differs has rows of its own."""
    options = at_budgets(make_options({}, None, None, device="cpu"), "train", trains=TRAINED_METHODS)
    video = folder / read_rows(folder / "data.jsonl")[0]["video"]
    clip = EncodedClip(VideoSource(video), options, loaded_models().encoder, StageTimer(torch.device("cpu")))
    kept = {
        name: [
            tensor
            for tensor in vars(clip.with_settings({"variant": name}).build_tracks(100)).values()
            if isinstance(tensor, torch.Tensor)
        ]
        for name in VARIANTS
    }

    def are_equal(one, other):
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))

    alike = {name for name in VARIANTS if are_equal(kept[name], kept["absorber"])}
    assert alike == set(VARIANTS) - set(VARIANTS_WITH_OWN_ROWS)
