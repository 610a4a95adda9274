"""Method adaptive as a user runs it: a budget is used to the last token, a quality is reached with the fewest."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from freres_cli.baselines.registry import BUNDLE_METHODS, METHODS
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import ExitStatus
from freres_cli.method import adaptive
from freres_cli.pipeline.bundle import load_bundle
from freres_cli.pipeline.compressor import Compressor
from freres_cli.stretches import STRETCH_COLUMNS
from freres_cli.workflows.compress import compress_many
from tests.clips import write_clip
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, fails, run_freres

FRAMES, FULL = 12, 12 * 36
ADAPTIVE = ("--method", "adaptive", "--frames", FRAMES)
QUALITIES = (0.0, 0.3, 0.8, 0.9, 0.97, 0.999)
NO_QUALITY = [name for name in BUNDLE_METHODS if not METHODS[name].has_quality]


def compress(clip, **settings):
    method = settings.pop("method", "adaptive")
    return Compressor(method=method, models=loaded_models(), **{"sample_count": FRAMES, **settings}).compress(clip)


@pytest.fixture(scope="module")
def whole(clip):
    """Every token of the clip, from which every smaller bundle can be cut."""
    bundle = compress(clip, budget_tokens=FULL)
    assert bundle.num_visual_tokens == FULL and bundle.manifest["tokens"]["quality"] == 1.0
    return bundle


@pytest.fixture(scope="module")
def path(clip, tmp_path_factory):
    """What the command writes for 128 tokens."""
    path = tmp_path_factory.mktemp("adaptive") / "b.pt"
    run = run_freres("compress", clip, *ADAPTIVE, "--budget", 128, "-o", path)
    assert run.status == 0, run.err
    assert "128 visual tokens (0 anchor, " in run.err and " % of the energy; " in run.err
    return path


def same_tensors(a, b):
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in STRETCH_COLUMNS if "curve" not in name)


# --- budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 35, 37, 128, 431, 432, 433, 10**6])
def test_a_budget_is_used_to_the_last_token(clip, tmp_path, budget):
    read = read_bundle(compress(clip, budget_tokens=budget).save(tmp_path / "b.pt").path)
    tokens = read.manifest["tokens"]
    assert len(read.content) == tokens["visual_tokens"] == min(budget, FULL)
    assert tokens["budget_tokens"] == budget and tokens["full_tokens"] == FULL
    assert sum(tokens["tokens_by_kind"].values()) == min(budget, FULL)


@pytest.mark.parametrize("budget", [1, 35, 128, 300])
def test_cutting_to_a_budget_is_compressing_to_it_bit_for_bit(clip, whole, path, budget, tmp_path):
    run = run_freres("compress", clip, *ADAPTIVE, "--budget", budget, "-o", tmp_path / "c.pt")
    assert run.status == 0, run.err
    direct = load_bundle(tmp_path / "c.pt")
    once = whole.repack(budget)
    same_tensors(once.content, direct.content)
    if budget <= 128:
        assert run_freres("repack", path, "--budget", budget, "-o", tmp_path / "r.pt").status == 0
        same_tensors(load_bundle(tmp_path / "r.pt").content, direct.content)
    told = ("visual_tokens", "quality", "tokens_by_kind", "context_tokens", "compression", "retention")
    for name in told:
        assert once.manifest["tokens"][name] == direct.manifest["tokens"][name], name


def test_a_budget_below_one_is_refused(path, tmp_path):
    assert run_freres("repack", path, "--budget", 0, "-o", tmp_path / "r.pt").status == ExitStatus.USAGE
    with fails(ExitStatus.USAGE, "budget_tokens: expected at least 1"):
        load_bundle(path).repack(0)
    with fails(ExitStatus.USAGE, "expected budget_tokens or quality, got neither"):
        load_bundle(path).repack()
    check_failure(run_freres("repack", path, "-o", tmp_path / "r.pt"), ExitStatus.USAGE, "--budget, --quality")


# --- quality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_quality_is_reached_with_the_fewest_tokens(clip, whole, quality):
    made = compress(clip, quality=quality)
    count = made.num_visual_tokens
    assert made.content.quality >= quality and made.notes == compress(clip, quality=quality).notes
    assert count == 1 or made.repack(count - 1).content.quality < quality
    assert count == 1 or compress(clip, budget_tokens=count - 1).content.quality < quality
    same_tensors(whole.repack(quality=quality).content, made.content)
    assert made.manifest["tokens"]["budget_tokens"] == count
    assert made.manifest["settings"]["quality"]["value"] == quality
    assert made.manifest["settings"]["budget_tokens"] == {"value": count, "source": "method adaptive"}


def test_quality_one_keeps_all_that_differs_and_quality_zero_one_token(clip, whole):
    assert whole.repack(quality=1).content.quality == 1.0 and whole.repack(quality=0).num_visual_tokens == 1
    run_all = compress(clip, quality=1)
    assert run_all.content.quality == 1.0
    assert run_all.num_visual_tokens == FULL or not run_all.repack(run_all.num_visual_tokens).content.energy[1]


def test_quality_is_the_share_of_energy_that_the_means_hold(clip, whole):
    """The definition, from the latents themselves."""
    made = whole.repack(60).content
    latents = whole.content.latents.reshape(FRAMES, 6, 6, -1).double()
    rebuilt = torch.empty_like(latents)
    for mean, (t0, t1, h0, h1, w0, w1) in zip(made.latents.double(), made.boxes.tolist(), strict=True):
        rebuilt[t0:t1, h0:h1, w0:w1] = mean
    energy = (latents - latents.mean((0, 1, 2))).square().sum()
    assert made.quality == pytest.approx(float(1 - (latents - rebuilt).square().sum() / energy), abs=1e-5)


def test_a_budget_binds_a_quality_that_needs_more_and_that_is_said(clip, tmp_path):
    flags = ("compress", clip, *ADAPTIVE, "--quality", 0.95)
    free = run_freres(*flags, "-o", tmp_path / "free.pt", "--json").json
    assert free["quality"] >= 0.95 and not any("in place of" in note for note in free["notes"])
    few = free["visual_tokens"] // 2
    bound = run_freres(*flags, "--budget", few, "-o", tmp_path / "bound.pt")
    assert bound.status == 0 and f"in place of 0.95: the budget of {few} tokens allows no more" in bound.err
    assert len(read_bundle(tmp_path / "bound.pt").content) == few
    loose = run_freres(*flags, "--budget", 2 * free["visual_tokens"], "-o", tmp_path / "loose.pt", "--json").json
    assert loose["visual_tokens"] == free["visual_tokens"] and loose["budget_tokens"] == 2 * free["visual_tokens"]
    assert not any("in place of" in note or "no more distinct" in note for note in loose["notes"])


def test_a_smaller_bundle_says_what_it_keeps_of_a_quality_that_it_misses(clip, tmp_path):
    path, flags = tmp_path / "b.pt", ("repack", tmp_path / "b.pt", "--quality", 0.999)
    kept = compress(clip, budget_tokens=40).save(path).content.quality
    assert kept < 0.999
    run = run_freres(*flags, "--budget", 200, "-o", tmp_path / "r.pt")
    assert run.status == 0 and f"already fits: 40 tokens, quality {kept:.4f}, budget 200" in run.err


def test_a_plan_knows_only_the_most_tokens_of_a_quality(clip):
    flags = (clip, "--method", "adaptive", "--set", f"sample_count={FRAMES}", "--set", "quality=0.5")
    run = run_freres("plan", *flags, "--tflops", 1, "--device", "cpu")
    assert f"at most {FULL} of {FULL}, as few as keep quality 0.5: the rest is for the most" in run.out
    planned = run_freres("plan", *flags, "--tflops", 1, "--device", "cpu", "--json").json
    dry = run_freres("compress", *flags, "--dry-run", "--json").json
    known = ("visual_tokens", "budget_tokens", "compression", "quality", "context_tokens")
    assert [planned[key] for key in known] == [dry[key] for key in known] and planned["visual_tokens"] is None


def test_what_was_merged_while_the_clip_was_read_bounds_the_quality_and_that_is_said(clip, monkeypatch):
    monkeypatch.setattr(adaptive, "MOST_STRETCHES", 60)
    made = compress(clip, quality=0.9999)
    assert made.content.quality < 0.9999 and made.num_visual_tokens <= 120
    assert any("in place of 0.9999: of a clip this long" in note for note in made.notes)


def test_a_still_clip_costs_few_tokens_and_a_busy_one_many(tmp_path):
    dice = np.random.default_rng(0)
    blocks = dice.integers(0, 255, (20, 6, 6, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    counts = {}
    for name, pictures in (("still", [blocks[0]] * 20), ("busy", list(blocks))):
        video = write_clip(tmp_path / f"{name}.mp4", 20, fps=10, size=(96, 96), pictures=pictures)
        counts[name] = compress(video, quality=0.95).num_visual_tokens
    assert counts["still"] <= 36 and counts["busy"] > 5 * counts["still"], counts


@pytest.mark.parametrize("quality", [0.5, 0.8])
def test_a_bundle_is_cut_to_a_quality(path, tmp_path, quality):
    small = tmp_path / "r.pt"
    document = run_freres("repack", path, "--quality", quality, "-o", small, "--json").json
    assert document["quality"] >= quality and document["visual_tokens"] == document["budget_tokens"] < 128
    one_less = load_bundle(small).repack(document["visual_tokens"] - 1)
    assert one_less.content.quality < quality
    assert load_bundle(small).manifest["history"][-1]["quality"] == quality
    same_tensors(load_bundle(path).repack(quality=quality).content, load_bundle(small).content)


def test_a_bundle_cut_to_a_budget_and_a_quality_keeps_to_both(path, tmp_path):
    few = load_bundle(path).repack(quality=0.8).num_visual_tokens
    for budget, count, is_short in ((few + 5, few, False), (few - 5, few - 5, True)):
        run = run_freres("repack", path, "--quality", 0.8, "--budget", budget, "-o", tmp_path / "r.pt", "--force")
        assert run.status == 0 and len(read_bundle(tmp_path / "r.pt").content) == count
        assert (f"in place of 0.8: the budget of {budget} tokens" in run.err) == is_short
    quality = load_bundle(path).content.quality
    above = run_freres("repack", path, "--quality", 1, "-o", tmp_path / "same.pt")
    assert above.status == 0 and f"the bundle is unchanged: it keeps {quality:.4f} of the energy" in above.err
    same_tensors(load_bundle(tmp_path / "same.pt").content, load_bundle(path).content)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NO_QUALITY)
def test_a_method_without_quality_refuses_it_in_one_line(clip, tmp_path, method):
    out = tmp_path / "b.pt"
    text = f"quality: method {method} has none: expected method adaptive"
    for flags in (("--quality", 0.9), ("--set", "quality=0.9"), ("--quality", 0.9, "--dry-run")):
        check_failure(run_freres("compress", clip, "--method", method, *flags, "-o", out), ExitStatus.USAGE, text)
    preset = tmp_path / "p.yaml"
    preset.write_text(f"method: {method}\nquality: 0.9\n")
    check_failure(run_freres("compress", clip, "--preset", preset, "-o", out), 2, f"preset p: {text}")
    with fails(ExitStatus.USAGE, text):
        Compressor(method=method, quality=0.9)
    assert not out.exists()
    bundle = compress(clip, method=method, sample_count=2)
    with fails(ExitStatus.BUNDLE, f"made by method {method}: only bundles of method adaptive can be cut to a quality"):
        bundle.repack(quality=0.5)
    bundle.save(out)
    run = run_freres("repack", out, "--quality", 0.5, "-o", tmp_path / "r.pt")
    check_failure(run, ExitStatus.BUNDLE, f"made by method {method}")
    assert "compress the video again with --method adaptive --quality 0.5" in run.err
    assert ("cut it to a --budget" in run.err) == (method == "fre-res")  # what the hint names must work
    assert not (tmp_path / "r.pt").exists()


@pytest.mark.parametrize("quality", ["-0.1", "1.1", "nan", "high", "inf"])
def test_a_quality_that_is_no_share_is_refused(clip, path, tmp_path, quality):
    for command in (("compress", clip, *ADAPTIVE), ("repack", path)):
        run = run_freres(*command, "--quality", quality, "-o", tmp_path / "b.pt")
        assert run.status == ExitStatus.USAGE and run.out == "" and "Traceback" not in run.err
    check_failure(run_freres("compress", clip, *ADAPTIVE, "--set", f"quality={quality}"), 2, "--set: quality: expected")
    with fails(ExitStatus.USAGE, "quality: expected"):
        load_bundle(path).repack(quality=float(quality) if quality != "high" else quality)
    assert not list(tmp_path.iterdir())


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preset_names_method_budget_and_quality(clip, tmp_path):
    preset = tmp_path / "mine.yaml"

    def run(text, *flags):
        preset.write_text(f"sample: count\nsample_count: {FRAMES}\ngrid: 6x6\n{text}")
        return run_freres(
            "compress", clip, "--preset", preset, *flags, "-o", tmp_path / "b.pt", "--force", "--json"
        ).json

    plain = run("method: adaptive\nbudget_tokens: 50\n")
    assert plain["visual_tokens"] == 50
    assert plain["settings"]["method"] == {"value": "adaptive", "source": "preset mine"}
    assert run("method: adaptive\n", "--method", "uniform")["settings"]["method"]["value"] == "uniform"
    free = run("method: adaptive\nquality: 0.97\n")
    assert free["quality"] >= 0.97 and free["visual_tokens"] > 50, "the default budget is not meant for it"
    both = run("method: adaptive\nquality: 0.97\nbudget_tokens: 50\n")
    assert both["visual_tokens"] == 50 and any("in place of 0.97" in note for note in both["notes"])
    flag = run("method: adaptive\nbudget_tokens: 50\n", "--quality", 0.97)
    assert flag["visual_tokens"] == free["visual_tokens"], "a preset's budget is not meant for another quality"
    assert run("method: adaptive\nquality: 0.97\n", "--budget", 50)["visual_tokens"] == 50


def test_an_unknown_method_is_refused_by_where_it_came_from(clip, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("method: adaptve\n")
    run = run_freres("compress", clip, "--preset", preset, "-o", tmp_path / "b.pt")
    check_failure(run, ExitStatus.USAGE, "preset mine: method: expected one of")
    assert "--method" not in run.err
    with fails(ExitStatus.USAGE, "preset mine: method: expected one of"):
        Compressor(preset=str(preset))
    check_failure(run_freres("compress", clip, "--set", "method=blind"), 2, "method: expected one of")
    check_failure(run_freres("compress", clip, "--method", "adaptve"), 2, "--method: expected one of")


@pytest.mark.parametrize("verb", ["eval", "fidelity", "train", "ablate"])
def test_verbs_that_work_at_budgets_take_no_quality(clip, tmp_path, verb):
    row = {"id": "1", "video": str(clip), "category": "c", "question": "q?", "choices": ["a", "b"], "answer": "a"}
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps(row) + "\n")
    target = clip if verb == "fidelity" else questions
    more = (
        ("-o", tmp_path / "out") if verb == "ablate" else ("-o", tmp_path / "a.safetensors") if verb == "train" else ()
    )
    set_both = ("--set", "quality=0.9", "--set", "method=adaptive")
    check_failure(run_freres(verb, target, *more, *set_both), 2, f"quality: {verb} works at budgets")
    if verb == "ablate":
        check_failure(
            run_freres(verb, target, *more, "--set", "method=adaptive"), 2, "ablate trains adapters of fre-res"
        )


# --- many videos ------------------------------------------------------------------------------------------------------


def test_a_second_run_skips_the_same_and_refuses_another_quality_or_budget(clip, tmp_path):
    videos = [(clip, clip.with_suffix("").relative_to(clip.parent))]

    def status(**settings):
        compressor = Compressor(method="adaptive", models=loaded_models(), sample_count=FRAMES, **settings)
        row = compress_many(compressor, videos, folder)[0]
        return row.status if row.error is None else row.error.message

    for number, settings in enumerate(
        [{"quality": 0.9}, {"quality": 0.9, "budget_tokens": 20}, {"budget_tokens": 20}, {"quality": 1.0}]
    ):
        folder = tmp_path / str(number)
        assert (status(**settings), status(**settings)) == ("done", "skipped")
        for other in ({"quality": 0.8}, {"quality": 0.9, "budget_tokens": 30}, {"budget_tokens": 30}):
            assert "differs in" in status(**other)
        for given in ({"quality": 0.9}, {"quality": 0.9, "budget_tokens": 20}, {"budget_tokens": 20}):
            assert (status(**given) == "skipped") == (given == settings)


def test_a_quality_of_denser_frames_may_take_more_than_the_clip_and_the_plan_says_so(clip):
    dense = Compressor(models=loaded_models(), quality=1.0, sample_count=4, track_density=3)
    plan, bundle = dense.plan(clip), dense.compress(clip)
    assert plan.full_tokens == 4 * 36 < bundle.num_visual_tokens <= plan.most_tokens == 12 * 36
    assert any("more than the 144 of the clip without compression" in note for note in bundle.notes)
    flags = ("--frames", 4, "--set", "track_density=3", "--dry-run", "--json")
    for more, most in (((), 12 * 36), (("--budget", 100), 100)):
        document = run_freres("compress", clip, "--quality", 1.0, *more, *flags).json
        assert document["budget_tokens"] == most and document["context_tokens"] > most
    fewer = Compressor(models=loaded_models(), quality=0.5, sample_count=4, track_density=3).compress(clip)
    assert fewer.num_visual_tokens < 144 and not any("without compression" in note for note in fewer.notes)


def test_a_bundle_cut_to_a_budget_and_a_quality_records_the_budget(clip, tmp_path):
    whole, small = tmp_path / "whole.pt", tmp_path / "small.pt"
    run_freres("compress", clip, "--budget", 400, "-o", whole, "--device", "cpu")
    assert run_freres("repack", whole, "--budget", 300, "--quality", 0.5, "-o", small).status == 0
    manifest = read_bundle(small).manifest
    assert manifest["tokens"]["budget_tokens"] == 300 > manifest["tokens"]["visual_tokens"]
    assert manifest["history"][-1]["budget_tokens"] == 300 and manifest["history"][-1]["quality"] == 0.5
