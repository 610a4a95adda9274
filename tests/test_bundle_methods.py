"""Bundles of the other methods can be written, read, asked, inspected and profiled, but not cut to a smaller budget."""

from __future__ import annotations

import pytest
import torch

from freres_cli.baselines.registry import METHODS
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.store import read_bundle
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import LatentStream, VideoSource
from freres_cli.pipeline.planning import plan_compression
from freres_cli.pipeline.session import AskRequest, open_session
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import BUDGET, FULL_TOKENS
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES, HIDDEN
from tests.tiny_models import CPU
from tests.token_checks import same_tokens

# Method -> the flags of its bundle and how many tokens it has.
PEERS = {
    "uniform": (("--budget", BUDGET), BUDGET),
    "lowres": (("--budget", BUDGET), BUDGET),
    "evs": (("--budget", BUDGET), BUDGET),
    "dtd": (("--budget", BUDGET), BUDGET),
    # Its positions are fractions on all axes.
    "tome": (("--budget", BUDGET), BUDGET),
    "dpp": (("--budget", BUDGET), BUDGET),
    "full": ((), FULL_TOKENS),
}
DEEP = next(case for case in FAMILY_CASES if case.name == "qwen3_vl")


@pytest.fixture(scope="module")
def written(clip, tmp_path_factory):
    """The bundle of each method, as the command writes it, and what the command says."""
    folder = tmp_path_factory.mktemp("peers")
    found = {}
    for method, (flags, _) in PEERS.items():
        run = run_freres("compress", clip, "--method", method, *flags, "-o", folder / f"{method}.pt")
        assert run.status == 0, run.err
        found[method] = folder / f"{method}.pt", run.err
    return found


@pytest.fixture(scope="module")
def latents(clip):
    """The latents of all frames, and their times."""
    models, options = loaded_models(), Compressor(method="full").options
    source = VideoSource(clip)
    plan = plan_compression(options, models.encoder, source.info)
    stream = LatentStream(models.encoder, StageTimer(torch.device("cpu")), "bundled").encode(source.open(plan, options))
    batches = [(batch.pts_seconds, rows) for batch, rows in stream]
    seconds = torch.tensor([second for times, _ in batches for second in times], dtype=torch.float64)
    return torch.cat([rows for _, rows in batches]), seconds


@pytest.fixture(params=PEERS)
def method(request):
    return request.param


@pytest.fixture
def path(written, method):
    return written[method][0]


# --- written and read -------------------------------------------------------------------------------------------------


def test_the_bundle_is_the_method_s_tokens_of_the_clip_s_latents(latents, path, method):
    expected = METHODS[method].compress(*latents, PEERS[method][1], loaded_models().encoder.width)
    same_tokens(read_bundle(path).content, expected)


def test_what_is_read_is_what_was_compressed(clip, path, method):
    flags = {"budget_tokens": BUDGET} if METHODS[method].has_budget else {}
    made = Compressor(method=method, models=loaded_models(), **flags).compress(clip)
    read = read_bundle(path)
    same_tokens(read.content, made.content)
    same_tokens(made.tokens(), read.content)
    assert read.content.boxes is None and (made.content.boxes is not None) == (method in ("lowres", "tome"))
    assert read.schema_version == 4 and read.manifest["content"] == "tokens"
    sections = ("model", "source", "sampling", "geometry", "tokens", "history")
    assert {key: read.manifest[key] for key in sections} == {key: made.manifest[key] for key in sections}
    assert read.manifest["settings"]["method"] == {"value": method, "source": "flag"}


def test_the_counts_are_the_method_s(path, method):
    tokens, geometry = (read_bundle(path).manifest[section] for section in ("tokens", "geometry"))
    count = PEERS[method][1]
    assert tokens["visual_tokens"] == tokens["budget_tokens"] == count and tokens["full_tokens"] == FULL_TOKENS
    assert tokens["tokens_by_kind"] == {"anchor": count, "dynamic": 0, "static": 0, "summary": 0}
    assert tokens["compression"] == pytest.approx(FULL_TOKENS / count)
    assert geometry["pooled_grid"] is tokens["num_gops"] is tokens["num_coefficients"] is tokens["cuts_found"] is None


