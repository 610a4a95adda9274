"""freres ablate: the rows of each table, adapters reused only when they are the ones asked for, failures reported."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import pytest

from freres_cli.baselines.registry import FRE_RES
from freres_cli.bundle.adapter import read_adapter, write_adapter
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.evaluation.cells import parse_budgets
from freres_cli.evaluation.questions import read_questions
from freres_cli.evaluation.readers.registry import read_any_questions
from freres_cli.presets import presets_dir
from freres_cli.workflows import ablate
from freres_cli.workflows.eval_run import EvalRequest
from freres_cli.workflows.evaluate import EvalResult, evaluate
from freres_cli.workflows.training_loop import Recipe
from freres_cli.world.make import make_set
from tests.benchmark_copies import make_nextqa
from tests.evaluations import read_rows
from tests.loaded_models import loaded_models
from tests.runner import check_failure, fails, run_freres

BUDGETS = "0.25"
FLAGS = ("--budgets", BUDGETS, "--train-budgets", BUDGETS, "--steps", 1, "--limit", 1, "--device", "cpu", "--json")
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


def run_command(folder, output, *flags):
    known = ("ablate", folder / "questions.jsonl", "--train", folder / "data.jsonl", "-o", output)
    return run_freres(*known, "--tables", "components", *FLAGS, *flags)


@dataclass(frozen=True)
class Ablation:
    """``log``: how training went, empty where nothing was trained. ``warned``: what was left out of it."""

    result: EvalResult
    log: list[str]
    warned: list[str]


def run_ablate(folder, output, settings=None, tables="components", steps=1, preset=None):
    """What ``run_command`` does, with a model that is loaded already."""
    models, names, log, warned = loaded_models(), ablate.parse_tables(tables), [], []
    options = at_budgets(make_options(settings or {}, preset, None, device="cpu"), "ablate", trains=(FRE_RES,))
    data, sizes = read_questions(folder / "data.jsonl", is_named=False), parse_budgets(BUDGETS)
    adapters = ablate.train_variants(
        data, options, Recipe(sizes, steps), names, output, log.append, warned.append, models
    )
    cells = ablate.make_cells(names, sizes, adapters)
    questions = read_questions(folder / "questions.jsonl", 1)
    result = evaluate(EvalRequest(questions, cells, options, output / "answers.jsonl"), models=models)
    return Ablation(result, log, warned)


@pytest.fixture(scope="module")
def first(folder):
    run = run_command(folder, folder / "out")
    assert run.status == 0, run.err
    return run


@pytest.fixture
def trained(folder, first, tmp_path):
    """A folder of the trained adapters alone."""
    for path in (folder / "out").glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_only_the_adapters_of_the_tables_are_trained(folder, first, tmp_path):
    shutil.copy(folder / "out" / "absorber.safetensors", tmp_path)
    assert run_ablate(folder, tmp_path, tables="frames").log == []
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["absorber"]


def labels(document):
    return [row["label"] or row["method"] for row in document["rows"]]


def test_every_row_of_the_table_is_there_at_equal_tokens(folder, first):
    document = first.json
    assert document["schema"] == "freres.ablate/1" and document["tables"] == ["components"]
    assert labels(document) == ["full", *COMPONENTS]
    assert document["settings"]["method"]["value"] == {row["method"] for row in document["rows"][1:]}.pop() == FRE_RES
    assert read_rows(folder / "out" / "answers.jsonl")[0]["run"]["settings"]["method"] == FRE_RES
    assert {row["budget"] for row in document["rows"][1:]} == {0.25}
    assert len({row["budget_tokens"] for row in document["rows"][1:]}) == 1
    trained = {"absorber", "concat", "idct", "iquery", "sparse-idct"}
    assert {path.stem for path in (folder / "out").glob("*.safetensors")} == trained
    # Only idct keeps other rows than the absorber: the other bundles are made once, and so are their teacher's scores.
    assert len(list((folder / "out" / "cache").iterdir())) == 2


def test_a_video_that_training_left_out_is_named_once(first):
    warned = [line for line in first.err.splitlines() if line.startswith("warning: left out: ")]
    assert len(warned) == 1 and "broken.mp4" in warned[0], first.err


def test_a_second_run_uses_adapters_and_answers(folder, first):
    again = run_ablate(folder, folder / "out")
    assert again.log == [] and again.result.num_resumed == 1
    assert json.loads(json.dumps(again.result.summary["rows"])) == first.json["rows"]
    assert any("1 were left out of the training" in line for line in again.warned)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"settings": {"grid": "4x4"}}, "differs in grid"),
        ({"settings": {"anchors": 4, "events": False}}, "differs in anchors, events"),
        ({"steps": 2}, "differs in recipe"),
    ],
)
def test_adapters_of_another_training_are_refused(folder, trained, changed, text):
    with fails(2, text) as failure:
        run_ablate(folder, trained, **changed)
    assert "absorber.safetensors" in failure.value.message and "use another -o" in failure.value.hint


def test_an_adapter_that_does_not_say_its_settings_is_refused(folder, trained):
    path = trained / "absorber.safetensors"
    weights, header = read_adapter(path, loaded_models().facts)
    del header["training"]["settings"]
    write_adapter(path, weights, header, force=True)
    check_failure(run_command(folder, trained), 2, "settings (not recorded)")


def test_an_adapter_with_the_absorber_of_an_earlier_release_is_refused(folder, trained):
    path = trained / "absorber.safetensors"
    weights, header = read_adapter(path, loaded_models().facts)
    del header["shape"]["values"]
    write_adapter(path, weights, header, force=True)
    with fails(2, "differs in absorber (an earlier release's)"):
        run_ablate(folder, trained)


def test_the_sweep_of_coefficients_is_trained_for_whatever_the_preset(folder, trained):
    """The default preset has the most of the sweep, so adapters for fewer are the same."""
    fewer = {"max_coefficients": 2}
    run = run_ablate(folder, trained, fewer, tables="coefficients")
    assert labels(run.result.summary)[1:] == [f"coefficients {count}" for count in (1, 2, 3, 5)] and run.log == []
    with fails(2, "differs in max_coefficients"):
        run_ablate(folder, trained, fewer)


def test_training_settings_change_only_where_the_sweep_needs_more():
    settings = make_options({}, None, None, device="cpu").settings
    for tables in (("components",), tuple(ablate.TABLES)):
        found = ablate.training_settings(settings, "absorber", tables)
        assert without_variant(found.record()) == without_variant(settings.record())


def test_rows_of_frames_read_the_rate_in_their_names_whatever_the_preset():
    for row, rate in zip(ablate.TABLES["frames"], (4.0, 2.0), strict=True):
        settings = make_options({}, "long-video", None, device="cpu").settings.with_values("eval", **dict(row.settings))
        assert settings.sample == "fps" and settings.sample_fps * settings.track_density == rate


def without_variant(settings):
    return {key: value for key, value in settings.items() if key != "variant"}


def test_sweeps_are_of_the_absorber_whatever_the_preset(folder, trained):
    preset = trained / "concat.yaml"
    text = (presets_dir() / "bundled.yaml").read_text()
    preset.write_text(text.replace("variant: absorber", "variant: concat"))
    run = run_ablate(folder, trained, tables="anchors,frames", preset=str(preset))
    assert len(labels(run.result.summary)) == 6 and run.log == []


def test_answers_of_another_run_are_refused_with_what_can_be_done(folder, trained):
    (trained / "answers.jsonl").write_text("notes\n")
    run = run_command(folder, trained)
    check_failure(run, 2, "holds no results")
    assert "--force" not in run.err and "name another folder" in run.err


@pytest.mark.parametrize("flag", ["--budgets", "--train-budgets"])
def test_a_budget_given_twice_is_refused(folder, tmp_path, flag):
    check_failure(run_command(folder, tmp_path, flag, "0.1,.10"), 2, f"{flag}: 0.1 is given twice")
    check_failure(run_command(folder, tmp_path, flag, "1"), 2, f"{flag}: expected a share")
    assert not any(tmp_path.iterdir())


def test_no_plot_replaces_a_video_that_is_read(folder, tmp_path):
    video = tmp_path / "v.png"  # an animated PNG is a video
    video.write_bytes(b"whatever it holds")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({**row, "video": str(video)}) + "\n" for row in rows))
    for questions, data in (("q.jsonl", folder / "data.jsonl"), (folder / "questions.jsonl", "q.jsonl")):
        named = ("ablate", tmp_path / questions, "--train", tmp_path / data, "-o", tmp_path / "out", *FLAGS)
        check_failure(run_freres(*named, "--plot", video, "--force"), 2, "video")
        assert video.read_bytes() == b"whatever it holds"


def test_without_training_the_rows_of_adapters_are_left_out():
    cells = ablate.make_cells(("components", "anchors"), parse_budgets("0.25,64"), {})
    untrained = [label for label in COMPONENTS if not label.endswith(", trained")]
    assert [cell.name for cell in cells[1 : 2 * len(untrained) : 2]] == [f"{label} 0.25" for label in untrained]
    assert all(cell.adapter is None for cell in cells)


def test_a_benchmark_is_asked_by_its_own_protocol_and_no_picture_replaces_its_annotations(tmp_path):
    (tmp_path / "copy").mkdir()
    copy = make_nextqa(tmp_path / "copy")
    part = ("--benchmark", "nextqa:val", "--limit", 1, "--device", "cpu", "--json")
    found = run_freres("ablate", copy, *part, "-o", tmp_path / "out", "--tables", "anchors").json
    scored = run_freres("eval", copy, *part, "--methods", "uniform").json
    assert found["scoring"] == scored["scoring"] and found["notes"][0] == scored["notes"][0]
    assert len(found["rows"]) == 1 + len(ablate.TABLES["anchors"])
    annotation, *_ = read_any_questions(copy, "nextqa:val").annotations
    linked = copy / "linked.png"
    linked.symlink_to(annotation)
    run = run_freres("ablate", copy, *part, "-o", tmp_path / "out", "--plot", linked, "--force")
    check_failure(run, 2, "is the annotation file")
