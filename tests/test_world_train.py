"""``freres world train``: a stopped run resumes, and what it may not replace it leaves alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from freres_cli.backbones.registry import load_language_model
from freres_cli.errors import UsageError
from freres_cli.training.state import save_state
from freres_cli.video.opening import hash_file
from freres_cli.workflows import train_world
from freres_cli.workflows.train_world import TrainRequest, _claim, _name_weights
from freres_cli.world import train_language, train_tower
from freres_cli.world.bundled_model import WIDTH, bundled_model_dir, bundled_model_info
from tests.runner import check_failure, fails, run_freres
from tests.tiny_models import CPU


def few_clips(monkeypatch):
    """Training on as little as possible."""
    for name, value in (("FIRST_CLIPS", 3), ("MOST_CLIPS", 2), ("NEW_CLIPS", 1), ("BATCH_TOKENS", 1500)):
        monkeypatch.setattr(train_language, name, value)
    monkeypatch.setattr(train_tower, "SCENES_A_STEP", 6)


@pytest.mark.slow
def test_world_train_writes_a_model_and_resumes(tmp_path, monkeypatch):
    few_clips(monkeypatch)
    monkeypatch.setattr(train_language, "LOG_EVERY", 1)
    monkeypatch.setattr(train_tower, "LOG_EVERY", 1)
    folder = tmp_path / "model"
    flags = ("world", "train", "-o", folder, "--tower-steps", 2, "--json")
    first = run_freres(*flags, "--steps", 1)
    assert first.status == 0, first.err
    more = run_freres("world", "train", "-o", folder, "--tower-steps", 2, "--steps", 2)
    # The tower was finished; the language half resumes after its first step.
    assert more.out == f"{folder}\n" and "tower" not in more.err and "language 1/2" not in more.err
    assert "language 2/2" in more.err
    info = json.loads((folder / "MODEL_INFO.json").read_text())
    # More steps of the tower would change the latents that the decoder has learned from.
    for other in (("--seed", 7), ("--start", folder), ("--steps", 1), ("--tower-steps", 3)):
        refused = run_freres("world", "train", "-o", folder, "--tower-steps", 2, "--steps", 2, *other)
        check_failure(refused, 2, "the training of another run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    check_failure(run_freres("world", "train", "-o", tmp_path / "mine"), 2, "holds something other than a training run")
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    assert info["weights"] == "model"  # its folder
    assert info["language_steps"] == 2 and info["choices_as"] == "words" and info["freres_trained"]
    trained = load_language_model(str(folder), CPU)
    assert trained.choices_as == "words" and trained.width == WIDTH


def test_training_starts_from_a_model_and_leaves_the_tower_alone(tmp_path, monkeypatch):
    few_clips(monkeypatch)
    folder = tmp_path / "model"
    flags = ("--start", "bundled", "--tower-steps", 0, "--steps", 1)
    run = run_freres("world", "train", "-o", folder, "-q", *flags)
    assert run.status == 0 and run.err == ""
    before, after = (load_file(path / "model.safetensors") for path in (bundled_model_dir(), folder))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if "visual" in key} <= same < before.keys()
    info = json.loads((folder / "MODEL_INFO.json").read_text())
    assert info["start"] == bundled_model_info()["weights"], "the name of the weights, not of the folder they are in"
    (folder / "MODEL_INFO.json").unlink()
    assert _name_weights(folder) == "model"
    assert info["start_sha256"] == hash_file(bundled_model_dir() / "model.safetensors")
    check_failure(run_freres("world", "train", "-o", tmp_path / "b", "--start", tmp_path), 5, "training can start from")
    check_failure(run_freres("world", "train", "-o", tmp_path / "b", "--start", "nowhere"), 2, "no such folder")
    copy = shutil.copytree(bundled_model_dir(), tmp_path / "copy")
    weights = copy / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not in a file that changes
    weights.write_bytes(weights.read_bytes()[:3_000_000])
    check_failure(run_freres("world", "train", "-o", tmp_path / "b", "--start", copy), 5, "training can start from")
    weights.unlink()
    torch.save(whole, copy / "pytorch_model.bin")  # pickles are never read
    check_failure(run_freres("world", "train", "-o", tmp_path / "b", "--start", copy), 5, "training can start from")


def request(folder, **steps):
    return TrainRequest(folder, CPU, **{"tower_steps": 2, "language_steps": 5, **steps})


def test_a_run_that_was_stopped_early_or_given_too_many_steps_can_go_on(tmp_path):
    states = tmp_path / "training"
    states.mkdir()  # stopped before it wrote what it is
    _claim(request(tmp_path, language_steps=99999), states)
    _claim(request(tmp_path), states)  # no step was made yet
    save_state(states / "language.pt", nn.Linear(1, 1), [], step=4)
    _claim(request(tmp_path, language_steps=99999), states)
    _claim(request(tmp_path, language_steps=4), states)
    with pytest.raises(UsageError, match="language_steps"):
        _claim(request(tmp_path, language_steps=3), states)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = run_freres("world", "train", "-o", tmp_path / "model")
    check_failure(refused, 2, "runs in one process, got 2")
    assert not (tmp_path / "model").exists()


def test_a_model_that_cannot_be_written_is_told_and_leaves_no_half_of_one(tmp_path, monkeypatch):
    def write(folder, *_, **__):
        (folder / "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(train_world, "make_checkpoint", write)
    states = tmp_path / "training"
    states.mkdir()
    with fails(6, "the model cannot be written: I/O error: No space left"):
        train_world._write_checkpoint(tmp_path, states, {}, {}, {})
    assert list(tmp_path.iterdir()) == [states] and not list(states.iterdir())
