"""The registry of methods, which the command, its help, completion, the manual and ``freres methods`` read."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from freres_cli.baselines.declaration import NEEDS, TRAININGS
from freres_cli.baselines.registry import ADAPTIVE, BUNDLE_METHODS, FRE_RES, METHODS, OWN_METHODS
from freres_cli.baselines.unavailable import UNAVAILABLE
from freres_cli.cli.options import complete_bundle_method, complete_method
from freres_cli.evaluation.cells import parse_budget
from freres_cli.pipeline.choices import count_budget
from tests.runner import check_failure, run_freres

ROOT = Path(__file__).parents[1]
SHARED = {"falling", "clustering", "groups", "quadtree", "shares", "still"}  # by several methods
NOT_METHODS = {"plugins", "__init__", "declaration", "registry", "unavailable"} | SHARED


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


def test_every_file_of_a_method_is_in_the_registry():
    stems = {path.stem for path in (ROOT / "freres_cli" / "baselines").glob("*.py")} - NOT_METHODS
    declared = [import_module(f"freres_cli.baselines.{stem}").METHOD for stem in sorted(stems)]
    assert {own.name: own for own in declared} == OWN_METHODS


def test_a_budget_in_tokens_is_decided_in_one_place(method):
    found = {text: count_budget(method.name, parse_budget(text), 101) for text in ("0.5", "7")}
    if method.has_budget:
        assert found == {"0.5": 50, "7": 7}
    else:
        fixed = 0 if method.name == "blind" else 101
        assert set(found.values()) == {fixed} and count_budget(method.name, None, 101) == fixed


def test_a_declaration_is_whole(method):
    assert method.summary and method.source and method.deviations
    assert method.training in TRAININGS and set(method.needs) <= set(NEEDS)
    assert method.is_question_blind == ("question" not in method.needs)
    functions = [method.compress, method.pick_for_question, method.pick_attended]
    assert sum(function is not None for function in functions) == (method.name not in (FRE_RES, ADAPTIVE))
    assert method.is_question_blind == (method.compress is not None or method.name in (FRE_RES, ADAPTIVE))
    assert ("decoder layers" in method.needs) == (method.pick_attended is not None) == (method.num_full_layers > 0)
    assert method.is_question_blind or not method.makes_bundles


@pytest.mark.parametrize(("frames", "budget"), [(1, 1), (1, 5), (7, 1), (7, 13), (7, 84), (5, 1000)])
def test_a_method_keeps_the_budget_and_gives_the_same_twice(method, frames, budget):
    if method.compress is None:
        return
    latents = torch.randn(frames, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    seconds = torch.arange(frames, dtype=torch.float64) / 3
    total = frames * 12
    given = budget if method.has_budget else total
    tokens, again = (method.compress(latents.clone(), seconds, given, 8) for _ in range(2))
    if method.has_budget:
        assert len(tokens) == min(budget, total)
    for name in ("latents", "positions", "seconds", "kind", "gop", "energy"):
        assert torch.equal(getattr(tokens, name), getattr(again, name)), name
    assert tokens.positions.shape == (len(tokens), 3) and tokens.seconds.isfinite().all()


def test_lists_name_every_method():
    listed, document = run_freres("methods"), run_freres("methods", "--json").json
    assert listed.status == 0 and [row["name"] for row in document["methods"]] == list(METHODS)
    for name, method in METHODS.items():
        assert f"\n{name} " in listed.out and method.summary in listed.out
    told = {row["name"]: row for row in document["methods"]}
    assert all(told[name]["streams"] and told[name]["training"] == "optional" for name in (FRE_RES, ADAPTIVE))
    assert told["blind"]["makes_bundles"] is False


def test_help_and_manual_name_every_method():
    for verb, names in (("compress", BUNDLE_METHODS), ("eval", METHODS)):
        shown = " ".join(run_freres(verb, "--help").out.split())
        page = " ".join((ROOT / "man" / "man1" / f"freres-{verb}.1").read_text().replace("\\-", "-").split())
        for name in names:
            assert name in shown and name in page, (verb, name)


def test_completion():
    assert complete_bundle_method("") == list(BUNDLE_METHODS) and complete_bundle_method("fre") == ["fre-res"]
    assert complete_bundle_method("ad") == [ADAPTIVE]
    assert complete_bundle_method("fourier") == ["fourier", "fourier-raw"]
    assert complete_method("uniform,fu") == ["uniform,full"] and "uniform,fre-res" in complete_method("uniform,f")


def test_an_unknown_method_is_refused():
    check_failure(run_freres("compress", "x.mp4", "--method", "none-such"), 2, "expected one of")
    check_failure(run_freres("compress", "x.mp4", "--method", "blind"), 2, "--method")


def test_what_is_not_here_is_listed_on_request_with_its_paper_and_what_it_would_take():
    assert not set(UNAVAILABLE) & set(METHODS)
    listed = run_freres("methods", "--all").out
    for name, system in UNAVAILABLE.items():
        assert f"\n{name}: {system.reason}; it would take {system.needs}\n" in listed and system.source in listed
        assert name not in run_freres("methods").out.split()
    document = run_freres("methods", "--all", "--json").json
    assert [row["name"] for row in document["unavailable"]] == list(UNAVAILABLE)
    assert all(
        set(row) == {"name", "source", "reason", "needs"} and all(row.values()) for row in document["unavailable"]
    )
    assert "unavailable" not in run_freres("methods", "--json").json


@pytest.mark.parametrize("name", [*UNAVAILABLE, "GRT"])
def test_what_is_not_here_is_refused_with_its_reason(name):
    system = UNAVAILABLE[name.lower()]
    for flags in (
        ("compress", "x.mp4", "--method"),
        ("eval", "q.jsonl", "--methods"),
        ("fidelity", "x.mp4", "--methods"),
    ):
        run = run_freres(*flags, name)
        check_failure(run, 2, f"{flags[2]}: {name} is not here: {system.reason}")
        assert f"hint: it would take {system.needs}" in run.err
    check_failure(run_freres("eval", "q.jsonl", "--methods", f"full, {name}"), 2, system.reason)


def test_lists_import_no_torch():
    code = "import sys, freres_cli.cli.app, freres_cli.baselines.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
