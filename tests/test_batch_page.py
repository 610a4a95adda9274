"""freres-batch(7): its commands and keys exist, and the figures of its plan follow from those it starts from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from freres_cli import __version__
from freres_cli.workflows.batch_list import SETTINGS, TOP_KEYS
from freres_cli.workflows.batch_process import MOST_ENDS
from freres_cli.workflows.batch_worker import BatchRow
from tests.test_manpages import MAN, options_of, section, tags

NAME = "man7/freres-batch.7"
RESULTS = Path(__file__).parents[1] / "freres_cli" / "bench" / "results"
PLAN = "A MILLION HOURS ON A THOUSAND GPUS"


def result(file: str, part: str) -> dict:
    return json.loads((RESULTS / file).read_text())[part]


def test_commands_use_flags_that_exist() -> None:
    known = {name for option in options_of("batch") for name in option.opts}
    rows = [row for row in section(NAME, "EXAMPLES").splitlines() if row.startswith("freres ")]
    assert len(rows) == 3
    for row in rows:
        assert row.startswith("freres batch ") and set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", row)) <= known


def test_every_key_of_a_line_and_of_a_row_is_there() -> None:
    assert tags(NAME, "KEYS OF A LINE") == list(TOP_KEYS)
    assert tags(NAME, "ROWS") == list(BatchRow("", "", "done").describe())


def test_the_example_list_can_be_read() -> None:
    lines = [json.loads(row) for row in section(NAME, "LISTS").splitlines() if row.startswith("{")]
    assert len(lines) == 3
    assert all(set(line) <= {*TOP_KEYS, *SETTINGS} and "video" in line for line in lines)


def test_the_version_and_the_limit_are_those_of_the_package() -> None:
    assert f'"freres {__version__}"' in (MAN / NAME).read_text(encoding="utf-8")
    assert f"or {MOST_ENDS} workers" in section(NAME, "RESUMING")


def test_the_figures_of_the_plan_follow_from_each_other() -> None:
    text = section(NAME, PLAN)
    frames, tokens, width, patches = 3600, 12 * 6600, 3584, 4 * 24 * 24
    tower = result("pipeline.json", "method")["tower"]
    deep, wide = tower["depth"], tower["embed_dim"]
    per_token = 2 * width + result("batch.json", "storage")["methods"]["adaptive"]["bytes_per_token_beyond_the_latent"]
    linear = 2 * (4 + 2 * tower["mlp_ratio"]) * wide**2 * deep * patches
    merger = 2 * ((4 * wide) ** 2 + 4 * wide * width) * patches / 4
    first = 2 * (3 * 2 * tower["patch_size"] ** 2) * wide * patches
    tflop = (first + linear + 4 * patches**2 * wide * deep + merger) / 1e12
    gpu_s = frames * tflop / 400
    decode = result("pipeline.json", "decode")
    cpu_s = [decode[key]["median"] * 360 for key in ("pyav_decode_only_s", "freres_s")]
    merging_s = result("pipeline.json", "method")["methods"]["adaptive"]["method_s_per_frame"]["median"] * frames
    gpu_merging_s = result("cuda.json", "video")["rows"][0]["compress_s"] / 300 * frames
    run_s = 1e6 * gpu_s / 1000
    shard_s = 2000 / 12 * gpu_s / 8
    said = [
        f"{576 * frames:,} an hour",
        f"{tokens:,} an hour, {576 * frames / tokens:.0f}x",
        f"{per_token:,.0f} bytes",
        f"{tokens * per_token / 1e9:.2f} GB an hour, {tokens * per_token / 1e9:.2f} PB",
        f"{frames * 576 * 2 * width / 1e9:.1f} GB an hour",
        f"{tflop:.2f} TFLOP a frame",
        f"{gpu_s:.1f} s an hour",
        f"{run_s / 3600:.1f} hours. D: {round(run_s, -2):,.0f} s",
        f"{cpu_s[0]:.0f} to {cpu_s[1]:.0f} s an hour",
        f"{cpu_s[0] / gpu_s:.1f} to {cpu_s[1] / gpu_s:.1f}",
        f"{merging_s:.0f} s an hour",
        f"{gpu_merging_s:.0f} s an hour",
        f"{gpu_s + gpu_merging_s:.1f} s an hour, {(gpu_s + gpu_merging_s) / 3.6:.1f} hours",
        f"{(cpu_s[0] + merging_s) / gpu_s:.1f} to {(cpu_s[1] + merging_s) / gpu_s:.1f}",
        f"{0.9e15 / run_s / 1e9:.0f} GB/s",
        f"{tokens * per_token * 1e6 / run_s / 1e9:.0f} GB/s",
        f"needs {shard_s / 60:.0f} minutes",
        f"reads {2000 / 12 * 0.9:.0f} GB and writes {2000 * 6600 * per_token / 1e9:.0f} GB",
        f"that is {60 / shard_s:.0%}".replace("%", " %"),
    ]
    assert [words for words in said if words not in text] == []


def test_the_kill_test_is_the_one_that_was_measured() -> None:
    kills = result("batch.json", "kills")
    text = section(NAME, "RESUMING")
    assert sum(kills["kills"].values()) >= 50
    assert f"{kills['kills']['worker']} times a worker and {kills['kills']['driver']} times the driver" in text
    for found in ("missing", "broken", "replaced", "made_twice"):
        assert kills[found] == 0


@pytest.mark.parametrize("source", ["M", "A", "D"])
def test_every_figure_says_where_it_comes_from(source: str) -> None:
    rows = section(NAME, PLAN).split(".TP\n")[1:]
    assert len(rows) >= 15
    assert all(re.search(r"(\. |, | and 72 bytes, )[MAD]( \(|:|\.|$)", row.split("\n.PP")[0].strip()) for row in rows)
    assert any(re.search(rf"\b{source}[ :.]", row) for row in rows)


def test_the_speed_is_the_one_that_was_measured() -> None:
    actors = result("batch.json", "actors")
    ratio, cpu = actors["two_over_one"], actors["cpu_s_per_video_with_start"]
    text = section(NAME, "SPEED")
    assert f"{ratio['min']:.2f} to {ratio['max']:.2f} times" in text and f"median {ratio['median']:.2f}" in text
    assert f"{cpu['1']['median']:.2f} s with one worker and {cpu['2']['median']:.2f} s with two" in text
