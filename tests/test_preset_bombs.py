"""Presets made to exhaust time or memory are refused before anything is built from them."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from freres_cli.errors import ExitStatus
from freres_cli.presets import load_preset, load_settings, parse_assignment
from tests.runner import fails


def nested_aliases(depth: int = 8) -> str:
    """10**depth values in a few hundred bytes."""
    text = "&a0 [x,x,x,x,x,x,x,x,x,x]"
    for level in range(1, depth):
        text = f"&a{level} [{text}," + ",".join([f"*a{level - 1}"] * 9) + "]"
    return f"budget_tokens: {text}\n"


BOMBS = {
    "aliases": nested_aliases(),
    "aliases among keys": "description: &a x\ngrid: *a\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "many short keys": "".join(f"{i}: 1\n" for i in range(2_000)),
    "deep lists": "description: " + "[" * 3000 + "]" * 3000,
    "deep mappings": "description: " + "{a: " * 3000 + "1" + "}" * 3000,
    "a huge number": "budget_tokens: 0x" + "f" * 60_000,
    "a number of sixties": "budget_tokens: 1" + ":1" * 20_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_preset_that_would_exhaust_the_machine_is_refused_at_once(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    start = time.process_time()
    with fails(ExitStatus.USAGE, str(path)) as caught:
        load_preset(str(path))
    seconds = time.process_time() - start
    tracemalloc.start()  # which slows the reading down
    try:
        with fails(ExitStatus.USAGE):
            load_preset(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 2 and peak < 50e6, (seconds, peak)
    assert len(caught.value.message) < len(str(path)) + 300 and "\n" not in caught.value.message


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "&a x", "*a", "0x" + "f" * 5000])
def test_a_value_of_set_has_the_same_limits(value):
    with fails(ExitStatus.USAGE, "--set") as caught:
        parse_assignment(f"budget_tokens={value}")
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("events", "!!bool maybe"),
        ("budget_tokens", '!!int ""'),
        ("tau", '!!float ""'),
        ("budget_tokens", "!!timestamp x"),
        ("grid", "9" * 5000 + "x1"),
    ],
)
def test_a_value_that_yaml_or_python_cannot_read_is_no_bug(tmp_path, key, value):
    (tmp_path / "p.yaml").write_text(f"{key}: {value}\n")
    with fails(2, f"{tmp_path / 'p.yaml'}: "):
        load_preset(str(tmp_path / "p.yaml"))
    with fails(2, "--set"):
        parse_assignment(f"{key}={value}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sample_fps=1e-3", 1e-3),
        ("sample_fps=1e2", 100.0),
        ("tau=2.5e-1", 0.25),
        ("tau=auto", None),
        ("budget_tokens=0100", 100),
        ("budget_tokens= 7 ", 7),
    ],
)
def test_numbers_of_set_are_those_of_flags(text, value):
    assert parse_assignment(text)[1] == value


@pytest.mark.parametrize("text", ["budget_tokens=1:30", "budget_tokens=1e2", "sample_fps=1:30", "budget_tokens=0x10"])
def test_what_only_yaml_takes_for_a_number_is_refused(text):
    with fails(2, "expected a"):
        parse_assignment(text)


@pytest.mark.parametrize(("sample", "key"), [("count", "sample_count"), ("fps", "sample_fps")])
def test_a_sampling_named_without_its_value_does_not_blame_the_preset(sample, key):
    with fails(ExitStatus.USAGE, f"sample: {sample} needs") as caught:
        load_settings("bundled", {"sample": sample})
    assert "bundled" not in caught.value.message and f"{key}=NUMBER" in caught.value.hint
