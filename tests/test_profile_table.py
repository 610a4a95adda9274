"""``freres profile --table``: prompts of exactly the paper's length, tokens where each method puts them, every row a row."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from freres_cli.backbones.sizes import measure_decoder
from freres_cli.baselines.registry import METHODS
from freres_cli.bench import tables
from freres_cli.bench.latents import MadeLatents
from freres_cli.bench.tables import DENSE_30FPS, CostRow, CostTable
from freres_cli.cli.profile_table import print_cost_table
from freres_cli.devices import choose_device
from freres_cli.errors import BackboneError
from freres_cli.pipeline.made_clip import MADE_WIDTH, fill_tokens, fit_prompt, place_made_tokens
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.session import Session
from freres_cli.presets import load_settings
from freres_cli.records import nearest_frames
from freres_cli.workflows import profile_table
from freres_cli.workflows.profile_table import TableRequest, find_floor, measure_table_row
from tests.family_contract import one_thread  # noqa: F401
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES

QUESTION = "What happens in the video?"
# Four seconds on a small grid: the whole table in the shape of the paper's.
SMALL = CostTable(
    "small",
    "dense-30fps",
    num_frames=120,
    fps=30.0,
    grid=(8, 8),
    rows=(
        CostRow("full", "full", 7680, 7702, {"ttft_s": None, "peak_memory_gb": None}),
        CostRow("uniform", "uniform", 256, 278, {"ttft_s": 1.0, "peak_memory_gb": 2.0}),
        CostRow("fourier", "fourier", 960, 2200),
        CostRow("fre-res", "fre-res", 1536, 1558),
        CostRow("adaptive", "adaptive", 1536, 1558),
    ),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Qwen3-VL without weights: it writes the time before every frame, and adds rows to visual tokens."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    next(case for case in FAMILY_CASES if case.name == "qwen3_vl").make(folder)
    (folder / "model.safetensors").unlink()
    return ModelSource(str(folder), choose_device("cpu"), is_random=True)


@pytest.fixture(scope="module")
def model(source):
    return Models(source).language_model


def request_of(source, table=SMALL, **more):
    return TableRequest(source.device, QUESTION, 1, 0, 2, 60.0, model=source, table=table, **more)


def test_the_table_is_the_papers():
    paper = {row.name: row for row in DENSE_30FPS.rows}
    assert paper["full"].budget_tokens == DENSE_30FPS.full_tokens == 1800 * 576
    assert paper["uniform 1 fps"].budget_tokens == 60 * 576
    assert 8 * paper["fourier 8x"].budget_tokens == DENSE_30FPS.full_tokens
    preset = load_settings(DENSE_30FPS.preset, {})
    assert paper["fre-res"].budget_tokens == paper["adaptive"].budget_tokens == preset.budget_tokens
    assert preset.grid == "{}x{}".format(*DENSE_30FPS.grid) and preset.sample_fps == DENSE_30FPS.fps
    assert all(row.context_tokens == row.budget_tokens + 22 and row.method in METHODS for row in paper.values())


@pytest.mark.parametrize("row", SMALL.rows, ids=lambda row: row.name)
def test_a_prompt_has_exactly_the_length_of_its_row_as_freres_would_run_it(model, row):
    placed = place_made_tokens(SMALL, row)
    assert len(placed) == row.budget_tokens and placed.grid == (120, 8, 8)
    tokens, text_tokens = fit_prompt(placed, model, QUESTION, row.context_tokens)
    session = Session(model, fill_tokens(tokens, model.width, model.num_deep_layers, model.dtype), 7680, "max", 0.0)
    # The session finds them where it would have put them, so the text is that of its own prompt.
    assert session.moves is None and torch.equal(session.tokens.positions, tokens.positions)
    ids = model.prompt(QUESTION)
    rows = len(model.splice(ids.prefix, session.tokens)) + len(ids.suffix)
    assert rows == len(tokens) + text_tokens
    assert rows == row.context_tokens
    frames = nearest_frames(tokens.positions[:, 0], 120)
    assert text_tokens == len(ids.prefix) + len(ids.suffix) + int(model.text_per_frame(tokens)[frames.unique()].sum())


@pytest.mark.parametrize("row", SMALL.rows[1:3], ids=lambda row: row.name)
def test_tokens_are_where_the_method_puts_them_at_any_width(row):
    latents = MadeLatents(120, (8, 8), MADE_WIDTH).frames(0, 120)
    seconds = torch.arange(120, dtype=torch.float64) / 30
    wider = METHODS[row.method].compress(torch.cat([latents] * 3, dim=-1), seconds, row.budget_tokens, 3 * MADE_WIDTH)
    assert torch.equal(place_made_tokens(SMALL, row).positions, wider.positions)


def test_a_prompt_is_no_longer_than_its_tokens_make_it(model):
    placed = place_made_tokens(SMALL, SMALL.rows[1])
    tokens, text_tokens = fit_prompt(placed, model, QUESTION, 5000)
    assert len(tokens) == len(placed) and len(tokens) + text_tokens < 5000


def test_a_prompt_without_room_for_its_own_text_is_refused(model):
    with pytest.raises(BackboneError, match="leaves room for 0"):
        fit_prompt(place_made_tokens(SMALL, SMALL.rows[0]), model, QUESTION, 100)


def test_a_measured_row_has_the_length_of_the_paper_and_says_what_it_is(source):
    row = measure_table_row(request_of(source), SMALL.rows[3])
    assert row["status"] == "ok" and row["context_tokens"] == 1558 == row["visual_tokens"] + row["text_tokens"]
    assert row["ttft_s"] >= row["prefill_s"] > 0 and row["flops_per_s"] > 0 and row["full_tokens"] == 7680
    assert row["message"] is None
    small = replace(SMALL, rows=(replace(SMALL.rows[0], context_tokens=5000),))
    beyond = measure_table_row(request_of(source, small), small.rows[0])
    assert beyond["context_tokens"] == 5000 and "beyond the model's context of 4096" in beyond["message"]


def test_the_floor_is_what_no_prefill_can_save(model):
    sizes = measure_decoder(model)
    floor = find_floor(sizes, 1558, torch.bfloat16, 1e12)
    assert floor["ttft_s"] == floor["flops"] / 1e12
    # One pass over everything, with what it masks left out: half of the pairs of rows, and half of the diagonal.
    whole = sizes.prefill_flops(1558, 1558)
    assert whole - floor["flops"] == sizes.pair_flops * (1558**2 - 1558) // 2
    weights = sum(parameter.numel() for parameter in model.half.parameters())
    assert floor["memory_bytes"] == 2 * weights + 1558 * model.kv_bytes_per_token * 2 // model.dtype.itemsize
    assert find_floor(sizes, 1558, torch.bfloat16, None)["ttft_s"] is None


def _killed(connection, request, name):
    os.kill(os.getpid(), signal.SIGKILL)


def test_rows_that_cannot_run_are_rows_beside_the_papers(source, monkeypatch):
    def total(device):
        return 2**20  # room for the short prompts

    monkeypatch.setattr(profile_table, "total_memory_bytes", total)
    monkeypatch.setattr(profile_table, "run_table_row", _killed)
    seen = []
    rows = profile_table.profile_table(request_of(source, replace(SMALL, rows=SMALL.rows[:2])), seen.append)
    assert [row["name"] for row in rows] == [row["name"] for row in seen] == ["full", "uniform"]
    assert [row["status"] for row in rows] == ["out_of_memory"] * 2
    assert "not tried" in rows[0]["message"] and "killed" in rows[1]["message"]
    assert [row["context_tokens"] for row in rows] == [7702, 278] and rows[1]["ttft_s"] is None
    assert rows[0]["paper"]["status"] == "out_of_memory" and rows[1]["paper"]["ttft_s"] == 1.0
    assert all(row["floor"]["memory_bytes"] > 0 and row["floor"]["ttft_s"] is None for row in rows)


@pytest.mark.slow
def test_the_command_prints_every_row_and_leaves_nothing(source, monkeypatch, tmp_path):
    monkeypatch.setitem(tables.TABLES, "small", SMALL)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    flags = ("--table", "small", "--weights", "random", "--model", source.name, "--device", "cpu", "--repeat", 1)
    document = run_freres("profile", *flags, "--warmup", 0, "--max-new-tokens", 2, "--json").json
    assert (document["schema"], document["target"], document["weights"]) == (
        "freres.profile/1",
        "table small",
        "random",
    )
    assert any("drawn at random" in note for note in document["notes"]) and document["environment"]["device"] == "cpu"
    assert [row["name"] for row in document["rows"]] == [row.name for row in SMALL.rows]
    for row in document["rows"]:
        assert row["status"] == "ok" and row["spread"]["ttft_s"]["min"] <= row["ttft_s"], row
        # No prefill is faster than its arithmetic; a busy machine may have slowed the measure of its speed.
        assert row["ttft_s"] > row["floor"]["ttft_s"] / 2 and row["peak_memory_bytes"] > row["floor"]["memory_bytes"]
    monkeypatch.setattr(profile_table, "profile_table", lambda request: document["rows"])
    printed = run_freres("profile", *flags)
    assert printed.status == 0 and "arXiv" in printed.out and all(row.name in printed.out for row in SMALL.rows)
    assert not list(tmp_path.iterdir())


def test_memory_stands_beside_the_papers_in_one_unit(source, monkeypatch, capsys):
    paper = {"status": "ok", "ttft_s": 1.0, "peak_memory_gb": 22.4}
    row = {"name": "a", "status": "ok", "message": None, "context_tokens": 9, "text_tokens": 1, "prefill_s": 1.0}
    row |= {
        "ttft_s": 1.0,
        "peak_memory_bytes": 24.4e9,
        "floor": {"ttft_s": 1.0, "memory_bytes": 23.2e9},
        "paper": paper,
    }
    monkeypatch.setattr(profile_table, "profile_table", lambda request: [row])
    print_cost_table(request_of(source, SMALL), {}, json=False)
    shown = capsys.readouterr().out
    assert "24.40 GB  23.20 GB  22.40 GB" in shown and "GiB" not in shown and "10^9" in shown


def test_a_table_has_its_own_clip(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"")
    for flags, name in (((clip,), "BUNDLE|VIDEO"), (("--budget", 5), "--budget"), (("--plot", "a.png"), "--plot")):
        check_failure(run_freres("profile", *flags, "--table", "dense-30fps"), 2, f"expected no {name}")
    check_failure(run_freres("profile", "--table", "dense", "--device", "cpu"), 2, "expected one of dense-30fps")
