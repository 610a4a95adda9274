"""Methods of other packages: they work as freres' own, in every verb, and what they return is held to what is promised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from freres_cli.baselines import plugins
from freres_cli.baselines.declaration import Method
from freres_cli.baselines.evs import METHOD
from freres_cli.errors import FreresError
from freres_cli.pipeline.method_tokens import check_tokens
from tests.clips import write_clip
from tests.evaluations import run_eval, write_clips, write_questions, write_rows
from tests.runner import Run
from tests.test_manpages import read, tags

# The example of freres(3).
MODULE = read("man3/freres.3").partition("# my_package/first.py\n")[2].partition("# pyproject.toml")[0]
RESULTS_PAGE = read("man5/freres-results.5")


@pytest.fixture
def freres(tmp_path):
    """Runs the command where packages offer methods: ``first``, one that cannot be imported, and one named as ours."""
    site = tmp_path / "site"
    points = {"first": "first_tokens:METHOD", "broken": "no_such_module:METHOD", "evs": "first_tokens:METHOD"}
    for name, value in points.items():
        info = site / f"{name}_method-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-method\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[freres.methods]\n{name} = {value}\n")
    (site / "first_tokens.py").write_text(MODULE)

    def run(*arguments):
        command = [sys.executable, "-c", "from freres_cli.cli.start import main; main()", *map(str, arguments)]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (site, Path.cwd()))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        return Run(done.returncode, done.stdout, done.stderr)

    return run, site / "first_tokens.py"


def test_a_method_of_another_package_works_as_ours_and_its_code_is_told_apart(freres, tmp_path):
    run, module = freres
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "clip.mp4", 8, fps=4)
    flags = ("compress", tmp_path / "clips", "--method", "first", "--budget", 50, "-o", tmp_path / "b", "--json")
    made = run(*flags)
    assert made.status == 0 and json.loads(made.out)["visual_tokens"] == 50, made.err
    facts = json.loads(run("inspect", tmp_path / "b" / "clip.pt", "--json").out)
    assert facts["history"][0]["method_from"].startswith("first-method 1.2, sha256 ")
    rows = [
        {
            "id": "1",
            "video": "clips/clip.mp4",
            "category": "a",
            "question": "What?",
            "choices": ["a", "b"],
            "answer": "a",
        }
    ]
    questions = write_rows(tmp_path / "q.jsonl", rows)
    asked = ("eval", questions, "--methods", "first,evs", "--budgets", "0.25", "-o", tmp_path / "r.jsonl")
    assert run(*asked).status == 0 and json.loads(run(*flags).out)["status"] == "skipped"
    module.write_text(MODULE.replace("torch.arange(budget_tokens)", "torch.arange(budget_tokens) + 1"))
    changed = run(*flags)
    assert changed.status == 2 and "code of the method" in changed.err
    refused = run(*asked)
    assert refused.status == 2 and "another run: methods differs" in refused.err


def test_a_package_that_cannot_be_used_is_named_and_nothing_else_fails(freres):
    run, _ = freres
    listed = run("methods", "--json")
    methods = {method["name"]: method for method in json.loads(listed.out)["methods"]}
    assert methods["first"]["origin"].startswith("first-method 1.2") and methods["evs"]["origin"] is None
    faults = json.loads(listed.out)["faults"]
    assert any(fault.startswith("broken of broken-method 1.2 cannot be used: No module") for fault in faults)
    assert "evs of evs-method 1.2 cannot be used: there is a method of that name" in faults
    assert "note: broken of" in run("methods").err
    named = run("compress", "none.mp4", "--method", "broken")
    assert named.status == 2 and "--method: broken of broken-method 1.2 cannot be used" in named.err


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seconds": lambda t: t.seconds.float()}, "seconds: expected torch.float64, got torch.float32"),
        ({"latents": lambda t: t.latents.double()}, "latents: expected torch.float32"),
        ({"positions": lambda t: t.positions.flip(0)}, "positions: expected by time, then row, then column, each once"),
        ({"positions": lambda t: t.positions + 1}, "positions: expected frames, rows and columns of the grid"),
        ({"seconds": lambda t: t.seconds + 9}, "seconds: expected times of the frames"),
        ({"frame_seconds": lambda t: t.frame_seconds / 2}, "frame_seconds: expected the times that it was given"),
        ({"energy": lambda t: t.energy - 1e9}, "energy: expected finite numbers, 0 or more"),
        ({"kind": lambda t: t.kind + 9}, "kind: expected 0 to 3"),
        ({"gop": lambda t: t.gop - 9}, "gop: expected 0 to"),
        ({"width": lambda t: t.width // 2}, "expected latents (S, 4) of width 4, got (4, 2)"),
    ],
)
def test_tokens_that_no_bundle_may_hold_are_refused_by_the_name_of_their_method(changed, told):
    latents, seconds = torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3.0).double()
    tokens = METHOD.compress(latents, seconds, 6, 4)
    check_tokens(tokens, METHOD, latents, seconds, 6, 4)
    with pytest.raises(FreresError, match="method evs: a fault in it: expected 1 to 5 tokens, got 6"):
        check_tokens(tokens, METHOD, latents, seconds, 5, 4)
    bad = replace(tokens, **{name: make(tokens) for name, make in changed.items()})
    with pytest.raises(FreresError) as refused:
        check_tokens(bad, METHOD, latents, seconds, 6, 4)
    assert told in refused.value.message


def test_a_declaration_has_the_one_function_that_is_called():
    with pytest.raises(ValueError, match="mine: expected a function compress"):
        Method("mine", "", "")
    with pytest.raises(ValueError, match="mine: expected a function compress"):
        replace(METHOD, name="mine", streams=True)


PICKS = """
import torch
from freres_cli.baselines import plugins
from freres_cli.baselines.declaration import Method
def pick(tokens, question, count):
    return torch.arange(count + MORE)
