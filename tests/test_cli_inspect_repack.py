"""``freres inspect`` and ``freres repack`` need nothing but the bundle."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest

from freres_cli.bundle.store import read_bundle
from freres_cli.method.tokens import build_tokens
from tests.pipeline_fixtures import COMMAND
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import tiny as tiny
from tests.runner import check_failure, run_freres


@pytest.fixture
def orphan(clip, tiny, tmp_path):
    """A bundle whose video and whose model's folder are gone."""
    video, model, path = tmp_path / "clip.mp4", tmp_path / "model", tmp_path / "orphan.pt"
    shutil.copy(clip, video)
    shutil.copytree(tiny[0], model)
    flags = ("--model", model, "--frames", 8, "--grid", "8x8", "--budget", 300)
    assert run_freres("compress", video, *flags, "-o", path).status == 0
    video.unlink()
    shutil.rmtree(model)
    check_failure(run_freres("ask", path, "what?"), 5, "no such folder here")
    return path


def test_inspect_needs_no_model(orphan):
    document = run_freres("inspect", orphan, "--tokens", "--json").json
    assert document["schema"] == "freres.inspect/1" and len(document["tokens"]) == document["visual_tokens"] == 300
    assert run_freres("inspect", orphan).status == 0


def test_inspect_reports_everything(bundle):
    document = run_freres("inspect", bundle, "--tokens", "--json").json
    assert document["schema"] == "freres.inspect/1" and len(document["tokens"]) == 300
    by_kind = {kind: sum(t["kind"] == kind for t in document["tokens"]) for kind in document["tokens_by_kind"]}
    assert by_kind == document["tokens_by_kind"]
    summed = {k: sum(gop["tokens_by_kind"][k] for gop in document["gops"]) for k in by_kind}
    assert summed == by_kind and len(document["gops"]) == document["num_gops"]
    energy = document["energy"]
    assert 0 < energy["clip_kept"] <= 1 and 0 < energy["pooling_kept"] <= 1
    assert energy["spectrum"] == sorted(energy["spectrum"]) and len(energy["null_spectrum"]) == len(energy["spectrum"])
    assert all(0 <= loss["start_s"] < loss["end_s"] <= 2.1 for loss in energy["worst_seconds"])
    assert document["cuts_found"] >= 1, "the clip has a cut"
    assert any(abs(gop["start_s"] - 1.0) < 0.04 for gop in document["gops"]), "a GoP begins at the cut"
    plain = run_freres("inspect", bundle, "--json").json
    assert plain["tokens"] is plain["absorber"] is None and plain.keys() == document.keys()
    text = run_freres("inspect", bundle).out
    for word in ("lost the most", "null", "preset bundled", "flag", "GoP at", "cuts"):
        assert word in text


def test_json_documents_hold_no_nan(bundle):
    def refuse(constant):
        raise AssertionError(constant)

    for arguments in (("inspect", bundle, "--json"), ("models", "--json"), ("presets", "--json")):
        json.loads(run_freres(*arguments).out, parse_constant=refuse)


def test_a_closed_pipe_is_not_a_failure(bundle):
    process = subprocess.Popen(
        [*COMMAND, "inspect", str(bundle), "--tokens"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("words", [("inspect", "BUNDLE"), ("inspect", "BUNDLE", "--json"), ("--help",), ("--version",)])
def test_a_result_that_nobody_can_read_is_a_failure(bundle, words):
    """Standard output is closed before the start: what goes there would be lost."""
    command = shlex.join([*COMMAND, *(str(bundle) if word == "BUNDLE" else word for word in words)])
    done = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 6 and done.stderr.count("\n") == 1, done.stderr
    assert "output cannot be written: Bad file descriptor" in done.stderr.replace("output: cannot", "output cannot")


def test_repack_needs_no_video_and_no_model(orphan, tmp_path):
    small = tmp_path / "small.pt"
    document = run_freres("repack", orphan, "--budget", 200, "-o", small, "--json").json
    assert document["schema"] == "freres.repack/1" and document["visual_tokens"] == 200 == document["budget_tokens"]
    assert small.stat().st_size < orphan.stat().st_size


def test_a_bundle_that_cannot_be_repacked_leaves_no_folder(tmp_path):
    check_failure(
        run_freres("repack", tmp_path / "nope.pt", "--budget", 9, "-o", f"{tmp_path}/new/"), 4, "no such file"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_repacked_bundle_is_a_bundle(bundle, tmp_path):
    small = tmp_path / "small.pt"
    document = run_freres("repack", bundle, "--budget", 200, "-o", small, "--json").json
    assert document["schema"] == "freres.repack/1" and document["visual_tokens"] == 200 == document["budget_tokens"]
    assert set(document["tokens_by_kind"]) == {"anchor", "dynamic", "static", "summary"}
    assert small.stat().st_size < bundle.stat().st_size
    assert run_freres("ask", small, "what?", "--max-new-tokens", 1, "--json").json["visual_tokens"] == 200
    before = run_freres("inspect", bundle, "--json").json
    after = run_freres("inspect", small, "--json").json
    assert after["energy"]["clip_kept"] < before["energy"]["clip_kept"]
    assert [step["verb"] for step in after["history"]] == ["compress", "repack"]
    check_failure(run_freres("repack", bundle, "--budget", 100, "-o", small), 2, "already exists")
    grown = run_freres("repack", bundle, "--budget", 9000, "-o", tmp_path / "same.pt")
    assert grown.status == 0 and "already fits" in grown.err


def test_of_a_bundle_with_every_token_it_says_if_compressing_would_read_other_frames(clip, tiny, tmp_path):
    """Then repacking does not give what compressing gives."""
    flags = ("--model", tiny[0], "--frames", 4, "--grid", "4x4", "--method", "adaptive")
    for density, budget, is_told in ((4, 64, True), (1, 64, False), (4, 63, False)):
        path = tmp_path / f"{density}-{budget}.pt"
        made = run_freres("compress", clip, *flags, "--set", f"track_density={density}", "--budget", budget, "-o", path)
        assert made.status == 0, made.err
        cut = run_freres("repack", path, "--budget", 30, "-o", tmp_path / f"small-{path.name}")
        assert ("reads other frames" in cut.err and "track_density=4" in cut.err) == is_told


def test_a_bundle_can_be_repacked_over_itself(bundle, tmp_path):
    path = tmp_path / "b.pt"
    shutil.copy(bundle, path)
    assert run_freres("repack", path, "--budget", 100, "-o", path, "--force").status == 0
    assert len(build_tokens(read_bundle(path).tracks)) == 100


@pytest.mark.parametrize(("sample", "is_told"), [("native", False), ("count", True)])
def test_only_a_bundle_of_fewer_frames_than_it_could_read_says_that_other_frames_would_be_read(
    clip, tmp_path, sample, is_told
):
    whole, small = tmp_path / "whole.pt", tmp_path / "small.pt"
    named = ["--set", "sample=native"] if sample == "native" else ["--frames", 4]
    flags = ("--budget", 10**6, "--set", "track_density=4", "--set", "line_levels=0", "--end", 0.5, "--device", "cpu")
    assert run_freres("compress", clip, *named, *flags, "-o", whole).status == 0
    assert ("reads other frames" in run_freres("repack", whole, "--budget", 100, "-o", small).err) == is_told
