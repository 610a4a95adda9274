"""Every verb that meets a bundle of method adaptive, or is asked for one."""

from __future__ import annotations

import pytest
import torch

from freres_cli.bundle.store import read_bundle
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.session import AskRequest, open_session
from tests.evaluations import write_clips, write_questions
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import FULL_TOKENS
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES, HIDDEN
from tests.tiny_models import CPU

BUDGET = 128  # the curve has every power of two
DEEP = next(case for case in FAMILY_CASES if case.name == "qwen3_vl")


@pytest.fixture(scope="module")
def path(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("adaptive") / "b.pt"
    assert run_freres("compress", clip, "--method", "adaptive", "--budget", BUDGET, "-o", path).status == 0
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The folder of a tiny model of a DeepStack family."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    DEEP.make(folder)
    return folder


# --- dry runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 300, FULL_TOKENS, 10**7])
def test_a_dry_run_tells_the_tokens_of_a_budget(clip, budget):
    flags = ("compress", clip, "--method", "adaptive", "--budget", budget, "--dry-run")
    document, text = run_freres(*flags, "--json").json, run_freres(*flags)
    count = min(budget, FULL_TOKENS)
    assert document["visual_tokens"] == count and document["quality"] is None
    assert document["budget_tokens"] == budget, "as the document of a run has it"
    assert document["compression"] == pytest.approx(FULL_TOKENS / count)
    assert document["is_lossless"] == (budget >= FULL_TOKENS)
    assert document["settings"]["method"] == {"value": "adaptive", "source": "flag"}
    assert f"visual tokens    {count} of at most {budget}" in text.out and "GoPs" not in text.out


@pytest.mark.parametrize(
    ("more", "most"), [((), FULL_TOKENS), (("--budget", 300), 300), (("--budget", 9999), FULL_TOKENS)]
)
def test_a_dry_run_does_not_make_up_the_tokens_of_a_quality(clip, more, most):
    flags = ("compress", clip, "--method", "adaptive", "--quality", 0.9995, *more, "--dry-run")
    document, text = run_freres(*flags, "--json").json, run_freres(*flags)
    assert document["visual_tokens"] is document["compression"] is document["tokens_by_kind"] is None
    assert document["budget_tokens"] == most and document["quality"] == 0.9995 and not document["is_lossless"]
    made = Compressor(method="adaptive", models=loaded_models(), quality=0.9995).compress(clip)
    if most >= made.num_visual_tokens:
        assert made.manifest["tokens"]["context_tokens"] <= document["context_tokens"]
    assert f"at most {most}, as few as keep 0.9995 of the energy: known only once the frames are encoded" in text.out
    assert text.status == 0 and "None" not in text.out


def test_no_document_and_no_text_holds_the_number_that_means_no_budget(clip, tmp_path):
    base = ("compress", clip, "--method", "adaptive", "--frames", 8)
    shown = []
    for flags in (("--quality", 0.9), ("--budget", 40), ("--quality", 0.9, "--budget", 40)):
        out = tmp_path / f"{len(shown)}.pt"
        for command in (
            (*base, *flags, "--dry-run"),
            (*base, *flags, "--dry-run", "--json"),
            (*base, *flags, "-o", out, "--json"),
            ("inspect", out),
            ("inspect", out, "--json"),
            ("repack", out, "--quality", 0.5, "-o", tmp_path / "r.pt", "--force", "--json"),
        ):
            run = run_freres(*command)
            assert run.status == 0, run.err
            shown.append(run.out + run.err)
    assert len(shown) == 18 and not any("214748364" in text for text in shown)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_tells_the_quality_at_every_budget(path):
    document = run_freres("inspect", path, "--tokens", "--json").json
    told = document["stretches"]
    assert document["energy"] is document["gops"] is None and document["quality"] == told["quality"]
    counts = [point["visual_tokens"] for point in told["curve"]]
    qualities = [point["quality"] for point in told["curve"]]
    assert counts == sorted(set(counts), reverse=True) and counts[0] == FULL_TOKENS and counts[-1] == 1
    assert (
        qualities == sorted(qualities, reverse=True)
        and qualities[0] == 1.0
        and qualities[-1] == pytest.approx(0, abs=1e-4)
    )
    assert dict(zip(counts, qualities, strict=True))[BUDGET] == pytest.approx(document["quality"], abs=1e-12)
    assert len(document["tokens"]) == BUDGET and told["num_cuts"] == document["cuts_found"] == len(told["cuts_s"]) == 1
    assert told["cuts_s"] == pytest.approx([1.0])
    assert told["frames_mean"] <= told["frames_max"] <= 30 and told["cells_mean"] <= told["cells_max"] <= 36
    # Together the stretches stand for every latent once.
    boxes = read_bundle(path).content.boxes
    sizes = (boxes[:, 1::2] - boxes[:, ::2]).prod(1)
    assert int(sizes.sum()) == FULL_TOKENS and told["num_single"] == int((sizes == 1).sum())


def test_the_curve_is_what_cutting_gives(path, tmp_path):
    curve = run_freres("inspect", path, "--json").json["stretches"]["curve"]
    for count in (64, 16, 1):
        small = tmp_path / f"{count}.pt"
        cut = run_freres("repack", path, "--budget", count, "-o", small, "--json").json
        point = next(point for point in curve if point["visual_tokens"] == count)
        assert cut["quality"] == pytest.approx(point["quality"], abs=1e-12)
        assert run_freres("inspect", small, "--json").json["stretches"]["curve"] == curve


def test_inspect_prints_quality_and_curve_and_nothing_of_gops(path):
    run = run_freres("inspect", path, "--tokens")
    assert run.status == 0 and "Traceback" not in run.err
    quality = read_bundle(path).content.quality
    assert f"quality  {100 * quality:.1f} % of the latents' energy in {BUDGET} stretches" in run.out
    assert "cuts     1 found\n" in run.out and "GoP" not in run.out and "without an anchor" not in run.out
    curve = next(line for line in run.out.splitlines() if line.split()[:2] == ["tokens", str(FULL_TOKENS)])
    assert [int(count) for count in curve.split()[1:]] == sorted(map(int, curve.split()[1:]), reverse=True)


def test_there_is_no_absorber_to_draw(path, tmp_path):
    run = run_freres("inspect", path, "--absorber", tmp_path / "a.png", "--adapter", "none")
    assert run.status == 4 and "made by method adaptive: it holds stretches, not tracks" in run.err
    assert not list(tmp_path.iterdir())


# --- ask, profile -----------------------------------------------------------------------------------------------------


def test_it_is_asked_and_every_token_stands_in_the_middle_of_its_stretch(path):
    document = run_freres("ask", path, "what moves?", "--choices", "A cat|A dog", "--json").json
    assert document["visual_tokens"] == BUDGET < document["context_tokens"]
    assert sum(document["choices"].values()) == pytest.approx(1.0)
    tokens = open_session(AskRequest(path, CPU), loaded_models()).tokens
    content = read_bundle(path).content
    assert torch.equal(tokens.latents, content.latents)
    middle = (content.boxes[:, ::2] + content.boxes[:, 1::2] - 1) / 2
    assert torch.equal(tokens.positions, middle)
    rows = run_freres("inspect", path, "--tokens", "--json").json["tokens"]
    assert [[row["t"], row["h"], row["w"]] for row in rows] == middle.tolist()
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_with_every_token_the_answer_is_the_unchanged_model_s(clip, tmp_path):
    answers = []
    for method in ("full", "adaptive"):
        out = tmp_path / f"{method}.pt"
        budget = ("--budget", 8 * 36) if method == "adaptive" else ()
        assert run_freres("compress", clip, "--method", method, "--frames", 8, *budget, "-o", out).status == 0
        answers.append(
            run_freres("ask", out, "what?", "--choices", "a ring|a cross", "--adapter", "none", "--json").json
        )
    assert answers[0]["choices"] == answers[1]["choices"]


def test_no_adapter_is_used_or_missed_unless_one_is_named(path, tmp_path):
    flags = ("ask", path, "what moves?", "--choices", "a|b", "--json")
    plain, none = run_freres(*flags).json, run_freres(*flags, "--adapter", "none").json
    assert plain["choices"] == none["choices"]
    assert not any("adapter" in note for note in plain["notes"] + none["notes"])
    check_failure(run_freres(*flags, "--adapter", tmp_path / "any.safetensors"), 5, "no such file: expected an adapter")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bundle", "budget", "quality"])
def test_it_is_profiled(path, clip, what):
    preset = ("--set", "method=adaptive", "--set", "sample_count=8")
    flags = {
        "bundle": (path,),
        "budget": (clip, *preset, "--budget", 40),
        "quality": (clip, *preset, "--set", "quality=0.9"),
    }
    run = run_freres("profile", *flags[what], "--repeat", 1, "--warmup", 0, "--max-new-tokens", 2, "--json")
    assert run.status == 0, run.err
    rows = {row["method"]: row for row in run.json["rows"]}
    assert list(rows) == ["adaptive", "full"] and {row["status"] for row in rows.values()} == {"ok"}
    full = FULL_TOKENS if what == "bundle" else 8 * 36
    assert rows["adaptive"]["visual_tokens"] < rows["full"]["visual_tokens"] == full


# --- eval, fidelity ---------------------------------------------------------------------------------------------------


def test_eval_and_fidelity_have_its_rows(tmp_path):
    folder = write_clips(tmp_path)
    flags = ("--methods", "adaptive,uniform,full", "--budgets", "0.25,20", "--json")
    rows = run_freres("eval", write_questions(folder), *flags).json["rows"]
    told = {(row["method"], str(row["budget"])): row for row in rows}
    for budget in ("0.25", "20"):
        assert told["adaptive", budget]["visual_tokens"] == told["uniform", budget]["visual_tokens"]
        assert told["adaptive", budget]["compress_s"] > 0
    kept = run_freres("fidelity", folder / "clip1.mp4", *flags).json["rows"]
    by_method = {(row["method"], str(row["budget"])): row for row in kept}
    assert by_method["adaptive", "0.25"]["kept_hold"] > by_method["uniform", "0.25"]["kept_hold"]
    quality = (
        Compressor(method="adaptive", models=loaded_models(), budget_tokens=20)
        .compress(folder / "clip1.mp4")
        .content.quality
    )
    assert by_method["adaptive", "20"]["kept_hold"] == pytest.approx(quality, abs=1e-4), "hold shows what was merged"


def test_eval_keeps_every_budget_above_what_is_merged_as_a_clip_is_read(tmp_path, monkeypatch):
    from freres_cli.method import adaptive
    from freres_cli.pipeline import clip as pipeline_clip

    for module in (adaptive, pipeline_clip):
        monkeypatch.setattr(module, "MOST_STRETCHES", 30)
    folder = write_clips(tmp_path)
    flags = ("--methods", "adaptive", "--budgets", "20,1.0,100", "--json")
    rows = run_freres("fidelity", folder / "clip2.mp4", *flags).json["rows"]
    assert [row["visual_tokens"] for row in rows] == [20, 6 * 36, 100] and rows[1]["kept_hold"] == pytest.approx(1.0)


# --- DeepStack --------------------------------------------------------------------------------------------------------


def test_deepstack_rows_are_dropped(clip, deep, tmp_path):
    keep, drop, later = (tmp_path / f"{name}.pt" for name in ("keep", "drop", "later"))
    flags = ("compress", clip, "--method", "adaptive", "--model", deep, "--frames", 8, "--grid", "4x5", "--budget", 60)
    assert run_freres(*flags, "-o", keep).status == run_freres(*flags, "--deepstack", "drop", "-o", drop).status == 0
    run = run_freres("repack", keep, "--deepstack", "drop", "-o", later)
    assert run.status == 0 and f"{1 + DEEP.num_deep} times smaller" in run.err
    whole, dropped, cut = (read_bundle(path).content for path in (keep, drop, later))
    assert whole.latents.shape == (60, HIDDEN * (1 + DEEP.num_deep)) and dropped.latents.shape == (60, HIDDEN)
    assert torch.equal(whole.latents[:, :HIDDEN], dropped.latents) and torch.equal(cut.latents, dropped.latents)
    for name in ("boxes", "merges", "merge_loss", "energy"):
        assert torch.equal(getattr(whole, name), getattr(dropped, name)), "costs are those of the main channels"
    answers = [run_freres("ask", path, "what?", "--max-new-tokens", 4) for path in (drop, later)]
    assert answers[0].status == 0 and answers[0].out == answers[1].out
    both = run_freres("repack", keep, "--deepstack", "drop", "--budget", 20, "-o", tmp_path / "both.pt")
    assert both.status == 0 and read_bundle(tmp_path / "both.pt").content.latents.shape == (20, HIDDEN)
    kept = run_freres("repack", drop, "--deepstack", "keep", "-o", tmp_path / "k.pt")
    assert kept.status == 2 and "cannot come back" in kept.err


def test_a_family_that_writes_text_around_frames_gets_little_of_it(clip, deep, tmp_path):
    out = tmp_path / "b.pt"
    flags = ("--method", "adaptive", "--model", deep, "--frames", 30, "--grid", "4x5", "--budget", 100)
    tokens = run_freres("compress", clip, *flags, "-o", out, "--json").json
    geometry = read_bundle(out).manifest["geometry"]
    around_frames = tokens["text_overhead_tokens"] - geometry["text_in_video"]
    assert 0 < around_frames <= max(10, *geometry["text_per_frame"][1::2]) and tokens["moved_tokens"] > 0
    cut = run_freres("repack", out, "--budget", 40, "-o", tmp_path / "r.pt", "--json").json
    assert cut["context_tokens"] < tokens["context_tokens"]
