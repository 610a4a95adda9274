"""``freres profile``: a row for each method, measured in its own process, and still a row if that process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from freres_cli.bench.apart import Outcome
from freres_cli.cli.profile_table import require_figures
from freres_cli.devices import choose_device
from freres_cli.errors import BackboneError, ContextError, ExitStatus
from freres_cli.workflows.profile import ProfileRequest, _measure_row, empty_row, run_apart
from tests.clips import write_clip
from tests.pipeline_fixtures import COMMAND
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import forked as forked
from tests.pipeline_fixtures import tiny as tiny
from tests.runner import check_failure, fails, run_freres


@pytest.mark.slow
def test_profile_compares_with_the_full_tokens(clip):
    flags = ("--budget", 400, "--repeat", 1, "--warmup", 0, "--max-new-tokens", 2, "--json")
    document = run_freres("profile", clip, *flags).json
    assert document["schema"] == "freres.profile/1"
    ours, full = document["rows"]
    assert (ours["method"], full["method"]) == ("adaptive", "full")
    assert ours["visual_tokens"] == 400 and full["visual_tokens"] == 60 * 36 == full["full_tokens"]
    for row in (ours, full):
        assert row["status"] == "ok"
        assert row["context_tokens"] > row["visual_tokens"] and row["peak_memory_bytes"] > row["base_memory_bytes"] > 0
        for stage in ("load_s", "decode_s", "encode_s", "compress_s", "prefill_s", "ttft_s", "next_ttft_s"):
            assert row[stage] > 0 and row["spread"][stage]["min"] <= row[stage] <= row["spread"][stage]["max"]
        assert row["ttft_s"] >= row["prefill_s"]


@pytest.mark.slow
def test_profile_of_a_bundle_uses_random_latents_for_the_full_row(bundle):
    run = run_freres("profile", bundle, "--repeat", 1, "--warmup", 0, "--max-new-tokens", 2, "--json")
    ours, full = run.json["rows"]
    assert ours["visual_tokens"] == 300 and full["visual_tokens"] == 60 * 36 and ours["encode_s"] is None
    assert "stand in" in full["message"]


def _killed(connection, request, method):
    os.kill(os.getpid(), signal.SIGKILL)


def _slow(connection, request, method):
    time.sleep(60)


def _starved(connection, request, method):
    from freres_cli.workflows import profile

    def allocate(*_):
        torch.empty(1 << 60)

    profile._measure_row = allocate
    profile.run_row(connection, request, method)


@pytest.mark.parametrize(
    ("target", "status"), [(_killed, "out_of_memory"), (_starved, "out_of_memory"), (_slow, "timed_out")]
)
def test_a_row_that_cannot_be_measured_is_a_row(target, status, forked):
    request = ProfileRequest(choose_device("cpu"), "what?", 1, 0, 1, 1.0 if target is _slow else 60.0)
    row = run_apart(request, "full", target)
    assert row["status"] == status and row["message"] and row["ttft_s"] is None and row["method"] == "full"


@pytest.mark.parametrize(("error", "is_row"), [(ContextError, True), (BackboneError, False)])
def test_only_a_context_that_is_exceeded_is_a_row_and_not_any_error_with_that_word(error, is_row, monkeypatch):
    raised = error("context/model: no such model")
    monkeypatch.setattr("freres_cli.bench.apart.run_apart", lambda *_: Outcome(raised, False, 0))
    request = ProfileRequest(choose_device("cpu"), "what?", 1, 0, 1, 60.0)
    if is_row:
        row = run_apart(request, "full")
        assert (row["status"], row["message"]) == ("context_exceeded", raised.message)
    else:
        with pytest.raises(BackboneError, match="no such model"):
            run_apart(request, "full")


def test_a_damaged_video_is_noted(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "cut.webm", 48, fps=12, codec="libvpx-vp9", options={"cpu-used": "8"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr("freres_cli.workflows.profile.run_apart", lambda request, method: _measure_row(request, method))
    run = run_freres("profile", path, "--budget", 20, "--repeat", 1, "--warmup", 0, "--max-new-tokens", 1, "--json")
    assert "cut.webm: " in run.err and "s of video are lost" in run.err
    assert any("s of video are lost" in note for note in run.json["notes"])
    assert all(any("are lost" in note for note in row["notes"]) for row in run.json["rows"])


@pytest.mark.slow
def test_a_full_run_beyond_the_context_is_a_row(clip, tiny):
    flags = ("--repeat", 1, "--warmup", 0, "--max-new-tokens", 1, "--json", "--set", "grid=9x9")
    ours, full = run_freres("profile", clip, "--model", tiny[0], "--preset", "bundled", "--budget", 300, *flags).json[
        "rows"
    ]
    assert ours["status"] == "ok" and full["status"] == "context_exceeded" and "4096" in full["message"]


def test_a_bundle_has_been_compressed_already(bundle):
    for flags in (("--budget", 50), ("--method", "fre-res")):
        check_failure(run_freres("profile", bundle, *flags), 2, "already compressed")


def test_sigterm_leaves_no_process_and_no_file(clip, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "profile", str(clip), "-q"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text().split():
        time.sleep(0.05)
    child = [pid for pid in children.read_text().split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    # Killed is not yet gone: its own parent is, and someone else has to reap it.
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in child):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in child) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["question", "blank", "too long", "empty file", "no video"])
def test_what_cannot_be_measured_is_refused_before_the_first_row(clip, tmp_path, monkeypatch, name):
    def refuse(*_):
        raise AssertionError("a row was started")

    monkeypatch.setattr("freres_cli.workflows.profile.run_apart", refuse)
    path = tmp_path / "v.mp4"
    path.write_bytes(b"" if name == "empty file" else b"no video\n" * 99 if name == "no video" else clip.read_bytes())
    question = {"question": "", "blank": " ", "too long": "x" * 20_000}.get(name)
    flags = () if question is None else ("--question", question)
    run = run_freres("profile", path, *flags)
    check_failure(run, 3 if question is None else 2, "v.mp4: " if question is None else "--question: ")


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("measured", [(), ("adaptive",), ("full",), ("adaptive", "full")])
def test_a_run_without_figures_of_the_compressed_clip_fails(clip, measured, json, monkeypatch):
    def run_apart(request, method):
        status = ("ok", None) if method in measured else ("timed_out", "took longer than 1 s")
        return empty_row(method, *status)

    monkeypatch.setattr("freres_cli.workflows.profile.run_apart", run_apart)
    run = run_freres("profile", clip, *(["--json"] if json else []))
    assert run.status == (0 if "adaptive" in measured else ExitStatus.RESOURCE)
    if json:
        assert [row["method"] for row in run.json["rows"]] == ["adaptive", "full"]
    else:
        assert run.out.count("(timed_out)") == 2 - len(measured)
    if "adaptive" not in measured:
        assert run.errors == ["error: row adaptive: timed_out: took longer than 1 s"] and "--timeout" in run.err


@pytest.mark.parametrize("status", ["timed_out", "out_of_memory", "context_exceeded"])
def test_of_a_table_one_row_with_figures_is_enough(status):
    rows = [empty_row("full", status, "why"), empty_row("fourier", status, "why")]
    with fails(ExitStatus.RESOURCE, f"row full: {status}: why"):
        require_figures(rows)
    require_figures([*rows, empty_row("adaptive", "ok", None)])
