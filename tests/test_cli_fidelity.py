"""``freres fidelity``: the table, the document and the picture are those of one encoding of each video."""

from __future__ import annotations

import sys

import av
import pytest
import torch

from freres_cli.baselines.registry import BUNDLE_METHODS, METHODS
from freres_cli.cli.compress import make_options
from freres_cli.errors import ExitStatus, UsageError
from freres_cli.evaluation.cells import parse_cells
from freres_cli.evaluation.fidelity import READERS, measure_energy, measure_loss
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.workflows import fidelity as workflow
from freres_cli.workflows.fidelity import FidelityRequest, measure_fidelity, rebuild_clip
from tests.evaluations import FRAMES, write_clips
from tests.loaded_models import CountingEncoder, loaded_models, models_with
from tests.pipeline_fixtures import tiny as tiny
from tests.runner import check_failure, fails, run_freres
from tests.test_encoded_clip import encode_clip, options_for

ALL = ",".join(BUNDLE_METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("fidelity"))


def request_for(*videos, methods=ALL, budgets="0.25,20", **settings):
    cells = parse_cells(methods, budgets, {name: METHODS[name].has_budget for name in BUNDLE_METHODS})
    return FidelityRequest(videos, cells, make_options(settings, None, None, device="cpu"))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_each_video_passes_the_tower_once_for_all_methods_and_budgets(folder):
    encoder = CountingEncoder(loaded_models().encoder)
    videos = [folder / f"clip{i}.mp4" for i in range(3)]
    result = measure_fidelity(request_for(*videos), models=models_with(encoder))
    assert sum(encoder.num_frames) == 3 * FRAMES + 3
    assert [video["num_frames"] for video in result.videos] == [FRAMES, FRAMES + 1, FRAMES + 2]


def test_the_document_is_the_figures_of_the_parts(folder):
    video = folder / "clip2.mp4"
    document = run_freres("fidelity", video, "--methods", ALL, "--budgets", "1.0,0.25,20", "--json").json
    assert document["schema"] == "freres.fidelity/1" and document["failed"] == []
    clip = encode_clip(video, options_for())
    width = loaded_models().encoder.width
    energy = measure_energy(clip.latents, width)
    rows = document["videos"][0]["rows"]
    assert [(row["method"], row["budget"]) for row in rows] == [
        (name, budget)
        for name in BUNDLE_METHODS
        for budget in ((1.0, 0.25, 20) if METHODS[name].has_budget else (None,))
    ]
    for row in rows:
        num_tokens, rebuilds = rebuild_clip(clip, row["method"], row["budget_tokens"])
        assert row["visual_tokens"] == num_tokens <= row["budget_tokens"] and row["full_tokens"] == clip.full_tokens
        for reader, rebuild in rebuilds.items():
            lost = float(measure_loss(clip.latents, rebuild, width).sum())
            assert row[f"kept_{reader}"] == pytest.approx(1 - lost / energy, abs=1e-9)
            assert sum(row[f"lost_by_second_{reader}"]) == pytest.approx(1 - row[f"kept_{reader}"], abs=1e-9)
            assert len(row[f"lost_by_second_{reader}"]) == int(clip.pts_seconds[-1] - clip.pts_seconds[0]) + 1
            if num_tokens == clip.full_tokens:
                assert row[f"kept_{reader}"] == 1
        assert row["method"] != "fre-res" or row["kept_hold"] == row["kept_linear"]


def test_means_count_every_video_once_and_the_table_has_them(folder):
    document = run_freres("fidelity", folder, "--methods", "evs,fre-res", "--budgets", "0.25", "--json").json
    assert [video["video"] for video in document["videos"]] == [str(folder / f"clip{i}.mp4") for i in range(3)]
    for place, row in enumerate(document["rows"]):
        own = [video["rows"][place] for video in document["videos"]]
        assert {part["method"] for part in own} == {row["method"]}
        for key in ("visual_tokens", "full_tokens", *(f"kept_{reader}" for reader in READERS)):
            assert row[key] == pytest.approx(sum(part[key] for part in own) / 3)
    table = run_freres("fidelity", folder, "--methods", "evs,fre-res", "--budgets", "0.25").out
    lines = [line.split() for line in table.splitlines()]
    row = document["rows"][0]
    shares = [f"{100 * row[f'kept_{reader}']:.1f}" for reader in ("hold", "linear")]
    assert lines[0] == ["method", "budget", "tokens", "hold", "linear"]
    assert lines[1] == ["evs", "0.25", f"{row['visual_tokens']:.0f}", shares[0], "%", shares[1], "%"]
    assert all(str(folder / f"clip{i}.mp4") in table for i in range(3))


def test_denser_tracks_are_compared_at_the_times_of_the_clip(folder):
    """At the full budget the tracks hold every token of a clip that is read more densely than it is measured."""
    options = options_for(sample="count", sample_count=3, track_density=2, grid="3x3", max_coefficients=5)
    clip = encode_clip(folder / "clip2.mp4", options)
    _, rebuilds = rebuild_clip(clip, "fre-res", clip.full_tokens)
    assert torch.equal(rebuilds["hold"](slice(None)), clip.latents.flatten(1, 2))
    assert clip.build_tracks(26).grid[0] == 6
    frames = rebuild_clip(clip, "fre-res", 26)[1]["linear"](slice(None))
    assert frames.shape == (3, 9, loaded_models().encoder.width)
    still = measure_loss(clip.latents, lambda part: clip.latents.flatten(1, 2).float().mean(0)[None], frames.shape[2])
    assert float(measure_loss(clip.latents, lambda part: frames[part], frames.shape[2]).sum()) < float(still.sum())