@pytest.mark.parametrize("budget", [1, 7, 35, 37, 101, 288, 1000])
@pytest.mark.parametrize("method", ["uniform", "lowres", "evs", "dtd", "tome", "fourier", "dpp"])
def test_the_budget_is_used_to_the_last_token(clip, method, budget, tmp_path):
    compressor = Compressor(method=method, models=loaded_models(), budget_tokens=budget, sample_count=8)
    read = read_bundle(compressor.compress(clip).save(tmp_path / "b.pt").path)
    assert len(read.content) == read.manifest["tokens"]["visual_tokens"] == min(budget, 8 * 36)


def test_the_dry_run_tells_what_compressing_gives(clip, path, method):
    flags, count = PEERS[method]
    planned = run_freres("compress", clip, "--method", method, *flags, "--dry-run", "--json").json
    assert planned["visual_tokens"] == planned["budget_tokens"] == count and planned["method"] == method
    assert planned["grid"] == read_bundle(path).manifest["geometry"]["grid"]


def test_a_budget_that_full_cannot_keep_is_refused(clip, tmp_path):
    flags = ("compress", clip, "--method", "full", "-o", tmp_path / "b.pt")
    check_failure(run_freres(*flags, "--budget", FULL_TOKENS - 1), 2, f"method full keeps all {FULL_TOKENS} tokens")
    assert not list(tmp_path.iterdir())
    assert run_freres(*flags, "--budget", FULL_TOKENS).status == 0


# --- asked and inspected ----------------------------------------------------------------------------------------------


def test_it_is_asked(path, method):
    count = PEERS[method][1]
    document = run_freres("ask", path, "what moves?", "--choices", "A cat|A dog", "--json").json
    assert document["visual_tokens"] == count < document["context_tokens"]
    assert sum(document["choices"].values()) == pytest.approx(1.0)
    answered = run_freres("ask", path, "what moves?", "--max-new-tokens", 4)
    again = run_freres("ask", path, "what moves?", "--max-new-tokens", 4)
    assert answered.status == 0 and answered.out == again.out != ""
    same_tokens(open_session(AskRequest(path, CPU), loaded_models()).tokens, read_bundle(path).content)


def test_full_answers_as_the_default_method_does_with_every_token_kept(written, clip, tmp_path):
    made = run_freres("compress", clip, "--budget", FULL_TOKENS, "-o", tmp_path / "b.pt")
    assert made.status == 0 and "holds the latents" not in made.err
    flags = ("what moves?", "--choices", "A cat|A dog", "--adapter", "none", "--json")
    answers = [run_freres("ask", path, *flags).json for path in (written["full"][0], tmp_path / "b.pt")]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_an_adapter_has_no_effect_and_that_is_said(path, method, tmp_path):
    flags = ("ask", path, "what moves?", "--choices", "a|b", "--json")
    plain = run_freres(*flags).json
    named = run_freres(*flags, "--adapter", tmp_path / "any.safetensors").json
    assert named["choices"] == plain["choices"]
    assert any("adapter has no effect" in note and method in note for note in named["notes"])
    assert not any("adapter" in note for note in plain["notes"])


def test_it_is_inspected(path, method):
    count = PEERS[method][1]
    document = run_freres("inspect", path, "--tokens", "--json").json
    assert document["schema"] == "freres.inspect/1" and document["energy"] is document["gops"] is None
    assert document["visual_tokens"] == len(document["tokens"]) == count
    assert {token["kind"] for token in document["tokens"]} == {"anchor"}
    assert all(0 <= token["seconds"] <= 2.0 and token["energy"] > 0 for token in document["tokens"])
    shown = run_freres("inspect", path, "--tokens")
    assert shown.status == 0 and f"{count} of at most {count} ({count} anchor" in shown.out
    lines = shown.out.splitlines()
    assert f"method {method} (flag)" in shown.out
    assert sum(line.startswith("anchor ") for line in lines) == count
    assert "GoP" not in shown.out and "null" not in shown.out and "None" not in shown.out.partition("settings ")[0]


