"""The whole product on real encoded files: compress, ask, inspect, repack, profile, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from freres_cli.backbones.engine import prefill_video
from freres_cli.bundle.adapter import write_adapter
from freres_cli.bundle.store import read_bundle
from freres_cli.devices import choose_device
from freres_cli.errors import ResourceError
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.adapters import NO_ADAPTER
from freres_cli.workflows.ask import AskRequest, open_session
from freres_cli.world.clip import make_clip
from tests.clips import numbered, write_clip
from tests.runner import check_failure, run_freres
from tests.tiny_models import make_qwen2_vl

SCRIPT = Path(sys.executable).parent / "freres"
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from freres_cli.cli.app import main; main()"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=2.0)


@pytest.fixture(scope="module")
def bundle(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle.pt"
    assert run_freres("compress", clip, "--budget", 300, "-o", path).status == 0
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_qwen2_vl(folder)


# --- the user's own lines ---------------------------------------------------------------------------------------------


def test_the_lines_of_the_readme_work_one_after_the_other(clip, tmp_path):
    """In a shell, with the installed command, in the current folder."""
    shutil.copy(clip, tmp_path / "video.mp4")

    def shell(*arguments):
        return subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    made = shell("compress", "video.mp4", "--budget", "300")
    assert (made.returncode, made.stdout) == (0, "bundle.pt\n"), made.stderr
    assert "only knows its own world" in made.stderr
    (tmp_path / "video.mp4").unlink()
    answered = shell("ask", "bundle.pt", "what moves first?", "--max-new-tokens", "4")
    assert answered.returncode == 0 and answered.stdout.endswith("\n"), answered.stderr
    again = shell("compress", "video.mp4")
    assert again.returncode == 4 and again.stdout == "" and "already exists" in again.stderr


def test_compress_json_has_every_promised_field(clip, tmp_path):
    run = run_freres("compress", clip, "--budget", 300, "-o", tmp_path / "b.pt", "--json")
    document = run.json
    assert document["schema"] == "freres.compress/1"
    assert document["bundle"] == str(tmp_path / "b.pt")
    assert document["visual_tokens"] == 300 == sum(document["tokens_by_kind"].values())
    assert document["budget_tokens"] == 300 and document["full_tokens"] == 60 * 36
    assert document["compression"] == pytest.approx(7.2) and document["retention"] == pytest.approx(1 / 7.2)
    assert set(document["tokens_by_kind"]) == {"anchor", "dynamic", "static", "summary"}
    assert {"decode", "encode", "compress", "write", "total"} <= set(document["timings_s"])
    assert document["peak_memory_bytes"] > 2**20 and document["num_gops"] >= 1
    assert document["model"]["model_id"] == "bundled" and document["environment"]["torch"] == torch.__version__
    assert document["settings"]["budget_tokens"] == {"value": 300, "source": "flag"}


def test_the_dry_run_tells_what_compressing_gives(clip, tmp_path):
    planned = run_freres("compress", clip, "--budget", 300, "--dry-run", "--json").json
    made = run_freres("compress", clip, "--budget", 300, "-o", tmp_path / "b.pt", "--json").json
    assert planned["visual_tokens"] == made["visual_tokens"] and planned["full_tokens"] == made["full_tokens"]
    assert planned["grid"] == made["grid"]
    text = run_freres("compress", clip, "--budget", 300, "--dry-run").out
    assert "visual tokens    300 of at most 300" in text


def test_the_papers_compact_case_comes_out_of_a_video(clip, tmp_path):
    document = run_freres("compress", clip, "--preset", "compact-16f", "-o", tmp_path / "b.pt", "--json").json
    assert document["grid"][1:] == [24, 24] and document["full_tokens"] == 16 * 576
    assert document["visual_tokens"] == 4413 and document["compression"] == pytest.approx(2.1, abs=0.02)


def test_two_runs_give_the_same_bytes(clip, bundle, tmp_path):
    run_freres("compress", clip, "--budget", 300, "-o", tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == bundle.read_bytes()


def test_batches_do_not_change_the_bundle(clip, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("freres_cli.workflows.compress.MAX_BATCH_FRAMES", 7)
    run_freres("compress", clip, "--budget", 300, "-o", tmp_path / "small.pt")
    assert (tmp_path / "small.pt").read_bytes() == bundle.read_bytes()


@pytest.mark.parametrize("moment", ["early", "while writing"])
def test_a_killed_compress_leaves_no_bundle_or_a_whole_one(clip, tmp_path, moment):
    process = subprocess.Popen(
        [*COMMAND, "compress", str(clip), "-o", "b.pt", "-q"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while moment == "while writing" and process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "b.pt").exists():
        read_bundle(tmp_path / "b.pt")


def test_ctrl_c_is_130_and_leaves_nothing(clip, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("freres_cli.workflows.compress.encode_frames", interrupt)
    run = run_freres("compress", clip, "-o", tmp_path / "b.pt")
    assert run.status == 130 and not list(tmp_path.iterdir())


# --- exactness --------------------------------------------------------------------------------------------------------


def test_with_all_tokens_kept_answers_and_logits_are_those_of_stock_transformers(clip, tmp_path, tiny):
    folder, stock = tiny
    path = tmp_path / "b.pt"
    flags = ("--model", folder, "--frames", 4, "--grid", "4x5", "--budget", 80)
    run = run_freres("compress", clip, *flags, "-o", path)
    assert run.status == 0 and "all are kept" in run.err
    session = open_session(AskRequest(path, choose_device("cpu"), text_after="hf"))
    tokens = session.tokens
    assert len(tokens) == 80 and tokens.grid == (4, 4, 5)
    ids = session.model.prompt("What moves?")
    pixels = _frames_of(clip, folder)
    inputs = _stock_inputs(stock, ids, pixels)
    with torch.no_grad():
        expected = stock(**inputs, logits_to_keep=1).logits[0, -1]
        greedy = stock.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prefix = prefill_video(session.model, ids.prefix, tokens, "hf")
    rows = session.model.text_rows(ids.suffix, prefix.num_tokens, prefix.next_position)
    whole = session.model.splice(ids.prefix, tokens, "hf").then(rows)
    got = session.model.logits(session.model.decode(whole, session.model.new_cache())[-1:])[0]
    assert (got - expected).abs().max() == 0.0
    answer = session.ask("What moves?", max_new_tokens=24)
    assert answer.text == session.model.tokenizer.decode(greedy, skip_special_tokens=True)


def _frames_of(clip, folder):
    from freres_cli.backbones.registry import load_vision_encoder
    from freres_cli.video.decode import decode_frames
    from freres_cli.video.probe import probe_video
    from freres_cli.video.sampling import Sampling

    info = probe_video(clip)
    encoder = load_vision_encoder(str(folder), choose_device("cpu"))
    size = encoder.frame_size(info.width_px, info.height_px, (4, 5))
    frames = torch.cat([f.pixels for f in decode_frames(clip, info, Sampling("count", count=4), size)])
    return encoder.patches(frames)


def _stock_inputs(stock, ids, patches):
    pad = stock.config.video_token_id
    row = torch.tensor([[*ids.prefix, *[pad] * 80, *ids.suffix]])
    kinds = (row == pad).long() * 2
    grid = torch.tensor([[4, 8, 10]])
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def test_the_bundle_holds_what_the_answer_uses(bundle):
    """Tokens built from the file are those of the session; positions, kinds and seconds come along."""
    session = open_session(AskRequest(bundle, choose_device("cpu"), adapter=NO_ADAPTER))
    tokens = build_tokens(read_bundle(bundle).tracks)
    assert torch.equal(session.tokens.latents, tokens.latents)
    assert tokens.seconds.min() >= 0 and tokens.seconds.max() <= 2.0
    assert (tokens.seconds - tokens.positions[:, 0].double() / 30).abs().max() < 1e-5


# --- ask --------------------------------------------------------------------------------------------------------------


def test_ask_json_and_choices(bundle):
    document = run_freres("ask", bundle, "what moves?", "--choices", "A cat|A dog|A car", "--json").json
    assert document["schema"] == "freres.ask/1"
    assert document["answer"] in document["choices"] and sum(document["choices"].values()) == pytest.approx(1.0)
    assert document["answer"] == max(document["choices"], key=document["choices"].get)
    assert document["visual_tokens"] == 300 < document["context_tokens"]
    assert 0 < document["ttft_s"] < document["cold_ttft_s"]
    plain = run_freres("ask", bundle, "what moves?", "--max-new-tokens", 1, "--json").json
    assert plain["choices"] is None and plain["new_tokens"] == 1 and plain["finish_reason"] == "length"


def test_a_question_from_stdin_is_the_same_question(bundle):
    given = run_freres("ask", bundle, "what moves?", "--max-new-tokens", 8)
    piped = run_freres("ask", bundle, "-", "--max-new-tokens", 8, stdin="what moves?\n")
    assert given.status == piped.status == 0 and given.out == piped.out


def test_the_prompt_loop_prefills_the_video_once(bundle, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "freres_cli.workflows.ask.prefill_video", lambda *a, **k: calls.append(1) or prefill_video(*a, **k)
    )
    looped = run_freres("ask", bundle, "--max-new-tokens", 6, stdin="what moves?\n\nwhere?\nwhat moves?\n")
    assert looped.status == 0 and calls == [1]
    single = [run_freres("ask", bundle, q, "--max-new-tokens", 6).out for q in ("what moves?", "where?")]
    assert looped.out == single[0] + single[1] + single[0]


def test_sampling_is_seeded(bundle):
    flags = ("--temperature", 2.0, "--max-new-tokens", 12)
    texts = [run_freres("ask", bundle, "what?", *flags, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_another_model_is_refused(bundle, tiny):
    check_failure(run_freres("ask", bundle, "what?", "--model", tiny[0]), 5, "made for another model")


def test_a_model_folder_that_moved_is_named(clip, tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny[0], folder)
    path = tmp_path / "b.pt"
    assert run_freres("compress", clip, "--model", folder, "--frames", 4, "-o", path).status == 0
    assert run_freres("ask", path, "what?", "--max-new-tokens", 2).status == 0
    folder.rename(tmp_path / "elsewhere")
    check_failure(run_freres("ask", path, "what?"), 5, "no such folder here")
    assert run_freres("ask", path, "what?", "--max-new-tokens", 2, "--model", tmp_path / "elsewhere").status == 0


def test_adapters_are_used_and_foreign_ones_refused(bundle, tmp_path):
    model = read_bundle(bundle).manifest["model"]
    modules = FreResModules(ModuleShape(model["width"], 8, 8))
    header = {"model": model, "shape": modules.shape.to_dict()}
    write_adapter(tmp_path / "zero.safetensors", modules.state_dict(), header)
    with torch.no_grad():
        modules.type_embedding.add_(3.0)
    write_adapter(tmp_path / "loud.safetensors", modules.state_dict(), header)
    write_adapter(
        tmp_path / "other.safetensors", modules.state_dict(), {**header, "model": {**model, "projector_sha256": "0"}}
    )
    flags = ("what moves?", "--choices", "a|b", "--json")
    plain = run_freres("ask", bundle, *flags, "--adapter", "none").json["choices"]
    # The bundled model has an adapter of its own.
    assert run_freres("ask", bundle, *flags).json["choices"] != plain
    assert run_freres("ask", bundle, *flags, "--adapter", tmp_path / "zero.safetensors").json["choices"] == plain
    assert run_freres("ask", bundle, *flags, "--adapter", tmp_path / "loud.safetensors").json["choices"] != plain
    check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "other.safetensors"), 5, "another model")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "bad.safetensors"), 5, "damaged adapter")
    check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "none"), 5, "no such adapter")


@pytest.mark.parametrize("variant", ["anchors", "temporal", "concat", "idct"])
def test_every_variant_goes_all_the_way(clip, tmp_path, variant):
    path = tmp_path / "b.pt"
    made = run_freres("compress", clip, "--budget", 500, "--variant", variant, "-o", path, "--json").json
    assert made["visual_tokens"] <= 500
    asked = run_freres("ask", path, "what?", "--max-new-tokens", 1, "--json").json
    assert asked["visual_tokens"] == made["visual_tokens"]


# --- inspect, repack --------------------------------------------------------------------------------------------------


def test_inspect_needs_no_model_and_tells_everything(bundle, monkeypatch):
    monkeypatch.setattr("freres_cli.backbones.registry.resolve_checkpoint", None)
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
    text = run_freres("inspect", bundle).out
    for word in ("lost most", "null", "preset bundled", "flag", "GoP at", "cuts"):
        assert word in text


def test_repack_needs_no_video_and_no_tower(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("freres_cli.backbones.registry.resolve_checkpoint", None)
    monkeypatch.setattr("freres_cli.video.probe.open_video", None)
    small = tmp_path / "small.pt"
    document = run_freres("repack", bundle, "--budget", 200, "-o", small, "--json").json
    assert document["schema"] == "freres.repack/1" and document["visual_tokens"] == 200 == document["budget_tokens"]
    assert set(document["tokens_by_kind"]) == {"anchor", "dynamic", "static", "summary"}
    assert small.stat().st_size < bundle.stat().st_size
    monkeypatch.undo()
    assert run_freres("ask", small, "what?", "--max-new-tokens", 1, "--json").json["visual_tokens"] == 200
    before = run_freres("inspect", bundle, "--json").json
    after = run_freres("inspect", small, "--json").json
    assert after["energy"]["clip_kept"] < before["energy"]["clip_kept"]
    assert [step["verb"] for step in after["history"]] == ["compress", "repack"]
    check_failure(run_freres("repack", bundle, "--budget", 100, "-o", small), 4, "already exists")
    grown = run_freres("repack", bundle, "--budget", 9000, "-o", tmp_path / "same.pt")
    assert grown.status == 0 and "already fits" in grown.err


def test_a_bundle_can_be_repacked_over_itself(bundle, tmp_path):
    path = tmp_path / "b.pt"
    shutil.copy(bundle, path)
    assert run_freres("repack", path, "--budget", 100, "-o", path, "--force").status == 0
    assert len(build_tokens(read_bundle(path).tracks)) == 100


# --- profile ----------------------------------------------------------------------------------------------------------


def test_profile_stands_beside_the_full_tokens(clip):
    flags = ("--budget", 400, "--repeat", 1, "--warmup", 0, "--max-new-tokens", 2, "--json")
    document = run_freres("profile", clip, *flags).json
    assert document["schema"] == "freres.profile/1"
    ours, full = document["rows"]
    assert (ours["method"], full["method"]) == ("fre-res", "full")
    assert ours["visual_tokens"] == 400 and full["visual_tokens"] == 60 * 36 == full["full_tokens"]
    for row in (ours, full):
        assert row["status"] == "ok"
        assert row["context_tokens"] > row["visual_tokens"] and row["peak_memory_bytes"] > row["base_memory_bytes"] > 0
        for stage in ("load_s", "decode_s", "encode_s", "compress_s", "prefill_s", "ttft_s", "next_ttft_s"):
            assert row[stage] > 0 and row["spread"][stage]["min"] <= row[stage] <= row["spread"][stage]["max"]
        assert row["ttft_s"] >= row["prefill_s"]


def test_profile_of_a_bundle_stands_in_random_latents(bundle):
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
def test_a_row_that_cannot_be_measured_is_a_row(target, status):
    from freres_cli.workflows.profile import ProfileRequest, run_apart

    request = ProfileRequest(choose_device("cpu"), "what?", 1, 0, 1, 1.0 if target is _slow else 60.0)
    row = run_apart(request, "full", target)
    assert row["status"] == status and row["message"] and row["ttft_s"] is None and row["method"] == "full"


def test_a_full_run_beyond_the_context_is_a_row(clip, tiny):
    flags = ("--repeat", 1, "--warmup", 0, "--max-new-tokens", 1, "--json", "--set", "grid=9x9")
    ours, full = run_freres("profile", clip, "--model", tiny[0], "--preset", "bundled", "--budget", 300, *flags).json[
        "rows"
    ]
    assert ours["status"] == "ok" and full["status"] == "context_exceeded" and "4096" in full["message"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("compress", "missing.mp4"), 3, "missing.mp4"),
        (("compress", "{clip}", "--preset", "nothing"), 2, "preset nothing"),
        (("compress", "{clip}", "--method", "magic"), 2, "--method"),
        (("compress", "{clip}", "--variant", "magic"), 2, "variant"),
        (("compress", "{clip}", "--grid", "2by2"), 2, "grid"),
        (("compress", "{clip}", "--set", "anchors=0"), 2, "anchors"),
        (("compress", "{clip}", "--fps", "0"), 2, "sample_fps"),
        (("compress", "{clip}", "--fps", "nan"), 2, "sample_fps"),
        (("compress", "{clip}", "--start", "100"), 2, "window"),
        (("compress", "{clip}", "--start", "2", "--end", "1"), 2, "window"),
        (("compress", "{clip}", "--model", "no-such-model"), 5, "no-such-model"),
        (("compress", "{clip}", "--device", "cuda:99"), 6, "cuda:99"),
        (("compress", "{clip}", "--device", "tpu"), 2, "device"),
        (("compress", "{clip}", "--dtype", "int3"), 2, "dtype"),
        (("compress", "{clip}", "-o", "no/such/folder.pt"), 4, "does not exist"),
        (("ask", "missing.pt", "what?"), 4, "missing.pt"),
        (("ask", "{clip}", "what?"), 4, "not a freres bundle"),
        (("ask", "{bundle}", "  "), 2, "question"),
        (("ask", "{bundle}", "what?", "--choices", "one"), 2, "--choices"),
        (("ask", "{bundle}", "what?", "--choices", "a||b"), 2, "empty"),
        (("ask", "{bundle}", "what?", "--choices", "a|a"), 2, "the same"),
        (("ask", "{bundle}", "what?", "--top-p", "2"), 2, "top_p"),
        (("ask", "{bundle}", "what?", "--text-after", "x"), 2, "--text-after"),
        (("ask", "{bundle}", "--json"), 2, "--json"),
        (("inspect", "missing.pt"), 4, "missing.pt"),
        (("repack", "missing.pt", "--budget", "3", "-o", "x.pt"), 4, "missing.pt"),
        (("profile", "missing.mp4"), 3, "missing.mp4"),
        (("presets", "nothing"), 2, "preset nothing"),
        (("demo", "-o", "no-such-folder"), 2, "folder"),
    ],
)
def test_bad_input_is_one_line_and_its_status(arguments, status, text, clip, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(clip=clip, bundle=bundle) for a in arguments]
    check_failure(run_freres(*filled), status, text)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_usage_errors_are_2(clip):
    for arguments in (("compress",), ("compress", clip, "--budget", "0"), ("compress", clip, "--nope"), ("fly",)):
        run = run_freres(*arguments)
        assert run.status == 2 and run.out == "" and "Traceback" not in run.err


def test_a_bug_is_1_and_shows_its_traceback_on_demand(clip, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("freres_cli.workflows.compress.compress_video", fail)
    check_failure(run_freres("compress", clip, "-o", tmp_path / "b.pt"), 1, "ZeroDivisionError: oops")
    monkeypatch.setenv("FRERES_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_freres("compress", clip, "-o", tmp_path / "b.pt")


def test_no_memory_is_6(clip, tmp_path, monkeypatch):
    def allocate(*_, **__):
        return torch.empty(1 << 60)

    monkeypatch.setattr("freres_cli.method.compress.pool_to_cells", allocate)
    check_failure(run_freres("compress", clip, "-o", tmp_path / "b.pt"), 6, "memory")


# --- what can be chosen -----------------------------------------------------------------------------------------------


def test_presets_models_and_doctor_answer(tmp_path):
    listed = run_freres("presets").out
    assert "compact-16f" in listed and "4413" in listed
    printed = run_freres("presets", "compact-16f").out
    (tmp_path / "mine.yaml").write_text(printed.replace("4413", "4000"))
    assert run_freres("presets", tmp_path / "mine.yaml", "--json").json["settings"]["budget_tokens"] == 4000
    assert "Qwen/Qwen2-VL-7B-Instruct" in run_freres("models").out
    assert run_freres("models", "--json").json["bundled"]["freres_trained"]
    findings = run_freres("doctor", "--json").json["findings"]
    assert {f["state"] for f in findings} <= {"ok", "limited", "missing"}
    assert run_freres("doctor").status == 0


def test_demo_runs_the_main_job(tmp_path):
    document = run_freres("demo", "-o", tmp_path, "--json").json
    assert [b["visual_tokens"] for b in document["bundles"]] == [576, 288]
    assert len(document["answers"]) == 6 and any(a["is_transient"] for a in document["answers"])
    assert [row["status"] for row in document["profile"]] == ["ok", "ok"]
    assert {p.name for p in tmp_path.iterdir()} == {"clip.mp4", "bundle-576.pt", "bundle-288.pt"}


def test_the_device_can_come_from_the_environment(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("FRERES_DEVICE", "cuda:99")
    check_failure(run_freres("compress", clip, "-o", tmp_path / "b.pt"), 6, "cuda:99")
    assert run_freres("compress", clip, "-o", tmp_path / "b.pt", "--device", "cpu").status == 0


def test_json_documents_hold_no_nan(bundle):
    def refuse(constant):
        raise AssertionError(constant)

    for arguments in (("inspect", bundle, "--json"), ("models", "--json"), ("presets", "--json")):
        json.loads(run_freres(*arguments).out, parse_constant=refuse)


def test_a_damaged_video_keeps_its_good_part_and_says_so(tmp_path):
    broken = tmp_path / "broken.mkv"
    # Matroska has no index at its end to lose.
    write_clip(tmp_path / "whole.mkv", pictures=numbered(48))
    data = (tmp_path / "whole.mkv").read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    run = run_freres("compress", broken, "-o", tmp_path / "b.pt")
    assert run.status == 0 and "note:" in run.err
    assert 0 < read_bundle(tmp_path / "b.pt").tracks.frame_seconds.shape[0] < 48
    assert read_bundle(tmp_path / "b.pt").manifest["sampling"]["lost_s"] > 0
    strict = run_freres("compress", broken, "-o", tmp_path / "c.pt", "--strict")
    check_failure(strict, 3)


def test_the_request_record_is_frozen(clip):
    from freres_cli.cli.compress import make_request

    request = make_request(clip, {}, None, None)
    with pytest.raises(FrozenInstanceError):
        request.strict = True


def test_every_setting_can_be_set(clip):
    flags = ("budget_tokens=300", "variant=anchors", "sample=count", "sample_count=16", "grid=4x4")
    given = [part for flag in flags for part in ("--set", flag)]
    planned = run_freres("compress", clip, *given, "--dry-run", "--json").json
    assert (
        planned["grid"] == [16, 4, 4] and planned["budget_tokens"] == 300 and planned["tokens_by_kind"]["dynamic"] == 0
    )
    over = run_freres("compress", clip, *given, "--budget", 200, "--grid", "5x5", "--dry-run", "--json").json
    assert over["budget_tokens"] == 200 and over["grid"] == [16, 5, 5], "a flag of its own wins over --set"


def test_one_frame_of_the_temporal_variant_is_one_token(clip, tmp_path):
    path = tmp_path / "b.pt"
    run = run_freres("compress", clip, "--frames", 1, "--variant", "temporal", "-o", path, "--json")
    assert run.status == 0 and run.json["visual_tokens"] == 1


def test_the_video_itself_is_never_replaced(clip, tmp_path):
    video = tmp_path / "v.mp4"
    shutil.copy(clip, video)
    check_failure(run_freres("compress", video, "-o", video, "--force"), 2, "is the video itself")
    assert video.read_bytes() == clip.read_bytes()


def test_a_model_folder_under_home_is_found_again(clip, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny[0].parent))
    path = tmp_path / "b.pt"
    assert run_freres("compress", clip, "--model", f"~/{tiny[0].name}", "--frames", 2, "-o", path).status == 0
    assert run_freres("ask", path, "what?", "--max-new-tokens", 1).status == 0


def test_control_tokens_and_other_bytes_in_a_question_are_refused(bundle):
    for text in ("end <|im_end|> now", "<|video_pad|>"):
        check_failure(run_freres("ask", bundle, text), 2, "reads as a command")
    check_failure(run_freres("ask", bundle, "what\udcff?"), 2, "UTF-8")
    check_failure(run_freres("ask", bundle, "what?", "--choices", "a|b\udcff"), 2, "UTF-8")


def test_a_question_in_place_of_the_bundle_is_one_line(clip):
    check_failure(run_freres("ask", "what " * 100), 4, "no such file")
    check_failure(run_freres("profile", "v" * 300), 3, "no such file")


def test_a_name_of_any_bytes_goes_all_the_way(clip, tmp_path):
    video = os.fsencode(tmp_path) + b"/odd\xff.mp4"
    with open(video, "wb") as file:  # noqa: PTH123
        file.write(clip.read_bytes())
    run = run_freres("compress", os.fsdecode(video), "--frames", 2, "-o", tmp_path / "b.pt")
    assert run.status == 0
    assert read_bundle(tmp_path / "b.pt").manifest["source"]["file"] == "odd\\xff.mp4"


def test_a_closed_pipe_is_no_failure(bundle):
    process = subprocess.Popen(
        [*COMMAND, "inspect", str(bundle), "--tokens"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and b"Traceback" not in process.stderr.read()


def test_a_failed_question_leaves_the_prefix_as_it_was(bundle, monkeypatch):
    """Memory may run out in the middle of the layers; the next answer must not suffer."""
    session = open_session(AskRequest(bundle, choose_device("cpu")))
    before = session.ask("what moves?", choices=["a", "b"]).choices
    layers = session.model.decoder.layers
    real = layers[3].forward

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(layers[3], "forward", fail)
    with pytest.raises(ResourceError):
        session.ask("what moves?", choices=["a", "b"])
    monkeypatch.setattr(layers[3], "forward", real)
    assert session.ask("what moves?", choices=["a", "b"]).choices == before


def test_the_demo_replaces_nothing(tmp_path):
    (tmp_path / "clip.mp4").write_text("mine")
    check_failure(run_freres("demo", "-o", tmp_path), 2, "already there")
    assert (tmp_path / "clip.mp4").read_text() == "mine"


def test_a_bundle_has_been_compressed_already(bundle):
    check_failure(run_freres("profile", bundle, "--budget", 50), 2, "has been compressed")


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
