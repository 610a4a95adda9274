"""Adapters of method adaptive: where they are used, where they have no effect, and where they are refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from freres_cli.bundle.adapter import write_adapter
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.stretch_modules import NUM_ORDERS, StretchModules
from freres_cli.pipeline.adapters import give_adapters, name_videos
from freres_cli.presets import BUNDLED
from freres_cli.video.opening import hash_file
from tests.evaluations import run_eval, write_clips, write_questions
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, fails, run_freres

BUDGET = 150
ASKED = ("what moves?", "--choices", "a square|a ring|nothing", "--json")
REFUSED = "adapter for another method: expected {}, got {}"


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    """Bundles with trends and without, and adapters that change nothing or much."""
    folder = tmp_path_factory.mktemp("adaptive")
    for trends in ("keep", "drop"):
        flags = ("--method", "adaptive", "--budget", BUDGET, "--set", f"trends={trends}")
        assert run_freres("compress", clip, *flags, "-o", folder / f"{trends}.pt").status == 0
    model = loaded_models().facts
    shape = ModuleShape(loaded_models().language_model.width, 4, NUM_ORDERS)
    torch.manual_seed(0)
    for method, modules in (("adaptive", StretchModules(shape)), ("fre-res", FreResModules(shape))):
        header = {"model": model, "method": method, "shape": shape.to_dict()}
        write_adapter(folder / f"{method}-zero.safetensors", modules.state_dict(), header)
        with torch.no_grad():
            modules.absorber.gamma.add_(1e3)
        write_adapter(folder / f"{method}-loud.safetensors", modules.state_dict(), header)
    write_adapter(folder / "later.safetensors", modules.state_dict(), {**header, "method": "later"})
    return folder


def ask(path, *flags):
    run = run_freres("ask", path, *ASKED, *flags)
    assert run.status == 0, run.err
    return run.json


def test_an_adapter_changes_a_bundle_with_trends(folder):
    plain = ask(folder / "keep.pt")
    assert plain["choices"] == ask(folder / "drop.pt")["choices"], "trends alone change nothing"
    assert ask(folder / "keep.pt", "--adapter", folder / "adaptive-zero.safetensors")["choices"] == plain["choices"]
    assert ask(folder / "keep.pt", "--adapter", folder / "adaptive-loud.safetensors")["choices"] != plain["choices"]


def test_without_trends_an_adapter_has_no_effect_and_a_note_says_so(folder):
    told = ask(folder / "drop.pt", "--adapter", folder / "adaptive-loud.safetensors")
    assert told["choices"] == ask(folder / "drop.pt")["choices"]
    assert any("has no effect: the bundle holds no trends" in n and "trends=keep" in n for n in told["notes"])


def test_trends_and_adapters_have_no_effect_on_other_methods_and_notes_say_so(folder, clip, tmp_path):
    flags = ("--method", "uniform", "--budget", BUDGET, "--set", "trends=keep")
    run = run_freres("compress", clip, *flags, "-o", tmp_path / "b.pt")
    assert run.status == 0 and "trends has no effect: method uniform has none" in run.err
    told = ask(tmp_path / "b.pt", "--adapter", folder / "adaptive-loud.safetensors")
    assert told["choices"] == ask(tmp_path / "b.pt")["choices"]
    assert any("adapter has no effect: method uniform has no trained modules" in note for note in told["notes"])


def test_an_adapter_of_another_method_is_refused(folder, bundle, clip, tmp_path):
    foreign = folder / "fre-res-zero.safetensors"
    for path in (folder / "keep.pt", folder / "drop.pt"):
        check_failure(run_freres("ask", path, "x", "--adapter", foreign), 5, REFUSED.format("adaptive", "fre-res"))
    own = folder / "adaptive-zero.safetensors"
    check_failure(run_freres("ask", bundle, "x", "--adapter", own), 5, REFUSED.format("fre-res", "adaptive"))
    picture = ("--absorber", tmp_path / "p.png", "--adapter", own)
    check_failure(run_freres("inspect", bundle, *picture), 5, REFUSED.format("fre-res", "adaptive"))
    check_failure(
        run_freres("ask", bundle, "x", "--adapter", folder / "later.safetensors"),
        5,
        REFUSED.format("fre-res or adaptive", "later"),
    )
    questions = write_questions(write_clips(tmp_path))
    for verb, subject in (("eval", questions), ("compare", clip)):
        flags = ("--methods", "full,fre-res", "--budgets", "0.5", "--adapter", own)
        check_failure(run_freres(verb, subject, *flags), 5, REFUSED.format("fre-res", "adaptive"))


def test_eval_gives_an_adapter_to_the_cells_of_its_method(folder, tmp_path):
    questions = write_questions(write_clips(tmp_path))

    def answers(name):
        adapter = name if name == "none" else str(folder / name)
        done = run_eval(questions, "full,adaptive,uniform", "0.25", adapter=adapter, output=tmp_path / f"{name}.jsonl")
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()[1:]]
        cells = [{k: v for k, v in c["answers"].items()} for row in rows for c in row["cells"]]
        return [row["adapter"] for row in done.summary["rows"]], [[a[:2] for a in c.values()] for c in cells]

    plain, silent, loud = (answers(name) for name in ("none", "adaptive-zero.safetensors", "adaptive-loud.safetensors"))
    assert plain[0] == [None] * 3 and loud[0] == [None, "adaptive-loud.safetensors", None]
    assert silent[1] == plain[1]
    assert loud[1][0::3] == plain[1][0::3] and loud[1][2::3] == plain[1][2::3] and loud[1][1::3] != plain[1][1::3]


def test_videos_that_an_adapter_was_trained_on_are_told(folder, tmp_path):
    """By their content, whatever their names."""
    questions, path = write_questions(write_clips(tmp_path)), tmp_path / "seen.safetensors"
    modules = StretchModules(ModuleShape(loaded_models().language_model.width, 4, NUM_ORDERS))
    header = {"model": loaded_models().facts, "method": "adaptive", "shape": modules.shape.to_dict()}
    shutil.copy(tmp_path / "clip1.mp4", tmp_path / "renamed.mp4")

    def notes(videos, verb="eval", video=None):
        write_adapter(path, modules.state_dict(), {**header, "training": {"videos": videos}}, force=True)
        if verb == "eval":
            told = run_eval(questions, "full,adaptive", "0.25", adapter=str(path)).notes
        else:
            flags = ("--methods", "adaptive", "--budgets", "0.25", "--question", "what?", "--choices", "a|b", "--json")
            told = run_freres("compare", video, *flags, "--adapter", path).json["notes"]
        return [note for note in told if "was trained on" in note]

    one = name_videos([hash_file(tmp_path / "renamed.mp4")])
    [told] = notes(["0" * 16, *one])
    assert told.startswith("adapter seen.safetensors was trained on 1 of these 3 videos")
    assert notes(["0" * 16]) == notes("damaged") == []
    assert "was trained on this video" in notes(one, "compare", tmp_path / "clip1.mp4")[0]
    assert notes(one, "compare", tmp_path / "clip0.mp4") == []


@pytest.mark.slow
def test_compare_names_the_adapter_of_each_row(folder, clip):
    flags = (
        "--methods",
        "adaptive,uniform",
        "--budgets",
        0.1,
        "--question",
        "what?",
        "--choices",
        "left|right",
        "--json",
    )
    plain = run_freres("compare", clip, *flags).json["rows"]
    loud = run_freres("compare", clip, *flags, "--adapter", folder / "adaptive-loud.safetensors").json["rows"]
    assert [row["adapter"] for row in plain] == [None, None]
    assert [row["adapter"] for row in loud] == ["adaptive-loud.safetensors", None]
    chosen = [[row["answers"][0]["choices"] for row in rows] for rows in (plain, loud)]
    assert chosen[0][0] != chosen[1][0] and chosen[0][1] == chosen[1][1]


def test_a_named_adapter_leaves_other_methods_their_own(folder):
    from freres_cli.evaluation.cells import parse_cells

    cells = parse_cells("full,fre-res,adaptive", "0.5", {"full": False, "fre-res": True, "adaptive": True})

    def given(named):
        return [None if c.adapter is None else c.adapter.name for c in give_adapters(cells, named, BUNDLED, "absorber")]

    ships = "bundled_adapter.safetensors"
    assert given(None) == [None, ships, None] and given("none") == [None, None, None]
    assert given(str(folder / "adaptive-zero.safetensors")) == [None, ships, "adaptive-zero.safetensors"]
    assert given(str(folder / "fre-res-zero.safetensors")) == [None, "fre-res-zero.safetensors", None]
    with fails(5, "no such file: expected an adapter"):
        given(str(folder / "nothing.safetensors"))
