"""What ``--plot`` of every verb shares, and the pictures of profile and ablate."""

from __future__ import annotations

import io

import av
import pytest

from freres_cli.evaluation import fidelity_plot
from freres_cli.evaluation.ablation_plot import draw_ablation
from freres_cli.evaluation.plots import COLOURS, PlotFile
from freres_cli.evaluation.profile_plot import STAGES, draw_profile, stage_seconds
from freres_cli.workflows.fidelity import average_rows
from freres_cli.workflows.profile import STAGES as MEASURED
from freres_cli.workflows.profile import empty_row
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, fails, run_freres

ROW = {**empty_row("evs", "ok", None), **{stage: 1.0 + place for place, stage in enumerate(MEASURED)}}


def colours_of(png):
    with av.open(io.BytesIO(png), format="png_pipe") as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    return {"#" + bytes(pixel).hex() for pixel in pixels.reshape(-1, 3)}


def test_the_stages_add_up_to_the_time_to_first_token():
    parts = stage_seconds(ROW)
    assert len(parts) == len(STAGES)
    assert sum(parts) == sum(ROW[key] for key in ("decode_s", "encode_s", "compress_s", "ttft_s"))
    assert sum(stage_seconds(empty_row("full", "timed_out", "late"))) == 0


def test_a_profile_shows_every_stage_and_a_row_that_failed():
    row = ROW | {"peak_memory_bytes": 2**30}
    drawn = colours_of(draw_profile([row, empty_row("full", "out_of_memory", "killed")]))
    assert set(COLOURS[: len(STAGES)]) <= drawn
    without = colours_of(draw_profile([row | {"encode_s": None}]))
    assert COLOURS[STAGES.index("decode")] in without


def make_rows(*budgets):
    rows = [{"method": "full", "label": None, "budget": None, "accuracy": 0.9, "ci_low": None, "ci_high": None}]
    for place, budget in enumerate(budgets):
        figures = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6 + place / 100}
        rows.append({"method": "fre-res", "label": "anchors only", "budget": budget, **figures})
    return rows


def test_an_ablation_has_a_colour_for_each_budget():
    drawn = colours_of(draw_ablation(make_rows(0.25, 0.1)))
    assert set(COLOURS[:3]) <= drawn and COLOURS[3] not in drawn
    assert COLOURS[2] not in colours_of(draw_ablation(make_rows(0.25)))
    assert draw_ablation([row | {"accuracy": None} for row in make_rows(0.25)])


def test_a_plot_is_refused_before_any_work(tmp_path, monkeypatch):
    with fails(2, ".png"):
        PlotFile(tmp_path / "plot.jpg").check()
    (tmp_path / "plot.png").touch()
    with fails(2, "already exists"):
        PlotFile(tmp_path / "plot.png").check()
    PlotFile(tmp_path / "plot.png", force=True).check()
    for verb in (("profile",), ("ablate", "none.jsonl", "-o", tmp_path / "out")):
        check_failure(run_freres(*verb, "--plot", tmp_path / "plot.png"), 2, "already exists")
        check_failure(run_freres(*verb, "--force"), 2, "--plot")
        monkeypatch.setattr("freres_cli.evaluation.plots.find_spec", lambda name: None)
        check_failure(run_freres(*verb, "--plot", tmp_path / "other.png"), 2, "matplotlib")
        monkeypatch.undo()


def test_profile_writes_its_plot(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("freres_cli.workflows.profile.profile", lambda request: [ROW])
    path = tmp_path / "cost.png"
    run = run_freres("profile", clip, "--plot", path)
    assert run.status == 0 and f"plot: {path}" in run.out and path.read_bytes() == draw_profile([ROW])
    assert run_freres("profile", clip, "--plot", path, "--force", "--json").json["plot"] == str(path)


def test_fidelity_is_drawn_over_the_mean_share_of_tokens_and_tells_twenty_methods_apart(monkeypatch):
    """640 tokens are all of a short clip and few of a long one: the mean share is not that of the mean counts."""

    def rows_of(video):
        full = (100, 10_000)[video]
        own = {"visual_tokens": min(640, full), "full_tokens": full, "kept_hold": 0.5, "kept_linear": 0.4}
        own |= {"budget_tokens": 640, "num_frames": 8}
        lost = {f"lost_by_second_{reader}": [0.5] for reader in ("hold", "linear")}
        return [{"method": f"m{n}", "budget": 640, **own, **lost} for n in range(20)]

    videos = [{"video": f"{number}.mp4", "rows": rows_of(number)} for number in range(2)]
    figures, make = [], fidelity_plot.new_figure
    monkeypatch.setattr(fidelity_plot, "new_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    png, notes = fidelity_plot.draw_fidelity(average_rows([video["rows"] for video in videos]), videos)
    kept, *curves = figures[0].axes
    lines = [line for line in kept.get_lines() if line.get_linestyle() == "-"]
    assert len(lines) == 20 and not notes and av.open(io.BytesIO(png), format="png_pipe")
    for line in lines:
        assert line.get_xdata() == pytest.approx([100 * (1 + 0.064) / 2])
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20
    for axes in curves:
        assert len({(own.get_edgecolor(), str(own.get_linestyle())) for own in axes.patches}) == 20
    assert len(figures[0].legends[0].get_texts()) == 20 and all(axes.get_legend() is None for axes in figures[0].axes)


@pytest.mark.parametrize("verb", ["profile", "ablate", "fidelity"])
def test_help_names_the_flag(verb):
    assert "--plot" in run_freres(verb, "--help").out
