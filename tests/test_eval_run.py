"""What ``freres eval`` says of a run: damaged videos, frames and adapters of each row, and what makes a run another one."""

from __future__ import annotations

import copy
import csv
import resource
import shutil

import pytest
import torch

from freres_cli.backbones.weight_samples import SAMPLED_VALUES, digest_weights
from freres_cli.errors import ExitStatus, UsageError
from freres_cli.evaluation.results import ResultsFile
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.models import Models
from freres_cli.workflows.eval_run import describe_run
from freres_cli.workflows.evaluate import evaluate
from freres_cli.world.bundled_model import bundled_adapter, bundled_model_dir
from tests.clips import solid, write_clip
from tests.evaluations import make_request, read_rows, rows_for, run_eval, write_rows
from tests.loaded_models import loaded_models, models_with
from tests.runner import check_failure, fails, run_freres
from tests.test_encoded_clip import encode_clip, options_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """clip0.mp4 and clip2.mp4, whole, and clip1.webm, of which the second half is gone; and questions on all three."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("clip0.mp4", "clip2.mp4"):
        write_clip(folder / name, 6, fps=10)
    write_clip(folder / "clip1.webm", 48, fps=12, codec="libvpx-vp9", options={"cpu-used": "8"})
    data = (folder / "clip1.webm").read_bytes()
    (folder / "clip1.webm").write_bytes(data[: len(data) // 2])
    write_rows(folder / "q.jsonl", rows_for(["clip0.mp4", "clip1.webm", "clip2.mp4"]))
    return folder


def test_notes_on_answers_are_told_once_a_kind_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loaded_models().language_model, "max_context_tokens", 24)
    for frames in (6, 40, 48):
        write_clip(tmp_path / f"{frames}.mp4", frames, fps=4)
    write_rows(tmp_path / "q.jsonl", rows_for(["6.mp4", "40.mp4", "48.mp4"]))
    more = {"output": tmp_path / "a.jsonl", "settings": {"text_after": "max"}}
    request = make_request(tmp_path / "q.jsonl", "uniform", "5,6", **more)
    notes = evaluate(request, models=loaded_models()).notes
    (told,) = [note for note in notes if "beyond the model's context of 24" in note]
    assert told.startswith("40.mp4, uniform 5: positions reach") and "in 4 of 6 rows" in told
    assert "context of 24" in read_rows(tmp_path / "a.jsonl")[2]["cells"][0]["notes"][0]
    again = evaluate(request, models=loaded_models())
    assert told in again.notes and again.num_resumed == 3


# --- videos that are damaged ------------------------------------------------------------------------------------------


def test_a_video_that_is_cut_short_is_warned_of_and_recorded(folder, tmp_path):
    log = tmp_path / "a.jsonl"
    run = run_freres("eval", folder / "q.jsonl", "--methods", "blind", "-o", log, "--json")
    warnings = [line for line in run.err.splitlines() if line.startswith("warning:")]
    said = Compressor(models=loaded_models()).compress(folder / "clip1.webm").notes
    lost = [note for note in said if note.endswith("s of video are lost")]
    assert len(warnings) == len(lost) == 1 and "1 video is damaged" in warnings[0]
    assert "clip1.webm" in warnings[0] and lost[0].partition(" ")[0] in warnings[0]
    (noted,) = run.json["video_notes"]
    row = next(row for row in read_rows(log)[1:] if row["video"] == "clip1.webm")
    assert (
        noted == {key: row[key] for key in ("video", "lost_s", "notes")}
        and set(lost) < {*said}
        and lost[0] in row["notes"]
    )
    assert f"{noted['lost_s']:.2f}" == lost[0].partition(" ")[0]
    again = run_freres("eval", folder / "q.jsonl", "--methods", "blind", "-o", log)
    assert warnings[0] in again.err, "also of a run that is resumed"


@pytest.mark.parametrize("verb", ["fidelity", "compare"])
def test_so_do_the_verbs_that_ask_nothing(folder, verb):
    videos = [folder / "clip1.webm", *([folder / "clip0.mp4"] if verb == "fidelity" else [])]
    run = run_freres(verb, *videos, "--methods", "evs", "--budgets", "0.5", "--json")
    assert "s of video are lost" in run.err
    if verb == "fidelity":
        assert "1 video is damaged" in run.err
        first, second = run.json["videos"]
        assert first["lost_s"] > 1 and second["lost_s"] == 0 and second["notes"] == []


def test_frames_that_were_not_encoded_are_counted(tmp_path):
    """Of a clip that stands still."""
    write_clip(tmp_path / "clip0.mp4", pictures=solid(6, (90, 90, 90)), fps=10)
    path = write_rows(tmp_path / "q.jsonl", rows_for(["clip0.mp4"]))
    result = run_eval(path, "uniform", "0.5", settings={"still_levels": 4})
    row = result.summary["rows"][0]
    assert (row["num_frames"], row["encoded_tokens"]) == (6, row["encoded_tokens"] // 36 * 36) and row[
        "encoded_tokens"
    ] < 6 * 36
    assert any("were not encoded" in note for note in result.summary["video_notes"][0]["notes"])
    assert any("frames moved by at most" in note for note in result.notes)


# --- frames and adapters of a row -------------------------------------------------------------------------------------


def test_a_row_has_its_frames_and_what_its_bundle_says_was_encoded(folder):
    """With density 2 the paper's method and adaptive read six frames where the others read three."""
    settings = {"sample": "count", "sample_count": 3, "track_density": 2, "grid": "4x4"}
    path = folder / "q.jsonl"
    result = run_eval(path, "full,uniform,fre-res,adaptive,blind", "1.0,0.5", limit=2, settings=settings)
    frames = {(row["method"], row["budget"]): row["num_frames"] for row in result.summary["rows"]}
    assert frames == {("full", None): 3, ("blind", None): 0} | {("uniform", b): 3 for b in (1.0, 0.5)} | {
        ("fre-res", 1.0): 3,
        ("fre-res", 0.5): 6,
        ("adaptive", 1.0): 3,
        ("adaptive", 0.5): 6,
    }
    (note,) = (note for note in result.notes if "differ in the frames" in note)
    assert "fre-res 0.5" in note and "fre-res 1.0" in note and note.endswith("--set track_density=1 reads equal frames")
    even = run_eval(
        path, "full,uniform,fre-res,adaptive,blind", "1.0,0.5", limit=2, settings=settings | {"track_density": 1}
    )
    assert {row["num_frames"] for row in even.summary["rows"]} == {0, 3}
    assert not any("differ in the frames" in note for note in even.notes)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fre-res", {}),
        ("fre-res", {"residual_grid": "half"}),
        ("fre-res", {"sample": "count", "sample_count": 3, "track_density": 2}),
        ("adaptive", {"line_levels": 48}),
        ("adaptive", {"still_levels": 64}),
        ("evs", {}),
    ],
)
def test_encoded_tokens_are_those_of_the_bundle(folder, method, settings):
    clip = encode_clip(VideoSource(folder / "clip0.mp4"), options_for(**settings, method=method))
    clip.build_tokens("full", clip.full_tokens)
    clip.build_tokens(method, 60)
    made = Compressor(models=loaded_models(), method=method, budget_tokens=60, **settings).compress(
        folder / "clip0.mp4"
    )
    found = made.manifest["sampling"]["num_frames"], made.manifest["tokens"]["encoded_tokens"]
    assert clip.count_frames(method, 60) == found


