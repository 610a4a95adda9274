"""freres train: frozen stays frozen, a stopped run goes on to the same bits, the cache holds what compress writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from freres_cli.bundle.adapter import read_adapter
from freres_cli.errors import BackboneError
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.losses import DISTILLATION_WEIGHT, distillation_loss, total_loss
from freres_cli.workflows import train_adapter, training_data
from freres_cli.world.make import make_set
from tests.runner import check_failure, run_freres

STEPS = 6
FLAGS = ("--batch", 2, "--questions", 2, "--validate-every", 3, "--budgets", "0.25,0.1", "--validation", 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_set(folder, "train", 4)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    kept = [{key: row[key] for key in ("video", "question", "choices", "answer")} for row in rows]
    kept.append({"video": kept[0]["video"], "question": "What colour?", "answer": "red"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def train(folder, output, *flags, steps=STEPS):
    return run_freres(
        *("train", folder / "data.jsonl", "-o", output, "--steps", steps, "--cache", folder / "cache", *FLAGS, *flags)
    )


@pytest.fixture(scope="module")
def adapter(folder):
    path = folder / "whole.safetensors"
    run = train(folder, path, "--json")
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


def test_a_stopped_run_goes_on_to_the_same_bits(folder, adapter, monkeypatch):
    path = folder / "stopped.safetensors"
    save = train_adapter.save_state

    def stop(*args, **facts):
        save(*args, **facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_adapter, "save_state", stop)
    assert train(folder, path).status == 130
    assert not path.exists() and path.with_name(path.name + ".state").exists()
    monkeypatch.undo()
    assert train(folder, path).status == 0
    whole, resumed = load_file(adapter[0]), load_file(path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert path.read_bytes() == adapter[0].read_bytes()
    assert not path.with_name(path.name + ".state").exists()


def test_a_state_of_another_run_is_refused(folder, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save = train_adapter.save_state
    monkeypatch.setattr(
        train_adapter, "save_state", lambda *a, **f: (save(*a, **f), (_ for _ in ()).throw(KeyboardInterrupt))
    )
    assert train(folder, path).status == 130
    check_failure(train(folder, path, "--seed", 5), 2, "state of another run")


def test_tower_and_language_model_do_not_change_by_a_bit(folder, tmp_path, monkeypatch):
    seen = []
    for name in ("load_encoder", "load_model"):
        load = getattr(train_adapter, name)

        def keep(request, load=load):
            half = load(request)
            module = getattr(half, "tower", None) or half.half
            seen.append((module, {n: t.clone() for n, t in module.state_dict().items()}))
            return half

        monkeypatch.setattr(train_adapter, name, keep)
    run = train(folder, tmp_path / "a.safetensors", "--cache", tmp_path / "fresh", "--learning-rate", 0.1, steps=3)
    assert run.status == 0, run.err
    assert len(seen) == 2
    for module, before in seen:
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_cache_holds_the_bundles_that_compress_writes(folder, adapter, tmp_path):
    video = folder / json.loads((folder / "data.jsonl").read_text().splitlines()[0])["video"]
    for cached in sorted((folder / "cache").rglob("*-0.1.pt")):
        shown = run_freres("inspect", cached, "--json").json
        if shown["source"]["file"] == video.name:
            break
    path = tmp_path / "b.pt"
    assert run_freres("compress", video, "--budget", shown["budget_tokens"], "-o", path).status == 0
    assert path.read_bytes() == cached.read_bytes()


def test_videos_are_encoded_once(folder, adapter, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("the tower was loaded again")

    monkeypatch.setattr(train_adapter, "load_encoder", fail)
    run = train(folder, tmp_path / "a.safetensors", steps=1)
    assert run.status == 0 and "device cpu" in run.err


def test_the_teacher_is_the_model_with_every_token(folder, adapter, tmp_path):
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    taught = {}
    for path in (folder / "cache").rglob("*-teacher.json"):
        taught |= json.loads(path.read_text())
    full = run_freres("eval", folder / "questions.jsonl", "--methods", "full", "-o", tmp_path / "a.jsonl", "--json")
    assert full.status == 0, full.err
    answers = {}
    for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:]:
        answers |= json.loads(line)["cells"][0]["answers"]
    for row in rows:
        scores = taught[json.dumps([row["question"], *row["choices"]])]
        assert row["choices"][max(range(4), key=scores.__getitem__)] == answers[row["id"]][0]


def test_training_moves_what_it_trains(adapter):
    weights, _ = read_adapter(adapter[0], model_facts(adapter[0]))
    start = FreResModules(ModuleShape(**read_adapter(adapter[0], model_facts(adapter[0]))[1]["shape"]))
    assert adapter[1]["best_step"]
    assert not torch.equal(weights["type_embedding"], start.type_embedding)
    assert float(weights["absorber.gamma"]) != 0


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
    rates = [train_adapter.learning_rate(step, 200) for step in range(200)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0 and rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:])[::-1]
    assert 0 < rates[-1] < 0.05


def test_a_broken_video_is_left_out_and_named(folder, tmp_path):
    (folder / "broken.mp4").write_bytes(b"no video")
    lines = (folder / "data.jsonl").read_text()
    broken = {"video": "broken.mp4", "question": "Which way?", "choices": ["up", "down"], "answer": "up"}
    (folder / "some.jsonl").write_text(json.dumps(broken) + "\n" + lines)
    run = run_freres(
        *("train", folder / "some.jsonl", "-o", tmp_path / "a.safetensors", "--steps", 1),
        *("--cache", folder / "cache", *FLAGS),
    )
    assert run.status == 0 and "left out: " in run.err and "broken.mp4" in run.err
    (folder / "broken.jsonl").write_text(json.dumps(broken) + "\n")
    failed = run_freres("train", folder / "broken.jsonl", "-o", tmp_path / "b.safetensors", "--cache", folder / "cache")
    check_failure(failed, 3, "none of 1 videos")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--budgets", "2.5"), "--budgets"),
        (("--validation", "1.5"), "--validation"),
        (("--set", "budget_tokens=3"), "use --budgets"),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, flags, text):
    run = train(folder, tmp_path / "a.safetensors", *flags)
    assert run.status == 2 and text in run.err and not (tmp_path / "a.safetensors").exists()


def test_an_existing_adapter_is_kept(folder, adapter):
    before = adapter[0].read_bytes()
    check_failure(train(folder, adapter[0]), 4, "already exists")
    assert adapter[0].read_bytes() == before


def test_the_share_that_is_trained_is_at_most_one_percent(folder):
    from freres_cli.cli.compress import make_request

    class Model:
        width, num_parameters = 1536, 1_500_000_000

    request = make_request(Path("x.mp4"), {}, None, None, None)
    assert train_adapter.choose_shape(Model(), request, None).rank == 64
    Model.width, Model.num_parameters = 192, 2_500_000
    small = train_adapter.choose_shape(Model(), request, None)
    assert train_adapter._size(small) <= 25_000 < train_adapter._size(ModuleShape(192, small.rank * 2, small.num_bands))
    assert train_adapter.choose_shape(Model(), request, 5).rank == 5


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(folder, adapter, tmp_path):
    path = tmp_path / "two.safetensors"
    arguments = ["train", folder / "data.jsonl", "-o", path, "--steps", STEPS, "--cache", folder / "cache", *FLAGS]
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
    first = (folder / "data.jsonl").read_text().splitlines()[0]
    (folder / "one.jsonl").write_text(first + "\n")
    run = run_freres(
        "train", folder / "one.jsonl", "-o", tmp_path / "a.safetensors", "--cache", folder / "cache", *FLAGS
    )
    check_failure(run, 2, "at least 2 videos")


def test_what_is_asked_is_what_asking_asks(folder):
    """The prompt and the answers of training are those that ``freres ask --choices`` scores."""
    from freres_cli.backbones.registry import load_language_model
    from freres_cli.devices import choose_device
    from freres_cli.evaluation.questions import read_questions
    from freres_cli.world.bundled_model import bundled_model_dir

    model = load_language_model("bundled", choose_device("cpu"), None, None, bundled_directory=bundled_model_dir())
    question = read_questions(folder / "data.jsonl", 1, is_named=False).questions[0]
    prefix, suffix, answers, truth = training_data.answer_ids(model, question)
    ids = model.prompt(question.question)
    assert (prefix, suffix) == (ids.prefix, ids.suffix) and question.choices[truth] == question.answer
    words = [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert words == list(question.choices)
