"""freres-benchmarks(7): its commands can be run, and it names every benchmark, file, folder and task of the readers."""

from __future__ import annotations

import re

from freres_cli import __version__
from freres_cli.evaluation.readers.mvbench import FOLDERS
from freres_cli.evaluation.readers.registry import BENCHMARKS
from freres_cli.presets import load_preset
from tests.test_manpages import COMMANDS, MAN, options_of, section, tags

NAME = "man7/freres-benchmarks.7"
# Of the paper's Table 1; how many of MVBench's tasks each column averages.
COLUMNS = {"Action": 5, "Object": 3, "Position": 2, "Scene": 1, "Count": 2}
COLUMNS |= {"Attribute": 2, "Pose": 1, "Character": 1, "Cognition": 3}


def commands() -> list[list[str]]:
    text = "".join(
        section(NAME, heading) for heading in ("EXAMPLES", "TABLE 1", "TABLE 2", "WHAT DIFFERS FROM THE PAPER")
    )
    return [row.split() for row in text.splitlines() if re.match(r"freres (eval|train|doctor)( [A-Za-z]|$)", row)]


def value(command: list[str], flag: str) -> str | None:
    return command[command.index(flag) + 1] if flag in command else None


def test_commands_use_flags_presets_methods_and_benchmarks_that_exist() -> None:
    from freres_cli.baselines.registry import METHODS

    assert len(commands()) == 16
    for command in commands():
        known = {name for option in options_of(command[1]) for name in option.opts}
        assert {word for word in command if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= known, command
        assert command[1] in COMMANDS
        if (preset := value(command, "--preset")) is not None:
            assert load_preset(preset).name == preset
        assert set((value(command, "--methods") or "full").split(",")) <= set(METHODS)
        named, _, part = (value(command, "--benchmark") or "mvbench").partition(":")
        assert named in BENCHMARKS and (not part or part in BENCHMARKS[named].parts)


def test_the_budget_of_a_table_is_that_of_its_preset() -> None:
    tables = [command for command in commands() if "-o" in command and command[1] == "eval"]
    assert len(tables) == 11
    for command in tables:
        preset = load_preset(value(command, "--preset") or "")
        assert value(command, "--budgets") == str(preset.values["budget_tokens"])


def test_every_benchmark_has_its_layout() -> None:
    assert tags(NAME, "LAYOUTS") == list(BENCHMARKS)
    text = section(NAME, "LAYOUTS")
    marks = [mark for own in BENCHMARKS.values() for mark in own.marks[0]]
    assert [mark for mark in marks if mark not in text] == []
    assert [own[0] for own in FOLDERS.values() if own[0] not in text] == []
    for own in BENCHMARKS.values():
        assert all(part in text for part in own.parts) or own.name == "mvbench"


def test_the_columns_of_table_1_hold_every_task_once() -> None:
    table = section(NAME, "TABLE 1").rpartition(".nf\n")[2].partition(".fi")[0].split()
    columns: dict[str, list[str]] = {}
    for word in table:
        if word[0].isupper():
            columns[word] = []
        else:
            columns[list(columns)[-1]].append(word)
    assert {name: len(tasks) for name, tasks in columns.items()} == COLUMNS
    assert sorted(task for tasks in columns.values() for task in tasks) == sorted(FOLDERS)


def test_the_version_is_that_of_the_package() -> None:
    assert f'"freres {__version__}"' in (MAN / NAME).read_text(encoding="utf-8")