def test_the_adapter_that_ships_is_named(folder, tmp_path):
    flags = ("eval", folder / "q.jsonl", "--methods", "fre-res,uniform", "--budgets", "0.5", "--limit", "2")
    run = run_freres(*flags, "--csv", tmp_path / "rows.csv")
    assert f"note: fre-res with adapter {bundled_adapter().name}" in run.err
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["adapter"] for row in csv.DictReader(file)] == [bundled_adapter().name, ""]
    assert "with adapter" not in run_freres(*flags, "--adapter", "none").err


@pytest.mark.parametrize("verb", [("eval", "q.jsonl"), ("compare", "clip0.mp4", "--question", "What?")])
def test_an_adapter_that_no_method_takes_is_refused(folder, verb):
    """Whether or not there is such a file: a mistyped name must not look as if it had been used."""
    flags = (verb[0], folder / verb[1], *verb[2:], "--methods", "uniform,evs", "--adapter", "nothere.safetensors")
    check_failure(run_freres(*flags), 2, "--adapter: has no effect on uniform, evs")


# --- another run ------------------------------------------------------------------------------------------------------

ENTRIES = (
    *(
        "freres_version",
        "torch",
        "transformers",
        "av",
        "questions_sha256",
        "methods",
        "model",
        "weights",
        "tokenizer_and_templates",
        "attention",
        "device",
    ),
    *("dtype", "settings", "max_answer_tokens"),
)