METHOD = Method("picks", "", "", needs=("question",), makes_bundles=False, pick_for_question=pick)
"""


@pytest.mark.parametrize(
    ("name", "module", "fault"),
    [
        ("ends", "raise SystemExit('at once')", "at once"),
        ("other", MODULE, "expected a Method named other"),
        ("first", MODULE.replace('source="ours"', 'source="ours", has_quality=True'), "for methods of freres"),
        (
            "first",
            MODULE.replace('"first"', '"first", makes_bundles=False'),
            "expected compress, or makes_bundles=False",
        ),
        ("picks", PICKS, None),
        ("first", MODULE, None),
    ],
)
def test_what_cannot_be_added_is_a_fault(tmp_path, monkeypatch, name, module, fault):
    found = plugins_with(tmp_path, monkeypatch, name, module)
    assert set(found.methods) == (set() if fault else {name})
    assert all(fault in told for told in found.faults.values()) and bool(found.faults) == bool(fault)


def plugins_with(folder, monkeypatch, name, module):
    stem = f"m{abs(hash(module))}"
    (folder / f"{stem}.py").write_text(module)
    monkeypatch.syspath_prepend(folder)
    point = EntryPoint(name, f"{stem}:METHOD", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    return plugins.find_plugins({"evs"})


def test_a_failure_of_a_package_names_it(tmp_path, monkeypatch):
    failing = MODULE.replace("    return", "    raise ValueError('no idea')\n    return")
    found = plugins_with(tmp_path, monkeypatch, "first", failing)
    with pytest.raises(FreresError, match="method first of a package: ValueError: no idea"):
        found.methods["first"].compress(None, None, 1, 1)
    for more, told in ((0, None), (1, "expected 3 places as int64"), (-3, "expected 3 places")):
        found = plugins_with(tmp_path, monkeypatch, "picks", PICKS.replace("MORE", str(more)))
        pick = found.methods["picks"].pick_for_question
        if told is None:
            assert pick(torch.zeros(8, 4), torch.zeros(2, 4), 3).tolist() == [0, 1, 2]
            continue
        with pytest.raises(FreresError, match=f"method picks of a package: ValueError: {told}"):
            pick(torch.zeros(8, 4), torch.zeros(2, 4), 3)


def test_the_page_of_results_files_has_every_key_and_its_example_runs(tmp_path, capsys, monkeypatch):
    questions = write_questions(write_clips(tmp_path))
    run_eval(questions, "uniform,evs", "0.5", output=tmp_path / "answers.jsonl")
    header, *rows = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert set(header) == set(tags("man5/freres-results.5", "HEADER"))
    told = {name for tag in tags("man5/freres-results.5", "ROWS") for name in tag.split(", ")}
    assert {*rows[0], "answers"} == told and set(rows[0]["cells"][0]) <= set(re.findall(r"\w+", RESULTS_PAGE))
    code = RESULTS_PAGE.partition(".nf\n")[2].partition(".fi")[0]
    monkeypatch.chdir(tmp_path)
    exec(code)
    first, second = ([a[1] for row in rows for a in row["cells"][i]["answers"].values()] for i in (0, 1))
    assert capsys.readouterr().out == f"{sum(first) - sum(second)}\n"
