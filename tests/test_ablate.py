"""freres ablate: rows of the tables, adapters used again only where they are those asked for, nothing left unsaid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from freres_cli.cli.compress import make_request
from freres_cli.evaluation.cells import parse_budgets
from freres_cli.presets import presets_dir
from freres_cli.workflows import ablate
from freres_cli.world.make import make_set
from tests.runner import check_failure, run_freres

FLAGS = ("--budgets", "0.25", "--train-budgets", "0.25", "--steps", 1, "--limit", 1, "--json")
COMPONENTS = [row.label for row in ablate.TABLES["components"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    make_set(folder, "train", 2)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    few = list({row["video"]: row for row in rows}.values())
    broken = {**rows[0], "id": "broken", "video": "broken.mp4"}
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*few, broken]))
    return folder


def run_ablate(folder, output, *flags, tables="components"):
    known = ("ablate", folder / "questions.jsonl", "--train", folder / "data.jsonl", "-o", output, "--tables", tables)
    return run_freres(*known, *FLAGS, *flags)


@pytest.fixture(scope="module")
def first(folder):
    run = run_ablate(folder, folder / "out")
    assert run.status == 0, run.err
    return run


@pytest.fixture
def trained(folder, first, tmp_path, monkeypatch):
    """A folder of the trained adapters alone; to train again is an error."""
    for path in (folder / "out").glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(ablate, "train_adapter", lambda *_: pytest.fail("trained again"))
    return tmp_path


def labels(run):
    return [row["label"] or row["method"] for row in run.json["rows"]]


def test_every_row_of_the_table_is_there_at_equal_tokens(folder, first):
    document = first.json
    assert document["schema"] == "freres.ablate/1" and document["tables"] == ["components"]
    assert labels(first) == ["full", *COMPONENTS]
    assert {row["budget"] for row in document["rows"][1:]} == {0.25}
    assert len({row["budget_tokens"] for row in document["rows"][1:]}) == 1
    assert sorted(path.stem for path in (folder / "out").glob("*.safetensors")) == sorted(ablate.TRAINED_VARIANTS)


def test_a_video_that_training_left_out_is_named_once(first):
    warned = [line for line in first.err.splitlines() if line.startswith("warning: left out: ")]
    assert len(warned) == 1 and "broken.mp4" in warned[0], first.err


def test_a_second_run_uses_adapters_and_answers(folder, first, monkeypatch):
    monkeypatch.setattr(ablate, "train_adapter", lambda *_: pytest.fail("trained again"))
    again = run_ablate(folder, folder / "out")
    assert again.status == 0 and again.json["num_videos_resumed"] == 1, again.err
    assert again.json["rows"] == first.json["rows"]
    assert "1 were left out of the training" in again.err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--set", "grid=4x4"), "grid differs"),
        (("--set", "anchors=4", "--set", "events=false"), "anchors, events differs"),
        (("--steps", 2), "recipe differs"),
    ],
)
def test_adapters_of_another_training_are_refused(folder, trained, flags, text):
    run = run_ablate(folder, trained, *flags)
    check_failure(run, 2, text)
    assert "absorber.safetensors" in run.errors[0] and "use another -o" in run.err


def test_an_adapter_that_does_not_say_its_settings_is_refused(folder, trained, monkeypatch):
    load = ablate.load_adapter

    def forget(path, model):
        adapter = load(path, model)
        adapter.training.pop("settings")
        return adapter

    monkeypatch.setattr(ablate, "load_adapter", forget)
    check_failure(run_ablate(folder, trained), 2, "settings (not recorded)")


def test_the_sweep_of_coefficients_is_trained_for_whatever_the_preset(folder, trained):
    """The default preset has the most of the sweep, so adapters for fewer are the same."""
    run = run_ablate(folder, trained, "--set", "max_coefficients=2", tables="coefficients")
    assert run.status == 0 and labels(run)[1:] == [f"coefficients {count}" for count in (1, 2, 3, 5)], run.err
    alone = run_ablate(folder, trained, "--set", "max_coefficients=2")
    check_failure(alone, 2, "max_coefficients differs")


def test_training_settings_change_only_where_the_sweep_needs_more():
    settings = make_request(Path("x.mp4"), {}, None, None, device="cpu").settings
    for tables in (("components",), tuple(ablate.TABLES)):
        found = ablate.training_settings(settings, "absorber", tables)
        assert {key: value for key, value in found.items() if key != "variant"} == {
            key: value for key, value in settings.items() if key != "variant"
        }


def test_sweeps_are_of_the_absorber_whatever_the_preset(folder, trained):
    preset = trained / "concat.yaml"
    text = (presets_dir() / "bundled.yaml").read_text()
    preset.write_text(text.replace("variant: absorber", "variant: concat"))
    run = run_ablate(folder, trained, "--preset", preset, tables="anchors,frames")
    assert run.status == 0 and len(labels(run)) == 6, run.err


def test_answers_of_another_run_are_refused_with_what_can_be_done(folder, trained):
    (trained / "answers.jsonl").write_text("notes\n")
    run = run_ablate(folder, trained)
    check_failure(run, 2, "holds no results")
    assert "--force" not in run.err and "name another folder" in run.err


@pytest.mark.parametrize("flag", ["--budgets", "--train-budgets"])
def test_a_budget_given_twice_is_refused(folder, tmp_path, flag):
    check_failure(run_ablate(folder, tmp_path, flag, "0.1,.10"), 2, f"{flag}: 0.1 is given twice")
    check_failure(run_ablate(folder, tmp_path, flag, "1"), 2, f"{flag}: expected a share")
    assert not any(tmp_path.iterdir())


def test_without_training_the_rows_of_adapters_are_left_out():
    cells = ablate.make_cells(("components", "anchors"), parse_budgets("0.25,64"), {})
    untrained = [label for label in COMPONENTS if not label.endswith(", trained")]
    assert [cell.name for cell in cells[1:11:2]] == [f"{label} 0.25" for label in untrained]
    assert all(cell.adapter is None for cell in cells)