@pytest.fixture(scope="module")
def run(folder):
    return describe_run(make_request(folder / "q.jsonl", "blind"), loaded_models())


def test_a_run_has_every_entry(run):
    assert tuple(run) == ENTRIES


@pytest.mark.parametrize("name", [*ENTRIES, "kv", "scoring"])
def test_any_entry_that_differs_makes_it_another_run(run, name, tmp_path):
    """``kv`` and ``scoring`` are there only for a cache in 8 bits and for a benchmark."""
    path = tmp_path / "a.jsonl"
    for same in (run, copy.deepcopy(run)):
        with ResultsFile(path, same):
            pass
    with pytest.raises(UsageError, match=f"holds the results of another run: {name} differs"):
        ResultsFile(path, run | {name: "another"})


def test_two_runs_do_not_write_one_file(run, tmp_path):
    path = tmp_path / "a.jsonl"
    with ResultsFile(path, run) as first:
        for force in (False, True):
            with fails(ExitStatus.USAGE, "a.jsonl: another run is writing it"):
                ResultsFile(path, run, force)
        first.append({"video": "clip0.mp4", "status": "failed", "message": "missing"})
    with ResultsFile(path, run) as later:
        assert list(later.rows) == ["clip0.mp4"]


def test_a_full_disk_is_reported_and_the_rows_before_it_are_kept(run, tmp_path):
    path, row = tmp_path / "a.jsonl", {"video": "a", "status": "failed", "message": "missing"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            fails(ExitStatus.RESOURCE, "a.jsonl: cannot be written: File too large"),
            ResultsFile(path, run) as results,
        ):
            results.append(row)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
            results.append({**row, "video": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with ResultsFile(path, run) as later:
        assert list(later.rows) == ["a"]


@pytest.mark.parametrize("half", ["tower", "decoder"])
def test_other_weights_in_the_same_folder_are_refused(tmp_path, half):
    """One matrix of a layer, which the fingerprint does not cover."""
    write_clip(tmp_path / "clip0.mp4", 4, fps=10)
    path = write_rows(tmp_path / "q.jsonl", rows_for(["clip0.mp4"]))
    models, output = loaded_models(), tmp_path / "a.jsonl"
    first = run_eval(path, "blind", output=output)
    changed = copy.deepcopy(models.encoder if half == "tower" else models.language_model)
    module = changed.tower if half == "tower" else changed.decoder
    weight = next(value for name, value in module.named_parameters() if value.dim() > 1 and "0" in name)
    with torch.no_grad():
        weight.mul_(1.5)
    other = models_with(changed) if half == "tower" else models_with(None, changed)
    assert (other.encoder.fingerprint, other.language_model.fingerprint) == (first.run["model"], first.run["model"])
    with fails(2, f"{output}: holds the results of another run: weights differs"):
        run_eval(path, "blind", output=output, models=other)
    assert run_eval(path, "blind", output=output).num_resumed == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "MODEL_INFO.json"])
def test_another_tokenizer_template_or_way_to_answer_is_another_run(folder, tmp_path, name):
    shutil.copytree(bundled_model_dir(), tmp_path / "model")
    request = make_request(folder / "q.jsonl", "blind", model=str(tmp_path / "model"))
    models = loaded_models()

    def describe():
        return describe_run(request, Models(request.options.model, models.encoder, models.language_model))

    before = describe()
    file = tmp_path / "model" / name
    file.write_text((file.read_text() if file.exists() else "") + "\n")
    after = describe()
    assert {key for key in before if before[key] != after[key]} == {"tokenizer_and_templates"}


def test_weights_are_sampled_over_the_whole_of_each_tensor():
    module = torch.nn.Linear(1000, 1000)
    before = digest_weights(module)
    assert digest_weights(copy.deepcopy(module)) == before
    for part in (slice(0, 4), slice(500, 504), slice(996, 1000)):  # 4,000 values, so at least one of the samples
        assert module.weight.numel() / SAMPLED_VALUES < 4000
        changed = copy.deepcopy(module)
        with torch.no_grad():
            changed.weight[part].add_(1)
        assert digest_weights(changed) != before
