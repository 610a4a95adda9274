"""Method adaptive is the default: what names no method gets it, and settings of Fre-Res are never ignored in silence."""

from __future__ import annotations

import pytest

from freres_cli.errors import UsageError
from freres_cli.method.budget import MethodSettings
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.planning import FRE_RES_KEYS
from freres_cli.presets import KEYS, REFERENCE, preset_names
from tests.evaluations import write_clips, write_questions
from tests.runner import check_failure, run_freres

REFUSED = "a setting of method fre-res, got method adaptive"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips, questions about them, and a preset of before, when Fre-Res was the default."""
    folder = write_clips(tmp_path_factory.mktemp("default"))
    write_questions(folder)
    (folder / "old.yaml").write_text("grid: 6x6\nanchors: 4\n")
    return folder


@pytest.fixture
def clip(folder):
    return folder / "clip0.mp4"


def test_the_settings_are_those_that_fre_res_computes_with():
    known = set(MethodSettings.__annotations__) - {REFERENCE}
    assert known | {"residual_grid"} == set(FRE_RES_KEYS) and set(FRE_RES_KEYS) < set(KEYS)


@pytest.mark.parametrize("key", FRE_RES_KEYS)
def test_python_refuses_a_setting_of_fre_res_without_its_method(key):
    value = KEYS[key].default
    for method in ({}, {"method": "adaptive"}, {"method": "uniform"}):
        with pytest.raises(UsageError, match=f"^{key}: a setting of method fre-res, got method") as failure:
            Compressor(**method, **{key: value})
        assert 'method="fre-res"' in failure.value.hint
    assert Compressor(method="fre-res", **{key: value}).options.method == "fre-res"
    assert Compressor(preset="qwen2-vl-7b", **{key: value}).options.method == "fre-res"


@pytest.mark.parametrize("key", sorted(set(KEYS) - set(FRE_RES_KEYS) - {"description", "method", "sample"}))
def test_settings_of_every_method_are_taken(key):
    value = {"sample_fps": 2.0, "sample_count": 4, "quality": 0.9}.get(key, KEYS[key].default)
    assert Compressor(**{key: value}).options.method == "adaptive"


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_is_taken_with_either_method(name):
    for method in (None, "adaptive", "fre-res"):
        Compressor(preset=name, method=method)


@pytest.mark.parametrize(
    ("arguments", "text", "hint"),
    [
        (("compress", "{clip}", "--set", "anchors=4"), f"anchors: {REFUSED}", "--method fre-res"),
        (("compress", "{clip}", "--variant", "idct"), f"variant: {REFUSED}", "--method fre-res"),
        (("compress", "{clip}", "--set", "tau=auto", "--dry-run"), f"tau: {REFUSED}", "--method fre-res"),
        (("plan", "{clip}", "--set", "pooled_side=2"), f"pooled_side: {REFUSED}", "--method fre-res"),
        (("profile", "{clip}", "--set", "events=false"), f"events: {REFUSED}", "--method fre-res"),
        (("batch", "{clip}", "-o", "out", "--set", "anchors=4"), f"anchors: {REFUSED}", "--method fre-res"),
        (("compare", "{clip}", "--methods", "adaptive", "--set", "anchors=4"), f"anchors: {REFUSED}", "--methods"),
        (("fidelity", "{clip}", "--methods", "adaptive", "--set", "anchors=4"), f"anchors: {REFUSED}", "--methods"),
        (("eval", "{questions}", "--methods", "adaptive", "--set", "anchors=4"), f"anchors: {REFUSED}", "--methods"),
        (("train", "{questions}", "--set", "method=adaptive", "--set", "anchors=4"), f"anchors: {REFUSED}", "leave"),
        (("compress", "{clip}", "--preset", "{old}"), "preset old: anchors: a setting of method fre-res;", "method: "),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_verb_refuses_it_in_one_line_and_writes_nothing(
    folder, clip, tmp_path, monkeypatch, arguments, text, hint
):
    monkeypatch.chdir(tmp_path)
    named = {"clip": clip, "questions": folder / "questions.jsonl", "old": folder / "old.yaml"}
    run = run_freres(*(argument.format(**named) for argument in arguments))
    check_failure(run, 2, text)
    assert any(line.startswith("hint:") and hint in line for line in run.err.splitlines())
    assert not list(tmp_path.iterdir())


def test_an_old_preset_is_taken_once_a_method_is_named(folder, clip):
    for method, anchors in (("fre-res", True), ("adaptive", False)):
        run = run_freres(
            "compress", clip, "--preset", folder / "old.yaml", "--method", method, "--budget", 40, "--dry-run"
        )
        assert run.status == 0 and ("GoPs" in run.out) == anchors, run.err


def test_no_method_is_adaptive_bit_for_bit(clip, tmp_path):
    made = [
        Compressor(budget_tokens=40, **method, device="cpu").compress(clip) for method in ({}, {"method": "adaptive"})
    ]
    assert made[0].method == "adaptive"
    first, second = (bundle.save(tmp_path / f"{i}.pt").tokens() for i, bundle in enumerate(made))
    assert bool((first.latents == second.latents).all()) and bool((first.positions == second.positions).all())
