"""freres-speed(7) and the README's table of what makes freres faster: flags exist, figures are the committed ones."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from freres_cli import __version__
from freres_cli.presets import KEYS
from tests.test_manpages import COMMANDS, MAN, options_of, read, section
from tests.test_readme_tables import Part, plain, read_part, tables_after

NAME = "man7/freres-speed.7"
ROWS = {row[0]: row[1:] for row in tables_after("**Faster and smaller, on request.**")[0][1:]}
STILL = {(row["clip"], row["method"], *row["settings"].items()): row for row in read_part("pipeline", "still")["rows"]}


def changes(part: str, level: str, name: str, minus: str) -> list[str]:
    """Points at a quarter and at a tenth, from one set of questions in ``speed.json``."""
    own = Part.__new__(Part)
    own.differences = {
        (d["method"], d["minus"], d["budget"]): d for d in read_part("speed", part)["sets"][level]["differences"]
    }
    return [own.difference(name, minus, budget) for budget in (0.25, 0.1)]


def of_the_time(clip: str, **settings: int) -> str:
    [whole] = [row for key, row in STILL.items() if key == (clip, "adaptive")]
    row = STILL[clip, "adaptive", *settings.items()]
    return f"{row['timings_s']['encode'] / whole['timings_s']['encode']:.2f}x"


def times_as_fast(part: Any, lever: str, key: str, **which: Any) -> dict[str, float]:
    [row] = [row for row in part["rows"] if row["lever"] == lever and which.items() <= row.items()]
    return row[key]


def test_commands_use_flags_and_settings_that_exist() -> None:
    lines = [row for row in section(NAME, "EXAMPLES").splitlines() if row.startswith("freres ")]
    assert len(lines) == 6
    for line in lines:
        known = {name for option in options_of(line.split()[1]) for name in option.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line)) <= known, line
    known = {name for verb in COMMANDS for option in options_of(verb) for name in option.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", read(NAME))) <= known
    named = set(re.findall(r"(?:--set )(\w+)=", read(NAME) + " ".join(ROWS)))
    assert named == {"still_levels", "line_levels"} <= set(KEYS)


@pytest.mark.parametrize(
    ("row", "settings"),
    [("`--set still_levels=2`", {"still_levels": 2}), ("`--set line_levels=16`, for `adaptive`", {"line_levels": 16})],
)
def test_frames_that_are_skipped_where_little_moves(row: str, settings: dict[str, int]) -> None:
    figures = [of_the_time(clip, **settings) for clip in ("slides", "still camera")]
    assert re.findall(r"[\d.]+x", ROWS[row][1]) == figures
    about = read(NAME).partition(f"--set {next(iter(settings))}={settings[next(iter(settings))]}")[2][:700]
    for clip, figure in zip(("slides", "still camera"), figures, strict=True):
        kept = STILL[clip, "adaptive", *settings.items()]
        assert kept["kept_hold"] >= 0.999
        assert f"{100 * kept['share_skipped']:.0f} %" in about and figure in about


def test_frames_that_are_skipped_where_things_move() -> None:
    speed = read_part("speed", "lines")["speed"]
    ratio = times_as_fast(speed, "line_levels 48", "times_as_fast_in_cpu_time")
    wanted = "0.{:.0f}x of the CPU time from file to first token (0.{:.0f} to 0.{:.0f})".format(
        *(100 / ratio[key] for key in ("median", "max", "min"))
    )
    rows = {levels: ROWS[f"`--set line_levels={levels}`, for `adaptive`"] for levels in (16, 48)}
    assert wanted in rows[48][1] and wanted in read(NAME)
    for level, levels in itertools.product(("l1", "l3"), rows):
        figures = [plain(figure) for figure in changes("lines", level, f"line_levels {levels}", "every frame")]
        assert " and ".join(figures) in plain(rows[levels][2]), (level, levels)
        assert all(figure in plain(read(NAME)) for figure in figures), (level, levels)
    lost = [plain(figure) for figure in changes("lines", "l1", "every frame", "2.67 frames a second")]
    first, second = (figure.partition(" (") for figure in lost)
    assert f"loses {first[0]} points ({first[2]} at a quarter and {second[0]} ({second[2]} at a tenth" in read(NAME)


def test_half_the_grid() -> None:
    [minute] = [row for row in read_part("speed", "levers")["rows"] if is_minute(row, "residual_grid half")]
    faster = minute["times_as_fast"]
    gain, changed = ROWS["`--method fre-res --residual-grid half`"][1:]
    ends = faster["median"], faster["min"], faster["max"]
    assert f"{1 / ends[0]:.2f}x of the time" in gain and "{:.1f} times as fast, {:.1f} to {:.1f}".format(*ends) in gain
    assert "{:.1f} times as fast from file to first token ({:.1f} to {:.1f})".format(*ends) in read(NAME)
    for level in ("l1", "l3"):
        figures = changes("grids", level, "residual_grid half", "residual_grid full")
        assert "{} and {}".format(*map(plain, figures)) in plain(changed), level
        assert all(point in read(NAME).replace(" points", "") for point in figures), level
    assert "{} and {}".format(*changes("grids", "l3", "residual_grid 4x4", "residual_grid full")) in read(NAME)


def is_minute(row: dict[str, Any], lever: str) -> bool:
    return (row["num_frames"], row["clip"], row["grid"], row["lever"]) == (1800, "moving", "12x12", lever)


def test_memory_of_the_decoder() -> None:
    part = read_part("quantized", "quantized")
    row, weights = part["kv_bytes_per_token"], part["decoder_weight_bytes"]
    gain = ROWS["`--kv-dtype int8` (or `fp8`)"][1]
    assert f"{100 * row['kv int8'] / row['float32']:.0f} % of float32" in gain
    slower = [
        part["decoding"][f"{kind}_after_{rows}_rows"]["cpu_s"]["this_over_other"]["median"]
        for kind in ("int8", "fp8")
        for rows in (1000, 4000)
    ]
    first = "{:.1f} times as long after 1,000 rows and {:.1f} times after 4,000"
    assert f"{first} (fp8: {{:.1f}} and {{:.1f}})".format(*slower) in gain
    assert f"{first}; with fp8, {{:.1f}} and {{:.1f}} times".format(*slower) in read(NAME)
    share = weights["weights int8"] / weights["float32"]
    assert f"{100 * share:.0f} % of the memory of float32" in ROWS["`--weight-dtype int8` (or `fp8`)"][1]


def test_the_page_belongs_to_this_release() -> None:
    assert f'"freres {__version__}"' in (MAN / NAME).read_text(encoding="utf-8")