def test_stretches_of_a_denser_clip_are_compared_at_the_times_of_the_clip(folder):
    options = options_for(sample="count", sample_count=3, track_density=2, grid="3x3")
    clip = encode_clip(folder / "clip2.mp4", options)
    tokens = clip.build_tokens("adaptive", 20)
    assert tokens.grid[0] == 6 and tokens.boxes is not None
    rebuilds = rebuild_clip(clip, "adaptive", 20)[1]
    frames = rebuilds["hold"](slice(None))
    assert frames.shape == (3, 9, tokens.width)
    for frame, second in zip(frames, clip.pts_seconds, strict=True):
        dense = int((tokens.frame_seconds - second).abs().argmin())
        for latent, (t0, t1, h0, h1, w0, w1) in zip(tokens.latents, tokens.boxes.tolist(), strict=True):
            if t0 <= dense < t1:
                shown = frame.view(3, 3, -1)[h0:h1, w0:w1]
                assert torch.equal(shown, latent[: tokens.width].float().expand(shown.shape))
    assert rebuilds["linear"](slice(1, 3)).shape == (2, 9, tokens.width)


def test_the_tower_of_another_model_is_measured(folder, tiny):
    run = run_freres(
        "fidelity", folder / "clip0.mp4", "--model", tiny[0], "--preset", "bundled", "--json", "--set", "grid=3x3"
    )
    assert run.status == 0, run.err
    assert len(run.json["rows"]) == 18 and run.json["model"]["model_id"] != "bundled"
    assert all(row["kept_hold"] <= 1 for row in run.json["rows"])


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_plot_is_a_picture_and_is_not_overwritten(folder, tmp_path):
    flags = ("fidelity", folder / "clip0.mp4", "--methods", "full,dtd", "--plot", tmp_path / "kept.png")
    assert f"plot: {tmp_path / 'kept.png'}" in run_freres(*flags).out
    with av.open(str(tmp_path / "kept.png")) as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert min(pixels.shape[:2]) > 500 and len({tuple(p) for p in pixels.reshape(-1, 3)[::7].tolist()}) > 10
    check_failure(run_freres(*flags), 2, "already exists")
    assert run_freres(*flags, "--force").status == 0


def test_a_name_that_is_a_formula_is_drawn_and_what_is_left_out_is_said(folder, tmp_path):
    names = ["$x^{.mp4", "\u6620\u753b.mp4", *(f"{i}.mp4" for i in range(5))]
    for name in names:
        (tmp_path / name).write_bytes((folder / "clip0.mp4").read_bytes())
    videos = [tmp_path / name for name in names]
    run = run_freres("fidelity", *videos, "--methods", "evs", "--budgets", "0.5", "--plot", tmp_path / "p.png")
    assert run.status == 0, run.err
    assert "the first 6 of 7 videos" in run.err and "Warning" not in run.err


def test_without_matplotlib_the_error_says_how_to_get_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = run_freres("fidelity", folder / "clip0.mp4", "--plot", tmp_path / "kept.png")
    check_failure(run, 2, "needs matplotlib, which is not installed")
    assert "pip install 'freres[plot]'" in run.err
    assert run_freres("fidelity", folder / "clip0.mp4", "--methods", "full").status == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (("--methods", "none-such"), 2, "got 'none-such'"),
        (("--methods", "blind"), 2, "got 'blind'"),
        (("--methods", "evs,evs"), 2, "given twice"),
        (("--budgets", "0"), 2, "--budgets"),
        (("--budgets", "0.0"), 2, "--budgets"),
        (("--budgets", "1.5"), 2, "--budgets"),
        (("--set", "budget_tokens=5"), 2, "--budgets"),
        (("--force",), 2, "--plot"),
        (("--plot", "kept.jpg"), 2, ".png"),
        (("--plot", "no/such/folder/kept.png"), 2, "does not exist"),
        (("--plot", ""), 2, "empty"),
        (("--model", "no/such/folder/at/all"), 5, "no/such"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, flags, status, text):
    check_failure(run_freres("fidelity", folder / "clip0.mp4", *flags), status, text)


def test_a_method_that_needs_the_question_makes_no_bundle_and_so_is_not_offered():
    assert all(METHODS[name].is_question_blind for name in BUNDLE_METHODS)


def test_a_bad_video_is_a_warning_beside_good_ones_and_an_error_alone(folder, tmp_path):
    bad, missing = tmp_path / "bad.mp4", tmp_path / "missing.mp4"
    bad.write_bytes(b"not a video")
    run = run_freres("fidelity", bad, folder / "clip0.mp4", "--methods", "evs", "--budgets", "0.5")
    assert run.status == ExitStatus.VIDEO and run.errors[0].startswith("error: 1 of 2 videos failed: "), run.err
    assert "warning: failed:" in run.err and run.out.strip().endswith("1 video; 1 failed")
    check_failure(run_freres("fidelity", bad), 3, "bad.mp4")
    check_failure(run_freres("fidelity", bad, missing), 3, "none of 2 videos")
    with fails(3, "bad.mp4"):
        VideoSource(bad)


def test_a_failure_that_names_no_file_gets_the_name_of_its_video(folder, monkeypatch):
    measure, videos = workflow.measure_clip, [folder / f"clip{i}.mp4" for i in range(2)]

    def measure_one(clip, *rest):
        if clip.num_frames == FRAMES:
            raise UsageError("--set: residual_grid: too large")
        return measure(clip, *rest)

    monkeypatch.setattr(workflow, "measure_clip", measure_one)
    run = run_freres("fidelity", *videos, "--methods", "evs", "--budgets", 20)
    assert f"failed: {videos[0]}: --set: residual_grid: too large" in run.err and run.status == 2, run.err
    assert f"error: 1 of 2 videos failed: {videos[0]}: --set" in run.err
