"""``freres compress`` on real encoded files, run as a user runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from freres_cli.bundle.store import read_bundle
from tests.clips import blank_payloads, numbered, write_clip
from tests.pipeline_fixtures import COMMAND
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres


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
    assert again.returncode == 2 and again.stdout == "" and "already exists" in again.stderr


@pytest.mark.parametrize("method", [None, "fre-res"])
def test_compress_json_has_every_promised_field(clip, tmp_path, method):
    flags = () if method is None else ("--method", method)
    run = run_freres("compress", clip, *flags, "--budget", 300, "-o", tmp_path / "b.pt", "--json")
    document = run.json
    assert document["schema"] == "freres.compress/1"
    assert document["bundle"] == str(tmp_path / "b.pt")
    assert document["visual_tokens"] == 300 == sum(document["tokens_by_kind"].values())
    assert document["budget_tokens"] == 300 and document["full_tokens"] == 60 * 36
    assert document["compression"] == pytest.approx(7.2) and document["retention"] == pytest.approx(1 / 7.2)
    assert set(document["tokens_by_kind"]) == {"anchor", "dynamic", "static", "summary"}
    assert {"decode", "encode", "compress", "write", "total"} <= set(document["timings_s"])
    assert document["peak_memory_bytes"] > 2**20
    if method is None:
        assert document["num_gops"] is None and 0 < document["quality"] < 1
        assert document["settings"]["method"] == {"value": "adaptive", "source": "preset bundled"}
    else:
        assert document["num_gops"] >= 1 and document["quality"] is None
        assert document["settings"]["method"] == {"value": method, "source": "flag"}
    assert document["model"]["model_id"] == "bundled" and document["environment"]["torch"] == torch.__version__
    assert document["settings"]["budget_tokens"] == {"value": 300, "source": "flag"}


def test_the_dry_run_tells_what_compressing_gives(clip, tmp_path):
    planned = run_freres("compress", clip, "--budget", 300, "--dry-run", "--json").json
    made = run_freres("compress", clip, "--budget", 300, "-o", tmp_path / "b.pt", "--json").json
    assert planned["visual_tokens"] == made["visual_tokens"] and planned["full_tokens"] == made["full_tokens"]
    assert planned["grid"] == made["grid"]
    text = run_freres("compress", clip, "--budget", 300, "--dry-run").out
    assert "visual tokens    300 of at most 300" in text


REPEATED = "the clip shows 60 frames, which are read as 120"


def test_frames_that_are_read_twice_are_told_wherever_compression_is(clip, tmp_path):
    flags, twice = ("--method", "uniform", "--budget", 40), ("--set", "sample_fps=60")
    runs = [run_freres("compress", clip, *flags, "--fps", n, "-o", tmp_path / f"{n}.pt", "--json") for n in (60, 30)]
    told = [any(note.startswith(REPEATED) for note in run.json["notes"]) for run in runs]
    assert told == [True, False] and runs[0].json["compression"] == 2 * runs[1].json["compression"]
    assert REPEATED in read_bundle(tmp_path / "60.pt").manifest["sampling"]["notes"][0]
    part = run_freres("compress", clip, *flags, "--fps", 60, "--end", 0.5, "--dry-run")
    assert "shows 15 frames, which are read as 30" in part.err
    assert REPEATED in run_freres("plan", clip, *twice, "--tflops", 1).err
    compared = run_freres("compare", clip, "--methods", "uniform", "--budgets", "40", *twice).err
    assert REPEATED in compared and "a lower sample_fps" in compared  # compare has no --fps


def test_a_frame_that_is_read_twice_now_and_then_is_not_told(tmp_path):
    """As where a clip of 29.97 frames a second is read as one of 30."""
    path = write_clip(tmp_path / "ntsc.mp4", 120, fps=30000 / 1001)
    for fps, is_told in ((30, False), (31, True)):
        run = run_freres("compress", path, "--budget", 40, "--fps", fps, "--dry-run", "--json")
        assert run.json["frames"] > 120 and ("the clip shows 120 frames" in run.err) == is_told, run.err


@pytest.mark.slow
def test_the_papers_compact_case_comes_out_of_a_video(clip, tmp_path):
    document = run_freres("compress", clip, "--preset", "compact-16f", "-o", tmp_path / "b.pt", "--json").json
    assert document["grid"][1:] == [24, 24] and document["full_tokens"] == 16 * 576
    assert document["visual_tokens"] == 4413 and document["compression"] == pytest.approx(2.1, abs=0.02)


def test_two_runs_give_the_same_bytes(clip, bundle, tmp_path):
    run_freres("compress", clip, "--method", "fre-res", "--budget", 300, "-o", tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == bundle.read_bytes()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("anchors", "concat", "iquery", "sparse-idct")]


@pytest.mark.parametrize("variant", ["temporal", "idct", *SLOW])
def test_every_variant_goes_all_the_way(clip, tmp_path, variant):
    path = tmp_path / "b.pt"
    flags = ("--method", "fre-res", "--budget", 500, "--variant", variant)
    made = run_freres("compress", clip, *flags, "-o", path, "--json").json
    assert made["visual_tokens"] <= 500
    asked = run_freres("ask", path, "what?", "--max-new-tokens", 1, "--json").json
    assert asked["visual_tokens"] == made["visual_tokens"]


def test_every_setting_can_be_set(clip):
    flags = ("method=fre-res", "budget_tokens=300", "variant=anchors", "sample=count", "sample_count=16", "grid=4x4")
    given = [part for flag in flags for part in ("--set", flag)]
    planned = run_freres("compress", clip, *given, "--dry-run", "--json").json
    assert (
        planned["grid"] == [16, 4, 4] and planned["budget_tokens"] == 300 and planned["tokens_by_kind"]["dynamic"] == 0
    )
    over = run_freres("compress", clip, *given, "--budget", 200, "--grid", "5x5", "--dry-run", "--json").json
    assert over["budget_tokens"] == 200 and over["grid"] == [16, 5, 5], "a flag of its own wins over --set"


def test_one_frame_of_the_temporal_variant_is_one_token(clip, tmp_path):
    path = tmp_path / "b.pt"
    run = run_freres(
        "compress", clip, "--method", "fre-res", "--frames", 1, "--variant", "temporal", "-o", path, "--json"
    )
    assert run.status == 0 and run.json["visual_tokens"] == 1


def test_the_device_can_come_from_the_environment(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("FRERES_DEVICE", "cuda:99")
    check_failure(run_freres("compress", clip, "-o", tmp_path / "b.pt"), 6, "error: FRERES_DEVICE: cuda:99")
    monkeypatch.setenv("FRERES_DTYPE", "int3")
    run = run_freres("compress", clip, "-o", tmp_path / "b.pt", "--device", "cpu")
    check_failure(run, 2, "error: FRERES_DTYPE: expected")
    monkeypatch.delenv("FRERES_DTYPE")
    assert run_freres("compress", clip, "-o", tmp_path / "b.pt", "--device", "cpu").status == 0


def test_the_video_itself_is_never_replaced(clip, tmp_path):
    video = tmp_path / "v.mp4"
    shutil.copy(clip, video)
    check_failure(run_freres("compress", video, "-o", video, "--force"), 2, "is the video itself")
    assert video.read_bytes() == clip.read_bytes()


def test_a_name_of_any_bytes_goes_all_the_way(clip, tmp_path):
    video = os.fsencode(tmp_path) + b"/odd\xff.mp4"
    with open(video, "wb") as file:  # noqa: PTH123
        file.write(clip.read_bytes())
    run = run_freres("compress", os.fsdecode(video), "--frames", 2, "-o", tmp_path / "b.pt")
    assert run.status == 0
    assert read_bundle(tmp_path / "b.pt").manifest["source"]["file"] == "odd\\xff.mp4"


def test_a_damaged_video_keeps_its_good_part_and_says_so(tmp_path):
    broken = tmp_path / "broken.mkv"
    # Matroska has no index at its end to lose.
    write_clip(tmp_path / "whole.mkv", pictures=numbered(48))
    data = (tmp_path / "whole.mkv").read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    run = run_freres("compress", broken, "-o", tmp_path / "b.pt")
    assert run.status == 0 and "note:" in run.err
    assert 0 < len(read_bundle(tmp_path / "b.pt").content.frame_seconds) < 48
    assert read_bundle(tmp_path / "b.pt").manifest["sampling"]["lost_s"] > 0
    strict = run_freres("compress", broken, "-o", tmp_path / "c.pt", "--strict")
    check_failure(strict, 3)


def test_a_damaged_video_is_compared_with_the_frames_that_the_full_model_would_have(tmp_path):
    """Also where adaptive and fre-res read more of them; and fre-res says why its budget is not used."""
    broken = blank_payloads(write_clip(tmp_path / "a.mp4", 64, pictures=numbered(64)), slice(32, None))
    facts = {}
    for density in (1, 4):
        flags = ("--set", "sample_count=16", "--set", f"track_density={density}", "--budget", 200)
        run = run_freres("compress", broken, *flags, "-o", tmp_path / f"{density}.pt", "--json")
        sampling = read_bundle(tmp_path / f"{density}.pt").manifest["sampling"]
        facts[density] = [sampling["num_frames"] // density, *map(run.json.get, ("full_tokens", "compression"))]
        assert sampling["baseline_frames"] * 36 == run.json["full_tokens"]
    num_frames = facts[1][0]
    assert 7 < num_frames < 12 and facts[4][1:] == facts[1][1:] == [num_frames * 36, num_frames * 36 / 200]
    run = run_freres("compress", broken, "--method", "fre-res", "--budget", 1900, "-o", tmp_path / "f.pt")
    assert "of 1900 tokens used: they were planned for 64 frames, of which 32 could be decoded" in run.err


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

    monkeypatch.setattr("freres_cli.pipeline.encoding.LatentStream.encode", interrupt)
    run = run_freres("compress", clip, "-o", tmp_path / "b.pt")
    assert run.status == 130 and not list(tmp_path.iterdir())


def test_each_of_many_videos_has_the_notes_that_it_has_alone(clip, tmp_path):
    flags = ("--frames", 500, "--set", "track_density=1", "--budget", 100, "--device", "cpu")
    alone = run_freres("compress", clip, *flags, "-o", tmp_path / "a.pt", "--json").json["notes"]
    run = run_freres("compress", clip, *flags, "-o", f"{tmp_path}/")
    assert any("frames requested" in note for note in alone)
    assert run.status == 0 and all(note in run.err for note in alone), run.err