def test_there_is_no_absorber_to_draw(path, method, tmp_path):
    run = run_freres("inspect", path, "--absorber", tmp_path / "a.png", "--adapter", "none")
    check_failure(run, 4, f"made by method {method}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_is_profiled(path, method):
    run = run_freres("profile", path, "--repeat", 1, "--warmup", 0, "--max-new-tokens", 2, "--json")
    rows = {row["method"]: row for row in run.json["rows"]}
    assert list(rows) == list(dict.fromkeys((method, "full"))) and {row["status"] for row in rows.values()} == {"ok"}
    assert rows[method]["visual_tokens"] == PEERS[method][1] and rows["full"]["visual_tokens"] == FULL_TOKENS
    for row in rows.values():
        assert row["ttft_s"] >= row["prefill_s"] > 0 and row["encode_s"] is None


# --- repacked ---------------------------------------------------------------------------------------------------------


def test_cutting_is_refused_by_name(path, method, tmp_path):
    small = tmp_path / "s.pt"
    for more in ((), ("--deepstack", "drop")):
        run = run_freres("repack", path, "--budget", 100, *more, "-o", small)
        check_failure(run, 4, f"made by method {method}")
        # full has no budget to name.
        other = "another --method and" if method == "full" else f"--method {method}"
        assert f"with {other} --budget 100" in run.err
    assert not list(tmp_path.iterdir())
    fits = run_freres("repack", path, "--budget", FULL_TOKENS, "-o", small)
    assert fits.status == 0 and "already fits" in fits.err
    same_tokens(read_bundle(small).content, read_bundle(path).content)


def test_without_deepstack_rows_nothing_is_dropped(path, tmp_path):
    run = run_freres("repack", path, "--deepstack", "drop", "-o", tmp_path / "d.pt")
    assert run.status == 0 and "deepstack has no effect" in run.err
    same_tokens(read_bundle(tmp_path / "d.pt").content, read_bundle(path).content)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The folder of a tiny model of a DeepStack family."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    DEEP.make(folder)
    return folder


def test_deepstack_rows_are_dropped(clip, deep, method, tmp_path):
    keep, drop, later = (tmp_path / f"{name}.pt" for name in ("keep", "drop", "later"))
    flags = ("compress", clip, "--method", method, "--model", deep, "--frames", 8, "--grid", "4x5")
    flags += ("--budget", 60) if METHODS[method].has_budget else ()
    assert run_freres(*flags, "-o", keep).status == run_freres(*flags, "--deepstack", "drop", "-o", drop).status == 0
    run = run_freres("repack", keep, "--deepstack", "drop", "-o", later)
    assert run.status == 0 and f"{1 + DEEP.num_deep} times smaller" in run.err
    whole, dropped = read_bundle(keep).content, read_bundle(drop).content
    assert len(whole) == (60 if METHODS[method].has_budget else 160)
    assert whole.latents.shape[1] == HIDDEN * (1 + DEEP.num_deep) and dropped.latents.shape[1] == HIDDEN
    assert torch.equal(whole.latents[:, :HIDDEN], dropped.latents)
    same_tokens(read_bundle(later).content, dropped)
    settings, history = (read_bundle(later).manifest[key] for key in ("settings", "history"))
    assert settings["deepstack"] == {"value": "drop", "source": "flag"} and history[-1]["deepstack"] == "drop"
    answers = [run_freres("ask", path, "what?", "--max-new-tokens", 4) for path in (drop, later)]
    assert answers[0].status == 0 and answers[0].out == answers[1].out
    check_failure(run_freres("repack", drop, "--deepstack", "keep", "-o", tmp_path / "k.pt"), 2, "cannot come back")


def test_notes_say_what_a_method_costs_and_no_budget_that_it_has_not(written, method):
    said = written[method][1]
    assert f"method {method} holds the latents of the whole clip" in said and "the budget of" not in said
